"""Real textures with synthetic defects and exact masks, for tests and first experiments.

Brick, grass and gravel are images (CC0) of scikit-image, 512 x 512 grey pixels each. Training
images are crops of the left half, test images of the right half, so that they share no pixels.
Defects are painted: dark cracks, soft stains and patches of the inverted texture. A mask marks
exactly the painted pixels. Results show that a method works, but do not predict its accuracy on
real defects.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastflow_jax.data.dataset import GOOD, DataConfig, Dataset, Source, check_choice
from fastflow_jax.data.transforms import decode_image, read_file
from fastflow_jax.errors import InputError

CATEGORIES = ("brick", "grass", "gravel")


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the texture `config.category`: brick, grass or gravel.

    Raises:
        InputError: an unknown texture, or scikit-image is not installed.
    """
    return paint_dataset(config.category)


def paint_dataset(
    category: str | None,
    *,
    side: int = 128,
    train: int = 64,
    good: int = 24,
    defective: int = 48,
    seed: int = 0,
) -> Dataset:
    """Returns a data set of square crops, determined by the arguments.

    Args:
        category: "brick", "grass" or "gravel".
        side: side of the crops in pixels, at most 256.
        train: number of training images.
        good: number of test images without a defect.
        defective: number of test images with a defect, of the three kinds in turn.
        seed: seed of the positions of crops and defects.

    Raises:
        InputError: an unknown texture, or scikit-image is not installed.
    """
    category = check_choice("data.category", category, CATEGORIES)
    texture = _read_texture(category)  # [512, 512]
    left, right = np.split(texture, 2, axis=1)
    kinds = [GOOD] * good + [list(DEFECTS)[i % len(DEFECTS)] for i in range(defective)]
    return Dataset(
        f"{category}_synth",
        _source(left, [GOOD] * train, side, (seed, 0)),
        _source(right, kinds, side, (seed, 1)),
        {
            "source": f"scikit-image, {category}.png (CC0)",
            "category": category,
            "note": "defects are painted",
            "seed": seed,
            "train_images": train,
            "test_images": good + defective,
        },
    )


def _source(texture: np.ndarray, defects: list[str], side: int, seed: tuple[int, int]) -> Source:
    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((*seed, index))
        image = crop(rng, texture, side)
        mask = np.zeros(image.shape, bool)
        if defects[index] != GOOD:
            image, mask = DEFECTS[defects[index]](rng, image)
        return np.repeat(image[..., None], 3, axis=-1), mask

    names = tuple(f"{defect}/{i:03}.png" for i, defect in enumerate(defects))
    return Source(names, tuple(defects), load)


def _read_texture(category: str) -> np.ndarray:
    package = importlib.util.find_spec("skimage")  # importing it would take a second
    if package is None or not package.submodule_search_locations:
        raise InputError(
            "The synthetic data sets use textures of scikit-image, which is not installed. Run pip "
            "install scikit-image."
        )
    path = Path(package.submodule_search_locations[0], "data", f"{category}.png")
    return decode_image(read_file(path), str(path))[..., 0]


def crop(rng: np.random.Generator, texture: np.ndarray, side: int) -> np.ndarray:
    """Returns a random square of an image [H, W] or [H, W, 3]."""
    top, left = (rng.integers(0, n - side, endpoint=True) for n in texture.shape[:2])
    return texture[top : top + side, left : left + side]


def paint_crack(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paints a dark polyline; returns the image, uint8 [H, W], and its mask, bool [H, W]."""
    side = len(image)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.5, 8))
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=1) * side / 12
    path = np.cumsum(steps, axis=0)
    path += side / 2 - path.mean(axis=0) + rng.uniform(-side / 6, side / 6, 2)
    canvas = Image.new("1", (side, side))
    ImageDraw.Draw(canvas).line([tuple(point) for point in path], fill=1, width=max(2, side // 48))
    mask = np.asarray(canvas)
    return np.where(mask, image // 4, image), mask


def paint_stain(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paints an ellipse, darker or brighter towards its centre; returns image and mask."""
    side = len(image)
    centre = rng.uniform(side / 4, 3 * side / 4, 2)
    radii = rng.uniform(side / 12, side / 5, 2)
    ys, xs = np.mgrid[:side, :side]
    distance = np.hypot((ys - centre[0]) / radii[0], (xs - centre[1]) / radii[1])
    mask = distance < 1
    target = rng.choice([0.0, 255.0])
    weight = 0.7 * np.sqrt(np.clip(1 - distance, 0, 1))
    stained = np.round(image + weight * (target - image)).astype(np.uint8)
    return np.where(mask, stained, image), mask


def paint_patch(rng: np.random.Generator, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotates a square by 90 degrees and inverts its grey levels; returns image and mask."""
    side = len(image)
    edge = int(rng.integers(side // 8, side // 4, endpoint=True))
    top, left = rng.integers(0, side - edge, 2, endpoint=True)
    square = np.s_[top : top + edge, left : left + edge]
    mask = np.zeros(image.shape, bool)
    mask[square] = True
    patched = image.copy()
    patched[square] = 255 - np.rot90(image[square])
    return patched, mask


Painter = Callable[[np.random.Generator, np.ndarray], tuple[np.ndarray, np.ndarray]]
DEFECTS: dict[str, Painter] = {"crack": paint_crack, "stain": paint_stain, "patch": paint_patch}
