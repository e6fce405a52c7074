"""How soon do we reach the AUROC that anomalib's FastFlow has at its end, and how soon does it?

    pip install -e '.[bench]'
    python benchmarks/time_to_quality.py --quick
    python benchmarks/time_to_quality.py --tile FOLDER --out time_to_quality.json
    python benchmarks/time_to_quality.py --rerun-peer

Both from image files on disk and loaded weights, the same EfficientNet-Lite0, to the first
evaluation from which on the image AUROC never falls below the mark again. Decoding, features and
compilation are counted on both sides, evaluation on neither. Ours is the default recipe, tested
after each epoch (`our_fastflow.py`); anomalib's is that of `anomalib_fastflow.py`, tested every
five or ten epochs, so its time is known to that grain.

anomalib's 100 epochs take hours: their AUROC stands in `results/`, and `--rerun-peer` has them
anew. What they take on this machine is measured now, a few steps in turn with our whole training,
and multiplied. The quick form trains on 160 cells of ELPV mono, and anomalib for 20 epochs.

Each line `ratio <name> <number>` is anomalib's seconds over ours:

    time_to_quality   to the AUROC of anomalib's last epoch, kept to the end, on both sides
    time_to_best      to anomalib's best AUROC: ours kept to the end, anomalib's first touch of it
    whole_training    to the end of each side's own training

as anomalib runs it, with the backbone in every step and decoding counted once, and with
`cached_features`, ours' way of going about it, given to anomalib too. A mark that we do not reach
has no line.
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
    """Seconds of the first evaluation from which on the AUROC is never below the mark.

    Args:
      curve: (seconds, AUROC) of each evaluation, in order of time.
      mark: an AUROC.

    Returns:
      None where the last one is below it.
    """
    since = None
    for seconds, auroc in curve:
        if auroc < mark:
            since = None
        elif since is None:
            since = seconds
    return since


def lay_out_cells(folder: pathlib.Path) -> None:
    """Cells of ELPV mono as a folder of images: 160 good ones to train on, 112 to test on."""
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
    """Our (seconds, image AUROC) after each epoch, of a fresh process that compiles anew.

    `device` is the peer's: "cpu" or "cuda".
    """
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "ours.json")
        command = [sys.executable, HERE / "our_fastflow.py", "--data", data, "--out", out]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads(out.read_text())
        if (found["device"] == "cpu") != (device == "cpu"):
            sys.exit(f"ours ran on {found['device']}, anomalib on {device}")
        return [(row["seconds"], row["image_auroc"]) for row in found["curve"]]


def run_peer(data: str, out: pathlib.Path, *arguments: str) -> dict:
    """What `anomalib_fastflow.py` writes."""
    command = [peer_python(), HERE / "anomalib_fastflow.py", "--data", data, "--out", out]
    subprocess.run([*command, "--cache-features", *arguments], check=True, stdout=sys.stderr)
    return json.loads(out.read_text())


def peer_seconds(timed: dict, epochs: int, form: str) -> float:
    """Seconds that some epochs take, from what a run of the peer says of its steps."""
    steps = epochs * timed["data"]["train"] / timed["recipe"]["batch"]
    if form == "cached_features":
        features = timed["decode_seconds"] + timed["train_feature_seconds"]
        return features + steps * timed["cached_step_median_seconds"]
    return timed["decode_seconds"] + steps * timed["plain_step_median_seconds"]


def compare(ours: list[list], peer: dict, timed: list[dict], form: str) -> dict[str, float]:
    """Ratios of one data set and one form of the peer.

    Args:
      ours: the curve of each of our runs, see `run_ours`.
      peer: with the peer's curve.
      timed: of each of its runs on this machine, see `run_peer`.
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
            print(f"{name}: we end at {ours[0][-1][1]:.3f}, below anomalib's {mark:.3f}")
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
    """Run both in turns on every data set, print the ratios, write them where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tile", type=pathlib.Path, help="the magnetic tile set, as a folder")
    parser.add_argument("--rerun-peer", action="store_true", help="its 100 epochs: hours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="under five minutes")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write")
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
