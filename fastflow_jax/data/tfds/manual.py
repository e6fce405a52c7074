"""Data sets that users download by hand, packed or unpacked."""

import contextlib
import functools
import gzip
import logging
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, cast

from tqdm import tqdm

from fastflow_jax.data.dataset import Counts, DataConfig, Dataset
from fastflow_jax.data.tfds import prepared
from fastflow_jax.data.tfds.prepared import Builder, Raw, data_dir
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded, lock, synchronise

_log = logging.getLogger(__name__)

_LOCK = ".unpacking"
_SCRATCH = f"{_LOCK}-"


def manual_dir(config: DataConfig) -> Path:
    """Returns the directory of raw files: `config.root`, or downloads/manual/<name> by default."""
    if config.root is not None:
        return expanded(config.root).resolve()
    return (data_dir(config.dir) / "downloads/manual" / config.name).resolve()


def open_category(
    builder_class: type[Builder],
    config: DataConfig,
    counts: Mapping[str, Counts] | None = None,
) -> Dataset:
    """Opens the category `config.category` of a set that was downloaded by hand.

    The raw files, packed or not, possibly one level deeper, are in `config.root` or in
    `downloads/manual/<name>` of the data directory. See `prepared.open_category`.

    Raises:
        InputError: an unknown category, or missing or invalid data.
    """
    find = functools.partial(find_raw, config, builder_class)
    return prepared.open_category(builder_class, config, find, counts)


def find_raw(config: DataConfig, builder_class: type[Builder]) -> Raw:
    """Finds the directory of `config.category`, in `manual_dir` or one level deeper.

    Args:
        config: `config.data`.
        builder_class: its `PLACES` and `CONTAINS` describe the directory. If it is missing, the
            first of its `ARCHIVES` that is present is unpacked. Its `MANUAL_DOWNLOAD_INSTRUCTIONS`
            are part of the error message.

    Raises:
        InputError: the category is missing, an archive is damaged, or the disk is full.
    """
    folder, category = manual_dir(config), config.category or ""
    found = _find_category(folder, category, builder_class)
    archives = [folder / name.format(category=category) for name in builder_class.ARCHIVES]
    present = [archive for archive in archives if archive.is_file()]
    if found is None and present:
        if (target := _target(present[0])).exists():
            missing = category or builder_class.CONTAINS
            raise InputError(f"{target} has no {missing}. Remove it to unpack {present[0]} again.")
        unpack(present[0])
        found = _find_category(folder, category, builder_class)
    if found is None:
        instructions = builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS
        title = f"{config.name} ({category})" if category else config.name
        raise InputError(f"{title} is not in {folder}. {instructions}")
    return Raw(found, str(folder))


def _find_category(folder: Path, category: str, builder_class: type[Builder]) -> Path | None:
    candidates = (
        path / place.format(category=category)
        for path in (folder, *sorted(folder.glob("*")))
        for place in builder_class.PLACES
    )
    return next((path for path in candidates if (path / builder_class.CONTAINS).exists()), None)


def unpack(archive: Path) -> None:
    """Unpacks a tar or zip file next to it, into a directory of its name without extensions.

    A single top-level directory of the archive is renamed to that name. The directory appears only
    when it is complete. Processes that unpack in the same directory wait for each other.

    Raises:
        InputError: the archive is damaged, or the disk is full.
    """
    folder, target = archive.parent, _target(archive)

    def on_wait():
        _log.info("Waiting for another process that unpacks in %s.", folder)

    try:
        with lock(folder / _LOCK, on_wait=on_wait) as is_locked:
            if target.exists():  # unpacked by another process
                return
            for leftover in folder.glob(f"{_SCRATCH}*") if is_locked else ():
                shutil.rmtree(leftover, ignore_errors=True)  # of a killed process
            _unpack(archive, target)
    except OSError as error:
        raise InputError(
            f"{archive} cannot be unpacked ({error}). Free disk space there, or unpack it "
            "elsewhere and set data.root to that directory."
        ) from error


def _unpack(archive: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=archive.parent) as scratch:
        content = Path(scratch, "content")
        with open_archive(archive) as packed:
            if isinstance(packed, tarfile.TarFile):
                packed.extractall(content, filter="data")
            else:
                packed.extractall(content)
        inner = [path for path in content.iterdir() if path.name != "__MACOSX"]
        synchronise(content)
        is_wrapped = len(inner) == 1 and inner[0].is_dir()
        try:
            (inner[0] if is_wrapped else content).rename(target)
        except OSError:
            if not target.is_dir():  # unpacked by another process, on a file system without locks
                raise


def _target(archive: Path) -> Path:
    return archive.parent / archive.name.partition(".")[0]


@contextlib.contextmanager
def open_archive(archive: Path) -> Iterator[tarfile.TarFile | zipfile.ZipFile]:
    """Opens a tar or zip file for one sequential read, with a progress bar.

    Raises:
        InputError: the archive is damaged, truncated, or compressed by an unknown method.
    """
    size = archive.stat().st_size
    title = f"unpacking {archive.name}"
    try:
        with (
            open(archive, "rb") as file,
            tqdm.wrapattr(file, "read", size, desc=title, delay=1) as wrapped,
        ):
            stream = cast(IO[bytes], wrapped)
            if archive.suffix == ".zip":
                with zipfile.ZipFile(stream) as packed:
                    yield packed
                return
            with tarfile.open(fileobj=stream, mode="r:*") as packed:
                yield packed
                # tarfile accepts an archive that was truncated between two members. Reading to the
                # end of the compressed stream verifies its checksum.
                while packed.fileobj is not None and packed.fileobj.read(1 << 20):
                    pass
    except NotImplementedError as error:  # an unknown compression of zipfile
        raise InputError(f"{archive} cannot be unpacked ({error}). Unpack it by hand.") from error
    except Exception as error:  # a damaged archive may cause any
        is_of_disk = isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile)
        if is_of_disk or isinstance(error, InputError):
            raise
        problem = " ".join(str(error).split())  # messages of tarfile may have several lines
        raise InputError(f"{archive} is damaged ({problem}). Download it again.") from error
