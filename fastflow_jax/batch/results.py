"""Parquet files of results: written completely or not at all, read again to continue."""

import contextlib
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastflow_jax.batch.items import Item, Shard
from fastflow_jax.batch.scorer import as_text
from fastflow_jax.errors import InputError
from fastflow_jax.files import lock, make_folder, parse_json, replacing, write_json

_SETTINGS = "_settings.json"  # readers of Parquet directories skip names with an underscore
_STATE = ("path", "pages", "score", "is_anomalous", "error", "bytes", "modified_ns")
_MAX_BYTES = 64 * 2**20  # of rows in memory


def outcome(row: Mapping[str, Any]) -> str:
    """The outcome of a row, as `predict.summarise` counts it."""
    if row["score"] is None:
        return "unreadable"
    return "anomalous" if row["is_anomalous"] else "normal"


class Results:
    """The files of one shard in an output directory.

    Attributes:
      done: paths of images that have results.
      counts: number of rows per outcome, of images of this shard.
    """

    def __init__(self, folder: pathlib.Path, shard: Shard, part_rows: int):
        self.folder, self.done, self.counts = folder, set[str](), Counter[str]()
        self._shard, self._part_rows = shard, part_rows
        self._waiting: list[pa.Table] = []
        names = [path.stem.rpartition("-")[2] for path in folder.glob(f"{shard.name}-part-*")]
        self._next = 1 + max((int(name) for name in names if name.isdecimal()), default=0)

    def keep(self, items: Mapping[str, Item]) -> None:
        """Fills `done` with the images whose results are valid; removes other rows of `items`.

        Results are valid if image and rows are complete, without an error, and the file has the
        same size and modification time. Those of two processes for the same image are not.
        """
        names = {as_text(path): path for path in items}
        found: dict[str, list[dict]] = {}
        parts: dict[str, set[pathlib.Path]] = {}
        for part in sorted(self.folder.glob("shard-*-part-*.parquet")):
            for row in _read(part, _STATE).to_pylist():
                if row["path"] in names:
                    found.setdefault(row["path"], []).append(row)
                    parts.setdefault(row["path"], set()).add(part)
        stale: dict[pathlib.Path, set[str]] = {}
        for name, rows in found.items():
            if _are_valid(rows, items[names[name]]):
                self.done.add(names[name])
                self.counts.update(map(outcome, rows))
            else:
                for part in parts[name]:
                    stale.setdefault(part, set()).add(name)
        if stale:
            with lock(self.folder / ".lock", lambda: None):
                for part, paths in stale.items():
                    table = _read(part)
                    is_kept = [path not in paths for path in table["path"].to_pylist()]
                    _write(part, table.filter(pa.array(is_kept)))

    def add(self, table: pa.Table) -> None:
        """Adds rows, and writes a file when there are enough."""
        self.counts.update(map(outcome, table.select(["score", "is_anomalous"]).to_pylist()))
        self._waiting.append(table)
        rows, size = (sum(getattr(t, a) for t in self._waiting) for a in ("num_rows", "nbytes"))
        if rows >= self._part_rows or size >= _MAX_BYTES:
            self.write()

    def write(self) -> None:
        """Writes the rows that are not written yet."""
        if self._waiting:
            name = f"{self._shard.name}-part-{self._next:06}.parquet"
            _write(self.folder / name, pa.concat_tables(self._waiting))
            self._waiting, self._next = [], self._next + 1


@contextlib.contextmanager
def opened(
    folder: pathlib.Path, shard: Shard, settings: dict[str, Any], part_rows: int
) -> Iterator[Results]:
    """Opens an output directory for one process per shard; writes the last rows at the end.

    Args:
      folder: the directory, which is created if it does not exist.
      shard: the shard that is scored.
      settings: fingerprint and options, which must be the same for all results of a directory.
      part_rows: number of rows of a file.

    Raises:
      InputError: the directory has results with other settings, or another process scores the
        shard.
    """

    def refuse() -> None:
        raise InputError(
            f"Another process writes shard {shard.index}/{shard.count} to {folder}. Wait until it "
            "ends, or pass another --shard or --output."
        )

    make_folder(folder)
    with lock(folder / f".{shard.name}.lock", refuse):
        with lock(folder / ".lock", lambda: None):
            _check_settings(folder, settings)
        for left in folder.glob(f"{shard.name}-part-*.tmp"):  # of a killed process
            left.unlink(missing_ok=True)
        results = Results(folder, shard, part_rows)
        try:
            yield results
        finally:  # also when it is interrupted
            results.write()


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    file = folder / _SETTINGS
    if not file.exists():
        write_json(file, settings)
        return
    known = parse_json(file)
    if known != settings:
        names = [name for name in settings if known.get(name) != settings[name]]
        raise InputError(
            f"{folder} has results with another {' and '.join(names)}. Pass another --output, or "
            "the same detector and options."
        )


def _are_valid(rows: list[dict], item: Item) -> bool:
    return item.size_and_time() == (rows[0]["bytes"], rows[0]["modified_ns"]) and all(
        row["error"] is None and row["pages"] == len(rows) for row in rows
    )


def _read(part: pathlib.Path, columns: tuple[str, ...] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(part) as file:
            return file.read(None if columns is None else list(columns))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputError(
            f"{part} cannot be read ({error}). Delete it to score its images again."
        ) from error


def _write(part: pathlib.Path, table: pa.Table) -> None:
    with replacing(part, "wb") as file:
        pq.write_table(table, file, compression="zstd")
