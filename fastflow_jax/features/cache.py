"""Cache of the features of many images, in memory or on disk.

On disk, each scale has a file of raw rows. A record next to them names the fingerprint of the
features and the checksums of each complete block of images. A block is reused only if fingerprint
and checksums agree, so that files of an interrupted run, of another run or with errors are never
taken for valid: only the missing blocks are computed.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import IO

import jax
import numpy as np
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.errors import InputError
from fastflow_jax.files import create_folder

# "auto" uses the first of the next three that has room. "device" is "memory", with a copy on the
# devices during training, so that an epoch is one program; on CPU the two are the same. "none"
# computes the features again each time.
CACHE_LOCATIONS = ("auto", "device", "memory", "disk", "none")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of an array that may be on disk; they are read when indexed."""

    array: np.ndarray
    rows: np.ndarray  # int [M]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.array.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        return self.array[self.rows[index]]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def load_or_compute(
    compute: Callable[[np.ndarray], Iterable[tuple[np.ndarray, ...]]],
    fingerprint: dict,
    names: Sequence[str],
    maps: Sequence[jax.ShapeDtypeStruct],
    *,
    block: int,
    location: str,
    folder: pathlib.Path,
    title: str,
) -> tuple[np.ndarray, ...]:
    """Features of N images, [N, h, w, C] per scale, each computed once.

    Logs where they are cached.

    Args:
      compute: function of rows [M] that yields the features of these images, `block` at a time.
      fingerprint: every setting that the features depend on, as JSON values. Features on disk with
        another fingerprint are computed again.
      names: name of each image; part of the fingerprint.
      maps: shape [b, h, w, C] and dtype of each scale.
      block: number of images that are computed together, and on disk checked together.
      location: one of `CACHE_LOCATIONS`.
      folder: directory for features on disk and nothing else. It may hold features of an earlier
        run.
      title: names the images in messages and progress bars.

    Raises:
      InputError: the disk is too full.
    """
    n, size = len(names), n_bytes(len(names), maps)
    on_disk = location == "disk" or (
        location == "auto" and size > parallel.available_host_memory() / 2
    )
    on_disk = parallel.any_process(on_disk)
    place = f"on disk, {folder}" if on_disk else "in memory"
    _log.info(f"{title} of {n:,} images, {_readable(size)} in {maps[0].dtype}, are cached {place}.")
    bar = tqdm(total=n, desc=title, unit="img", leave=False, dynamic_ncols=True)
    with bar:
        if on_disk:
            return _DiskCache(fingerprint, names, maps, block, folder).fill(compute, bar)
        arrays = tuple(np.empty((n, *m.shape[1:]), m.dtype) for m in maps)
        first = 0  # a disabled bar does not count
        for features in compute(np.arange(n)):
            rows = slice(first, first + len(features[0]))
            for array, m in zip(arrays, features, strict=True):
                array[rows] = m
            first = rows.stop
            bar.update(len(features[0]))
        return arrays


def n_bytes(n: int, maps: Sequence[jax.ShapeDtypeStruct | np.ndarray | Rows]) -> int:
    """Size in bytes of the features of n images."""
    return n * sum(math.prod(m.shape[1:]) * m.dtype.itemsize for m in maps)


def fits_on_device(size: int, location: str) -> bool:
    """Whether the devices hold `size` bytes of features during training.

    With "auto", they do if that leaves half of their available memory for the training itself.
    """
    if parallel.on_cpu() or location not in ("auto", "device"):
        return False
    return location == "device" or size <= parallel.available_device_memory() / 2


class _DiskCache:
    """Features on disk: a file of raw rows per scale, and a record of the complete blocks.

    The record's first line is a header with the fingerprint; each other line has the checksums of
    one block.
    """

    def __init__(self, fingerprint, names, maps, block, folder):
        self.n, self.maps, self.block, self.folder = len(names), maps, block, folder
        digest = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
        shapes = [[list(m.shape[1:]), str(m.dtype)] for m in maps]
        header = {"fingerprint": fingerprint, "images": self.n, "names": digest}
        self.header = json.dumps(header | {"maps": shapes, "block": block})
        self.record = folder / "record.jsonl"
        self.paths = [folder / f"scale_{i}.raw" for i in range(len(maps))]
        self.block_bytes = [block * n_bytes(1, [m]) for m in maps]

    def fill(self, compute: Callable, bar: tqdm) -> tuple[np.ndarray, ...]:
        """Computes the missing blocks; returns the arrays, which are read as they are indexed."""
        checksums = self._read_record()
        # A link in the place of a file would lead writes elsewhere.
        is_plain = all(_is_plain(path) for path in (self.record, *self.paths))
        if checksums is None or not is_plain:
            # New files: another process may still read the old ones.
            shutil.rmtree(self.folder, ignore_errors=True)
            create_folder(self.folder)
            self.record.write_text(self.header)
            checksums = {}
        with contextlib.ExitStack() as stack:
            for path in self.paths:
                path.touch()
            files = [stack.enter_context(path.open("r+b")) for path in self.paths]
            done = [b for b, sums in checksums.items() if sums == self._checksums(files, b)]
            rows = np.arange(self.n)
            rows = rows[~np.isin(rows // self.block, done)]
            bar.update(self.n - len(rows))
            self._check_room(len(rows))
            lines = stack.enter_context(self.record.open("a"))
            for features in compute(rows) if len(rows) else ():
                self._write_block(int(rows[0]) // self.block, features, files, lines)
                rows = rows[len(features[0]) :]
                bar.update(len(features[0]))
        return tuple(
            np.memmap(path, m.dtype, "r", shape=(self.n, *m.shape[1:]))
            for path, m in zip(self.paths, self.maps, strict=True)
        )

    def _read_record(self) -> dict[int, list[int]] | None:
        """Checksums of each complete block; None if the record has another header."""
        try:
            header, *lines = self.record.read_text().splitlines()
        except (OSError, ValueError):  # missing, empty or damaged
            return None
        if header != self.header:
            return None
        checksums = {}
        for line in lines:
            # Lines may be cut off or damaged.
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                content = json.loads(line)
                if (block := content["block"]) in range(-(-self.n // self.block)):
                    checksums[block] = content["crc32"]
        return checksums

    def _checksums(self, files: Sequence[IO[bytes]], block: int) -> list[int]:
        sums = []
        for file, length in zip(files, self.block_bytes, strict=True):
            file.seek(block * length)
            sums.append(zlib.crc32(file.read(length)))
        return sums

    def _write_block(self, block: int, features, files: Sequence[IO[bytes]], lines: IO) -> None:
        sums = []
        for file, m, length in zip(files, features, self.block_bytes, strict=True):
            data = m.tobytes()
            sums.append(zlib.crc32(data))
            file.seek(block * length)
            file.write(data)
            file.flush()
        # The line break comes first, as the last line may have been cut off.
        lines.write("\n" + json.dumps({"block": block, "crc32": sums}))
        lines.flush()

    def _check_room(self, n: int) -> None:
        """Raises InputError if the disk has no room for the features of n images."""
        size, free = n_bytes(n, self.maps), shutil.disk_usage(self.folder).free
        if size > free:
            raise InputError(
                f"The features take {_readable(size)}, but {self.folder} has room for "
                f"{_readable(free)}. Make room there, pass another --workdir, or pass "
                "--config.train.cache=none to compute the features again in every epoch."
            )


def _is_plain(path: pathlib.Path) -> bool:
    """Whether a path is a file, but no link, or does not exist."""
    return not path.is_symlink() and (path.is_file() or not path.exists())


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
