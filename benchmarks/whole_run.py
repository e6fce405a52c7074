"""How long does our whole training take beside that of anomalib's FastFlow on the same images?

    python benchmarks/whole_run.py --data elpv/mono --peer-python PEER/bin/python
    python benchmarks/whole_run.py --data FOLDER --peer-python PEER/bin/python

`--data` and the peer's environment are those of `anomalib_fastflow.py`. Ours is the default
recipe from image files to the last step, with decoding, features and compilation. The peer's is
its recipe of 100 epochs, of which a few steps are timed and multiplied; decoding is left out, and
so is evaluation on both sides. Given twice: as anomalib runs it, with the backbone in every step,
and with its features cached as ours are. The two sides take turns, and each uses all cores.

Each line `ratio <name> <number>` is the peer's median seconds over ours: above 1, we are faster.
What the two reach in that time is another question: `anomalib_fastflow.py` answers it.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).parent
EPOCHS, BATCH = 100, 32


def our_seconds(data: str, folder: pathlib.Path) -> float:
    """Seconds of features and training, compilation included, of a fresh process."""
    if data.startswith("elpv/"):
        arguments = [f"--config=configs/demo.py:{data.removeprefix('elpv/')}"]
    else:
        arguments = ["--config=configs/folder.py", f"--config.data.root={data}"]
    command = [sys.executable, "-m", "fastflow_jax.main", *arguments, f"--workdir={folder / 'run'}"]
    subprocess.run([*command, "--config.heatmaps=0"], cwd=HERE.parent, check=True)
    (seconds,) = json.loads((folder / "run/results.json").read_text())["seconds"].values()
    return seconds["features"] + seconds["train"]


def peer_seconds(data: str, python: str, folder: pathlib.Path) -> dict[str, float]:
    """Seconds of the peer's epochs, from a few of its steps."""
    out = folder / "peer.json"
    command = [python, HERE / "anomalib_fastflow.py", "--data", data, "--out", out]
    subprocess.run([*command, "--epochs", "0", "--cache-features"], check=True)
    peer = json.loads(out.read_text())
    steps = EPOCHS * -(-peer["data"]["train"] // BATCH)
    return {
        "": steps * peer["plain_step_median_seconds"],
        "_cached_features": steps * peer["cached_step_median_seconds"] + peer["feature_seconds"],
    }


def main() -> None:
    """Run both in turns and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="elpv/mono, elpv/poly or a folder")
    parser.add_argument("--peer-python", required=True, help="interpreter of the peer")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not args.data.startswith("elpv/"):
        args.data = str(pathlib.Path(args.data).resolve())
    ours, peer = [], []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            peer.append(peer_seconds(args.data, args.peer_python, pathlib.Path(folder)))
            ours.append(our_seconds(args.data, pathlib.Path(folder)))
    name = pathlib.Path(args.data).name
    for form in peer[0]:
        ratio = statistics.median(p[form] for p in peer) / statistics.median(ours)
        print(f"ratio whole_run_{name}{form} {ratio:.1f}")


if __name__ == "__main__":
    main()
