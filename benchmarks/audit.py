"""Audit of training sets with planted defective images, and what leaving out the listed ones gives.

    python benchmarks/audit.py --sets elpv/mono photos/capsule photos/cookie --seeds 3 \
        --detectors knn --out benchmarks/results/audit.json

Defective test images, drawn at random, are planted among the normal training images, so that 5 % of
the images are defective; with --one_kind they are of one kind of defect, another one for each seed.
The audit ranks the images, by latents of FastFlow trained on them as well as by features, or with
--features_only by features. The table has the share of planted images among the first 8 %, and the
image AUROC of each detector trained on the normal images, with the planted ones, without those of
them that are listed, as after a look at the list, and without all listed images. Planted images are
in none of the test sets.
"""

import argparse
import dataclasses
import itertools
import pathlib
import shlex
import tempfile
from collections.abc import Iterator

import numpy as np
from many_sets import Fields, configuration, find_sets, train
from outcome import commit, describe_machine, write_result

from fastflow_jax import data
from fastflow_jax.data.dataset import GOOD
from fastflow_jax.evaluation.cross_fit import SIMILAR
from fastflow_jax.features.prepare import preparer
from fastflow_jax.runs.audit import train_flow, write_audit

PLANTED, LISTED = 0.05, 0.08  # shares of the training images
TRAININGS = ("clean", "planted", "confirmed left out", "listed left out")


class Planted:
    """A data set with training images that are planted from its test images.

    Attributes:
      names: of the planted images.
      listed: names of the images that the audit lists.
    """

    def __init__(self, dataset: data.Dataset, seed: int, one_kind: bool):
        train, test = dataset.train, dataset.test
        assert test is not None
        kinds = [kind for kind in dict.fromkeys(test.defects) if kind != GOOD]
        kinds = [kinds[seed % len(kinds)]] if one_kind else kinds
        pool = [i for i, kind in enumerate(test.defects) if kind in kinds]
        n = min(round(PLANTED / (1 - PLANTED) * len(train)), len(pool))
        self._planted = np.sort(np.random.default_rng(seed).choice(pool, n, replace=False))
        self._dataset, self.listed = dataset, set[str]()
        self.names = {f"planted/{test.names[i]}" for i in self._planted}

    def open(self, training: str, joined: data.Source) -> data.Dataset:
        """The data set for one of `TRAININGS`, given the training and test images in one source.

        Features of images are computed once for all, see `data.Source.part_of`.
        """
        n, test = len(self._dataset.train), self._dataset.test
        assert test is not None
        rows = list(range(n)) + ([] if training == "clean" else (n + self._planted).tolist())
        if training in TRAININGS[2:]:
            left_out = self.listed if training == TRAININGS[3] else self.listed & self.names
            rows = [i for i in rows if joined.names[i] not in left_out]
        tested = np.delete(np.arange(len(test)), self._planted).tolist()
        train = dataclasses.replace(data.subset(joined, rows), part_of=(joined, np.array(rows)))
        test = dataclasses.replace(data.subset(test, tested), part_of=(test, np.array(tested)))
        return data.Dataset(self._dataset.name, train, test, {})


def join(train: data.Source, test: data.Source) -> data.Source:
    """All images as normal ones, without masks."""
    n = len(train)
    return data.Source(
        train.names + tuple(f"planted/{name}" for name in test.names),
        (GOOD,) * (n + len(test)),
        lambda i: (train.load(i)[0] if i < n else test.load(i - n)[0], None),
    )


def measure(name: str, fields: Fields, args: argparse.Namespace) -> Iterator[dict]:
    """Yields the entry of each seed of a data set: shares of planted images, and image AUROC."""
    configs = {each: configuration(each, fields) for each in args.detectors}
    auditor = "knn" if args.features_only else "fastflow"
    c = configuration(auditor, fields | {"audit": LISTED, "data.holdout": 0.0})
    dataset = data.open_dataset(c.data)
    joined = join(dataset.train, dataset.test)
    sets = [Planted(dataset, seed, args.one_kind) for seed in range(args.seeds)]

    def open_category(category: str) -> data.Dataset:
        training, _, seed = category.rpartition("/")
        return sets[int(seed)].open(training, joined)

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        prepare = preparer(c, folder / "features", open_category)
        for seed, planted in enumerate(sets):
            prepared = prepare(c, f"{TRAININGS[1]}/{seed}", 0)
            scorer = train_flow(c, prepared, folder / "flow", label=f"{name}: flow")
            audit = write_audit(c, prepared, folder, None, scorer, similar=SIMILAR)
            ranked = [entry["name"] for entry in audit["ranking"]]
            planted.listed = listed = set(ranked[: audit["listed"]])
            found = len(planted.names & listed) / len(planted.names)
            entry = {"set": name, "seed": seed, "images": len(ranked), "found": found}
            entry |= {"planted": len(planted.names), "listed": len(listed), "image_auroc": {}}
            trained = args.detectors if seed < args.trained else ()
            for detector, training in itertools.product(trained, TRAININGS):
                own = configs[detector].copy_and_resolve_references()
                with own.unlocked():
                    own.data.category = f"{training}/{seed}"
                result, _ = train(own, 0, prepare, f"{name}, {detector}, {training}")
                auroc = result["figures"]["image_auroc"]
                entry["image_auroc"].setdefault(detector, {})[training] = auroc
            print(entry, flush=True)
            yield entry


def row_of(entries: list[dict]) -> dict:
    """Row of the table: means and deviations over seeds, given the entries of a set."""

    def cell(values: list[float]) -> float | list[float]:
        values = [*map(float, values)]
        return [np.mean(values), np.std(values, ddof=1)] if len(values) > 1 else values[0]

    row = {"name": entries[0]["set"], "found": cell([e["found"] for e in entries])}
    for detector, training in itertools.product(entries[0]["image_auroc"], TRAININGS):
        values = [e["image_auroc"][detector][training] for e in entries if e["image_auroc"]]
        row[f"{detector}, {training}"] = cell(values)
    return row


def main() -> None:
    """Measures all sets and writes the file after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", required=True, metavar="SET")
    parser.add_argument("--detectors", nargs="*", default=[], help="detectors to train")
    parser.add_argument("--seeds", type=int, default=1, help="number of draws of planted images")
    parser.add_argument("--trained", type=int, default=1, help="seeds to train detectors with")
    parser.add_argument("--one_kind", action="store_true", help="plant defects of one kind")
    parser.add_argument("--features_only", action="store_true", help="audit without a flow")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    args = parser.parse_args()

    entries: list[list[dict]] = []
    heads = [f"{d}, {t}" for d, t in itertools.product(args.detectors, TRAININGS)]
    for name, fields in find_sets(args.sets).items():
        entries.append(list(measure(name, fields, args)))
        counts = ((e[0]["set"], e[0]["images"], e[0]["planted"]) for e in entries)
        words = ["--sets", *(e[0]["set"] for e in entries), "--seeds", str(args.seeds)]
        if args.detectors:
            words += ["--detectors", *args.detectors, "--trained", str(args.trained)]
        words += [f"--{name}" for name in ("one_kind", "features_only") if getattr(args, name)]
        table = {
            "command": f"python benchmarks/audit.py {shlex.join(words)}",
            "commit": commit(),
            "machine": describe_machine(),
            "seeds": ", ".join(map(str, range(args.seeds))),
            "data": "; ".join(f"{n}: {images} images, {k} planted" for n, images, k in counts),
            "columns": {"name": "", "found": "planted among the first 8 %"}
            | {head: f"image AUROC of {head}" for head in heads},
            "rows": [row_of(of_set) for of_set in entries],
            "runs": [entry for of_set in entries for entry in of_set],
        }
        write_result(args.out, table)


if __name__ == "__main__":
    main()
