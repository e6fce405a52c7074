"""What scoring costs for each training of a run: time, memory, space on disk.

python -m fastflow_jax.main --config=configs/compare.py:elpv/mono --workdir=RUN
python benchmarks/costs.py RUN
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax.config import from_plain
from fastflow_jax.detector import Detector
from fastflow_jax.files import to_plain
from fastflow_jax.runs import saved

BATCHES = (1, 16)
_SECONDS = 2.0  # that one batch size is timed for,
_CALLS = (5, 200)  # within these numbers of calls

# Units of what `measure` gives, in the order of a table.
FIGURES = {
    **{f"ms_batch_{b}": "milliseconds an image, from pixels to map" for b in BATCHES},
    **{f"detector_ms_batch_{b}": "milliseconds an image, features at hand" for b in BATCHES},
    "memory_mib": "peak resident memory of a process that does nothing but score, MiB",
    "disk_mib": "what the training left on disk, to score with and to go on from, MiB",
}


def measure(config: ConfigDict, folder: pathlib.Path, seed: int) -> dict[str, float] | None:
    """The figures of `FIGURES` for a finished training.

    They are taken in a process of its own, whose memory is that of scoring alone, on random images
    of the input size: medians, after warm-up, each call waited for. On a GPU the two processes
    share its memory: set XLA_PYTHON_CLIENT_PREALLOCATE=false, or this one has taken most of it. On
    a TPU, which one process owns, there are no figures.

    Args:
      config: filled, of one training.
      folder: of that training, see `runs.experiment.run`.
      seed: of that training.

    Returns:
      None where that process failed, which is told: the figures of accuracy stand for themselves.
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
        tqdm.write(f"the speed of {folder} could not be measured: {child.stderr.strip()[-500:]}")
        return None
    files = [file for file in folder.rglob("*") if file.is_file()]
    others = {"heatmaps", "strips", "scores.json", "features"}  # to look at, and on the way
    kept = [file for file in files if not others.intersection(file.relative_to(folder).parts)]
    figures = json.loads(child.stdout.splitlines()[-1])
    return figures | {"disk_mib": sum(file.stat().st_size for file in kept) / 2**20}


def _measure_here(
    config: ConfigDict, folder: pathlib.Path, seed: int, seconds: float
) -> dict[str, float]:
    figures = {}
    for batch in BATCHES:
        config = config.copy_and_resolve_references()
        config.batch_size = batch  # programs are made for it
        detector = Detector.from_training(config, folder, seed)
        images = np.random.default_rng(0).standard_normal((batch, *config.image_size, 3))
        images = images.astype(np.float32)
        features = detector.extract(images)
        whole = median_seconds(lambda d=detector, x=images: d.score(x), seconds)
        alone = median_seconds(lambda d=detector, x=features: d.scorer.score(x), seconds)
        figures[f"ms_batch_{batch}"] = 1e3 * whole / batch
        figures[f"detector_ms_batch_{batch}"] = 1e3 * alone / batch
    return figures | {"memory_mib": _peak_memory() / 2**20}


def median_seconds(call, spent: float = _SECONDS) -> float:
    """The median of calls that end when their result is there, as numpy arrays on the host are.

    About so many seconds are spent on them. The first call, which compiles, and another one before
    the rest do not count.
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


def _peak_memory() -> int:
    """Most bytes that this process has had in memory."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # getrusage counts the parent's memory in, from before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def main() -> None:
    """Print a row per training of a run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=pathlib.Path, nargs="?", help="run directory")
    parser.add_argument("--measure", action="store_true", help="one training, asked for on stdin")
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
