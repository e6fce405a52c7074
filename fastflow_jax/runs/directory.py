"""The run directory: one configuration, and one run at a time."""

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
    """Reserves a run directory for this run, of one or several processes, and its configuration.

    If no training has begun in the directory, its configuration is replaced.

    Args:
      workdir: the run directory, which is created.
      config: filled.

    Raises:
      InputError: another process uses the directory, it has a run with other settings or other
        files, it cannot be created, it is among the images, or not all processes of this run see
        it.
    """
    with contextlib.ExitStack() as held:
        parallel.on_main(lambda: held.enter_context(_claim(workdir, config)))
        if parallel.any_process(not (workdir / ".lock").exists()):
            raise InputError(
                f"Not all processes of this run see {workdir}. Pass a --workdir that they share."
            )
        yield


@contextlib.contextmanager
def _claim(workdir: pathlib.Path, config) -> Iterator[None]:
    images = config.data.root if config.data.name == "folder" else None
    if images is not None and workdir.resolve().is_relative_to(images):
        raise InputError(f"{workdir} is in {images}, among the images. Pass a --workdir elsewhere.")
    make_folder(workdir)
    if _has_other_files(workdir):
        raise InputError(f"{workdir} has other files. Pass a --workdir of its own.")

    def fail():
        raise InputError(
            f"{workdir} is in use by another process. Wait for it, or pass another --workdir."
        )

    with lock(workdir / ".lock", on_wait=fail):
        file = workdir / "config.json"
        changed = differences(parse_json(file), config) if file.exists() else ["new"]
        if changed and any(workdir.rglob("checkpoints")):
            raise InputError(
                f"{workdir} has a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nPass another --workdir, or remove that directory."
            )
        if changed:
            write_json(file, to_plain(config))
        yield


def _has_other_files(workdir: pathlib.Path) -> bool:
    """Whether there are files, but no lock of a run, nor the configuration of a copied run.

    Hidden files are ignored, because operating systems create them.
    """
    names = {file.name for file in workdir.iterdir()}
    if ".lock" in names or all(name.startswith(".") for name in names):
        return False
    try:
        known = json.loads((workdir / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(known, dict) or not known.keys() >= {"backbone", "detector", "train"}


def check_same_data(directory: pathlib.Path, contents: list[str], weights: dict) -> None:
    """Checks that training images and weights are those that the training began with.

    Args:
      directory: of the training.
      contents: of the training images without the held-out ones, see `Split.contents`.
      weights: `Backbone.weights`.

    Raises:
      InputError: they are others.
    """
    file = directory / "learns_from.json"
    known, now = read_json(file), {"weights": weights.get("sha256"), "images": contents}
    if known is None:
        if parallel.on_main((directory / "checkpoints").exists):
            raise InputError(
                f"{directory} was written by an older version. Pass another --workdir."
            )
        write_json(file, now)
        return
    for what, words in (("images", "training images"), ("weights", "backbone's weights")):
        if known[what] != now[what]:
            raise InputError(
                f"The {words} are not those that {directory} began with. Restore them, or pass "
                "another --workdir."
            )
