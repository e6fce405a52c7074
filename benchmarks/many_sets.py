"""Accuracy of several detectors on several data sets, with paired intervals of their differences.

    python benchmarks/many_sets.py --detectors fastflow knn patchcore --seeds 3 \
        --sets elpv/mono photos/screws photos/nuts --out many_sets.json
    python benchmarks/many_sets.py --detectors fastflow no_bank=fastflow:map.bank=0 \
        --archives DOWNLOADS --data SETS --out bank.json

A set is a registered data set, such as `elpv/mono`, or a directory in the layout of docs/data.md.
`--archives` names a directory with archives and their `prepare.py`; the sets in it are prepared in
the directory `--data` if they are not there yet. A detector is a name or a variant,
`NAME=DETECTOR:FIELD=VALUE,FIELD=VALUE`; `--fields` sets fields of all. All detectors use the
feature maps of FastFlow, which are computed once per set, and again for detectors that hold out
another share of the images.

The file is written after each training, and counts of pixels (`resampled.py`) to a directory next
to it. The same command continues an interrupted pass; trainings with the same configuration are not
repeated. After a change of the code or the images, pass another `--out`.

The table has a row per set and metric, their mean over sets and the mean rank, with deviations over
seeds. Differences of each pair of detectors follow, averaged over sets and seeds, with their 95 %
bootstrap interval over sets and test images; then each set on which the first detector is behind
another by more than .01 image AUROC or .005 pixel AUROC and the interval over images excludes 0.
Seconds of a fit include compilation; the first detector of a set also waits for statistics that the
others share. With a field `page`, the file is a table of `tables.py`.
"""

import argparse
import ast
import hashlib
import itertools
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import resampled
from outcome import commit, describe_machine, write_result
from tables import format_cell
from tqdm import tqdm

from fastflow_jax import data
from fastflow_jax.config import default, fill, misspelt, name_data, without
from fastflow_jax.detectors.base import recipe
from fastflow_jax.errors import InputError, Interrupted
from fastflow_jax.evaluation.evaluate import measure, score_split
from fastflow_jax.features.prepare import Prepared, feature_fingerprint, preparer
from fastflow_jax.files import parse_json, read_arrays, write_arrays
from fastflow_jax.report.table import TITLES
from fastflow_jax.runs.fit import fit

ARCHIVES = ("capsule", "cookie", "ballscrew", "magnetic_tile")
BEHIND = {"image_auroc": 0.01, "pixel_auroc": 0.005}  # differences that are reported
_TOLERANCE = 0.002  # of metrics from counts

Fields = dict[str, Any]  # of the configuration, by dotted name
Samples = Mapping[tuple[str, str], Mapping[str, np.ndarray]]  # (set, detector) -> metric -> [n]


def parse_fields(texts: Iterable[str]) -> Fields:
    """Fields from FIELD=VALUE; a value that is no Python literal is text."""
    fields = {}
    for text in texts:
        name, is_given, value = text.partition("=")
        if not is_given:
            raise InputError(f"{text} has no value. Pass FIELD=VALUE, such as map.sigma=4.")
        try:
            fields[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            fields[name] = value
    return fields


def parse_detector(text: str) -> tuple[str, str, Fields]:
    """Row name, detector and changed fields of DETECTOR or NAME=DETECTOR:FIELD=VALUE,..."""
    match = re.fullmatch(r"(?:([\w-]+)=)?(\w+)(?::(.+))?", text)
    if match is None or (match[3] and not match[1]):
        raise InputError(
            f"{text} is not a detector. Pass a name, such as knn, or a variant, such as "
            "no_bank=fastflow:map.bank=0."
        )
    fields = re.split(r",(?=[\w.]+=)", match[3]) if match[3] else ()
    return match[1] or match[2], match[2], parse_fields(fields)


def configuration(detector: str, fields: Fields):
    """Filled configuration of a detector on the feature maps of FastFlow."""
    c = default()
    c.update(recipe(detector) | {"layers_as": "fastflow"})
    message = misspelt(c, [f"--config.{field}" for field in fields])
    if message is not None:
        raise InputError(message)
    for field, value in fields.items():
        try:
            c.update_from_flattened_dict({field: value})
        except (TypeError, ValueError) as error:
            raise InputError(
                f"config.{field} cannot be {value!r}. Pass a value of the type of its default."
            ) from error
    return fill(c)


def find_sets(texts: Iterable[str]) -> dict[str, Fields]:
    """Fields that select each set, by its name."""
    found: dict[str, Fields] = {}
    for text in texts:
        path, c = pathlib.Path(text), default()
        name_data(c, text)
        if path.is_dir():
            sets = {path.resolve().name: {"data.name": "folder", "data.root": text}}
        elif c.data.name in data.DATASETS:
            name = c.data.name
            sets = {
                f"{name}/{part}" if part else name: {"data.name": name, "data.category": part}
                for part in data.categories(c.data)
            }
        else:
            raise InputError(
                f"{text} is neither a directory nor a data set. Pass a directory, or one of "
                f"{', '.join(data.DATASETS)}."
            )
        if twice := found.keys() & sets.keys():
            raise InputError(f"Two sets are named {min(twice)}. Rename one of the directories.")
        found |= sets
    return found


def unpack(archives: pathlib.Path, folder: pathlib.Path) -> list[str]:
    """Prepares the `ARCHIVES` that are not in `folder`; returns the directories of all."""
    program = archives / "prepare.py"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ARCHIVES:
        if (folder / name).is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            command = [sys.executable, program, temporary, name]
            if not program.is_file() or subprocess.run(command, stdout=sys.stderr).returncode:
                raise InputError(f"{program} cannot prepare {name}. Check --archives.")
            pathlib.Path(temporary, name).rename(folder / name)
    return [str(folder / name) for name in ARCHIVES]


def train(config, seed: int, prepare: Callable[..., Prepared], label: str) -> tuple[dict, dict]:
    """Trains and tests a detector; returns its entry in the file, and `resampled.count`."""
    prepared = prepare(config, config.data.category, seed)
    test, seconds = prepared.dataset.test, []
    if not test:
        raise InputError(f"{label} has no test images. Add them, or leave the set out.")
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(config, prepared, seed=seed, directory=pathlib.Path(folder), label=label)

    def score(*batch):
        start = time.perf_counter()
        scores, maps = fitted.scorer.score(*batch)
        seconds.append((time.perf_counter() - start) / len(scores))
        return scores, maps

    scored = score_split(score, prepared.test(), len(test), progress=f"{label}: test")
    bad = int(scored.labels.sum())
    images = {"training": len(prepared.dataset.train), "normal": len(test) - bad, "defective": bad}
    return {
        "figures": measure(scored),
        "fit_seconds": round(fitted.seconds, 2),
        "score_ms": round(1e3 * float(np.median(seconds[1:] or seconds)), 3),  # without compilation
        "images": images,
    }, resampled.count(scored)


class Pass:
    """Trainings of detectors on sets, in a file that is continued.

    Attributes:
      trainings: entries of the file by (set, detector, seed).
    """

    def __init__(self, out: pathlib.Path):
        self._out, self._folder = out, out.with_suffix(".counts")
        self._content = parse_json(out) if out.exists() else {"trainings": []}
        self.trainings = {
            (each["set"], each["detector"], each["seed"]): each
            for each in self._content["trainings"]
        }

    def run(self, configs: Mapping[tuple[str, str], Any], seeds: Sequence[int]) -> None:
        """Runs the trainings that are not in the file, given configurations by (set, detector)."""
        left = [
            (*names, seed, config, digest)
            for names, config in configs.items()
            for seed in seeds
            if (digest := _digest(config, seed)) != self._known(*names, seed)
        ]
        # Trainings that need the same features follow each other.
        left.sort(key=lambda e: (e[0], feature_fingerprint(e[3], e[2]), e[3].data.holdout))
        total, now = len(configs) * len(seeds), commit()
        prepare, last = None, None  # keeps the features of one set
        with (
            tqdm(total=total, initial=total - len(left), unit="training", smoothing=0) as bar,
            tempfile.TemporaryDirectory() as features,
        ):
            for name, detector, seed, config, digest in left:
                if prepare is None or name != last:
                    prepare, last = preparer(config, pathlib.Path(features, name)), name
                entry, counts = train(config, seed, prepare, f"{name}, {detector}")
                key = {"set": name, "detector": detector, "seed": seed, "digest": digest}
                self._add(key | entry | {"commit": now}, counts)
                bar.update()

    def counts(self, name: str, detector: str, seed: int) -> dict[str, np.ndarray]:
        """Counts of a training, see `resampled.count`."""
        return read_arrays(self._file(self.trainings[name, detector, seed]))

    def write(self, table: Mapping[str, Any]) -> None:
        """Writes a table and all trainings."""
        self._content = {**table, "trainings": list(self.trainings.values())}
        write_result(self._out, self._content)

    def _add(self, entry: dict, counts: Mapping[str, np.ndarray]) -> None:
        file = self._file(entry)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(file, counts)
        self.trainings[entry["set"], entry["detector"], entry["seed"]] = entry
        self.write({k: v for k, v in self._content.items() if k != "trainings"})

    def _known(self, *key) -> str | None:
        entry = self.trainings.get(key)
        return entry["digest"] if entry and self._file(entry).exists() else None

    def _file(self, entry: Mapping) -> pathlib.Path:
        return self._folder / f"{entry['digest']}.npz"


def _digest(config, seed: int) -> str:
    """Hash of a configuration and a seed; the same set may be in another directory."""
    root = pathlib.Path(config.data.root).name if config.data.root else None
    fields = without(config, ("data.root", "data.dir", "parallel"))
    text = json.dumps([fields, root, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def draw(done: Pass, pairs: Iterable[tuple[str, str]], seeds: Sequence[int], n: int) -> Samples:
    """Metrics of n resamples for each (set, detector), averaged over seeds.

    The first has the exact metrics; detectors have the same resamples of a set.
    """
    samples = {}
    for name, detector in tqdm(list(pairs), desc="resamples", unit="detector", leave=False):
        of_seeds = []
        for seed in seeds:
            counts = done.counts(name, detector, seed)
            found = resampled.measure(counts, resampled.resamples(counts["labels"], n, 0))
            exact = done.trainings[name, detector, seed]["figures"]
            for metric, values in found.items():
                if abs(values[0] - exact[metric]) > _TOLERANCE:
                    tqdm.write(
                        f"{name}, {detector}: {metric} is {values[0]:.4f} from counts, "
                        f"{exact[metric]:.4f} exactly. Its intervals are approximate."
                    )
                values[0] = exact[metric]
            of_seeds.append(found)
        samples[name, detector] = {m: np.mean([f[m] for f in of_seeds], 0) for m in of_seeds[0]}
    return samples


def rows_of(done: Pass, sets: Sequence[str], detectors: Sequence[str], seeds) -> list[dict]:
    """Rows of the table: each metric on each set, its mean and mean rank, and times."""

    def row(title: str, values: np.ndarray) -> dict:  # [seeds, detectors]
        means, spread = values.mean(0), values.std(0, ddof=1) if len(seeds) > 1 else None
        cells = means if spread is None else np.stack([means, spread], 1)
        return {"name": title} | dict(zip(detectors, cells.round(6).tolist(), strict=True))

    def every(key: Callable[[dict], Any], name: str) -> np.ndarray:  # [seeds, detectors]
        found = [[key(done.trainings[name, d, seed]) for d in detectors] for seed in seeds]
        return np.array(found, float)  # NaN for None

    rows = []
    for metric in resampled.METRICS:
        values = {name: every(lambda e, m=metric: e["figures"][m], name) for name in sets}
        values = {name: table for name, table in values.items() if not np.isnan(table).any()}
        rows += [row(f"{name}: {TITLES[metric]}", table) for name, table in values.items()]
        if len(values) > 1:
            whole = np.stack(list(values.values()))  # [sets, seeds, detectors]
            rows.append(row(f"mean: {TITLES[metric]}", whole.mean(0)))
            ranks = resampled.mean_ranks(whole.mean(1)).round(3).tolist()
            name = f"mean rank: {TITLES[metric]}"
            rows.append({"name": name} | dict(zip(detectors, ranks, strict=True)))
    for key, title in (("fit_seconds", "fit, s"), ("score_ms", "scoring, ms per image")):
        times = np.mean([every(lambda e, k=key: e[k], name) for name in sets], (0, 1))
        cells = [f"{value:.3g}" for value in times]
        rows.append({"name": f"mean: {title}"} | dict(zip(detectors, cells, strict=True)))
    return rows


def pairs_of(samples: Samples, sets: Sequence[str], detectors: Sequence[str]) -> list[dict]:
    """Difference of each pair of detectors and its interval over sets and images, by metric."""
    rows = []
    for first, other in itertools.combinations(detectors, 2):
        row: dict[str, Any] = {"first": first, "other": other}
        for metric in resampled.METRICS:
            both = [(samples[name, first], samples[name, other]) for name in sets]
            steps = [a[metric] - b[metric] for a, b in both if metric in a]
            if steps:
                row[metric] = [round(v, 4) for v in resampled.over_sets(steps, 0)]
        rows.append(row)
    return rows


def behind_of(samples: Samples, sets: Sequence[str], detectors: Sequence[str]) -> list[dict]:
    """Sets and metrics in which the first detector is behind another, see `BEHIND`."""
    rows = []
    for name, other, (metric, least) in itertools.product(sets, detectors[1:], BEHIND.items()):
        first, second = samples[name, detectors[0]], samples[name, other]
        if metric in first:
            interval = resampled.over_images(first[metric] - second[metric])
            if interval[0] < -least and interval[2] < 0:
                step = [round(v, 4) for v in interval]
                rows.append({"set": name, "metric": metric, "other": other, "difference": step})
    return rows


def _interval(values: Sequence[float] | None) -> str:
    """`-.012 (-.020 to -.004)`."""
    if values is None:
        return ""
    step, low, high = (re.sub(r"^([+-])0\.", r"\1.", f"{value:+.3f}") for value in values)
    return f"{step} ({low} to {high})"


def show(table: Mapping[str, Any], first: str) -> None:
    """Prints the table, the differences, and where the first detector is behind."""
    columns = table["columns"]
    print(f"| {' | '.join(columns.values())} |\n|---{'|---:' * (len(columns) - 1)}|")
    for row in table["rows"]:
        print(f"| {' | '.join(format_cell(row.get(key)) for key in columns)} |")
    titles = [TITLES[metric] for metric in resampled.METRICS]
    print(f"\n| difference | {' | '.join(titles)} |\n|---{'|---:' * len(titles)}|")
    for row in table["pairs"]:
        cells = [_interval(row.get(metric)) for metric in resampled.METRICS]
        print(f"| {row['first']} - {row['other']} | {' | '.join(cells)} |")
    print()
    for row in table["behind"]:
        step = _interval(row["difference"])
        where = f"{row['set']}: {first} is behind {row['other']}"
        print(f"{where} in {TITLES[row['metric']]}: {step}")


def compare(args: argparse.Namespace) -> None:
    """Runs all trainings that are left, writes the file and prints the tables."""
    given = [*args.sets, *(unpack(args.archives, args.data) if args.archives else ())]
    sets, shared = find_sets(given), parse_fields(args.fields)
    parsed = [parse_detector(text) for text in args.detectors]
    detectors, seeds = [name for name, *_ in parsed], list(range(args.seeds))
    if not sets:
        raise InputError("There are no sets. Pass --sets or --archives.")
    if len(set(detectors)) < len(detectors):
        raise InputError(f"Two of {', '.join(detectors)} have one name. Pass NAME=DETECTOR.")
    configs = {
        (name, row): configuration(detector, shared | of_set | fields)
        for name, of_set in sets.items()
        for row, detector, fields in parsed
    }
    done = Pass(args.out)
    done.run(configs, seeds)
    samples = draw(done, configs, seeds, args.resamples)
    entries = [done.trainings[*names, seed] for names in configs for seed in seeds]
    images = {e["set"]: ", ".join(f"{n} {k}" for k, n in e["images"].items()) for e in entries}
    words = ["--detectors", *args.detectors, "--seeds", str(args.seeds), "--sets", *sets]
    words += ["--fields", *args.fields] if args.fields else []
    table = {
        "command": f"python benchmarks/many_sets.py {shlex.join(words)}",
        "commit": ", ".join(sorted({e["commit"] for e in entries})),
        "machine": describe_machine(),
        "seeds": ", ".join(map(str, seeds)),
        "data": "; ".join(f"{name}: {text} images" for name, text in images.items()),
        "columns": {"name": "", **{name: name for name in detectors}},
        "rows": rows_of(done, list(sets), detectors, seeds),
        "pairs": pairs_of(samples, list(sets), detectors),
        "behind": behind_of(samples, list(sets), detectors),
    }
    done.write(table)
    show(table, detectors[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Compares the detectors; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--detectors", nargs="+", required=True, metavar="DETECTOR")
    parser.add_argument("--sets", nargs="+", default=[], metavar="SET")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds, from 0 on")
    parser.add_argument("--fields", nargs="+", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--archives", type=pathlib.Path, help="directory with prepare.py")
    parser.add_argument("--data", type=pathlib.Path, help="directory of the prepared sets")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args(argv)
    if args.archives and not args.data:
        parser.error("--archives needs --data. Name the directory of the prepared sets.")
    if args.seeds < 1 or args.resamples < 100:
        parser.error("--seeds must be at least 1, and --resamples at least 100.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    message = "interrupted. The same command continues with the next training."
    try:
        compare(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"error: {message}", file=sys.stderr)
        return stop.exit_code if isinstance(stop, Interrupted) else 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
