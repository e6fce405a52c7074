"""Time per image of each detector on the backbones of the paper.

    python benchmarks/detectors.py --quick
    python benchmarks/detectors.py --out detectors.json
    python benchmarks/detectors.py --backbones wide_resnet50_2 --batches 1 16

The paper (arXiv 2111.07677) reports FastFlow as 10 times as fast as SPADE, twice as fast as
PatchCore and 1.5 times as fast as CFLOW. This measures milliseconds per image of the backbone (from
pixels to float32 maps) and of each detector (from maps to score and anomaly map), separately and on
all cores:

    fastflow_published  the published form (`configs/reference.py`)
    fastflow            the default recipe
    patchcore           10,000 points of 1,024 numbers, `config.patchcore.max_points`
    spade               the nearest of 200 stored training images, `--stored`
    cflow               8 steps per map

All use the maps of the published form, layer1 to layer3 of a ResNet and one block of a transformer;
SPADE uses the last of several for the image vector only. Rows that end in `_own_maps` use the maps
that the method takes by default, as in `configs/compare.py`, and the backbone runs as far as these
need.

Nothing is trained: weights, banks, galleries and features are random, since the cost of scoring
depends on their shapes only. No coreset is computed; a bank of the same size is drawn.

Each line `ratio <detector>_<backbone> <number>` is that detector's milliseconds over those of
`fastflow_published`, both with the backbone: above 1, FastFlow is faster. Names that end in
`_alone` exclude the backbone. For batches above 1 the name includes the size.
"""

import argparse
import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from costs import median_seconds
from outcome import describe_machine, ratios, versions, write_result
from same_weights import published
from tqdm import tqdm

from fastflow_jax.backbones import create_backbone, find_spec
from fastflow_jax.config import default, fill
from fastflow_jax.detectors import cflow
from fastflow_jax.detectors.base import recipe
from fastflow_jax.detectors.fastflow.scorer import calibrated, objective, with_banks
from fastflow_jax.detectors.patchcore import PatchCoreScorer
from fastflow_jax.detectors.spade import SpadeScorer
from fastflow_jax.features.extract import Features, cached_features, extractor

BACKBONES = ("resnet18", "wide_resnet50_2", "cait_m48_448")
QUICK = BACKBONES[:2]
PUBLISHED = "fastflow_published"
DETECTORS = ("fastflow", "patchcore", "spade", "cflow")
COLUMNS = ("backbone", "detector", "maps", "batch", "backbone, ms", "detector, ms", "both, ms")


def configurations(backbone: str, batch: int, side: int | None = None) -> dict:
    """Filled configurations by row name; `_own_maps` rows only if the maps differ."""

    def filled(detector, layers):
        c = default()
        c.update(recipe(detector))
        c.backbone, c.layers, c.batch_size = backbone, layers, batch
        return fill(c)

    reference = published(backbone, batch)
    found = {PUBLISHED: reference}
    for detector in DETECTORS:
        found[detector] = filled(detector, reference.layers)
        own = filled(detector, None)
        if own.layers != reference.layers:
            found[f"{detector}_own_maps"] = own
    for config in found.values() if side else ():
        config.image_size = (side, side)
    return found


def random_maps(config, n: int) -> Features:
    """Standard normal feature maps of n images, float32 [n, h, w, C] per layer."""
    rng = np.random.default_rng(0)
    height, width = config.image_size
    maps = [find_spec(config.backbone).maps[layer] for layer in config.layers]
    return tuple(
        rng.standard_normal((n, height // stride, width // stride, channels), np.float32)
        for channels, stride in maps
    )


def scorer_of(config, stored: int):
    """Scorer with random values in the shapes that training gives.

    Args:
      config: filled configuration.
      stored: number of training images in SPADE's gallery and for FastFlow's memory bank.
    """
    one, key = random_maps(config, 1), jax.random.key(0)
    if config.detector == "fastflow":
        variables = objective(config).init(key, one)
        images = cached_features(random_maps(config, stored))
        variables = with_banks(config, variables, images, 0)
        return calibrated(config, variables, None)
    if config.detector == "cflow":
        variables = cflow.objective(config).init(key, one)
        return cflow.CFlowScorer(config, variables, np.zeros(len(one), np.float32))
    if config.detector == "spade":
        return SpadeScorer(config, random_maps(config, stored), None)
    size = config.patchcore.max_points, config.patchcore.dimension
    bank = np.random.default_rng(0).standard_normal(size, np.float32)
    return PatchCoreScorer(config, tuple(m.shape[1:] for m in one), bank)


def backbone_seconds(config) -> float:
    """Median seconds per batch from images to feature maps."""
    backbone = create_backbone(config.backbone, weights="random", layers=config.layers)
    extract = extractor(backbone, 1.0, config.parallel, config.batch_size, "float32")
    shape = config.batch_size, *config.image_size, 3
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    return median_seconds(lambda: extract(images))


def detector_seconds(config, stored: int) -> float:
    """Median seconds per batch from feature maps to scores and anomaly maps."""
    scorer, features = scorer_of(config, stored), random_maps(config, config.batch_size)
    return median_seconds(lambda: scorer.score(features))


def measure(configs: dict, stored: int) -> Iterator[dict]:
    """Yields a row for each of `configurations`, with one model in memory at a time."""
    backbones = {}  # seconds, by layers
    for name, config in configs.items():
        if config.layers not in backbones:
            backbones[config.layers] = backbone_seconds(config)
        milliseconds = 1e3 / config.batch_size
        yield {
            "backbone": config.backbone,
            "detector": name,
            "layers": list(config.layers),
            "input": list(config.image_size),
            "batch": config.batch_size,
            "backbone_ms": milliseconds * backbones[config.layers],
            "detector_ms": milliseconds * detector_seconds(config, stored),
        }


def line(row: dict) -> str:
    """Line of the table."""
    names = row["backbone"], row["detector"], " ".join(row["layers"]), str(row["batch"])
    times = row["backbone_ms"], row["detector_ms"], row["backbone_ms"] + row["detector_ms"]
    return f"| {' | '.join([*names, *(f'{ms:.1f}' for ms in times)])} |"


def compared(row: dict, ours: dict) -> dict[str, float]:
    """Ratios of a row to that of `PUBLISHED`, by name."""
    name = f"{row['detector']}_{row['backbone']}"
    if row["batch"] > 1:
        name += f"_batch{row['batch']}"
    both, our_both = (r["backbone_ms"] + r["detector_ms"] for r in (row, ours))
    return {name: both / our_both, f"{name}_alone": row["detector_ms"] / ours["detector_ms"]}


def main() -> None:
    """Measures all, prints the table and the ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", help="timm's names")
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--stored", type=int, default=200, help="SPADE's training images")
    parser.add_argument("--side", type=int, help="input side; default: the backbone's")
    parser.add_argument(
        "--quick", action="store_true", help="the two ResNets only, under five minutes"
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()

    names = args.backbones or (QUICK if args.quick else BACKBONES)
    groups = [configurations(name, b, args.side) for name in names for b in args.batches]
    rows = []
    with ratios() as found, tqdm(total=sum(map(len, groups)), unit="row") as bar:
        tqdm.write(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
        for configs in groups:
            ours = None
            for row in measure(configs, args.stored):
                ours = ours or row
                rows.append(row)
                tqdm.write(line(row))
                bar.update()
                if not row["detector"].startswith("fastflow"):
                    found |= compared(row, ours)
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(
            None if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
        ),
        "versions": versions("jax"),
        "stored": args.stored,
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
