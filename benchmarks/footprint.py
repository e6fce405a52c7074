"""Peak memory and time of scoring one image with each backbone, in JAX and in ONNX Runtime.

    pip install -e '.[onnx]'
    python benchmarks/footprint.py --out benchmarks/results/footprint.json
    python benchmarks/footprint.py --backbones resnet18 vit_small_patch16_224

The detector is FastFlow with the default recipe for the backbone and memory banks of full size. It
is not trained, because neither memory nor time depends on the values of its arrays. A fresh process
of each engine loads it and scores one image; its peak resident memory includes Python, the
libraries and, in JAX, the compilation. The time of one model input is measured in another process,
where the engines take turns. JAX is imported in functions, since the process of ONNX Runtime must
not load it.

Backbones that the result file already has are not measured again. Each line
`ratio <name> <number>` is JAX's median CPU seconds, of all threads, over those of ONNX Runtime.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
from outcome import commit, describe_machine, peak_memory, ratios, versions, write_result

if TYPE_CHECKING:
    from fastflow_jax import Detector

_ENGINES = ("jax", "onnx")


def _image(side: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*side, 3), np.uint8)


def untrained(backbone: str) -> "Detector":
    """A FastFlow detector with random weights and random memory banks, without thresholds."""
    import jax

    from fastflow_jax import Detector
    from fastflow_jax.backbones import create_backbone
    from fastflow_jax.config import default, fill
    from fastflow_jax.detectors.fastflow.scorer import FastFlowScorer, calibrated, objective

    config = default()
    config.backbone, config.weights = backbone, "random"
    config = fill(config)
    net = create_backbone(backbone, weights="random", layers=config.layers)
    height, width = config.image_size
    sizes = [(height // stride, width // stride) for stride in net.strides]
    features = [
        np.zeros((1, *size, c), np.float32) for size, c in zip(sizes, net.channels, strict=True)
    ]
    variables = objective(config).init(jax.random.key(0), tuple(features))
    rng = np.random.default_rng(0)
    banks = {
        f"{kind}_{i}": rng.standard_normal((config.map.bank, channels)).astype(np.float16)
        for i, channels in enumerate(net.channels)
        for kind in ("features", "latents")
    }
    variables = {**variables, "bank": banks}
    calibration = calibrated(config, variables, None).calibration
    return Detector(config, net, FastFlowScorer(config, variables, calibration))


def prepare(backbone: str, folder: pathlib.Path, rounds: int) -> dict[str, float]:
    """Saves and exports a detector; returns the CPU seconds of one model input by engine."""
    from exported import seconds

    from fastflow_jax.exported import Exported

    detector = untrained(backbone)
    detector.save(folder / "jax", backbone=True)
    detector.export(folder / "onnx")
    exported, one = Exported(folder / "onnx"), _image(detector.image_size)[None]
    calls = {"jax": lambda: detector.run(one, None), "onnx": lambda: exported.run(one)}
    return {engine: cpu for engine, (cpu, _) in seconds(calls, rounds).items()}


def score(engine: str, folder: pathlib.Path) -> int:
    """Loads a detector and scores one image; returns the peak memory of this process in bytes."""
    if engine == "jax":
        from fastflow_jax import Detector

        detector = Detector.load(folder / engine)
    else:
        from fastflow_jax.exported import Exported

        detector = Exported(folder / engine)
    detector.predict(_image(detector.image_size))
    return peak_memory()


def measure(backbone: str, rounds: int) -> dict[str, Any]:
    """CPU seconds and bytes of both engines, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:

        def call(*task: str) -> Any:
            command = [sys.executable, __file__, "--rounds", str(rounds), "--task", folder, *task]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(run.stdout.splitlines()[-1])

        return {
            "backbone": backbone,
            "seconds": call("prepare", backbone),
            "bytes": {engine: call("score", engine) for engine in _ENGINES},
        }


def backbones(largest: float) -> list[str]:
    """Names of the backbones with weights that have at most `largest` million parameters."""
    from fastflow_jax.backbones import BACKBONES

    specs = (spec for spec in BACKBONES.values() if spec.tag)
    return [spec.name for spec in specs if spec.parameters <= largest * 1e6]


def main() -> None:
    """Measures the backbones, prints a line each, and writes the file after each if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", help="timm's names")
    parser.add_argument("--largest", type=float, default=100, help="millions of parameters")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write, or to continue")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)  # run by `measure`
    args = parser.parse_args()
    if args.task:
        folder, task, name = pathlib.Path(args.task[0]), *args.task[1:]
        found = prepare(name, folder, args.rounds) if task == "prepare" else score(name, folder)
        print(json.dumps(found))
        return

    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.is_file() else []
    missing = dict.fromkeys(args.backbones or backbones(args.largest))
    with ratios() as found:
        for name in [n for n in missing if n not in {row["backbone"] for row in rows}]:
            row = measure(name, args.rounds)
            rows.append(row)
            found[name] = row["seconds"]["jax"] / row["seconds"]["onnx"]
            sizes = [f"{engine} {row['bytes'][engine] / 2**20:.0f} MiB" for engine in _ENGINES]
            print(f"{name}: {', '.join(sizes)}", flush=True)
            write_result(
                args.out,
                {
                    "question": __doc__.partition("\n")[0],
                    "commit": commit(),
                    "machine": describe_machine(),
                    "versions": versions("jax", "jaxlib", "onnxruntime"),
                    "rows": rows,
                },
            )


if __name__ == "__main__":
    main()
