"""A detector compared with its exported file: scores of the test images, time, and start.

    pip install -e '.[onnx]'
    python -m fastflow_jax.main --config=configs/demo.py --workdir=runs/demo
    python benchmarks/exported.py runs/demo --out exported.json

Prints the image AUROC of both, which must agree in four digits, and the number of decisions and
p-values that differ.
JAX and ONNX Runtime take turns on the same cores. They score model inputs (batch_1, batch_8) and
image files (files), and a fresh process of each predicts one file from the command line (start).

Each line `ratio <name> <number>` is JAX's median over that of ONNX Runtime, of seconds of CPU time
(of all threads) or of wall time.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from outcome import describe_machine, ratios, versions, write_result
from PIL import Image

from fastflow_jax import Detector, data
from fastflow_jax.data.transforms import resize
from fastflow_jax.evaluation.metrics import image_auroc
from fastflow_jax.exported import Exported

_FILES = 128  # that are scored in a turn
ROOT = pathlib.Path(__file__).parent.parent


def parity(detector: Detector, exported: Exported, test: data.Source) -> dict:
    """AUROC of both engines, and how many results differ."""
    images = [test[i].image for i in range(len(test))]
    labels = [defect != data.GOOD for defect in test.defects]
    one, other = (list(each.stream(images)) for each in (detector, exported))
    pairs = list(zip(one, other, strict=True))
    scores = [[result.score for result in results] for results in (one, other)]
    return {
        "images": len(images),
        "auroc": [image_auroc(each, labels) for each in scores],
        "score_difference": float(np.abs(np.subtract(*scores)).max()),
        "decisions_that_differ": sum(a.is_anomalous != b.is_anomalous for a, b in pairs),
        "p_values_that_differ": sum(abs(a.p_value - b.p_value) > 1e-6 for a, b in pairs),
    }


def seconds(calls: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Median CPU and wall seconds of each call; the calls take turns after a warm-up."""
    for call in calls.values():
        call()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time(), time.perf_counter()
            call()
            found[name].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return {name: [statistics.median(t) for t in zip(*x, strict=True)] for name, x in found.items()}


def fresh_process(run: pathlib.Path, engine: str, image: pathlib.Path) -> list[float]:
    """CPU seconds and wall seconds of a command that predicts one image."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "fastflow_jax.main", "--mode=predict", "--quiet"]
        command += [f"--workdir={run}", f"--input={image}", f"--output={output}"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"--engine={engine}"], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status) not in (0, 1):
            sys.exit(f"{engine} could not predict {image}.")
    return [usage.ru_utime + usage.ru_stime, time.perf_counter() - start]


def main() -> None:
    """Compares the engines, prints the results, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=pathlib.Path, help="directory of a run with test images")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--starts", type=int, default=3, help="fresh processes, and turns of files")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()

    detector = Detector.load(args.run)
    file = args.run.resolve() / "detector.onnx"
    detector.export(file)
    exported, test = Exported(file), data.open_dataset(detector.config.data).test
    found = parity(detector, exported, test)
    print(", ".join(f"{name}: {value}" for name, value in found.items()))
    one, other = found["auroc"]
    if round(one, 4) != round(other, 4):
        sys.exit("The exported file has another AUROC.")

    image = test[0].image
    inputs = np.stack([resize(image, detector.image_size)] * 8)
    times = {}
    with ratios() as with_ratios, tempfile.TemporaryDirectory() as folder:
        for n in (1, 8):
            calls = {
                "jax": lambda n=n: detector.run(inputs[:n], None),
                "onnx": lambda n=n: exported.run(inputs[:n]),
            }
            times[f"batch_{n}"] = seconds(calls, args.rounds)
        paths = [pathlib.Path(folder, f"{i}.png") for i in range(min(_FILES, len(test)))]
        for i, path in enumerate(paths):
            Image.fromarray(test[i].image).save(path)
        calls = {
            "jax": lambda: list(detector.stream(paths)),
            "onnx": lambda: list(exported.stream(paths)),
        }
        times["files"] = seconds(calls, args.starts)
        engines = ("jax", "onnx")
        starts = {
            e: [fresh_process(args.run.resolve(), e, paths[0])] for e in engines
        }  # fills caches
        for _ in range(args.starts):
            for engine in engines:
                starts[engine].append(fresh_process(args.run.resolve(), engine, paths[0]))
        times["start"] = {
            e: [statistics.median(x) for x in zip(*starts[e][1:], strict=True)] for e in engines
        }
        for name, both in times.items():
            for kind, a, b in zip(("cpu", "wall"), both["jax"], both["onnx"], strict=True):
                with_ratios[f"{name}_{kind}"] = a / b
    write_result(
        args.out,
        {
            "parity": found,
            "ratios": with_ratios,
            "seconds": times,
            "machine": describe_machine(),
            "versions": versions("jax", "jaxlib", "onnxruntime"),
        },
    )


if __name__ == "__main__":
    main()
