"""One experiment: data, features, training, evaluation, and the run folder that keeps them."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import fastflow_jax
from fastflow_jax import data, parallel
from fastflow_jax.config import variants, without
from fastflow_jax.data.transforms import placement
from fastflow_jax.detectors.registry import kind
from fastflow_jax.evaluation.evaluate import METRICS, Scored, measure, score_split
from fastflow_jax.features.prepare import Prepared, feature_fingerprint, preparer
from fastflow_jax.files import expanded, read_json, read_lines, to_plain, write_json, write_text
from fastflow_jax.report.html import write_reports
from fastflow_jax.report.pictures import write_pictures
from fastflow_jax.report.table import format_csv, format_markdown, format_table
from fastflow_jax.runs import advice, saved
from fastflow_jax.runs.directory import check_same_data, claim


def default_workdir(config_file: str, config) -> pathlib.Path:
    """runs/<config>-<argument>-<backbone>."""
    file, _, argument = config_file.partition(":")
    parts = [pathlib.Path(file).stem, argument.replace(",", "+").replace("/", "-"), config.backbone]
    return pathlib.Path("runs") / "-".join(filter(None, parts))


def run(config, workdir: str | pathlib.Path) -> dict:
    """Run every category and seed of a filled configuration, or what is left of them.

    Args:
      config: see `config.fill`.
      workdir: the run folder: `config.json`, `results.json`, its table as `table.md` and
        `table.csv`, and, in it or in a
        sub-folder for each category, variant and seed where there are several, `checkpoints/`,
        `metrics.jsonl`, `scores.json`, `heatmaps/`, `report.html`, which the run has too (that of a
        finished run, removed, is written again), and `detector.json` and `held_out.npz` for
        `detector.Detector.load`. Variants that differ only in what comes after training share one,
        in the folder of the first. Until the run is finished, `features/` has those that the memory
        has no room for.

    Returns:
      What stands in `results.json`.

    Raises:
      InputError: bad data, a folder of another configuration or in use, diverging training.
      Interrupted: SIGTERM or SIGINT came while training; the state is saved.
    """
    workdir = expanded(workdir)
    with claim(workdir, config):
        results_file = workdir / "results.json"
        results = read_json(results_file)
        if results is not None:
            if config.report:
                report = workdir / "report.html"
                parallel.on_main(lambda: report.exists() or write_reports(workdir, results))
            print(
                f"{workdir} holds this run, finished; have the data changed since, choose another "
                f"--workdir:\n\n{format_table(results)}"
            )
            return results
        plan = _plan(config, workdir)
        features = workdir / "features"
        prepare = preparer(config, features)
        done = sum(part.file.exists() for part in plan)
        bar = {"desc": workdir.name, "unit": "run", "dynamic_ncols": True, "smoothing": 0}
        parts = []
        with tqdm(total=len(plan), initial=done, disable=len(plan) == 1, **bar) as progress:
            for _, alike in itertools.groupby(plan, _but_for_the_seed):
                alike = list(alike)
                for i, part in enumerate(alike):
                    finished = read_json(part.file)
                    if finished is None:
                        finished = _run_part(part, alike[i + 1 :], prepare)
                        progress.update()
                    parts.append(finished)
        results = _summarise(config, parts)
        write_text(workdir / "table.md", format_markdown(results))
        write_text(workdir / "table.csv", format_csv(results))
        if config.report:
            parallel.on_main(lambda: write_reports(workdir, results))
        parallel.on_main(lambda: shutil.rmtree(features, ignore_errors=True))
        write_json(results_file, results)
        parallel.on_main(lambda: None)  # all wait for what the first one writes
        print(f"\n{format_table(results)}\n\nRun folder: {workdir}")
        print(_advice(parts))
        if len(plan) == 1:
            print(f"New images: --mode=predict --workdir={workdir} --input=FOLDER --output=FOLDER")
        return results


@dataclasses.dataclass(frozen=True)
class _Part:
    """One training and its evaluation."""

    config: ConfigDict  # the variant's
    variant: str | None
    category: str | None
    seed: int
    folder: pathlib.Path
    training: pathlib.Path  # its folder, or that of an earlier part that trains the very same,
    scored: pathlib.Path  # or that scores the very same, too
    pictures: int  # that its report shows at the most

    @property
    def file(self) -> pathlib.Path:
        """Holds what came out of it, when it is finished."""
        return self.folder / "part.json"

    @property
    def name(self) -> str:
        return self.category or self.config.data.name

    @property
    def title(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name


# What the scores of images that are as they came do not hang on, and what a training does not.
_AFTER_SCORING = (
    "layers_as",  # what it made of `layers` counts
    *("data.tamper", "data.mask_resize"),
    *("heatmaps", "report", "report_pictures", "parallel"),
)
_AFTER_TRAINING = (
    *_AFTER_SCORING,
    *("map", "score", "patchcore.neighbours", "patchcore.reweight", "spade"),
)


def _plan(config, workdir: pathlib.Path) -> list[_Part]:
    """All parts of a run; those that share most follow upon each other."""
    categories = data.categories(config.data)
    seeds = [config.seed + i for i in range(config.seeds)]
    pairs = [(category, v) for category in categories for v in variants(config).items()]
    if data.share_images(config.data):  # a variant of all categories at a time
        pairs = [(category, v) for v in variants(config).items() for category in categories]
    plan, first = [], {}
    pictures = config.report_pictures // (len(pairs) * len(seeds)) if config.report else 0
    for (category, (variant, changed)), seed in itertools.product(pairs, seeds):
        folder = workdir
        if len(categories) > 1:
            folder /= category
        if variant:
            folder /= variant
        if len(seeds) > 1:
            folder /= f"seed_{seed}"
        training, scored = (
            first.setdefault(json.dumps([category, seed, without(changed, after)]), folder)
            for after in (_AFTER_TRAINING, _AFTER_SCORING)
        )
        plan.append(_Part(changed, variant, category, seed, folder, training, scored, pictures))
    features = [feature_fingerprint(part.config, part.seed) for part in plan]
    order = sorted(range(len(plan)), key=lambda i: features.index(features[i]))
    return [plan[i] for i in order]


def _but_for_the_seed(part: _Part) -> tuple:
    """What parts have in common whose trainings differ in their seed alone."""
    return part.category, part.variant, feature_fingerprint(part.config, part.seed)


def _run_part(part: _Part, beside: list[_Part], prepare: Callable[..., Prepared]) -> dict:
    """Train and evaluate; returns what stands in `part.json`.

    Of the parts `beside`, which differ in the seed, some may be trained along.
    """
    config = part.config
    start = time.perf_counter()
    prepared = prepare(config, part.category, part.seed)
    seconds = {"features": time.perf_counter() - start}
    dataset = prepared.dataset
    for each in [part, *beside]:
        each.folder.mkdir(parents=True, exist_ok=True)
        check_same_data(each.training, prepared.contents, prepared.backbone.weights)
    scorer, seconds["train"] = _train(part, beside, prepared)
    thresholds = saved.record(
        config,
        scorer,
        prepared,
        seed=part.seed,
        folder=part.folder,
        training=part.training,
        scored=part.scored,
    )
    epochs = parallel.on_main(partial(read_lines, part.training / "metrics.jsonl"))
    judged = [epoch for epoch in epochs if "holdout_loss" in epoch]
    best = min(judged, key=lambda epoch: epoch["holdout_loss"])["step"] if judged else None
    results = {
        "name": part.name,
        "variant": part.variant,
        "seed": part.seed,
        "figures": dict.fromkeys(METRICS),
        "best_on_test": _best_on_test(epochs) if part.training == part.folder else None,
        "best_holdout_step": best,
        "data": dataset.provenance
        | {
            "trained_on": prepared.train.n,
            "held_out": len(prepared.holdout[0]) if prepared.holdout else 0,
        }
        | _test_counts(dataset.test),
        "weights": prepared.backbone.weights,
        "training": os.path.relpath(part.training, part.folder),
        "thresholds": thresholds,
        "seconds": seconds,
    }
    if dataset.test:
        start = time.perf_counter()
        scored = _score_test(part, prepared, scorer, "test")
        results["figures"] = measure(scored)
        seconds["evaluate"] = time.perf_counter() - start
        _write_pictures(part, prepared, scorer, scored, thresholds["pixel"])
    results["seconds"] = {k: round(v, 2) for k, v in seconds.items()}
    write_json(part.file, results)
    return results


def _test_counts(test: data.Source | None) -> dict:
    if test is None:
        return {}
    defective = int(test.labels.sum())
    return {"test_good": len(test) - defective, "test_defective": defective}


def _train(part: _Part, beside: list[_Part], prepared: Prepared) -> tuple[Any, float]:
    """The scorer of a part, and the seconds that its training took, in all processes that had it.

    Tests after an epoch, and what parts `beside` had of the time, are not counted.
    """
    config = part.config
    tested = 0.0

    def on_epoch(epoch: int, scorer: Callable) -> dict:
        nonlocal tested
        every = config.evaluate_every
        if not (prepared.dataset.test and every and epoch % every == 0):
            return {}
        start = time.perf_counter()
        figures = measure(_score_test(part, prepared, scorer(), f"epoch {epoch}"))
        tested += time.perf_counter() - start
        return {"test": figures}

    def in_epochs(*parts: _Part) -> float:
        """Seconds that trainings spent in epochs that they finished, in this process or before."""
        epochs = (
            parallel.on_main(partial(read_lines, p.training / "metrics.jsonl")) for p in parts
        )
        return sum(epoch["seconds"] for lines in epochs for epoch in lines)

    before, of_others = in_epochs(part), in_epochs(*beside)
    start = time.perf_counter()
    scorer = kind(config.detector).fit(
        config,
        prepared.train,
        prepared.holdout,
        prepared.holdout_valid,
        seed=part.seed,
        folder=part.training,
        beside=[(other.seed, other.training) for other in beside],
        on_epoch=on_epoch,
        progress=f"{part.title}: train",
    )
    seconds_file = part.training / "seconds.json"
    took = read_json(seconds_file)
    if took is None:  # else another part has trained before, and this one found it
        of_others = in_epochs(*beside) - of_others
        took = {"train": before + time.perf_counter() - start - tested - of_others}
        write_json(seconds_file, took)
    return scorer, took["train"]


def _score_test(part: _Part, prepared: Prepared, scorer: Any, progress: str) -> Scored:
    return score_split(
        scorer.score_features,
        prepared.test(),
        len(prepared.dataset.test),
        progress=f"{part.title}: {progress}",
    )


def _best_on_test(epochs: list[dict]) -> dict | None:
    """The best figure of each metric over the epochs that were tested: not an honest result."""
    rows = [epoch["test"] for epoch in epochs if "test" in epoch]
    if not rows:
        return None
    values = {m: [row[m] for row in rows if row[m] is not None] for m in METRICS}
    return {m: max(v, default=None) for m, v in values.items()}


def _write_pictures(
    part: _Part, prepared: Prepared, scorer, scored: Scored, threshold: dict | None
) -> None:
    """Heat maps and what the report shows, of the test images; `threshold` is that of pixels."""
    config, source = part.config, prepared.dataset.test

    def maps_of(indices) -> Iterable[np.ndarray]:
        if scored.maps is not None:
            return (scored.maps[i] for i in indices)
        batches = prepared.test(indices)
        return (m for b in batches for m in scorer.score_features(b.image, b.valid)[1])

    write_pictures(
        part.folder,
        source,
        scored,
        maps_of,
        heatmaps=config.heatmaps,
        strips=part.pictures,
        placed=partial(placement, target=tuple(config.image_size), how=config.data.resize),
        threshold=threshold,
    )


def _summarise(config, parts: list[dict]) -> dict:
    """What `results.json` holds, from all parts of a run.

    Of an ablation the figures of each variant stand in "variants", and those of the first one
    where they stand in every run.
    """
    names = list(dict.fromkeys(part["variant"] for part in parts))
    figures = {name: _figures([p for p in parts if p["variant"] == name]) for name in names}
    categories = list(figures[names[0]]["categories"])
    changes = to_plain(config)["variants"]
    return {
        **figures[names[0]],
        "variants": {name: each | {"changes": changes[name]} for name, each in figures.items()}
        if changes
        else None,
        "protocol": {
            "epoch": "last",
            "chosen_on_test_data": "nothing",
            "resize": config.data.resize,
            "masks": f"resized to the input size, {config.data.mask_resize}",
            "aupro_fpr_limit": 0.3,
            "dataset": config.data.name,
            "std": "over seeds, of the mean over categories (n - 1)",
            "backbone": config.backbone,
            "weights": parts[0]["weights"],  # of the first seed, where they are random
            "image_size": list(config.image_size),
            "holdout": config.data.holdout,
            "tamper": to_plain(config.data.tamper),
            "seeds": [int(seed) for seed in figures[names[0]]["seeds"]],
            "data": {
                name: next(part["data"] for part in parts if part["name"] == name)
                for name in categories
            },
        },
        # Features that several share are told with the first of them.
        "seconds": {
            "/".join(filter(None, (p["name"], p["variant"], str(p["seed"])))): p["seconds"]
            for p in parts
        },
        "versions": {
            "python": platform.python_version(),
            "fastflow-jax": fastflow_jax.__version__,
            **{p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")},
            "device": parallel.device_description(),
        },
    }


def _figures(parts: list[dict]) -> dict:
    """The figures of each category, over its seeds, and their mean over the categories."""
    names = list(dict.fromkeys(part["name"] for part in parts))
    seeds = list(dict.fromkeys(part["seed"] for part in parts))

    def mean(rows):
        values = {m: [row[m] for row in rows] for m in METRICS}
        return {m: None if None in v else float(np.mean(v)) for m, v in values.items()}

    def of(name, key):
        return [part[key] for part in parts if part["name"] == name]

    categories = {name: mean(of(name, "figures")) for name in names}
    by_seed = {s: mean([p["figures"] for p in parts if p["seed"] == s]) for s in seeds}
    std = None
    if len(seeds) > 1:
        spread = {m: [row[m] for row in by_seed.values()] for m in METRICS}
        std = {m: None if None in v else float(np.std(v, ddof=1)) for m, v in spread.items()}
    best = {name: [b for b in of(name, "best_on_test") if b] for name in names}
    return {
        "categories": categories,
        "mean": mean(list(categories.values())),
        "std": std,
        "seeds": {
            str(s): {p["name"]: p["figures"] for p in parts if p["seed"] == s} for s in seeds
        },
        "best_on_test": {n: mean(rows) for n, rows in best.items()} if all(best.values()) else None,
    }


def _advice(parts: list[dict]) -> str:
    """Advice on the training with the fewest held-out images, see `advice.after_training`."""
    part = min(parts, key=lambda part: (part["thresholds"]["image"] or {"n": 0})["n"])
    which = f"{part['name']}: " if len({part["name"] for part in parts}) > 1 else ""
    figures = part["thresholds"]["image"], part["data"], part["figures"]["image_auroc"]
    return which + advice.after_training(*figures)
