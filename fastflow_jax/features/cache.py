"""Where the features of many images are kept: in memory, or in files that are read as needed.

On disk, the features of each scale lie in a file of their own, row after row, and a record beside
them tells what they are features of and which blocks of images are done, each with its checksums.
A block counts only where both agree, so that files of an interrupted run, of another run, or
damaged ones are never taken for whole: what is missing is computed, and nothing else.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.errors import InputError

# "auto" is the first of the next three that has room. "device" is memory too, and in training the
# devices hold a copy, so that an epoch is one program; where the host is the device (CPU), nothing
# differs. "none": computed again each time.
HOMES = ("auto", "device", "memory", "disk", "none")


def keep(
    compute: Callable[[np.ndarray], Iterable[tuple[np.ndarray, ...]]],
    of: dict,
    names: Sequence[str],
    maps: Sequence[jax.ShapeDtypeStruct],
    *,
    block: int,
    home: str,
    folder: pathlib.Path,
    title: str,
) -> tuple[np.ndarray, ...]:
    """The features of all images, [N, h, w, C] a scale, each computed once.

    Where they are kept is printed.

    Args:
      compute: rows [M] -> the features of these images, `block` at a time.
      of: what they are features of, in plain values: with other values, what lies on disk is
        computed anew.
      names: of the N images, likewise.
      maps: shape [b, h, w, C] and type of each scale.
      block: images that are computed together, and on disk checked together.
      home: see `HOMES`.
      folder: for features on disk, and nothing else; an earlier run may have left some there.
      title: what the images are called.

    Raises:
      InputError: no room on disk.
    """
    n, size = len(names), n_bytes(len(names), maps)
    on_disk = home == "disk" or (home == "auto" and size > free_memory() / 2)
    on_disk = parallel.any_process(on_disk)
    place = f"on disk, {folder}" if on_disk else "in memory"
    tqdm.write(f"{title} of {n:,} images, {_readable(size)} in {maps[0].dtype}, kept {place}")
    bar = tqdm(total=n, desc=title, unit="img", leave=False, dynamic_ncols=True)
    with bar:
        if on_disk:
            return _on_disk(compute, of, names, maps, block, folder, bar)
        arrays = tuple(np.empty((n, *m.shape[1:]), m.dtype) for m in maps)
        first = 0  # the bar does not count where bars are switched off
        for features in compute(np.arange(n)):
            rows = slice(first, first + len(features[0]))
            for array, m in zip(arrays, features, strict=True):
                array[rows] = m
            first = rows.stop
            bar.update(len(features[0]))
        return arrays


def n_bytes(n: int, maps: Sequence[jax.ShapeDtypeStruct]) -> int:
    """What the features of n images take."""
    return n * sum(math.prod(m.shape[1:]) * m.dtype.itemsize for m in maps)


def goes_on_device(size: int, home: str) -> bool:
    """Whether the devices are to hold so many bytes of features while they train.

    With "auto", where that leaves half of the free memory for the training itself.
    """
    if parallel.on_cpu() or home not in ("auto", "device"):
        return False
    return home == "device" or size <= parallel.free_memory() / 2


def free_memory() -> int:
    """Available host memory in bytes, as reported by the OS or the limit of a container."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # macOS, which tells of all memory only
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min(free, *map(_free_in_container, _CGROUPS))


_CGROUP_ROOT = pathlib.Path("/sys/fs/cgroup")
# Of a container: the file of its limit, the file of its statistics and what these call memory that
# cannot be reclaimed, in versions 2 and 1 of the kernel's interface.
_CGROUPS = (
    ("memory.max", "memory.stat", "anon"),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
)


def _free_in_container(cgroup: tuple[str, str, str]) -> float:
    """Bytes below the limit of a container; infinite without one."""
    limit, statistics, name = cgroup
    try:
        limit = int((_CGROUP_ROOT / limit).read_text())
        used = re.search(rf"^{name} (\d+)$", (_CGROUP_ROOT / statistics).read_text(), re.M)
        return max(0, limit - int(used[1]))
    except (OSError, ValueError, TypeError):
        return float("inf")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of an array that may lie on disk: they are read when they are asked for."""

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


def _on_disk(compute, of, names, maps, block, folder, bar) -> tuple[np.ndarray, ...]:
    """See `keep`."""
    n = len(names)
    digest = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
    kinds = [[list(m.shape[1:]), str(m.dtype)] for m in maps]
    head = json.dumps({"of": of, "images": n, "names": digest, "maps": kinds, "block": block})
    record = folder / "record.jsonl"
    sums = _read_record(record, head)
    if sums is None:  # another file in its place, as the old one may still be in use
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(head)
        sums = {}
    paths = [folder / f"scale_{i}.raw" for i in range(len(maps))]
    a_block = [block * n_bytes(1, [m]) for m in maps]
    with contextlib.ExitStack() as stack:
        for path in paths:
            path.touch()
        files = [stack.enter_context(path.open("r+b")) for path in paths]

        def checksums(b):
            for file, length in zip(files, a_block, strict=True):
                file.seek(b * length)
                yield zlib.crc32(file.read(length))

        done = {b: kept for b, kept in sums.items() if kept == list(checksums(b))}
        rows = np.arange(n)
        rows = rows[~np.isin(rows // block, list(done))]
        bar.update(n - len(rows))
        _check_room(n_bytes(len(rows), maps), folder)
        lines = stack.enter_context(record.open("a"))
        for features in compute(rows) if len(rows) else ():
            b, kept = int(rows[0]) // block, []
            for file, m, length in zip(files, features, a_block, strict=True):
                data = m.tobytes()
                kept.append(zlib.crc32(data))
                file.seek(b * length)
                file.write(data)
                file.flush()
            # On a line of its own, even where the last one was cut off.
            lines.write("\n" + json.dumps({"block": b, "crc32": kept}))
            lines.flush()
            rows = rows[len(features[0]) :]
            bar.update(len(features[0]))
    return tuple(
        np.memmap(path, m.dtype, "r", shape=(n, *m.shape[1:]))
        for path, m in zip(paths, maps, strict=True)
    )


def _read_record(file: pathlib.Path, head: str) -> dict[int, list[int]] | None:
    """The checksums of each block that is done; None where the record is of something else."""
    try:
        first, *lines = file.read_text().splitlines()
    except (OSError, ValueError):  # none, or an empty or damaged one
        return None
    if first != head:
        return None
    sums = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # cut off in the middle
            block = json.loads(line)
            sums[block["block"]] = block["crc32"]
    return sums


def _check_room(size: int, folder: pathlib.Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"the features take {_readable(size)} and there is room for {_readable(free)} in "
            f"{folder}: make room, choose another --workdir, or have them computed again in every "
            "epoch with --config.train.cache=none"
        )


def _readable(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
