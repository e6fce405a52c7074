"""How do seconds and memory grow with image side, flow steps, images, seeds and devices?

    pip install -e '.[bench]'
    python benchmarks/growth.py --quick
    python benchmarks/growth.py --out growth.json

One training of the default recipe on pictures of noise, from the command line on; each row changes
one thing. Seconds are the product's own: of all features, with decoding and compilation; of all
training, with compilation; and of one epoch of it after the first, of which seeds that are trained
at once have a share each. Memory is the process's largest, and on a GPU the host's alone. Nobody
else has these figures, so there are no ratios but a table, in which "times" compares a row's epoch
with that of the row before.

Several devices are the GPUs, as many as there are; on a CPU they are so many shares of its cores,
which shows what sharing costs and cannot show a gain.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from outcome import describe_machine, write_result
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
BASE = {"side": 256, "steps": 4, "images": 64, "seeds": 1, "devices": 1}
FULL = {
    "side": (128, 256, 512, 1024),
    "steps": (2, 4, 8, 16),
    "images": (64, 128, 256, 512),
    "seeds": (1, 2, 4),
    "devices": (1, 2, 4),
}
QUICK = {
    "side": (128, 256, 512),
    "steps": (4, 8),
    "images": (64, 128),
    "seeds": (1, 2),
    "devices": (1, 2),
}
EPOCHS = 3


def make_images(folder: pathlib.Path, n: int) -> None:
    """Noise: what is in the pictures changes neither time nor memory."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        pixels = rng.integers(0, 256, (256, 256, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04}.png")


def run(point: dict[str, int], images: pathlib.Path, folder: pathlib.Path) -> dict | None:
    """Seconds and bytes of one training, of a process of its own that compiles anew.

    None where there are fewer devices.
    """
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    flags = environment.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = (
        f"{flags} --xla_force_host_platform_device_count={point['devices']}".strip()
    )
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7").split(",")
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible[: point["devices"]])
    fields = {
        "data.root": images,
        "image_size": f"({point['side']},)",
        "flow.steps": point["steps"],
        "seeds": point["seeds"],
        "train.epochs": EPOCHS,
        "train.batch_size": 16,
    }
    command = [sys.executable, "-m", "fastflow_jax.main", "--config=configs/folder.py"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    process = subprocess.Popen(
        [*command, f"--workdir={folder / 'run'}"], cwd=ROOT, env=environment, stdout=sys.stderr
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"the run of {point} failed")
    results = json.loads((folder / "run/results.json").read_text())
    if not results["versions"]["device"].startswith(f"{point['devices']} x "):
        return None
    parts = results["seconds"].values()
    metrics = sorted((folder / "run").rglob("metrics.jsonl"))
    epochs = [json.loads(line)["seconds"] for f in metrics for line in f.read_text().splitlines()]
    return {
        "features_seconds": sum(part["features"] for part in parts),
        "train_seconds": sum(part["train"] for part in parts),
        "epoch_seconds": min(epochs),
        "memory_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def table(rows: list[dict]) -> str:
    """Markdown: what changed, and what it took."""
    lines = [
        "| | features, s | training, s | an epoch, s | times | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    before = None
    for row in rows:
        follows = before is not None and before["axis"] == row["axis"]
        times = f"{row['epoch_seconds'] / before['epoch_seconds']:.2f}" if follows else ""
        lines.append(
            f"| {row['axis']} {row['value']} | {row['features_seconds']:.1f} | "
            f"{row['train_seconds']:.1f} | {row['epoch_seconds']:.2f} | {times} | "
            f"{row['memory_bytes'] / 2**20:.0f} |"
        )
        before = row
    return "\n".join(lines)


def main() -> None:
    """Run all points, print the table, write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", nargs="+", choices=tuple(FULL))
    parser.add_argument("--quick", action="store_true", help="under five minutes")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write")
    args = parser.parse_args()
    points = QUICK if args.quick else FULL
    rows, known = [], {}
    for axis in args.axes or points:
        for value in points[axis]:
            point = BASE | {axis: value}
            key = tuple(point.values())
            if key not in known:
                with tempfile.TemporaryDirectory() as temporary:
                    folder = pathlib.Path(temporary)
                    make_images(folder / "images", point["images"])
                    known[key] = run(point, folder / "images", folder)
            if known[key]:
                rows.append({"axis": axis, "value": value} | known[key])
                print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
