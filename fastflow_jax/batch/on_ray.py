"""Scores of images by the workers of a Ray cluster, with Ray Data."""

import contextlib
import os
from collections.abc import Iterator

import pyarrow as pa
import ray  # pyright: ignore[reportMissingImports]
import ray.data  # pyright: ignore[reportMissingImports]

from fastflow_jax.batch import Options
from fastflow_jax.batch.items import Cell, Item, chunks
from fastflow_jax.batch.scorer import Scorer


class _Worker:
    """A `Scorer` of tables of items, whose relative paths are those of the directory `folder`."""

    def __init__(self, model: str, options: Options, folder: str):
        with contextlib.suppress(OSError):  # another machine needs it for relative paths only
            os.chdir(folder)
        self._scorer = Scorer(model, options)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._scorer(
            [
                Item(path, cell=None if file is None else Cell(file, *place))
                for path, file, *place in zip(*table.to_pydict().values(), strict=True)
            ]
        )


def score_on_ray(
    model: str, options: Options, items: list[Item], workers: int
) -> Iterator[pa.Table]:
    """Yields the results of images, in any order.

    Uses the cluster that this process is connected to or that RAY_ADDRESS names, and otherwise
    starts Ray on this machine until the end.

    Args:
      model: absolute path of the detector, which all machines of the cluster can read, as well as
        the images.
      options: how images are scored.
      items: the images.
      workers: largest number of worker processes, each with one CPU.
    """
    is_own = not ray.is_initialized()
    if is_own:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        tables = [_to_table(chunk) for chunk in chunks(items, whole_groups=True)]
        scored = ray.data.from_arrow(tables).map_batches(
            _Worker,
            fn_constructor_args=(model, options, os.getcwd()),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(tables))),
            num_cpus=1,
        )
        yield from scored.iter_batches(batch_size=None, batch_format="pyarrow")
    finally:
        if is_own:
            ray.shutdown()


_COLUMNS = pa.schema(
    [
        *(("path", pa.string()), ("file", pa.string()), ("column", pa.string())),
        *(("group", pa.int64()), ("row", pa.int64())),
    ]
)


def _to_table(items: list[Item]) -> pa.Table:
    rows = [{"path": item.path, **(item.cell._asdict() if item.cell else {})} for item in items]
    return pa.Table.from_pylist(rows, _COLUMNS)
