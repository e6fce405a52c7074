"""Cost of scoring for each training of a run: time, memory, disk space.

python -m fastflow_jax.main --config=configs/compare.py:elpv/mono --workdir=RUN
python benchmarks/costs.py RUN
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
from ml_collections import ConfigDict
from outcome import peak_memory
from tqdm import tqdm

from fastflow_jax.config import from_plain
from fastflow_jax.detector import Detector
from fastflow_jax.files import to_plain
from fastflow_jax.runs import saved

BATCHES = (1, 16)
_SECONDS = 2.0  # time spent on one batch size
_CALLS = (5, 200)  # smallest and largest number of calls in that time

# What `measure` returns, with units, in the order of the table.
FIGURES = {
    **{f"ms_batch_{b}": "milliseconds per image, from pixels to map" for b in BATCHES},
    **{f"detector_ms_batch_{b}": "milliseconds per image, from features to map" for b in BATCHES},
    "memory_mib": "peak resident memory of a process that only scores, MiB",
    "disk_mib": "disk space of the training without images and scores, MiB",
}


def measure(config: ConfigDict, folder: pathlib.Path, seed: int) -> dict[str, float] | None:
    """Measures the `FIGURES` of a finished training.

    Scoring runs in a process of its own, on random images of the input size; times are medians of
    synchronised calls after warm-up. On a GPU the two processes share memory: set
    XLA_PYTHON_CLIENT_PREALLOCATE=false. On a TPU, which one process owns, nothing can be measured.

    Args:
      config: filled configuration of the training.
      folder: its directory, see `runs.experiment.run`.
      seed: its seed.

    Returns:
      The figures by name, or None if that process failed, after printing its error.
    """
    request = {
        "config": to_plain(config),
        "folder": str(folder.absolute()),
        "seed": seed,
        "seconds": _SECONDS,
    }
    child = subprocess.run(
        [sys.executable, __file__, "--measure"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    if child.returncode:
        tqdm.write(f"Scoring could not be measured in {folder}: {child.stderr.strip()[-500:]}")
        return None
    files = [file for file in folder.rglob("*") if file.is_file()]
    others = {"heatmaps", "strips", "scores.json", "features"}  # not needed for scoring
    kept = [file for file in files if not others.intersection(file.relative_to(folder).parts)]
    figures = json.loads(child.stdout.splitlines()[-1])
    return figures | {"disk_mib": sum(file.stat().st_size for file in kept) / 2**20}


def _measure_here(
    config: ConfigDict, folder: pathlib.Path, seed: int, seconds: float
) -> dict[str, float]:
    figures = {}
    for batch in BATCHES:
        config = config.copy_and_resolve_references()
        config.batch_size = batch  # batch size of the compiled programs
        detector = Detector.from_training(config, folder, seed)
        images = np.random.default_rng(0).standard_normal((batch, *config.image_size, 3))
        images = images.astype(np.float32)
        features = detector.extract(images)
        whole = median_seconds(lambda d=detector, x=images: d.score(x), seconds)
        alone = median_seconds(lambda d=detector, x=features: d.scorer.score(x), seconds)
        figures[f"ms_batch_{batch}"] = 1e3 * whole / batch
        figures[f"detector_ms_batch_{batch}"] = 1e3 * alone / batch
    return figures | {"memory_mib": peak_memory() / 2**20}


def median_seconds(call, spent: float = _SECONDS) -> float:
    """Median seconds of a call that returns numpy arrays, after two calls for warm-up.

    Args:
      call: the function; it must wait for its result.
      spent: seconds to spend on all calls.
    """
    call()  # compiles
    start = time.perf_counter()
    call()
    calls = int(np.clip(spent / (time.perf_counter() - start), *_CALLS))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Prints a row per training of a run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=pathlib.Path, nargs="?", help="run directory")
    parser.add_argument(
        "--measure", action="store_true", help="measure the training described on stdin"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        asked = json.load(sys.stdin)
        given = from_plain(asked["config"]), pathlib.Path(asked["folder"])
        print(json.dumps(_measure_here(*given, asked["seed"], asked["seconds"])))
        return
    print("| training | " + " | ".join(["train_s", *FIGURES]) + " |")
    print("|---" + "|---:" * (len(FIGURES) + 1) + "|")
    for file in sorted(arguments.run.rglob("detector.json")):
        kept = saved.read(file.parent)
        seconds = json.loads((kept.training / "seconds.json").read_text())["train"]
        figures = measure(kept.config, kept.training, kept.seed)
        if figures is not None:
            cells = [seconds, *(figures[name] for name in FIGURES)]
            name = file.parent.relative_to(arguments.run)
            print(f"| {name} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
