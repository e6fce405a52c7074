"""Paths as people type them, and folders that may be impossible to make."""

import errno
import os
import re
import urllib.parse
from pathlib import Path

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
