"""A run: training and evaluation of its categories, variants and seeds."""

import dataclasses
import importlib.metadata
import itertools
import json
import logging
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

import fastflow_jax
from fastflow_jax import data, parallel
from fastflow_jax.backbones.weights import licence
from fastflow_jax.config import variants, without
from fastflow_jax.data.dataset import Regions
from fastflow_jax.data.levels import Levels
from fastflow_jax.data.pipeline import regions_as_input
from fastflow_jax.data.tiles import image_means_of
from fastflow_jax.data.tiling import Places
from fastflow_jax.data.transforms import Placement, placement
from fastflow_jax.detectors.base import DETECTORS, Scorer, method
from fastflow_jax.evaluation import advice
from fastflow_jax.evaluation.evaluate import (
    METRICS,
    Limits,
    Scored,
    evaluate,
    measure,
    score_split,
    score_tiles,
)
from fastflow_jax.features import shift
from fastflow_jax.features.extract import FeatureBatch, image_means
from fastflow_jax.features.prepare import Prepared, feature_fingerprint, preparer
from fastflow_jax.files import expanded, read_json, read_lines, to_plain, write_json, write_text
from fastflow_jax.report.html import write_reports
from fastflow_jax.report.pictures import write_pictures
from fastflow_jax.report.table import check_metrics, format_csv, format_markdown
from fastflow_jax.runs import audit, products
from fastflow_jax.runs.directory import claim
from fastflow_jax.runs.fit import Fitted, fit
from fastflow_jax.runs.levels import with_levels

_log = logging.getLogger(__name__)


def default_workdir(config_file: str, config) -> pathlib.Path:
    """The default run directory, runs/<config>-<argument>-<backbone>."""
    file, _, argument = config_file.partition(":")
    parts = [pathlib.Path(file).stem, argument.replace(",", "+").replace("/", "-"), config.backbone]
    return pathlib.Path("runs") / "-".join(filter(None, parts))


def run(config, workdir: str | pathlib.Path) -> dict:
    """Runs every category, variant and seed of a configuration, or continues an interrupted run.

    Args:
      config: filled, see `config.fill`.
      workdir: the run directory. Files of the run are `config.json`, `results.json`, `table.md`,
        `table.csv` and `report.html`, which is written again if it was removed from a finished
        run. `features/` has cached features that do not fit into memory until the run is finished.
        Files of each training are `checkpoints/`, `metrics.jsonl`, `scores.json`, `heatmaps/`,
        `report.html`, and for `Detector.load` `detector.json`, `held_out.npz`, `shift.npz` and
        `roi.npz`. If there are several categories, variants or seeds, each training has a
        subdirectory. Variants that differ only after the training share the training in the
        directory of the first one.

    Returns:
      The content of `results.json`.

    Raises:
      InputError: the data are not usable, the directory is in use or has another run, or training
        diverged.
      Interrupted: SIGTERM or SIGINT was received during training; the state is saved.
    """
    workdir, config = expanded(workdir), with_levels(config)
    check_metrics(config.metrics)
    with claim(workdir, config):
        results = read_json(workdir / "results.json")
        if results is not None:
            results["protocol"]["metrics"] = list(config.metrics)
            if config.report:
                report = workdir / "report.html"
                parallel.on_main(lambda: report.exists() or write_reports(workdir, results))
            _log.info(
                "The run in %s is finished. To train on changed data, pass another --workdir.",
                workdir,
            )
            return results
        opened, names = None, data.categories(config.data)
        if config.one_model and len(names) == 1:
            whole = data.open_dataset(config.data)
            opened = products.discovered(config, whole, workdir / "features")
            names = tuple(opened)
        plan = _plan(config, workdir, names)
        parts, membership = _run_parts(config, workdir, plan, opened)
        results = _summarise(config, parts)
        if config.one_model:
            results["products"] = products.recognition({p.name: p.directory for p in membership})
            names = {p.name: p.directory.relative_to(workdir).as_posix() for p in membership}
            products.write_products(workdir, names)
        write_text(workdir / "table.md", format_markdown(results))
        write_text(workdir / "table.csv", format_csv(results))
        if config.report:
            parallel.on_main(lambda: write_reports(workdir, results))
        parallel.on_main(lambda: shutil.rmtree(workdir / "features", ignore_errors=True))
        write_json(workdir / "results.json", results)
        parallel.on_main(lambda: None)  # all processes wait until the files are written
        _log.info(_advice(parts))
        if len(plan) == 1 or config.one_model:
            predict = f"fastflow-jax predict --workdir={workdir} --input=IMAGES --output=RESULTS"
            _log.info("To score new images, use %s", predict)
        return results


@dataclasses.dataclass(frozen=True)
class _Part:
    """One training and its evaluation."""

    config: ConfigDict  # of the variant
    variant: str | None
    category: str | None
    seed: int
    directory: pathlib.Path
    training: pathlib.Path  # directory of the first part with the same training
    scored: pathlib.Path  # directory of the first part with the same scores
    pictures: int  # largest number of images in its report
    member: products.Membership | None = None  # of a model of several products

    @property
    def file(self) -> pathlib.Path:
        """File of the results, written when the part is finished."""
        return self.directory / "part.json"

    @property
    def name(self) -> str:
        return self.category or self.config.data.name

    @property
    def title(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name


def _run_parts(
    config, workdir: pathlib.Path, plan: list[_Part], opened: dict[str, data.Dataset] | None
) -> tuple[list[dict], list[_Part]]:
    """Runs the parts that are not finished; returns the results of all parts, and the parts.

    Args:
      config: of the run.
      workdir: the run directory.
      plan: the parts.
      opened: data set of each category; None to open those of `config.data`.
    """
    open_category = None if opened is None else lambda name: opened[str(name)]
    prepare = preparer(config, workdir / "features", open_category)
    if config.one_model:
        plan, prepare = _share_training(workdir, plan, prepare)
    done, parts = sum(part.file.exists() for part in plan), []
    bar = {"desc": workdir.name, "unit": "run", "dynamic_ncols": True, "smoothing": 0}
    with tqdm(total=len(plan), initial=done, disable=len(plan) == 1, **bar) as progress:
        for _, group in itertools.groupby(plan, _group_key):
            group = list(group)
            for i, part in enumerate(group):
                finished = read_json(part.file)
                if finished is None:
                    finished = _run_part(part, group[i + 1 :], prepare)
                    progress.update()
                parts.append(finished)
    return parts, plan


def _share_training(
    workdir: pathlib.Path, plan: list[_Part], prepare: Callable[..., Prepared]
) -> tuple[list[_Part], Callable[..., Prepared]]:
    """Trains what the parts share; returns the parts of one model, and their `prepare`."""
    of_all = products.of_several(plan[0].config, len(plan))
    held: dict[str | None, Prepared] = {}
    directory = workdir / products.SHARED
    if not all(part.file.exists() for part in plan):
        held = {part.category: prepare(of_all, part.category, part.seed) for part in plan}
        named = {part.name: held[part.category] for part in plan}
        directory = products.fit_shared(of_all, named, directory, plan[0].seed)
    members = [
        dataclasses.replace(part, config=of_all, member=products.Membership(i, directory))
        for i, part in enumerate(plan)
    ]
    return members, lambda config, category, seed: held.pop(category)


# Fields that do not affect the scores of unchanged images, and fields that do not affect training.
_AFTER_SCORING = (
    "layers_as",  # `layers` has its effect
    *("data.tamper", "data.mask_resize"),
    *("audit", "metrics", "heatmaps", "report", "report_pictures", "parallel"),
)
_AFTER_TRAINING = (
    *_AFTER_SCORING,
    *itertools.chain.from_iterable(method(name).scoring for name in DETECTORS),
)


def _plan(config, workdir: pathlib.Path, categories: tuple[str | None, ...]) -> list[_Part]:
    """The parts of a run in their order: parts that share features follow each other."""
    seeds = [config.seed + i for i in range(config.seeds)]
    pairs = [(category, v) for category in categories for v in variants(config).items()]
    if data.share_images(config.data):  # the categories of a variant share features
        pairs = [(category, v) for v in variants(config).items() for category in categories]
    plan, first = [], {}
    pictures = config.report_pictures // (len(pairs) * len(seeds)) if config.report else 0
    for (category, (variant, changed)), seed in itertools.product(pairs, seeds):
        directory = workdir
        if category and len(categories) > 1:
            directory /= category
        if variant:
            directory /= variant
        if len(seeds) > 1:
            directory /= f"seed_{seed}"
        training, scored = (
            first.setdefault(json.dumps([category, seed, without(changed, after)]), directory)
            for after in (_AFTER_TRAINING, _AFTER_SCORING)
        )
        plan.append(_Part(changed, variant, category, seed, directory, training, scored, pictures))
    features = [feature_fingerprint(part.config, part.seed) for part in plan]
    order = sorted(range(len(plan)), key=lambda i: features.index(features[i]))
    return [plan[i] for i in order]


def _group_key(part: _Part) -> tuple:
    """Key of parts whose trainings differ in their seeds only."""
    return part.category, part.variant, feature_fingerprint(part.config, part.seed)


def _run_part(part: _Part, siblings: list[_Part], prepare: Callable[..., Prepared]) -> dict:
    """Trains and evaluates a part; returns the content of `part.json`.

    Siblings differ in their seeds only; some may be trained in the same program.
    """
    start = time.perf_counter()
    prepared = prepare(part.config, part.category, part.seed)
    seconds = {"features": time.perf_counter() - start}
    dataset = prepared.dataset
    fitted, seconds["train"] = _fit(part, siblings, prepared)
    epochs = parallel.on_main(partial(read_lines, part.training / "metrics.jsonl"))
    results = {
        "name": part.name,
        "variant": part.variant,
        "seed": part.seed,
        "figures": dict.fromkeys(METRICS),
        "best_on_test": _best_on_test(epochs) if part.training == part.directory else None,
        "data": dataset.provenance
        | {
            "trained_on": prepared.n_trained_on,
            "held_out": _n_held_out(prepared),
            "cross_fitted": prepared.n_trained_on
            if part.config.data.folds and not prepared.holdout
            else 0,
        }
        | _test_counts(dataset.test),
        "weights": prepared.backbone.weights,
        "training": os.path.relpath(part.training, part.directory),
        "thresholds": fitted.thresholds,
        "seconds": seconds,
    }
    if dataset.test:
        start = time.perf_counter()
        scored, means = _score_test(part, prepared, fitted.scorer, fitted.places, "test")
        _warn_of_hidden_defects(part, dataset.test, scored)
        given = fitted.thresholds
        limits = Limits(**{of: given[of] and given[of]["value"] for of in ("image", "pixel")})
        results["figures"], details = evaluate(scored, dataset.test.defects, limits)
        results |= {"kinds": details.kinds, "sizes": details.sizes}
        results["shift"] = _shift(part, fitted.reference, dataset.test.names, means)
        if part.member is not None:
            products.write_means(part.directory, means)
        seconds["evaluate"] = time.perf_counter() - start
        _write_pictures(part, prepared, fitted, scored, details.aupimo)
    if not part.variant and part.seed == part.config.seed and prepared.image is None:
        start = time.perf_counter()
        audit.audit_training(part.config, prepared, part.directory, part.category, fitted.scorer)
        seconds["audit"] = time.perf_counter() - start
    results["seconds"] = {k: round(v, 2) for k, v in seconds.items()}
    write_json(part.file, results)
    return results


def _n_held_out(prepared: Prepared) -> int:
    """Number of held-out images."""
    if prepared.holdout_tiles is not None:
        return len(prepared.holdout_tiles.sizes)
    return len(prepared.holdout[0]) if prepared.holdout else 0


def _shift(
    part: _Part, reference: shift.Reference | None, names: Sequence[str], means: np.ndarray
) -> dict | None:
    """Result of `shift.find` as a dict, logged if there is a shift; None without a test.

    Args:
      part: of the run.
      reference: of its training images.
      names: of the test images.
      means: their `extract.image_means`, [N, C].
    """
    if reference is None:
        return None
    distances = dict(zip(names, reference.distances(means).tolist(), strict=True))
    found = shift.find(reference, distances, part.config.data.groups)
    if found is None:
        return None
    if found.message:
        _log.warning("%s: %s", part.title, found.message)
    return dataclasses.asdict(found)


def _test_counts(test: data.Source | None) -> dict:
    if test is None:
        return {}
    defective = int(test.labels.sum())
    return {"test_good": len(test) - defective, "test_defective": defective}


def _fit(part: _Part, siblings: list[_Part], prepared: Prepared) -> tuple[Fitted, float]:
    """Fits a part; also returns the seconds of its training, over all interrupted processes.

    Evaluations after an epoch and the training of siblings are not counted.
    """
    config = part.config
    tested = 0.0

    def on_epoch(epoch: int, make_scorer: Callable[[], Scorer]) -> dict:
        nonlocal tested
        every = config.evaluate_every
        if not (prepared.dataset.test and every and epoch % every == 0):
            return {}
        start = time.perf_counter()
        scored, _ = _score_test(part, prepared, make_scorer(), None, f"epoch {epoch}")
        figures = measure(scored)
        tested += time.perf_counter() - start
        return {"test": figures}

    def in_epochs(*parts: _Part) -> float:
        """Seconds of all finished epochs of parts."""
        files = (p.training / "metrics.jsonl" for p in parts)
        epochs = itertools.chain(*(parallel.on_main(partial(read_lines, f)) for f in files))
        return sum(epoch["seconds"] for epoch in epochs)

    before, of_siblings = in_epochs(part), in_epochs(*siblings)
    fitted = fit(
        config,
        prepared,
        seed=part.seed,
        directory=part.directory,
        training=part.training,
        scored=part.scored,
        sibling_runs=tuple((sibling.seed, sibling.training) for sibling in siblings),
        member=part.member,
        on_epoch=on_epoch,
        label=f"{part.title}: train",
    )
    seconds_file = part.training / "seconds.json"
    took = read_json(seconds_file)
    if took is None:  # otherwise another part was trained in this directory
        of_siblings = in_epochs(*siblings) - of_siblings
        took = {"train": before + fitted.seconds - tested - of_siblings}
        write_json(seconds_file, took)
    return fitted, took["train"]


def _score_test(
    part: _Part, prepared: Prepared, scorer: Scorer, places: Places | None, progress: str
) -> tuple[Scored, np.ndarray]:
    """Scores of the test images, and their `image_means` [N, C]; see `Fitted`."""
    test = prepared.dataset.test
    assert test is not None
    by_index: dict[int, np.ndarray] = {}

    def batches() -> Iterator[FeatureBatch]:
        for batch in prepared.test():
            found = image_means(batch.features, batch.valid)
            by_index.update(zip(batch.index.tolist(), found, strict=True))
            yield batch

    title, tiles = f"{part.title}: {progress}", prepared.test_tiles
    if tiles is not None:
        scored = score_tiles(scorer.score, batches(), tiles, places, progress=title)
        means = np.stack([by_index[i] for i in range(len(by_index))])
        return scored, image_means_of(means, tiles.image)
    scored = score_split(scorer.score, batches(), len(test), progress=title)
    means = np.stack([by_index[i] for i in range(len(test))])
    if test.regions is None:
        return scored, means
    resize = tuple(part.config.image_size), part.config.data.resize, part.config.data.mask_resize
    regions_of, valid = test.regions, scored.valid

    def regions(i: int) -> Regions:
        found = regions_as_input(regions_of(i), *resize)
        if valid is None:
            return found
        masks = found.masks & valid[i]
        remain = masks.any((1, 2))
        return Regions(masks[remain], found.saturation[remain])

    return scored._replace(regions=regions), means


def _warn_of_hidden_defects(part: _Part, test: data.Source, scored: Scored) -> None:
    """Warns of defective images that have no defective pixel in their region of interest."""
    section = part.config.data
    if scored.masks is None or (section.roi is None and section.roi_dir is None):
        return
    is_hidden = (scored.labels == 1) & ~np.array([mask.any() for mask in scored.masks])
    if is_hidden.any():
        _log.warning(
            "%s: %d of %d defective test images have no defect in the region of interest, such as "
            "%s. They count as defective in image metrics, and not in pixel metrics.",
            part.title,
            is_hidden.sum(),
            scored.labels.sum(),
            test.names[int(is_hidden.argmax())],
        )


def _best_on_test(epochs: list[dict]) -> dict | None:
    """Best value of each metric over epochs, chosen on test images: for study, not a result."""
    rows = [epoch["test"] for epoch in epochs if "test" in epoch]
    if not rows:
        return None
    # Epochs of earlier versions lack newer metrics, and so do their parts.
    values = {m: [row[m] for row in rows if row.get(m) is not None] for m in METRICS}
    return {m: max(v, default=None) for m, v in values.items()}


def _write_pictures(
    part: _Part,
    prepared: Prepared,
    fitted: Fitted,
    scored: Scored,
    aupimo: list[float | None] | None,
) -> None:
    """Writes heat maps and the images of the report."""
    config, test, tiles = part.config, prepared.dataset.test, prepared.test_tiles
    assert test is not None

    def maps_of(indices) -> Iterable[np.ndarray]:
        if scored.maps is not None:
            return (scored.maps[i] for i in indices)
        found = (fitted.scorer.score(b.features, b.valid) for b in prepared.test(indices))
        if tiles is not None:
            wholes = tiles.whole(tiles.rows(indices), found, fitted.places)
            return (whole.anomaly_map for whole in wholes)
        return (m for _, maps in found for m in maps)

    def placed(size: tuple[int, int]) -> Placement:
        if tiles is not None:  # maps have the size of the image, and may be padded
            return placement(size, size, "square")
        return placement(size, tuple(config.image_size), config.data.resize)

    write_pictures(
        part.directory,
        test,
        scored,
        maps_of,
        heatmaps=config.heatmaps,
        strips=part.pictures,
        placed=placed,
        threshold=fitted.thresholds["pixel"],
        aupimo=aupimo,
    )


def _summarise(config, parts: list[dict]) -> dict:
    """The content of `results.json`, given the results of all parts.

    Metrics of each variant are in "variants"; those of the first variant are also at the top level.
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
            "levels": str(Levels.of(config.data) or "high byte of 16 bits"),
            "roi": config.data.roi or config.data.roi_dir,
            "masks": _masks(config),
            "tile": config.data.tile,
            "aupro_fpr_limit": 0.3,
            "metrics": list(config.metrics),  # in tables
            "dataset": config.data.name,
            "std": "over seeds, of the mean over categories (n - 1)",
            "backbone": config.backbone,
            "weights": parts[0]["weights"],  # of the first seed, if they are random
            "licence": licence(parts[0]["weights"]),
            "image_size": list(config.image_size),
            "holdout": config.data.holdout,
            "tamper": to_plain(config.data.tamper),
            "seeds": [int(seed) for seed in figures[names[0]]["seeds"]],
            "data": {
                name: next(part["data"] for part in parts if part["name"] == name)
                for name in categories
            },
        },
        # The time to compute shared features is part of the first part that uses them.
        "seconds": {_key(part): part["seconds"] for part in parts},
        "shift": {_key(part): part.get("shift") for part in parts},  # see `shift.find`
        # Of kinds of defects and of regions by size, see `evaluate.Details`
        "kinds": {_key(part): part.get("kinds") for part in parts},
        "sizes": {_key(part): part.get("sizes") for part in parts},
        "versions": {
            "python": platform.python_version(),
            "fastflow-jax": fastflow_jax.__version__,
            **{p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")},
            "device": parallel.device_description(),
        },
    }


def _masks(config) -> str:
    """Size at which masks and maps are compared."""
    how, resolution = config.data.mask_resize, config.data.resolution
    if config.data.tile is None:
        return f"resized to the input size, {how}"
    if resolution is None:
        return "at the size of the image"
    return f"resized to a longer side of {resolution}, {how}"


def _key(part: dict) -> str:
    """Name, variant and seed of a part, such as "bottle/0"."""
    return "/".join(filter(None, (part["name"], part["variant"], str(part["seed"]))))


def _figures(parts: list[dict]) -> dict:
    """Mean metrics of each category over seeds, and their mean over categories."""
    names = list(dict.fromkeys(part["name"] for part in parts))
    seeds = list(dict.fromkeys(part["seed"] for part in parts))

    def over(rows, statistic):
        values = {m: [row.get(m) for row in rows] for m in METRICS}
        return {m: None if None in v else float(statistic(v)) for m, v in values.items()}

    def mean(rows):
        return over(rows, np.mean)

    def of(name, key):
        return [part[key] for part in parts if part["name"] == name]

    categories = {name: mean(of(name, "figures")) for name in names}
    by_seed = {s: mean([p["figures"] for p in parts if p["seed"] == s]) for s in seeds}
    std = over(by_seed.values(), partial(np.std, ddof=1)) if len(seeds) > 1 else None
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
    """Advice on the part with the fewest held-out images, see `advice.after_training`."""
    part = min(parts, key=lambda part: (part["thresholds"]["image"] or {"n": 0})["n"])
    which = f"{part['name']}: " if len({part["name"] for part in parts}) > 1 else ""
    figures = part["thresholds"]["image"], part["data"], part["figures"]["image_auroc"]
    return which + advice.after_training(*figures)
