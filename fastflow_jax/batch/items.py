"""Images to score: of directories, patterns, manifests and Parquet files, in shards."""

import csv
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fastflow_jax.data.arrays import Given
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded
from fastflow_jax.predict import find_images

CHUNK = 100  # images that are scored together and then stored


class Cell(NamedTuple):
    """Place of the content of an image file in a Parquet file."""

    file: str  # path of the Parquet file
    column: str  # with the contents of image files
    group: int  # row group
    row: int  # in the row group


class Item(NamedTuple):
    """One image file."""

    path: str  # its path, or a unique name for its content
    content: bytes | None = None  # of the file; None if it is read when it is scored
    cell: Cell | None = None  # place of its content, read when it is scored

    def given(self) -> Given:
        """Returns the image for `Predictor.stream`; a cell that cannot be read has an error."""
        if self.cell is None:
            path = pathlib.Path(self.path) if self.content is None else None
            return Given(self.path, path=path, content=self.content)
        try:
            file, column, group, row = self.cell
            content = _contents(file, column, group)[row].as_py()
        except (OSError, IndexError, pa.ArrowException) as error:
            problem = f"{self.path} cannot be read: {error}. Write {self.cell.file} again."
            return Given(self.path, error=InputError(problem))
        if not content:
            return Given(self.path, error=InputError(f"{self.path} is empty. Remove the row."))
        return Given(self.path, content=content)

    def size_and_time(self) -> tuple[int | None, int | None]:
        """Size in bytes and modification time in ns of the file with the image; None if missing."""
        if self.content is not None:
            return len(self.content), None
        try:
            stat = os.stat(self.path if self.cell is None else self.cell.file)
        except (OSError, ValueError):
            return None, None
        return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(1)  # consecutive items have the same row group
def _contents(file: str, column: str, group: int) -> Any:
    with pq.ParquetFile(file) as parquet:
        return parquet.read_row_group(group, [column]).column(0)


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index`, from 1, of `count` parts of the images."""

    index: int  # from 1 to `count`
    count: int  # number of shards

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Parses "3/16".

        Args:
          text: number of the shard, and number of shards.

        Raises:
          InputError: it is not of this form, or there is no such part.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(
                f"The shard {text!r} does not exist. Pass a number and the number of shards: 1/16 "
                "to 16/16."
            )
        return cls(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        """Beginning of the names of its files."""
        return f"shard-{self.index:05}-of-{self.count:05}"

    def has(self, key: int) -> bool:
        """Whether it is the shard of an image with this hash.

        Args:
          key: hash of the image's path, or of its row group.
        """
        return key % self.count == self.index - 1


def find_items(inputs: str, column: str, shard: Shard) -> dict[str, Item]:
    """Finds the images of a shard.

    The shard of a file is decided by its path, that of a cell by its row group.

    Args:
      inputs: one of
        - a directory, an image file or a glob pattern of these, see `predict.find_images`;
        - a `.txt` file with a path per line;
        - a `.csv` file with a header, or a `.jsonl` file of objects, with a column of paths;
        - a `.parquet` file, or a directory of that suffix with such files, with a column of paths
          or of the content of image files. An image is then named `<file>:<row>`, from 0.
        A glob pattern of that suffix stands for several such files. Paths that are not absolute
        are relative to the directory of the file that names them. Images that are named twice are
        scored once.
      column: name of that column.
      shard: the part to return.

    Returns:
      The images by path.

    Raises:
      InputError: there are no images in any shard, no such column, or a row without a path.
    """
    read = _READERS.get(pathlib.PurePath(inputs).suffix.lower())
    if read is None:
        return {path: Item(path) for path in find_images(inputs).names if shard.has(_hash(path))}
    found, count, groups = {}, 0, itertools.count()
    for file in _files(inputs):
        at = os.path.dirname(file)
        for row, value in enumerate(_rows(read, file, column)):
            count += 1
            if isinstance(value, Cell):
                if value.row == 0:
                    group = next(groups)
                item = Item(f"{file}:{row}", cell=value)
                key = group
            else:
                if not isinstance(value, str) or not value:
                    raise InputError(f"Row {row} of {file} has no path. Remove the row.")
                item = Item(_absolute(at, value))
                key = _hash(item.path)
            if shard.has(key):
                found.setdefault(item.path, item)
    if not count:
        raise InputError(f"{inputs} has no images. Add rows, or pass another file.")
    return found


def chunks(items: list[Item], *, whole_groups: bool = False) -> Iterator[list[Item]]:
    """Splits images into lists of up to `CHUNK`, or of all images of a row group.

    Args:
      items: images in the order of their paths or rows.
      whole_groups: whether a list has all images of a row group of a Parquet file, whatever their
        number.
    """
    for place, same in itertools.groupby(items, lambda item: item.cell and item.cell[:3]):
        several = list(same)
        size = len(several) if whole_groups and place else CHUNK
        yield from (several[i : i + size] for i in range(0, len(several), size))


def _hash(path: str) -> int:
    """Hash of a path, the same in all processes."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "big")


def _absolute(folder: str, path: str) -> str:
    """The path of a file that a file in `folder` names."""
    if path.startswith(("~", "file:")) or "://" in path:
        return str(expanded(path))
    return os.path.join(folder, path)


def _files(inputs: str) -> list[str]:
    """The files of a path or pattern; of a directory, the files in it of the same suffix."""
    path = expanded(inputs)
    if path.is_file():
        return [str(path)]
    pattern = os.path.join(glob.escape(str(path)), f"*{path.suffix}") if path.is_dir() else path
    files = sorted(filter(os.path.isfile, glob.glob(str(pattern), recursive=True)))
    if not files:
        raise InputError(f"{inputs} was not found. Pass a file, or a pattern in quotes.")
    return files


def _rows(read: Callable, file: str, column: str) -> Iterator[Any]:
    """The rows of a file; errors of its form end in one message."""
    try:
        yield from read(file, column)
    except KeyError as error:
        names = ", ".join(error.args[0])
        raise InputError(
            f"{file} has no column {column!r}. Pass one of its columns as --column: {names}."
        ) from error
    except OSError as error:
        raise InputError(
            f"{file} cannot be read: {error.strerror or error}. Check its permissions, or write it "
            "again."
        ) from error
    except (ValueError, TypeError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is damaged ({error}). Write it again.") from error


def _lines(file: str, column: str) -> Iterator[str]:
    del column
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as opened:
        yield from filter(None, (line.rstrip("\r\n") for line in opened))


def _csv(file: str, column: str) -> Iterator[str]:
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        reader = csv.DictReader(opened)
        if column not in (names := reader.fieldnames or ()):
            raise KeyError(names)
        yield from (row[column] for row in reader)


def _jsonl(file: str, column: str) -> Iterator[str]:
    for line in filter(str.strip, _lines(file, column)):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise TypeError(f"{line!r} is not an object")
        if column not in row:
            raise KeyError(list(row))
        yield row[column]


def _parquet(file: str, column: str) -> Iterator[str | Cell]:
    with pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        if column not in schema.names:
            raise KeyError(schema.names)
        kind: Any = schema.field(column).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        has_contents = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        if not has_contents and not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
            raise InputError(
                f"The column {column!r} of {file} has the type {kind}. Pass a column of paths "
                "(string) or of image files (binary)."
            )
        for group in range(parquet.num_row_groups):
            if has_contents:
                rows = range(parquet.metadata.row_group(group).num_rows)
                yield from (Cell(file, column, group, row) for row in rows)
            else:
                yield from parquet.read_row_group(group, [column]).column(0).to_pylist()


_READERS = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
