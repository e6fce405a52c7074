"""Speed of our backbones compared with timm's in torch, on the same weights and images.

    pip install -e '.[bench]' && pip install torch==2.13.0
    pip install --no-deps timm==1.0.31 torchvision==0.28.0

    python benchmarks/backbones.py --quick
    python benchmarks/backbones.py --out backbones.json
    python benchmarks/backbones.py --backbones cait_m48_448 --batches 1 --repeats 3

Both sides compute the feature maps of FastFlow and nothing after them, from the same random
weights, and are checked to agree. They take turns, so that other load affects both. timm runs in
inference mode and in its faster memory format, plain or channels last. On a GPU both run in float32
and bfloat16, and every run is synchronised.

Each line `ratio <name> <number>` is timm's median seconds over ours: above 1, ours is faster.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import torch
import torchvision_operators  # noqa: F401
from outcome import describe_machine, ratios, versions, write_result

# isort: split
import timm

from fastflow_jax.backbones import Backbone, create_backbone

FAMILIES = (
    "resnet18",
    "wide_resnet50_2",
    "tf_efficientnet_lite0",
    "deit_base_distilled_patch16_384",
    "cait_xxs24_224",
)
QUICK = ("resnet18", "tf_efficientnet_lite0", "deit_tiny_distilled_patch16_224", "cait_xxs24_224")


class Peer(torch.nn.Module):
    """timm's model up to the last layer; images [B, 3, H, W] -> maps [B, C, h, w]."""

    def __init__(self, name: str, layers: tuple[str, ...]):
        super().__init__()
        self.model = timm.create_model(name, pretrained=False).eval()
        if name.startswith(("vit", "deit", "cait")):
            self.indices = [int(layer.rpartition(".")[2]) for layer in layers]
            return
        modules = [info["module"] for info in self.model.feature_info]
        self.indices = [modules.index(layer) for layer in layers]

    def forward(self, images):
        """Returns the maps; tokens of transformers pass through the model's norm."""
        maps = self.model.forward_intermediates(
            images, indices=self.indices, norm=True, stop_early=True, intermediates_only=True
        )
        return [m[0] if isinstance(m, tuple) else m for m in maps]


def seconds_of(run: Callable[[], None]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def build(name: str, dtype: str) -> tuple[Backbone, Peer]:
    """Our backbone and timm's model with the same random weights."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, f"{name}.safetensors")
        torch.manual_seed(0)
        peer = Peer(name, create_backbone(name, weights="random").layers)
        state = {k: v.numpy() for k, v in peer.model.state_dict().items()}
        safetensors.numpy.save_file(state, file)
        return create_backbone(name, weights=str(file), dtype=getattr(jnp, dtype)), peer


def largest_difference(ours, theirs) -> float:
    """Largest difference of two sets of feature maps as a share of the largest feature."""
    error = 0.0
    for one, two in zip(ours, theirs, strict=True):
        two = two.permute(0, 2, 3, 1).float().cpu().numpy()
        error = max(error, float(np.abs(np.asarray(one) - two).max() / np.abs(two).max()))
    return error


def compare(name: str, batch: int, dtype: str, repeats: int, device: str) -> dict:
    """Median seconds of both sides for one batch, measured in turns after warm-up."""
    ours, peer = build(name, dtype)
    height, width = ours.spec.image_size
    images = np.random.default_rng(0).standard_normal((batch, height, width, 3), np.float32)
    on_device = jax.device_put(images)
    formats = {
        "plain": torch.contiguous_format,
        "channels last": torch.channels_last,
    }
    peer = peer.to(device, getattr(torch, dtype))
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, getattr(torch, dtype))

    def run_ours():
        return jax.block_until_ready(ours(on_device))

    def runner(memory_format):
        model = peer.to(memory_format=memory_format)
        tensor = theirs.contiguous(memory_format=memory_format)

        def run():
            with torch.inference_mode():
                maps = model(tensor)
            if device != "cpu":
                torch.cuda.synchronize()
            return maps

        return run

    ours_maps = run_ours()
    trials = {}
    for kind, memory_format in formats.items():
        run = runner(memory_format)
        their_maps = run()
        trials[kind] = min(seconds_of(run) for _ in range(2))
    kind = min(trials, key=trials.get)
    run_theirs = runner(formats[kind])

    error = largest_difference(ours_maps, their_maps)
    if error > (1e-3 if dtype == "float32" else 0.1):
        sys.exit(f"{name}: feature maps differ from timm's by {error:.1e} of the largest feature")

    run_ours(), run_theirs()
    times = [(seconds_of(run_ours), seconds_of(run_theirs)) for _ in range(repeats)]
    our_median, their_median = (statistics.median(side) for side in zip(*times, strict=True))
    return {
        "backbone": name,
        "input": [height, width],
        "layers": list(ours.layers),
        "batch": batch,
        "dtype": dtype,
        "ours_seconds": our_median,
        "timm_seconds": their_median,
        "timm_memory_format": kind,
        "difference": error,
        "ratio": their_median / our_median,
    }


def main() -> None:
    """Compares all, prints a line each and the ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", help="timm's names")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--quick", action="store_true", help="small models only, under five minutes"
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()

    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    device, dtypes = ("cuda", ["float32", "bfloat16"]) if on_gpu else ("cpu", ["float32"])
    names = args.backbones or (QUICK if args.quick else FAMILIES)
    rows = []
    with ratios() as found:
        for name in names:
            for dtype in dtypes:
                for batch in args.batches:
                    row = compare(name, batch, dtype, 5 if args.quick else args.repeats, device)
                    rows.append(row)
                    found[f"{name}_{dtype}_batch{batch}"] = row["ratio"]
                    print(
                        f"{name} {dtype} batch {batch}: ours {row['ours_seconds'] * 1e3:.1f} ms, "
                        f"timm {row['timm_seconds'] * 1e3:.1f} ms ({row['timm_memory_format']})",
                        flush=True,
                    )
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(jax.devices()[0].device_kind if on_gpu else None),
        "versions": versions("jax", "torch", "timm"),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
