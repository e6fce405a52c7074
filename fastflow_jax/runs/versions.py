"""Versions of the detector in a run directory: each update adds one, and an undo goes one back.

The training is version 1. `versions/N/` has the detector of version N as a saved detector, in
`previous.json` the `detector.json` of the run directory before, and in `lesson.json` the checksum
of what it was taught. The `detector.json` of the run directory names the current version. It is
replaced at once, after everything else is written: a process that is killed leaves the old or the
new version. The next update deletes what the process has left.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from fastflow_jax.errors import InputError
from fastflow_jax.files import (
    delete_staged,
    lock,
    make_folder,
    read_json,
    sha256,
    write_json,
    write_text,
)
from fastflow_jax.runs import saved
from fastflow_jax.runs.durable import DETECTOR, plain_thresholds, write_description
from fastflow_jax.runs.saved import VERSIONS

_PREVIOUS, _LESSON = "previous.json", "lesson.json"
_UNDONE = "undone"  # in the directory of a version that was taken back


@contextlib.contextmanager
def changing(run: pathlib.Path) -> Iterator[None]:
    """Reserves a run directory, so that one process changes its version.

    Raises:
      InputError: another process uses it, or it is not the directory of a finished training.
    """
    saved.description(run)

    def fail():
        raise InputError(f"{run} is in use by another process. Wait for it.")

    with lock(run / ".lock", on_wait=fail):
        yield


def current(run: pathlib.Path) -> int:
    """Number of the current version.

    Raises:
      InputError: see `saved.description`.
    """
    return saved.version_of(saved.description(run))


def lesson(run: pathlib.Path) -> str | None:
    """Checksum of what the current version was taught; None for the training.

    Raises:
      InputError: see `saved.description`.
    """
    return (read_json(run / VERSIONS / str(current(run)) / _LESSON) or {}).get("sha256")


def add(run: pathlib.Path, detector: Any, lesson: str) -> int:
    """Makes a detector the current version, and returns its number.

    Args:
      run: run directory, reserved by `changing`.
      detector: an updated `Detector` of the run.
      lesson: checksum of what it was taught.

    Raises:
      InputError: the directory cannot be written.
    """
    about = saved.description(run)
    folder = run / VERSIONS
    make_folder(folder)
    _delete_unfinished(folder, about)
    known = [int(path.name) for path in folder.iterdir() if path.name.isdigit()]
    number = 1 + max(known, default=1)
    new = detector.save(folder / str(number), backbone=False)
    write_json(new / _PREVIOUS, about)
    write_json(new / _LESSON, {"sha256": lesson})
    taught = {"version": number, "sha256": sha256(new / DETECTOR)}
    thresholds = plain_thresholds(detector.image_threshold, detector.pixel_threshold)
    write_description(run, about | {"thresholds": thresholds, "taught": taught})
    return number


def _delete_unfinished(folder: pathlib.Path, about: dict) -> None:
    """Deletes versions that a killed process has not made the current one."""
    delete_staged(folder)
    finished = set()
    while (number := saved.version_of(about)) not in finished:
        finished.add(number)
        about = read_json(folder / str(number) / _PREVIOUS) or about
    for path in folder.iterdir():
        is_version = path.name.isdigit() and not (path / _UNDONE).exists()
        if is_version and int(path.name) not in finished:
            shutil.rmtree(path)


def undo(run: pathlib.Path) -> int:
    """Makes the version before the current one the current one, and returns its number.

    Args:
      run: run directory, reserved by `changing`.

    Raises:
      InputError: the current version is the training, or the directory cannot be written.
    """
    number = current(run)
    if number == 1:
        raise InputError(f"{run} has no update to take back: its version is that of the training.")
    file = run / VERSIONS / str(number) / _PREVIOUS
    previous = read_json(file)
    if previous is None:
        raise InputError(f"{file} is missing. Restore it from a copy.")
    write_text(file.with_name(_UNDONE), "")
    write_description(run, previous)
    return saved.version_of(previous)
