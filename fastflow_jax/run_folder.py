"""The run folder: one configuration, one run at a time, and files that are whole or absent."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from fastflow_jax import parallel
from fastflow_jax.config import differences, to_plain
from fastflow_jax.errors import InputError


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config) -> Iterator[None]:
    """Hold the run folder for this run, of one process or several, and this filled configuration.

    A folder in which no training has begun yet takes on another configuration.

    Raises:
      InputError: another run is at work there, it holds a run with other settings, it cannot be a
        folder, or not all processes of this run see it.
    """
    with contextlib.ExitStack() as held:
        parallel.on_main(lambda: held.enter_context(_claim(workdir, config)))
        if parallel.any_process(not (workdir / ".lock").exists()):
            raise InputError(
                f"not all processes of this run see {workdir}: choose a --workdir that they share"
            )
        yield


@contextlib.contextmanager
def _claim(workdir: pathlib.Path, config) -> Iterator[None]:
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
    known = read_json(file)
    if known is None:
        write_json(file, names)
    elif known != names:
        raise InputError(
            f"the training images are no longer those that {folder} began with: bring them back, "
            "or choose another --workdir"
        )


# Of several processes the first one alone reads and writes: see `parallel.on_main`.


def read_json(file: pathlib.Path) -> dict | list | None:
    """What `write_json` wrote; None where there is no such file."""
    return parallel.on_main(lambda: json.loads(file.read_text()) if file.exists() else None)


def write_json(file: pathlib.Path, content: dict | list) -> None:
    """Write a whole file or none."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: pathlib.Path, content: str) -> None:
    """Write a whole file or none."""
    if parallel.is_main():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(content)
        temporary.replace(file)


def write_arrays(file: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a whole .npz file or none."""
    if parallel.is_main():
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as open_file:
            np.savez(open_file, **{name: np.asarray(array) for name, array in arrays.items()})
        temporary.replace(file)


def read_arrays(file: pathlib.Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
