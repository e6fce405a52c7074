"""Paths as people type them, and folders that may be impossible to make."""

import errno
import os
from pathlib import Path

from fastflow_jax.errors import InputError


def expanded(path: str | os.PathLike) -> Path:
    """The path; unless there is such a file, one that begins with ~ lies in a home folder.

    Raises:
      InputError: there is neither such a file nor such a home.
    """
    path = Path(path)
    try:
        return path if path.exists() else path.expanduser()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except RuntimeError as error:
        raise InputError(f"{path} does not exist, nor does a home folder of that name.") from error


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
