"""One experiment: data, features, training, evaluation, and the run folder that keeps them."""

import dataclasses
import functools
import importlib.metadata
import itertools
import json
import pathlib
import platform
import time

import jax
import numpy as np
from tqdm import tqdm

import fastflow_jax
from fastflow_jax import data
from fastflow_jax.backbones import Backbone, create_backbone
from fastflow_jax.checkpoints import Checkpoints
from fastflow_jax.data.pipeline import batches
from fastflow_jax.describe import flow_model
from fastflow_jax.detector import FastFlowDetector, calibrate
from fastflow_jax.evaluate import METRICS, Scored, measure, score_split
from fastflow_jax.features import (
    Features,
    TrainingFeatures,
    cache,
    cached_features,
    extractor,
    recomputed_features,
)
from fastflow_jax.report.heatmaps import draw_heatmap, save_picture
from fastflow_jax.report.table import format_table
from fastflow_jax.run_folder import check_same_data, claim, write_json
from fastflow_jax.train import TrainState, train


def default_workdir(config_file: str, config) -> pathlib.Path:
    """runs/<config>-<argument>-<backbone>."""
    file, _, argument = config_file.partition(":")
    parts = [pathlib.Path(file).stem, argument.replace(",", "+"), config.backbone]
    return pathlib.Path("runs") / "-".join(filter(None, parts))


def run(config, workdir: str | pathlib.Path) -> dict:
    """Run every category and seed of a filled configuration, or what is left of them.

    Args:
      config: see `config.fill`.
      workdir: the run folder: `config.json`, `results.json`, and, in it or in a sub-folder for
        each category and seed where there are several, `checkpoints/`, `metrics.jsonl` and
        `heatmaps/`.

    Returns:
      What stands in `results.json`.

    Raises:
      InputError: bad data, a folder of another configuration or in use, diverging training.
      Interrupted: SIGTERM or SIGINT came while training; the state is saved.
    """
    workdir = pathlib.Path(workdir)
    with claim(workdir, config):
        results_file = workdir / "results.json"
        if results_file.exists():
            results = json.loads(results_file.read_text())
            print(f"{workdir} holds this run, finished:\n\n{format_table(results)}")
            return results
        categories = data.categories(config.data)
        seeds = [config.seed + i for i in range(config.seeds)]
        parts = []
        for category in categories:
            prepare = functools.lru_cache(1)(functools.partial(_prepare, config, category))
            name = category or config.data.name
            for seed in seeds:
                folder = workdir
                if len(categories) > 1:
                    folder /= category
                if len(seeds) > 1:
                    folder /= f"seed_{seed}"
                parts.append(_run_part(config, prepare, name, seed, folder))
        results = _summarise(config, parts)
        write_json(results_file, results)
        print(f"\n{format_table(results)}\n\nRun folder: {workdir}")
        return results


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What all seeds of a category share."""

    dataset: data.Dataset
    backbone: Backbone
    train: TrainingFeatures
    holdout: Features | None
    seconds: float


def split_holdout(n: int, part: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out: every so many-th image, in file order.

    A fixed choice, the same for all seeds. At least one image is left on either side.
    """
    if part == 0 or n < 2:
        return np.arange(n), np.arange(0)
    every = min(round(1 / part), n)
    held = np.arange(n) % every == every - 1
    return np.flatnonzero(~held), np.flatnonzero(held)


def _prepare(config, category: str | None, weights_seed: int) -> _Prepared:
    """Open the data, then fetch weights, then compute the features once.

    `weights_seed` is that of random weights, where these are asked for.
    """
    start = time.perf_counter()
    section = config.data.copy_and_resolve_references()
    section.category = category
    dataset = data.open_dataset(section)
    backbone = create_backbone(
        config.backbone, weights=config.weights, layers=config.layers, seed=weights_seed
    )
    train, held_out = split_holdout(len(dataset.train), config.data.holdout)
    extract = extractor(backbone, config.length_power, config.parallel, config.train.batch_size)

    def stream(indices, batch_size):
        return _batches(config, backbone, dataset.train, indices, batch_size)

    def cached(indices, what):
        batches = stream(indices, config.train.batch_size)
        return cache(extract, batches, len(indices), progress=f"{category or dataset.name}: {what}")

    if config.train.cache:
        features = cached_features(cached(train, "features"), config.flow.norm)
    else:
        features = recomputed_features(
            len(train),
            lambda epoch, rows, size: stream(train[rows], size),
            extract,
            config.flow.norm,
            config.train.batch_size,
        )
    holdout = cached(held_out, "held-out features") if len(held_out) else None
    return _Prepared(dataset, backbone, features, holdout, time.perf_counter() - start)


def _batches(config, backbone: Backbone, source: data.Source, indices=None, batch_size=None):
    """Images as the backbone takes them."""
    return batches(
        source,
        image_size=config.image_size,
        mean=backbone.spec.mean,
        std=backbone.spec.std,
        batch_size=batch_size or config.train.batch_size,
        indices=indices,
    )


def _run_part(config, prepare, name: str, seed: int, folder: pathlib.Path) -> dict:
    """Train and evaluate one category with one seed, or read what an earlier process left."""
    part_file = folder / "part.json"
    if part_file.exists():
        return json.loads(part_file.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    # Each seed of the control has an untrained backbone of its own.
    prepared: _Prepared = prepare(seed if config.weights == "random" else config.seed)
    dataset = prepared.dataset
    check_same_data(folder, list(dataset.train.names))
    model = flow_model(config)

    def score_test(state: TrainState, progress: str) -> Scored:
        calibration = calibrate(config, model, state.variables, prepared.holdout)
        detector = FastFlowDetector(config, prepared.backbone, model, state.variables, calibration)
        stream = _batches(config, prepared.backbone, dataset.test)
        return score_split(detector.score, stream, len(dataset.test), progress=progress)

    def on_epoch(epoch: int, state: TrainState) -> dict:
        if dataset.test and config.evaluate_every and epoch % config.evaluate_every == 0:
            return {"test": measure(score_test(state, f"{name}: epoch {epoch}"))}
        return {}

    metrics_file = folder / "metrics.jsonl"
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state = train(
            config,
            model,
            prepared.train,
            prepared.holdout,
            seed=seed,
            checkpoints=checkpoints,
            metrics_file=metrics_file,
            on_epoch=on_epoch,
            progress=f"{name}: train",
        )
        best_step = checkpoints.best
    epochs = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    part = {
        "name": name,
        "seed": seed,
        "figures": dict.fromkeys(METRICS),
        "best_on_test": _best_on_test(epochs),
        "best_holdout_step": best_step,
        "data": dataset.provenance
        | {
            "trained_on": prepared.train.n,
            "held_out": len(prepared.holdout[0]) if prepared.holdout else 0,
        },
        "weights": prepared.backbone.weights,
        "seconds": {"features": prepared.seconds, "train": sum(e["seconds"] for e in epochs)},
    }
    if dataset.test:
        start = time.perf_counter()
        scored = score_test(state, f"{name}: test")
        part["figures"] = measure(scored)
        part["seconds"]["evaluate"] = time.perf_counter() - start
        _write_heatmaps(config, dataset.test, scored, folder / "heatmaps")
    part["seconds"] = {k: round(v, 2) for k, v in part["seconds"].items()}
    write_json(part_file, part)
    return part


def _best_on_test(epochs: list[dict]) -> dict | None:
    """The best figure of each metric over the epochs that were tested: not an honest result."""
    rows = [epoch["test"] for epoch in epochs if "test" in epoch]
    if not rows:
        return None
    values = {m: [row[m] for row in rows if row[m] is not None] for m in METRICS}
    return {m: max(v, default=None) for m, v in values.items()}


def _write_heatmaps(config, source: data.Source, scored: Scored, folder: pathlib.Path) -> None:
    """Pictures of the highest scores, defective and good in turn, on one colour scale."""
    ranked = np.argsort(-scored.scores, kind="stable")
    good, bad = (ranked[scored.labels[ranked] == label] for label in (0, 1))
    turns = itertools.zip_longest(bad, good)
    chosen = [i for turn in turns for i in turn if i is not None][: config.heatmaps]
    # From the typical pixel to the highest that a good image reaches, but for outliers.
    normal = scored.maps[scored.labels == 0] if (scored.labels == 0).any() else scored.maps
    low, high = np.quantile(normal, 0.5), np.quantile(normal, 0.999)
    for i in tqdm(chosen, desc="heat maps", unit="img", leave=False, dynamic_ncols=True):
        example = source[int(i)]
        picture = draw_heatmap(
            example.image,
            scored.maps[i],
            low=low,
            high=high + (high - low),
            mask=example.mask,
            title=f"{example.name}  score {scored.scores[i]:.3f}",
        )
        save_picture((folder / example.name).with_suffix(".png"), picture)


def _summarise(config, parts: list[dict]) -> dict:
    """What `results.json` holds, from the parts of all categories and seeds."""
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
        "protocol": {
            "epoch": "last",
            "chosen_on_test_data": "nothing",
            "masks": "resized to the input size, nearest",
            "aupro_fpr_limit": 0.3,
            "std": "over seeds, of the mean over categories (n - 1)",
            "backbone": config.backbone,
            "weights": parts[0]["weights"],  # of the first seed, where they are random
            "image_size": list(config.image_size),
            "holdout": config.data.holdout,
            "seeds": seeds,
            "data": {name: of(name, "data")[0] for name in names},
        },
        # Features are computed once for all seeds of a category, and told with each.
        "seconds": {"/".join((p["name"], str(p["seed"]))): p["seconds"] for p in parts},
        "versions": {
            "python": platform.python_version(),
            "fastflow-jax": fastflow_jax.__version__,
            **{p: importlib.metadata.version(p) for p in ("jax", "flax", "optax")},
            "device": f"{jax.local_device_count()} x {jax.devices()[0].device_kind}",
        },
    }
