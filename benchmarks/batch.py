"""Rates and costs of batch scoring by one and two workers: shards of processes, and Ray Data.

    pip install -e '.[ray]'
    python benchmarks/batch.py screws.onnx --images FOLDER --out result.json

Each way scores the folder, and its first image alone for the time to start, in turns. Times of the
images are those of the folder less the start. CPU time is that of all processes, read from /proc.

Each line `ratio <name> <number>` is images per second over those of one process.
"""

import argparse
import contextlib
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

from outcome import describe_machine, ratios, versions, write_result

WAYS = [("shards", 1), ("shards", 2), ("Ray Data", 1), ("Ray Data", 2)]
INTERVAL = 0.1  # seconds between two looks at the processes
CODE = "import sys; from fastflow_jax import batch; batch.run(*sys.argv[1:4], {})"


class Family:
    """CPU time and memory of processes and their descendants, while they run."""

    def __init__(self, processes: list[subprocess.Popen]):
        self._known = {process.pid for process in processes}
        self._cpu: dict[int, float] = {}
        self.workers: dict[int, int] = {}  # peak memory of processes with a detector, in bytes
        self.peak = 0  # of all together, with shared memory counted once per process

    def look(self) -> None:
        """Reads the state of all processes."""
        stats, rss = {}, 0
        for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                stats[int(file.parent.name)] = file.read_text().rpartition(") ")[2].split()
        for pid, fields in sorted(stats.items()):
            if pid in self._known or int(fields[1]) in self._known:
                self._known.add(pid)
                self._cpu[pid] = sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
                rss += int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
                with contextlib.suppress(OSError):
                    self._look_for_worker(pathlib.Path(f"/proc/{pid}"), pid)
        self.peak = max(self.peak, rss)

    def _look_for_worker(self, process: pathlib.Path, pid: int) -> None:
        if "onnxruntime" in (process / "maps").read_text():
            status = (process / "status").read_text()
            if found := re.search(r"VmHWM:\s+(\d+)", status):
                self.workers[pid] = 1024 * int(found[1])

    @property
    def cpu(self) -> float:
        """Seconds of CPU time so far."""
        return sum(self._cpu.values())


def measure(way: str, workers: int, model: pathlib.Path, images: str) -> dict[str, float]:
    """Scores images once; returns seconds, CPU seconds and bytes of memory."""
    with tempfile.TemporaryDirectory() as output:
        arguments = (
            [f"ray={workers}"]
            if way == "Ray Data"
            else [f"shard='{i + 1}/{workers}'" for i in range(workers)]
        )
        start = time.monotonic()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", CODE.format(argument), model, images, output],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for argument in arguments
        ]
        family = Family(processes)
        while any(process.poll() is None for process in processes):
            family.look()
            time.sleep(INTERVAL)
        if any(process.returncode not in (0, 1) for process in processes):
            sys.exit(f"{way} with {workers} workers failed.")
        return {
            "seconds": time.monotonic() - start,
            "cpu": family.cpu,
            "worker_bytes": max(family.workers.values()),
            "bytes": family.peak,
        }


def summarise(whole: list[dict], first: list[dict], count: int) -> dict[str, float]:
    """Medians over rounds; of the images after the first, without the start."""
    median = {
        name: [statistics.median(turn[name] for turn in turns) for turns in (whole, first)]
        for name in whole[0]
    }
    seconds, cpu = (a - b for a, b in (median["seconds"], median["cpu"]))
    return {
        "images_per_second": (count - 1) / seconds,
        "cpu_ms_per_image": 1000 * cpu / (count - 1),
        "core_hours_per_million": cpu / (count - 1) * 1e6 / 3600,
        "seconds_to_start": median["seconds"][1],
        "cpu_seconds_to_start": median["cpu"][1],
        "worker_megabytes": median["worker_bytes"][0] / 1e6,
        "megabytes": median["bytes"][0] / 1e6,
    }


def main() -> None:
    """Measures, prints the ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=pathlib.Path, help="exported detector")
    parser.add_argument("--images", type=pathlib.Path, required=True, help="folder of images")
    parser.add_argument("--copies", type=int, default=1, help="links to each image to score")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--machine", default=describe_machine(), help="description in the file")
    parser.add_argument("--data", default="images", help="description in the file")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()
    files = sorted(path for path in args.images.iterdir() if path.is_file())
    turns = {key: ([], []) for key in WAYS}
    count = args.copies * len(files)
    with ratios() as found, tempfile.TemporaryDirectory() as folder:
        for copy in range(args.copies):
            for file in files:
                pathlib.Path(folder, f"{copy}-{file.name}").symlink_to(file.absolute())
        for _ in range(args.rounds):
            for key, (whole, first) in turns.items():
                first.append(measure(*key, args.model, str(files[0])))
                whole.append(measure(*key, args.model, folder))
                print(*key, first[-1], whole[-1], flush=True)
        measured = {key: summarise(*turns[key], count) for key in WAYS}
        base = measured[WAYS[0]]["images_per_second"]
        for (way, workers), row in measured.items():
            name = f"{way.lower().replace(' ', '_')}_{workers}"
            found[name] = row["images_per_second"] / base
    size = sum(path.stat().st_size for path in files) // len(files)
    result = {
        "page": "docs/batch.md",
        "command": f"python benchmarks/batch.py FILE --images FOLDER --copies {args.copies} "
        f"--rounds {args.rounds}, FILE of the export of configs/demo.py",
        "commit": subprocess.getoutput("git rev-parse --short HEAD"),
        "machine": args.machine,
        "versions": versions("onnxruntime", "pyarrow", "ray"),
        "seeds": "0",
        "data": f"{args.data}: {len(files)} files, {size} bytes each on average, "
        f"{args.copies} links to each",
        "columns": {
            "way": "way",
            "images_per_second": "images per second",
            "cpu_ms_per_image": "CPU time per image, ms",
            "core_hours_per_million": "core hours per million images",
            "seconds_to_start": "seconds for one image, with the start",
            "worker_megabytes": "memory of a worker, MB",
        },
        "rows": [
            {"way": f"{way}, {workers} worker{'s' * (workers > 1)}"}
            | {
                "images_per_second": f"{row['images_per_second']:.1f}",
                "seconds_to_start": f"{row['seconds_to_start']:.1f}",
                "core_hours_per_million": f"{row['core_hours_per_million']:.1f}",
                "cpu_ms_per_image": f"{row['cpu_ms_per_image']:.0f}",
                "worker_megabytes": f"{row['worker_megabytes']:.0f}",
            }
            for (way, workers), row in measured.items()
        ],
        "measured": [
            {"way": way, "workers": workers} | {name: round(x, 2) for name, x in row.items()}
            for (way, workers), row in measured.items()
        ],
        "turns": {f"{way} {n}": {"first": b, "all": a} for (way, n), (a, b) in turns.items()},
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
