"""Time from image files to the image AUROC that anomalib's FastFlow reaches.

    pip install -e '.[bench]'
    python benchmarks/time_to_quality.py --quick
    python benchmarks/time_to_quality.py --tile FOLDER --out time_to_quality.json
    python benchmarks/time_to_quality.py --rerun-peer

Both sides start from image files on disk and the loaded weights of EfficientNet-Lite0, and end at
the first evaluation from which on the image AUROC stays at or above the mark. Decoding, features
and compilation count on both sides, evaluation on neither. Ours is the default recipe, evaluated
after each epoch (`our_fastflow.py`); anomalib's is `anomalib_fastflow.py`, evaluated every five or
ten epochs, which limits the resolution of its time.

anomalib's 100 epochs take hours, so their AUROCs are stored in `results/`; `--rerun-peer` measures
them again. Their seconds are a number of steps times the seconds of a step, measured now in turn
with our whole training. The quick form trains on 160 cells of ELPV mono, anomalib for 20 epochs.

Each line `ratio <name> <number>` is anomalib's seconds over ours:

    time_to_quality   to the AUROC of anomalib's last epoch, kept to the end, on both sides
    time_to_best      to anomalib's best AUROC: ours kept to the end, anomalib's first evaluation
    whole_training    to the end of each side's own training

with the backbone in every step as anomalib runs it (decoding counted once), and with
`cached_features` as ours. A mark that ours does not reach has no line.
"""

import argparse
import importlib.resources
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from outcome import describe_machine, ratios, write_result
from peer import peer_python

from fastflow_jax.data.tfds import elpv

HERE = pathlib.Path(__file__).parent
QUICK_CELLS, QUICK_EPOCHS = 160, 20


def reached_and_kept(curve: Sequence[tuple[float, float]], mark: float) -> float | None:
    """Seconds of the first evaluation from which on no AUROC is below the mark.

    Args:
      curve: (seconds, AUROC) of each evaluation, in order of time.
      mark: an AUROC.

    Returns:
      None if the last AUROC is below the mark.
    """
    since = None
    for seconds, auroc in curve:
        if auroc < mark:
            since = None
        elif since is None:
            since = seconds
    return since


def lay_out_cells(folder: pathlib.Path) -> None:
    """Copies cells of ELPV mono into a directory: 160 for training, 112 for testing."""
    labels = importlib.resources.files("elpv_dataset") / "data/labels.csv"
    splits = elpv.split(pathlib.Path(str(labels)), "mono")
    good = [record for record in splits["test"] if record.defect == elpv.GOOD]
    defective = [record for record in splits["test"] if record.defect != elpv.GOOD]
    parts = {"train": splits["train"][:QUICK_CELLS], "test": good[::2] + defective[::6]}
    for split, records in parts.items():
        for record in records:
            target = folder / split / record.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(record.image, target)


def run_ours(data: str, device: str) -> list[tuple[float, float]]:
    """Our (seconds, image AUROC) after each epoch, in a new process without a compilation cache.

    Args:
      data: "elpv/mono" or a directory.
      device: device of the peer, "cpu" or "cuda".
    """
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "ours.json")
        command = [sys.executable, HERE / "our_fastflow.py", "--data", data, "--out", out]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads(out.read_text())
        if (found["device"] == "cpu") != (device == "cpu"):
            sys.exit(
                f"Ours ran on {found['device']}, anomalib on {device}. Use one device for both."
            )
        return [(row["seconds"], row["image_auroc"]) for row in found["curve"]]


def run_peer(data: str, out: pathlib.Path, *arguments: str) -> dict:
    """Runs `anomalib_fastflow.py` and returns its result."""
    command = [peer_python(), HERE / "anomalib_fastflow.py", "--data", data, "--out", out]
    subprocess.run([*command, "--cache-features", *arguments], check=True, stdout=sys.stderr)
    return json.loads(out.read_text())


def peer_seconds(timed: dict, epochs: int, form: str) -> float:
    """Seconds of a number of epochs, from the step times in a result of the peer."""
    steps = epochs * timed["data"]["train"] / timed["recipe"]["batch"]
    if form == "cached_features":
        features = timed["decode_seconds"] + timed["train_feature_seconds"]
        return features + steps * timed["cached_step_median_seconds"]
    return timed["decode_seconds"] + steps * timed["plain_step_median_seconds"]


def compare(ours: list[list], peer: dict, timed: list[dict], form: str) -> dict[str, float]:
    """Ratios of one data set and one form of the peer.

    Args:
      ours: the curve of each of our runs, from `run_ours`.
      peer: result with the peer's curve.
      timed: results of the peer's timing runs on this machine, from `run_peer`.
      form: "plain" or "cached_features".
    """

    def after(epochs):
        return statistics.median(peer_seconds(each, epochs, form) for each in timed)

    theirs = [(after(row["epoch"]), row["image_auroc"]) for row in peer["curve"]]
    best = max(auroc for _, auroc in theirs)
    marks = {
        "time_to_quality": (theirs[-1][1], reached_and_kept(theirs, theirs[-1][1])),
        "time_to_best": (best, next(seconds for seconds, auroc in theirs if auroc == best)),
    }
    found = {}
    for name, (mark, seconds) in marks.items():
        reached = [reached_and_kept(curve, mark) for curve in ours]
        if None in reached:
            print(f"{name}: ours ends at {ours[0][-1][1]:.3f}, below anomalib's {mark:.3f}")
            continue
        found[name] = seconds / statistics.median(reached)
        print(
            f"{name}, {form}: AUROC {mark:.3f} after {statistics.median(reached):.1f} s of ours, "
            f"{seconds:.1f} s of anomalib's",
            flush=True,
        )
    found["whole_training"] = theirs[-1][0] / statistics.median(curve[-1][0] for curve in ours)
    return found


def main() -> None:
    """Runs both sides in turns, prints the ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tile", type=pathlib.Path, help="directory of the magnetic tile set")
    parser.add_argument(
        "--rerun-peer", action="store_true", help="train anomalib for 100 epochs, which takes hours"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a short form, under five minutes")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    args = parser.parse_args()

    rows = []
    with ratios() as found, tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if args.quick:
            lay_out_cells(folder / "elpv_mono")
            sets = {"elpv_mono": str(folder / "elpv_mono")}
        else:
            sets = {"elpv_mono": "elpv/mono"}
            if args.tile:
                sets["magnetic_tile"] = str(args.tile.resolve())
        for name, data in sets.items():
            stored = HERE / f"results/anomalib_{name}.json"
            if args.quick:
                epochs = ("--epochs", str(QUICK_EPOCHS), "--timed-steps", "3")
                peer = run_peer(data, folder / "peer.json", *epochs)
                timed, ours = [peer], [run_ours(data, peer["device"])]
            else:
                peer = run_peer(data, stored) if args.rerun_peer else json.loads(stored.read_text())
                timed, ours = [], []
                for _ in range(args.repeats):
                    timed.append(run_peer(data, folder / "peer.json", "--epochs", "0"))
                    ours.append(run_ours(data, timed[-1]["device"]))
            for form in ("plain", "cached_features"):
                for question, ratio in compare(ours, peer, timed, form).items():
                    words = [question, name, form if form != "plain" else ""]
                    found["_".join(filter(None, [*words, "quick" if args.quick else ""]))] = ratio
            curve = [(row["epoch"], row["image_auroc"]) for row in peer["curve"]]
            rows.append({"data": name, "ours": ours, "anomalib": curve, "ratios": dict(found)})
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
