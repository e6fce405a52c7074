"""Whether reading files slows scoring: predictions of JPEG files and of decoded images, in turns.

    python benchmarks/reading.py --out reading.json
    NPROC=1 python benchmarks/reading.py --images 400 --block 50     # one thread scores, one reads

Writes synthetic JPEG files to a temporary directory, trains the default detector on some of them
(random weights of the backbone, which do not change its speed), and scores blocks of files and as
many decoded images in turns. Both sides resize images and resize maps back; only one reads and
decodes files. The rate of model inputs, which are neither resized nor read, is that of the backbone
and the detector alone.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from outcome import commit, describe_machine, versions, write_result
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.data.arrays import read_image
from fastflow_jax.data.pipeline import n_threads, prefetch
from fastflow_jax.data.transforms import resize

_TRAINED_ON, _DECODED = 32, 64  # images


def write_images(folder: pathlib.Path, n: int, side: int) -> list[pathlib.Path]:
    """Writes JPEG files of a texture, each with another part and noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 190, (side // 16, side // 16, 3), np.uint8)
    texture = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    grain = rng.normal(0, 8, (2 * side, 2 * side, 1)).astype(np.float32)

    def write(i: int) -> pathlib.Path:
        top, left = np.random.default_rng(i).integers(0, side, 2)
        noisy = np.roll(texture, (top, left), (0, 1)) + grain[top:, left:][:side, :side]
        path = folder / f"{i:04}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        return path

    return list(prefetch((lambda i=i: write(i)) for i in range(n)))


def seconds(call: Callable[[], Iterable]) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time of all threads, until all results are there."""
    start, busy = time.perf_counter(), time.process_time()
    for _ in call():
        pass
    return time.perf_counter() - start, time.process_time() - busy


def main() -> None:
    """Runs the benchmark; see the top of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="Number of files.")
    parser.add_argument("--side", type=int, default=1024, help="Their side in pixels.")
    parser.add_argument("--block", type=int, default=200, help="Images that are scored in a turn.")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        paths = write_images(pathlib.Path(name), args.images, args.side)
        size = sum(path.stat().st_size for path in paths) / len(paths)
        c = default()
        c.weights, c.train.steps = "random", 8
        detector = Detector.fit(paths[:_TRAINED_ON], config=c)
        decoded = [read_image(path) for path in paths[:_DECODED]]
        inputs = np.stack([resize(image, detector.image_size) for image in decoded[:32]])
        found = {"files": [], "decoded": [], "inputs": [], "reading": []}
        busy = dict.fromkeys(found, 0.0)  # CPU seconds per image
        list(detector.stream(decoded[:41]))  # compiles for all batch sizes
        for first in range(0, args.images, args.block):
            block = paths[first : first + args.block]
            n = len(block)
            images = [decoded[i % _DECODED] for i in range(n)]
            calls = {
                "files": lambda block=block: detector.stream(block),
                "decoded": lambda images=images: detector.stream(images),
                "inputs": lambda: (detector.run(inputs, None) for _ in range(2)),
                "reading": lambda block=block: prefetch(
                    (lambda path=path: read_image(path)) for path in block[:64]
                ),
            }
            sizes = {"files": n, "decoded": n, "inputs": 64, "reading": len(block[:64])}
            for kind, call in calls.items():
                wall, cpu = seconds(call)
                found[kind].append(sizes[kind] / wall)
                busy[kind] += cpu / sizes[kind] / -(-args.images // args.block)
            print({kind: round(rates[-1], 1) for kind, rates in found.items()}, flush=True)
    data = f"{args.images} JPEG files of {args.side}x{args.side}, {size:.0f} bytes each on average"
    content = {"data": data, **table(found, busy)}
    print(*(f"{row['name']}: {row['value']}" for row in content["rows"]), sep="\n")
    write_result(args.out, content)


def table(found: Mapping[str, Sequence[float]], busy: Mapping[str, float]) -> dict[str, Any]:
    """The table of `tables.py`.

    Args:
      found: images per second of each block, by kind.
      busy: CPU seconds per image, by kind.
    """
    rates = {kind: statistics.median(of) for kind, of in found.items()}
    ratio = statistics.median(a / b for a, b in zip(found["files"], found["decoded"], strict=True))
    values = {
        "files over decoded images, images per second: median of blocks in turns": ratio,
        "decoding over predicting decoded images, CPU time": busy["reading"] / busy["decoded"],
        "cores that are busy while files are predicted": busy["files"] * rates["files"],
        "reading files only, over scoring model inputs only, images per second": rates["reading"]
        / rates["inputs"],
    }
    return {
        "page": "docs/speed.md",
        "command": "python benchmarks/reading.py --out benchmarks/results/reading.json",
        "commit": commit(),
        "machine": describe_machine(),
        "seeds": "0",
        "columns": {"name": "", "value": "value"},
        "rows": [{"name": n, "value": f"{value:.3f}".lstrip("0")} for n, value in values.items()],
        "measured": {
            "images_per_second": rates,
            "cpu_seconds_per_image": busy,
            "blocks": found,
            "threads": n_threads(),
        },
        "versions": versions("jax", "jaxlib", "pillow", "numpy"),
    }


if __name__ == "__main__":
    main()
