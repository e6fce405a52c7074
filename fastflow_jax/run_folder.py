"""The run folder: one configuration, one process, and files that are whole or absent."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from fastflow_jax.config import differences, to_plain
from fastflow_jax.errors import InputError


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config) -> Iterator[None]:
    """Hold the run folder for this process and this filled configuration.

    A folder in which no training has begun yet takes on another configuration.

    Raises:
      InputError: another process is at work there, it holds a run with other settings, or it
        cannot be a folder.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{workdir} cannot be a run folder: a file is in the way") from error
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"{workdir} is in use by another process: wait for it, or choose another --workdir"
            ) from error
        file = workdir / "config.json"
        changed = differences(json.loads(file.read_text()), config) if file.exists() else ["new"]
        if changed and any(workdir.rglob("checkpoints")):
            raise InputError(
                f"{workdir} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nchoose another --workdir, or remove that folder"
            )
        if changed:
            write_json(file, to_plain(config))
        yield


def check_same_data(folder: pathlib.Path, names: list[str]) -> None:
    """Hold a part of a run to the training images that it began with.

    Raises:
      InputError: there are others now.
    """
    file = folder / "training_images.json"
    if not file.exists():
        write_json(file, names)
    elif json.loads(file.read_text()) != names:
        raise InputError(
            f"the training images are no longer those that {folder} began with: bring them back, "
            "or choose another --workdir"
        )


def write_json(file: pathlib.Path, content: dict | list) -> None:
    """Write a whole file or none."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: pathlib.Path, content: str) -> None:
    """Write a whole file or none."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(content)
    temporary.replace(file)


def write_arrays(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a whole .npz file or none."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("wb") as open_file:
        np.savez(open_file, **{name: np.asarray(array) for name, array in arrays.items()})
    temporary.replace(file)


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
