"""File names as people type them."""

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
