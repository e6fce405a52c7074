"""Time of scoring compared with anomalib: single images and batches, part by part.

    pip install -e '.[bench]'
    python benchmarks/inference.py --quick
    python benchmarks/inference.py --out inference.json

The published form (`configs/reference.py`) on both sides, with the same random weights and images,
checked to give the same scores. The parts, each on the device result of the one before:

    backbone   images -> feature maps
    flow       feature maps -> latents
    map        latents -> anomaly map and score
    all        images in host memory -> maps and scores there: our `Detector.score`

Batch 1 is latency; 16 (on a GPU 32, in the quick form on a CPU 8) is throughput. Both sides take
turns, each on all cores.

Each line `ratio <name> <number>` is anomalib's median seconds over ours.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
import same_weights
from outcome import describe_machine, ratios, versions, write_result
from peer import Peer

from fastflow_jax.detector import Detector
from fastflow_jax.detectors.calibration import fuse
from fastflow_jax.detectors.fastflow.model import location_energies
from fastflow_jax.detectors.fastflow.scorer import calibrated
from fastflow_jax.detectors.maps import top_mean

BACKBONES = (
    "resnet18",
    "tf_efficientnet_lite0",
    "deit_base_distilled_patch16_384",
    "wide_resnet50_2",
)
PARTS = ("backbone", "flow", "map", "all")


def our_parts(ours: same_weights.Ours) -> dict[str, Callable]:
    """Functions that run each of `PARTS`; those of "map" and "all" return scores and maps."""
    config, model = ours.config, ours.model
    scorer = calibrated(config, ours.variables, None)
    calibration = scorer.calibration
    detector = Detector(config, ours.backbone, scorer)

    @jax.jit
    def latents_to_scores(latents):
        maps = [
            location_energies(z, log_det, form=config.map.form, log_det_weight=config.map.log_det)
            for z, log_det in latents
        ]
        anomaly_map = fuse(maps, calibration, config.image_size)
        return top_mean(anomaly_map, config.score.top_k), anomaly_map

    images = jax.device_put(ours.images)
    variables = jax.device_put(ours.variables)
    maps = ours.backbone(images)
    flow = jax.jit(model.apply)
    latents = flow(variables, maps)
    return {
        "backbone": lambda: ours.backbone(images),
        "flow": lambda: flow(variables, maps),
        "map": lambda: latents_to_scores(latents),
        "all": lambda: detector.score(ours.images),
    }


def seconds_of(run: Callable, repeats: int) -> float:
    """Mean seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / repeats


def compare(peer: Peer, backbone: str, batch: int, dtype: str, rounds: int) -> dict:
    """Median seconds of both sides for every part, measured in turns after warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        ours = same_weights.build(peer, backbone, batch, dtype, pathlib.Path(folder))
    parts = our_parts(ours)

    def theirs(part, repeats):
        return peer.call("score_seconds", part=part, dtype=dtype, repeats=repeats)

    for part in ("map", "all"):
        score, their_score = float(np.mean(parts[part]()[0])), theirs(part, 1)["score"]
        if abs(score - their_score) > (1e-3 if dtype == "float32" else 0.05):
            sys.exit(
                f"{backbone} {dtype}: our mean score {score} differs from anomalib's {their_score}"
            )
    medians = {}
    for part, run in parts.items():
        seconds_of(run, 1), theirs(part, 1)
        # Short calls are repeated, so that each turn takes about 0.1 s.
        repeats = max(1, round(0.1 / seconds_of(run, 1)))
        turns = [
            (seconds_of(run, repeats), theirs(part, repeats)["seconds"]) for _ in range(rounds)
        ]
        medians[part] = [statistics.median(side) for side in zip(*turns, strict=True)]
    return {
        "backbone": backbone,
        "batch": batch,
        "dtype": dtype,
        "seconds": {
            part: {"ours": ours, "anomalib": theirs} for part, (ours, theirs) in medians.items()
        },
    }


def main() -> None:
    """Compares all, prints a line each and the ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="a short form, under five minutes")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()

    on_cpu = jax.default_backend() == "cpu"
    quick_on_cpu = args.quick and on_cpu
    names = args.backbones or (BACKBONES[:2] if quick_on_cpu else BACKBONES)
    dtypes = args.dtypes or (["float32"] if quick_on_cpu else ["float32", "bfloat16"])
    batches = args.batches or ([1, 8] if quick_on_cpu else [1, 16 if on_cpu else 32])
    rows = []
    with ratios() as found, Peer() as peer:
        for name in names:
            for dtype in dtypes:
                for batch in batches:
                    row = compare(peer, name, batch, dtype, 3 if args.quick else args.rounds)
                    rows.append(row)
                    start = f"{name}_{dtype}_batch{batch}"
                    for part, seconds in row["seconds"].items():
                        found[f"{start}_{part}"] = seconds["anomalib"] / seconds["ours"]
                        print(
                            f"{start} {part}: ours {seconds['ours'] * 1e3:.1f} ms, "
                            f"anomalib {seconds['anomalib'] * 1e3:.1f} ms",
                            flush=True,
                        )
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(None if on_cpu else jax.devices()[0].device_kind),
        "versions": versions("jax"),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
