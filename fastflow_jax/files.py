"""Paths, locks, and files that are written completely or not at all.

Only the first process writes files, and reads JSON for all others, see `parallel.on_main`.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import stat
import sys
import urllib.parse
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fastflow_jax.errors import InputError, reason

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_log = logging.getLogger(__name__)


def expanded(path: str | os.PathLike) -> Path:
    """Expands `~` and `file://` in a path that a user gave.

    `~` is kept if a file of that name exists.

    Raises:
      InputError: the path is empty, cannot be read, is another URL, or begins with the home
        directory of an unknown user.
    """
    if not os.fspath(path):
        raise InputError("An empty path was given. Name a file or a directory.")
    if "\0" in str(path):
        raise InputError(f"The path {str(path)!r} has a NUL character. Correct it.")
    path = _without_scheme(path)
    try:
        return path if path.exists() else path.expanduser()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from error
    except RuntimeError as error:
        raise InputError(
            f"{path} does not exist, and there is no user of that name. Pass an existing path."
        ) from error


def _without_scheme(path: str | os.PathLike) -> Path:
    text = os.fspath(path)
    # pathlib turns gs://bucket into gs:/bucket.
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)", text)
    if not match or (not match[2] and (isinstance(path, str) or Path(path).exists())):
        return Path(path)
    local = re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/).*)", text, re.IGNORECASE | re.DOTALL)
    if local:
        return Path(os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(local[1]))))
    raise InputError(
        f"{text} is a URL, not a local path. Mount the bucket (for example with gcsfuse or "
        "rclone), or copy the data to a local directory."
    )


def is_utf8(path: Path) -> bool:
    """Whether a path is valid UTF-8, which most libraries expect and file systems do not need."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # Python represents other bytes as surrogates
        return False
    return True


_REMEDIES = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there",
    errno.EACCES: "Allow writing there",
    errno.EROFS: "Allow writing there",
}


def remedy(error: BaseException | None) -> str | None:
    """Remedy for an error of a disk that is full or not writable; None for other errors."""
    return _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None


def create_folder(path: Path) -> None:
    """Creates a directory and its parents if they do not exist, and synchronises their names.

    Raises:
      OSError: the path cannot be a directory.
    """
    missing = list(itertools.takewhile(lambda each: not each.exists(), (path, *path.parents)))
    path.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _synchronise_directory(each.parent)


def make_folder(path: Path) -> None:
    """Creates a directory as `create_folder`, for a path that a user has chosen.

    Raises:
      InputError: the path cannot be a directory.
      OSError: the disk is full or not writable, see `remedy`.
    """
    try:
        create_folder(path)
    except OSError as error:
        if remedy(error):
            raise
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file of that name exists" if is_file else error.strerror
        raise InputError(f"{path} cannot be a directory: {reason}. Pass another path.") from error


@contextlib.contextmanager
def lock(file: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Creates a file and holds an exclusive lock on it until the context ends.

    File systems without locks (NFS with `nolock`, Lustre without `flock`, some FUSE mounts) are
    used without one, with one warning.

    Args:
      file: file in the directory to lock.
      on_wait: called if another process has the lock. Unless it raises, the lock is waited for.

    Yields:
      Whether the lock is held.

    Raises:
      OSError: the file cannot be written.
    """
    with file.open("w") as opened:

        def flock(operation: int) -> bool:
            try:
                fcntl.flock(opened, operation)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.ENOSPC, errno.EDQUOT):
                    raise
                _warn_without_lock(file.parent, error.strerror)
                return False
            return True

        try:
            is_held = flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            is_held = flock(fcntl.LOCK_EX)
        yield is_held


@functools.cache  # once per directory
def _warn_without_lock(folder: Path, reason: str) -> None:
    _log.warning(
        f"{folder} cannot be locked ({reason}). Do not let two processes use it at the same time."
    )


def files_in(workdir: Path, name: str) -> list[Path]:
    """Sorted files with a name in a run directory, without those of other runs inside it."""

    def is_of_another(file: Path) -> bool:
        folders = file.relative_to(workdir).parents
        return any((workdir / folder / "config.json").exists() for folder in folders[:-1])

    return sorted(file for file in workdir.rglob(name) if not is_of_another(file))


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from error


PRODUCTS = "products.json"  # in the directory of a model of several products


def sha256_of_detector(path: Path) -> str:
    """Returns the SHA-256 that identifies a detector: of its .zip file or its `detector.json`.

    Of a model of several products, that of the list of their identifiers.
    """
    if path.is_file():
        return sha256(path)
    if not (path / PRODUCTS).exists():
        return sha256(path / "detector.json")
    places = parse_json(path / PRODUCTS)["products"].values()
    each = [sha256_of_detector(path / place) for place in places]
    return hashlib.sha256("".join(each).encode()).hexdigest()


def read_json(file: Path) -> Any:
    """Content of a JSON file, read by the first process for all; None if there is no file.

    Raises:
      InputError: the file is damaged.
    """

    def read() -> Any:
        return parse_json(file) if file.exists() else None

    parallel = _processes()
    return read() if parallel is None else parallel.on_main(read)


def parse_json(file: Path) -> Any:
    """Content of a JSON file, read by this process.

    Raises:
      InputError: the file is damaged.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{file} is damaged ({error}). Restore it, or train in a new directory."
        ) from error


def read_lines(file: Path) -> list[dict]:
    """Objects of a file of JSON lines, without damaged lines; empty if there is no file."""
    lines = []
    for line in file.read_bytes().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def write_json(file: Path, content: dict | list) -> None:
    """Writes a JSON file, see `write_text`."""
    write_text(file, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def replacing(file: Path, mode: str, **how) -> Iterator[IO]:
    """Opens a new file for writing, which replaces `file` when the context ends.

    Content and name are synchronised to the disk, so that neither a killed process nor a power
    failure leaves an incomplete file. Processes that write the same file wait for each other.

    Args:
      file: target, which may exist.
      mode: "w" or "wb".
      how: other arguments of `open`.
    """
    temporary = file.with_suffix(".tmp")
    with open(_open_locked(temporary), mode, **how) as opened:
        try:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    _synchronise_directory(file.parent)


def _open_locked(file: Path) -> int:
    """Opens an empty file, and locks it until it is closed, where the file system has locks."""
    while True:
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):
            fcntl.flock(opened, fcntl.LOCK_EX)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(file), os.fstat(opened)):
                if os.fstat(opened).st_size:
                    os.ftruncate(opened, 0)
                return opened
        os.close(opened)  # the process that had the lock has renamed or removed the file


_STAGED = ".saving_"


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yields a new hidden path next to `path`, and moves it to `path` when the context ends.

    What is written there, a file or a directory, replaces a file or an empty directory. If the
    context raises, it is removed.

    Raises:
      OSError: the directory is not writable, or `path` is a directory with files.
    """
    path = path.resolve()
    temporary = path.with_name(f"{_STAGED}{uuid.uuid4().hex}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        raise
    _synchronise_directory(path.parent)


def delete_staged(folder: Path) -> None:
    """Deletes what killed processes have left of `staged` in a directory that is locked."""
    for path in folder.glob(f"{_STAGED}*"):
        shutil.rmtree(path, ignore_errors=True)


def synchronise(path: Path) -> None:
    """Synchronises a file or a directory, all that is below it, and its name to the disk.

    What other libraries have written there survives a power failure afterwards.

    Raises:
      OSError: the disk is full or defective.
    """
    if path.is_file():
        _fsync(path)
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            _fsync(Path(directory, name))
        _synchronise_directory(Path(directory))
    _synchronise_directory(path.parent)


def _synchronise_directory(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot synchronise directories
        _fsync(folder)


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _is_main() -> bool:
    parallel = _processes()
    return parallel is None or parallel.is_main()


def _processes() -> Any:
    """The module `parallel`, or None if it is not loaded: this process then shares no run.

    Exported detectors are used without JAX, which `parallel` imports.
    """
    return sys.modules.get("fastflow_jax.parallel")


def write_text(file: Path, content: str) -> None:
    """Writes a text file atomically, in the first process. Escapes what is not valid UTF-8."""
    if _is_main():
        with replacing(file, "w", encoding="utf-8", errors="backslashreplace") as opened:
            opened.write(content)


def write_arrays(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a .npz file atomically, in the first process.

    Args:
      file: path of the file; its directory exists.
      arrays: arrays by name.
    """
    if _is_main():
        with replacing(file, "wb") as opened:
            content: Any = {name: np.asarray(array) for name, array in arrays.items()}
            np.savez(opened, **content)


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """Arrays of a .npz file of `write_arrays`.

    Args:
      file: path of the file.

    Raises:
      InputError: the file is damaged.
    """
    try:
        return read_npz(file)
    except Exception as error:  # a damaged file may cause any
        raise InputError(
            f"{file} is damaged ({reason(error)}). Restore it, or train in a new directory."
        ) from error


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """Arrays of a .npz file without compression. Memory is bounded by the size of the file.

    Raises:
      Exception: the file is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        return {
            name.removesuffix(".npy"): _parse_npy(archive.read(info))
            for name, info in stored_members(archive, file.stat().st_size).items()
        }


def stored_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the members of a .zip file without compression by name.

    Raises:
      ValueError: a member is compressed, or the members claim more than `size` bytes together.
        Either could unpack to any size.
    """
    members = {info.filename: info for info in archive.infolist()}
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{name!r} is compressed; only plain archives are read")
    if sum(info.file_size for info in members.values()) > size:
        raise ValueError("its members claim more bytes than the file has")
    return members


def _parse_npy(content: bytes) -> np.ndarray:
    """The array of a .npy file. Unlike `np.load`, allocates no more than the file has."""
    file = io.BytesIO(content)
    versions = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, is_fortran, dtype = versions[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
        raise ValueError(f"it has not the numbers of an array {shape} of {dtype}")
    array = np.frombuffer(content, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if is_fortran else "C").copy()


def delete_oldest(folder: Path, max_bytes: int) -> None:
    """Deletes the least recently used files of a directory until the rest fits in `max_bytes`.

    Sub-directories are left alone, and so are files that cannot be deleted.
    """
    files = []
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # another process may have deleted it
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                used = max(status.st_atime, status.st_mtime)
                files.append((used, status.st_size, path))
    excess = sum(size for _, size, _ in files) - max_bytes
    for _, size, path in sorted(files):
        if excess <= 0:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= size


def to_plain(config: "ConfigDict") -> dict:
    """The configuration as JSON values; tuples become lists."""
    return json.loads(config.to_json_best_effort())
