"""Made-up images, and the arguments of a detector that trains on them in a second."""

import pathlib

import numpy as np
from PIL import Image

EPOCHS = 4


def write_images(root: pathlib.Path, *, train: int = 16, test: int = 3, seed: int = 0) -> None:
    """Writes a data set in the layout of docs/data.md: noise, with a bright square as defect."""
    rng, size = np.random.default_rng(seed), 32

    def image() -> np.ndarray:
        stripes = 128 + 30 * np.sin(np.arange(size) / 3)[None, :, None]
        return (stripes + rng.normal(0, 8, (size, size, 3))).clip(0, 255).astype(np.uint8)

    def save(part: str, i: int, pixels: np.ndarray, suffix: str = "") -> None:
        file = root / part / f"{i:03}{suffix}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)

    for i in range(train):
        save("train/good", i, image())
    for i in range(test):
        save("test/good", i, image())
        defective, mask = image(), np.zeros((size, size), np.uint8)
        defective[8:20, 4 * i : 12 + 4 * i] = 255
        mask[8:20, 4 * i : 12 + 4 * i] = 255
        save("test/square", i, defective)
        save("ground_truth/square", i, mask, "_mask")


def arguments(root: pathlib.Path, *more: str) -> list[str]:
    """Arguments of the training of a tiny FastFlow on the images of a directory."""
    return [
        "train",
        *("--config=folder", f"--config.data.root={root}"),
        *("--config.detector=fastflow", "--config.backbone=pixels", "--config.weights=random"),
        *("--config.image_size=32", "--config.flow.steps=1", "--config.flow.kernels=(3,)"),
        *("--config.map.bank=8", "--config.batch_size=4", "--config.train.batch_size=4"),
        *(f"--config.train.epochs={EPOCHS}", "--config.checkpoint_every=1", "--config.heatmaps=1"),
        *("--config.audit=0", "--config.report_pictures=1"),
        *more,
    ]
