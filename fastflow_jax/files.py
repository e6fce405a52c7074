"""Paths, locks, and files that are whole or absent.

Of several processes the first one alone reads JSON and writes, see `parallel.on_main`.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import pathlib
import re
import sys
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.errors import InputError


def expanded(path: str | os.PathLike) -> Path:
    """The local path that a user means.

    A path that begins with ~ is in a home directory, unless there is such a file. A URL is refused,
    except for `file:///...`, which becomes the path that it names.

    Raises:
      InputError: the path is a URL, or there is neither such a file nor such a home directory.
    """
    if not os.fspath(path):
        raise InputError("An empty path was given. Name a file or a directory.")
    path = _without_scheme(path)
    try:
        return path if path.exists() else path.expanduser()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except RuntimeError as error:
        raise InputError(f"{path} does not exist, nor does a home folder of that name.") from error


def _without_scheme(path: str | os.PathLike) -> Path:
    text = os.fspath(path)
    # pathlib makes gs:/bucket of gs://bucket.
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
    """Whether a path is UTF-8, as most libraries expect; in a file system it may be any bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # Python has such bytes as surrogates
        return False
    return True


_REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EACCES: "give leave to write there",
    errno.EROFS: "give leave to write there",
}


def remedy(error: BaseException | None) -> str | None:
    """What helps where a disk is full or not to be written to; None for another error."""
    return _REMEDIES.get(error.errno) if isinstance(error, OSError) else None


def make_folder(path: Path) -> None:
    """Make a folder, with those that it lies in, unless it is there.

    Raises:
      InputError: there can be none of that name.
      OSError: the disk is full, or not to be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{path} cannot be a folder: a file is in the way") from error
    except OSError as error:
        if remedy(error):
            raise
        raise InputError(f"{path} cannot be a folder: {error.strerror}") from error


@contextlib.contextmanager
def lock(file: pathlib.Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Holds an exclusive lock on a file, which is created, until the context ends.

    A file system without locks (NFS with `nolock`, Lustre without `flock`, some FUSE mounts) is
    used without one, with one warning on stderr.

    Args:
      file: in the directory to be locked.
      on_wait: called if another process has the lock. It raises, or the lock is waited for.

    Yields:
      Whether the lock is held.

    Raises:
      OSError: the file cannot be written, or the disk is full.
    """
    with file.open("w") as opened:

        def flock(operation: int) -> bool:
            try:
                fcntl.flock(opened, operation)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.ENOSPC, errno.EDQUOT):
                    raise
                _warn(file.parent, error.strerror)
                return False
            return True

        try:
            is_held = flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            is_held = flock(fcntl.LOCK_EX)
        yield is_held


@functools.cache
def _warn(folder: pathlib.Path, reason: str) -> None:
    tqdm.write(
        f"warning: {folder} cannot be locked ({reason}). Do not let two processes use it at the "
        "same time.",
        file=sys.stderr,
    )


def files_in(workdir: pathlib.Path, name: str) -> list[pathlib.Path]:
    """The files of a name in a run folder and below, sorted, without those of runs inside it."""

    def is_of_another(file: pathlib.Path) -> bool:
        folders = file.relative_to(workdir).parents
        return any((workdir / folder / "config.json").exists() for folder in folders[:-1])

    return sorted(file for file in workdir.rglob(name) if not is_of_another(file))


def read_json(file: pathlib.Path) -> Any:
    """What `write_json` wrote; None where there is no such file.

    Raises:
      InputError: the file is damaged.
    """
    return parallel.on_main(lambda: parse_json(file) if file.exists() else None)


def parse_json(file: pathlib.Path) -> Any:
    """What `write_json` wrote, in this process; for errors see `read_json`."""
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(
            f"{file} is damaged ({error}): bring it back, or train in a new folder"
        ) from error


def read_lines(file: pathlib.Path) -> list[dict]:
    """The lines of JSON in a file that grew by one at a time; none where there is no such file.

    A line that was cut off is passed over.
    """
    lines = []
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def write_json(file: pathlib.Path, content: dict | list) -> None:
    """Write a whole file or none."""
    write_text(file, json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def replacing(file: pathlib.Path, mode: str, **how) -> Iterator[IO]:
    """A new file, open to write to, that takes the place of `file` when the context ends.

    Both its content and its name are on the disk then, so that neither a killed process nor a power
    failure leaves half a file.

    Args:
      file: may exist.
      mode: "w" or "wb".
      how: see `open`.
    """
    temporary = file.with_suffix(".tmp")
    with temporary.open(mode, **how) as opened:
        yield opened
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)
    with contextlib.suppress(OSError):  # some file systems cannot
        directory = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_text(file: pathlib.Path, content: str) -> None:
    """Write a whole file or none; bytes of file names that are not UTF-8 are escaped."""
    if parallel.is_main():
        with replacing(file, "w", encoding="utf-8", errors="backslashreplace") as opened:
            opened.write(content)


def write_arrays(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a whole .npz file or none."""
    if parallel.is_main():
        with replacing(file, "wb") as opened:
            np.savez(opened, **{name: np.asarray(array) for name, array in arrays.items()})


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote.

    Raises:
      InputError: the file is damaged.
    """
    try:
        with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
            return dict(arrays)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise InputError(f"{file} is damaged ({error}): train again in a new folder") from error


def to_plain(config: ConfigDict) -> dict:
    """The configuration as JSON has it: tuples become lists."""
    return json.loads(config.to_json_best_effort())
