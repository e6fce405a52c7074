"""Scores the images of one shard, in this process or by Ray."""

import dataclasses
import logging
import os
from collections.abc import Iterator

import pyarrow as pa
from tqdm import tqdm

from fastflow_jax.batch import Options
from fastflow_jax.batch.items import Item, Shard, chunks, find_items
from fastflow_jax.batch.results import opened
from fastflow_jax.batch.scorer import Scorer
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded
from fastflow_jax.predict import summarise

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Part:
    """Which images are scored, and by whom, see `batch.run`."""

    shard: str
    part_rows: int
    ray: int


def score(
    model: str | os.PathLike,
    inputs: str,
    output: str | os.PathLike,
    column: str,
    options: Options,
    part: Part,
) -> int:
    """Scores the images of a shard that have no results; returns the exit status of `batch.run`."""
    if part.ray < 0 or part.part_rows < 1:
        raise InputError(
            f"{part.ray} Ray workers or files of {part.part_rows} rows are impossible. Pass 0 or "
            "more workers, and 1 row or more."
        )
    shard, output = Shard.parse(part.shard), expanded(output)
    items = find_items(inputs, column, shard)
    scorer = Scorer(model, options)
    settings = {"fingerprint": scorer.fingerprint}
    settings |= {name: getattr(options, name) for name in ("rate", "tile", "maps")}
    with opened(output, shard, settings, part.part_rows) as results:
        results.keep(items)
        if results.done:
            _log.info("%d images already have results. Continuing.", len(results.done))
        todo = [item for path, item in items.items() if path not in results.done]
        style = {"desc": "batch", "unit": "img", "dynamic_ncols": True, "smoothing": 0}
        with tqdm(total=len(items), initial=len(results.done), **style) as bar:
            for table in _tables(model, options, scorer, todo, part.ray):
                results.add(table)
                _warn(table)
                bar.update(len(table["path"].unique()))
    return summarise(results.counts, 0, output, scorer.detector.image_threshold is not None)


def _tables(
    model: str | os.PathLike, options: Options, scorer: Scorer, todo: list[Item], workers: int
) -> Iterator[pa.Table]:
    """The results of images, in any order."""
    if workers and todo:
        from fastflow_jax.batch.on_ray import score_on_ray

        yield from score_on_ray(os.path.abspath(expanded(model)), options, todo, workers)
    else:
        yield from map(scorer, chunks(todo))


def _warn(table: pa.Table) -> None:
    for error in filter(None, table["error"].to_pylist()):
        _log.warning("skipped: %s", error)
