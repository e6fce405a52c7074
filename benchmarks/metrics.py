"""Speed and memory of the exact pixel metrics compared with scikit-learn and anomalib.

    python benchmarks/metrics.py --quick
    python benchmarks/metrics.py --out metrics.json
    python benchmarks/metrics.py --large 2000

Pixel AUROC and average precision against scikit-learn's `roc_auc_score` and
`average_precision_score`; AUPRO up to a false-positive rate of 0.3 against anomalib's, in the
environment of `peer.py`. All get the same float32 maps of 256x256 pixels, smooth noise that is
slightly higher in the round defects of every other image, and their results are checked to agree.
Each metric is computed in a process of its own, on a few maps for warm-up and then timed once; the
two sides take turns. Memory is the growth of the process at its peak, without maps and masks.

`--large N` only evaluates N maps of 1024x1024, in memory maps, with all of our metrics, and prints
seconds and the memory of the process without the memory maps.

Each line `ratio <name> <number>` is the peer's median seconds over ours, or its peak memory over
ours if the name begins with `memory_`: above 1, ours is better.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np
from outcome import describe_machine, peak_memory, ratios, versions, write_result
from peer import peer_python

HERE = pathlib.Path(__file__).resolve()
SIDE = 256
LIMIT = 0.3  # false-positive rate up to which AUPRO integrates
PEERS = {"pixel_auroc": "scikit-learn", "pixel_ap": "scikit-learn", "aupro": "anomalib"}
TOLERANCE = {"scikit-learn": 1e-9, "anomalib": 1e-4}  # anomalib sums in float32


LARGE = 1024  # side of the maps of `--large`


def evaluate_large(images: int, folder: pathlib.Path) -> dict[str, float | None]:
    """Evaluates large maps in memory maps; prints and returns the metrics.

    Every third image has a defect. Maps are smooth noise, enlarged, with small noise against ties.
    """
    from fastflow_jax.evaluation.evaluate import Limits, Scored, evaluate

    rng = np.random.default_rng(0)
    shape = (images, LARGE, LARGE)
    maps = np.lib.format.open_memmap(folder / "maps.npy", "w+", np.float32, shape)
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", bool, shape)
    for i in range(images):
        coarse = rng.standard_normal((LARGE // 16,) * 2, np.float32)
        maps[i] = np.kron(coarse, np.ones((16, 16), np.float32))
        maps[i] += 0.1 * rng.standard_normal((LARGE, LARGE), np.float32)
        if i % 3 == 0:
            y, x = rng.integers(0, LARGE - 300, 2)
            height, width = rng.integers(20, 300, 2)
            masks[i, y : y + height, x : x + width] = True
            maps[i] += 3 * masks[i]
    labels = (np.arange(images) % 3 == 0).astype(np.int32)
    scored = Scored(maps[:, ::16, ::16].max((1, 2)), labels, maps, masks, None)
    kinds = ["crack" if label else "good" for label in labels]
    before, start = _anonymous_memory(), time.perf_counter()
    with _Peak() as peak:
        figures, details = evaluate(scored, kinds, Limits(3.0, 3.0))
    print(f"{masks.sum():,} of {masks.size:,} pixels are defective")
    print(f"{time.perf_counter() - start:.0f} s, {(peak.bytes - before) / 2**20:.0f} MiB")
    print(figures, details.sizes, sep="\n")
    return figures


def _anonymous_memory() -> int:
    """Bytes of the memory of this process without memory maps of files; Linux only."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


class _Peak(threading.Thread):
    """Samples the memory of this process every 20 ms while its context is open."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.02):
            self.bytes = max(self.bytes, _anonymous_memory())

    def __enter__(self) -> "_Peak":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self.join()


def make_data(images: int, folder: pathlib.Path) -> None:
    """Writes `maps.npy`, float32 [N, H, W], and `masks.npy`, bool; every other one has defects."""
    from scipy import ndimage

    rng = np.random.default_rng(0)
    masks = np.zeros((images, SIDE, SIDE), bool)
    maps = np.empty(masks.shape, np.float32)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for i in range(images):
        for _ in range(rng.integers(1, 4) * (i % 2)):
            y, x = rng.integers(0, SIDE, 2)
            masks[i] |= (rows - y) ** 2 + (columns - x) ** 2 < rng.integers(5, 30) ** 2
        noise = rng.standard_normal((SIDE, SIDE), np.float32)
        maps[i] = ndimage.gaussian_filter(noise, 4) + 0.1 * masks[i]
    np.save(folder / "maps.npy", maps)
    np.save(folder / "masks.npy", masks)


def figure_of(side: str, figure: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """Function of a metric of one side; the other sides are not imported."""
    if side == "ours":
        from fastflow_jax.evaluation import metrics

        if figure == "aupro":
            return lambda maps, masks: metrics.aupro(maps, masks, LIMIT)
        return metrics.pixel_auroc if figure == "pixel_auroc" else metrics.average_precision
    if side == "scikit-learn":
        from sklearn import metrics

        names = {"pixel_auroc": "roc_auc_score", "pixel_ap": "average_precision_score"}
        function = getattr(metrics, names[figure])
        return lambda maps, masks: float(function(masks.ravel(), maps.ravel()))

    import torch
    import torchvision_operators  # noqa: F401
    from anomalib.metrics.aupro import _AUPRO

    def aupro(maps, masks):
        metric = _AUPRO(fpr_limit=LIMIT)
        metric.update(torch.from_numpy(maps), torch.from_numpy(masks).int())
        return float(metric.compute())

    return aupro


def measure(side: str, figure: str, folder: pathlib.Path) -> dict:
    """Computes a metric of one side; returns its value, seconds and bytes of memory."""
    maps, masks = np.load(folder / "maps.npy"), np.load(folder / "masks.npy")
    function = figure_of(side, figure)
    function(maps[:4], masks[:4])
    before, start = peak_memory(), time.perf_counter()
    value = function(maps, masks)
    seconds = time.perf_counter() - start
    return {"value": value, "seconds": seconds, "memory": peak_memory() - before}


def compare(figure: str, images: int, python: str, repeats: int, folder: pathlib.Path) -> dict:
    """Medians of both sides, measured in turns, each time in a process of its own."""
    peer = PEERS[figure]
    runs = {"ours": [], peer: []}
    for _ in range(repeats):
        for side, interpreter in (("ours", sys.executable), (peer, python)):
            command = [interpreter, HERE, "--measure", side, figure, folder]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[side].append(json.loads(out.splitlines()[-1]))
    ours, theirs = (
        {key: statistics.median(run[key] for run in side) for key in side[0]}
        for side in runs.values()
    )
    if abs(ours["value"] - theirs["value"]) > TOLERANCE[peer]:
        sys.exit(
            f"{figure}: our value {ours['value']} differs from that of {peer}, {theirs['value']}"
        )
    return {
        "figure": figure,
        "pixels": images * SIDE**2,
        "peer": peer,
        "ours": ours,
        "theirs": theirs,
        "ratio": theirs["seconds"] / ours["seconds"],
        "memory_ratio": theirs["memory"] / ours["memory"],
    }


def main() -> None:
    """Compares all, prints a line each and the ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", nargs="+", type=int, default=[100, 305], help="numbers of maps of 256x256"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="100 maps, under five minutes")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument("--large", type=int, metavar="N", help="evaluate N maps of 1024x1024")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # run by `compare`
    args = parser.parse_args()
    if args.measure:
        side, figure, folder = args.measure
        print(json.dumps(measure(side, figure, pathlib.Path(folder))))
        return

    if args.large:
        with tempfile.TemporaryDirectory() as folder:
            evaluate_large(args.large, pathlib.Path(folder))
        return

    rows = []
    with ratios() as found:
        for images in [100] if args.quick else args.images:
            with tempfile.TemporaryDirectory() as folder:
                make_data(images, pathlib.Path(folder))
                for figure, peer in PEERS.items():
                    python = peer_python() if peer == "anomalib" else sys.executable
                    repeats = 3 if args.quick else args.repeats
                    row = compare(figure, images, python, repeats, pathlib.Path(folder))
                    rows.append(row)
                    sides = (
                        f"{side} {row[key]['seconds']:.2f} s, {row[key]['memory'] / 2**20:.0f} MiB"
                        for side, key in (("ours", "ours"), (peer, "theirs"))
                    )
                    print(f"{figure} of {row['pixels']:,} pixels: {'; '.join(sides)}", flush=True)
                    name = f"{figure}_{row['pixels'] / 1e6:.0f}M_pixels"
                    found[name], found[f"memory_{name}"] = row["ratio"], row["memory_ratio"]
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(),
        "versions": versions("numpy", "scikit-learn"),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
