"""The run folder: one configuration, one run at a time, and files that are whole or absent."""

import contextlib
import json
import pathlib
from collections.abc import Iterator

from fastflow_jax import parallel
from fastflow_jax.config import differences
from fastflow_jax.errors import InputError
from fastflow_jax.files import lock, make_folder, parse_json, read_json, to_plain, write_json


@contextlib.contextmanager
def claim(workdir: pathlib.Path, config) -> Iterator[None]:
    """Hold the run folder for this run, of one process or several, and this filled configuration.

    A folder in which no training has begun yet takes on another configuration.

    Raises:
      InputError: another run is at work there, it holds a run with other settings or something
        else, it cannot be a folder or is one among the images, or not all processes of this run
        see it.
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
    images = config.data.root if config.data.name == "folder" else None
    if images is not None and workdir.resolve().is_relative_to(images):
        raise InputError(
            f"{workdir} lies in {images}, among the images: choose a --workdir elsewhere"
        )
    make_folder(workdir)
    if _holds_something_else(workdir):
        raise InputError(f"{workdir} holds something else: choose a --workdir of its own")

    def fail():
        raise InputError(
            f"{workdir} is in use by another process: wait for it, or choose another --workdir"
        )

    with lock(workdir / ".lock", on_wait=fail):
        file = workdir / "config.json"
        changed = differences(parse_json(file), config) if file.exists() else ["new"]
        if changed and any(workdir.rglob("checkpoints")):
            raise InputError(
                f"{workdir} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nchoose another --workdir, or remove that folder"
            )
        if changed:
            write_json(file, to_plain(config))
        yield


def _holds_something_else(workdir: pathlib.Path) -> bool:
    """Whether there are files, and neither the lock of a run nor, if a copy lacks that, its fields.

    Hidden files do not count, as systems leave them everywhere.
    """
    names = {file.name for file in workdir.iterdir()}
    if ".lock" in names or all(name.startswith(".") for name in names):
        return False
    try:
        known = json.loads((workdir / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(known, dict) or not known.keys() >= {"backbone", "detector", "train"}


def check_same_data(folder: pathlib.Path, contents: list[str], weights: dict) -> None:
    """Hold a part of a run to the training images and the backbone's weights that it began with.

    Args:
      folder: of the training.
      contents: of the images to train on, see `data.Source`; without those held out.
      weights: `Backbone.weights`.

    Raises:
      InputError: there are others now.
    """
    file = folder / "learns_from.json"
    known, now = read_json(file), {"weights": weights.get("sha256"), "images": contents}
    if known is None:
        if parallel.on_main((folder / "checkpoints").exists):
            raise InputError(f"{folder} is of an older version: choose another --workdir")
        write_json(file, now)
        return
    for what, words in (("images", "training images"), ("weights", "backbone's weights")):
        if known[what] != now[what]:
            raise InputError(
                f"the {words} are no longer those that {folder} began with: bring them back, "
                "or choose another --workdir"
            )
