"""Saved detectors: format 1, a directory or a .zip file with the same files.

`detector.json` describes the detector and lists the other files, with their sizes and sha256. These
are .safetensors files. docs/detector.md specifies the format; later versions must read it.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import pathlib
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

import fastflow_jax
from fastflow_jax import parallel
from fastflow_jax.backbones.weights import licence
from fastflow_jax.config import from_plain
from fastflow_jax.data.profile import Profile
from fastflow_jax.data.roi import CommonRegion
from fastflow_jax.decision import Threshold
from fastflow_jax.errors import InputError, reason
from fastflow_jax.evaluation.held_out import HeldOut
from fastflow_jax.features.foreground import Foreground
from fastflow_jax.features.shift import Reference
from fastflow_jax.files import make_folder, remedy, replacing, staged, to_plain, write_json
from fastflow_jax.state import Slot, State, check, from_bytes, to_bytes

_log = logging.getLogger(__name__)

DETECTOR = "detector.json"
_FORMAT = 1
_KEYS = {"format", "version", "config", "weights", "thresholds", "images", "files"}
_LATER_KEYS = {"licence", "packages"}  # files of earlier versions do not have them
_SCORER, _BACKBONE = "scorer.safetensors", "backbone.safetensors"
_HELD_OUT, _REFERENCE = "held_out.safetensors", "shift.safetensors"
_ROI = "roi.safetensors"  # region of interest; files of earlier versions do not have it
_FILES = (_SCORER, _BACKBONE, _HELD_OUT, _REFERENCE, _ROI)

_SMALL = 100 * 10**6  # bytes of backbone weights that are saved by default
_MAX_DESCRIPTION = 2**20  # bytes of detector.json
_MAX_RATIO = 20  # of the sizes of the files in a zip file to its own size


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """Content of a saved detector, or of the directory of a finished training."""

    config: ConfigDict  # filled, of the training
    weights: dict  # origin of the backbone's weights, see `Backbone.weights`
    state: State  # see `Scorer.state_dict`
    held_out: HeldOut | None
    image_threshold: Threshold | None
    pixel_threshold: Threshold | None
    images: Profile | None  # None in directories of older versions
    reference: Reference | None  # None in directories of older versions, see also `Reference.fit`
    # See `Backbone.state_dict`; None if the weights are those of `weights`.
    backbone: State | None = None
    seed: int = 0  # of the training, which determines random weights
    training: pathlib.Path | None = None  # its directory; None for a saved detector
    roi: CommonRegion | Foreground | None = None  # region of interest, see `region_state`


def write(path: pathlib.Path, content: Saved, *, backbone: bool | None = None) -> None:
    """Writes a saved detector.

    Args:
      path: a new directory, or a new file whose name ends with .zip.
      content: of the detector, with the tensors of its backbone.
      backbone: whether these are saved; None: if they take less than 100 MB.

    Raises:
      InputError: the path exists and is not an empty directory, or cannot be written.
    """
    states = {_SCORER: content.state}
    if content.backbone and _is_wanted(path, content.backbone, backbone):
        states[_BACKBONE] = content.backbone
    if content.held_out is not None:
        states[_HELD_OUT] = content.held_out.state_dict()
    if content.reference is not None:
        states[_REFERENCE] = content.reference.state_dict()
    if content.roi is not None:
        states[_ROI] = region_state(content.roi)
    files = {name: to_bytes(state) for name, state in states.items()}
    about = {
        "format": _FORMAT,
        "version": fastflow_jax.__version__,
        "packages": {name: importlib.metadata.version(name) for name in ("flax", "jax", "numpy")},
        "config": to_plain(content.config),
        "weights": content.weights,
        "licence": licence(content.weights),
        "thresholds": plain_thresholds(content.image_threshold, content.pixel_threshold),
        "images": content.images and dataclasses.asdict(content.images),
        "files": {name: {"bytes": len(x), "sha256": _sha256(x)} for name, x in files.items()},
    }

    def write_new() -> None:
        if path.exists() and (not path.is_dir() or is_zip(path)):
            raise InputError(f"{path} exists. Save to a new directory or .zip file.")
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} has other files. Save to a new directory.")
        make_folder(path.resolve().parent)
        _write_files(path, about, files)

    _on_main(path, write_new)


def change(
    path: pathlib.Path, weights: str | None, image: Threshold | None, pixel: Threshold | None
) -> None:
    """Changes `config.weights` and the thresholds of a saved detector; for errors see `write`."""
    with damage_is_named(path), _opened(path) as read_file:
        about = _description(path, read_file)
        about["config"]["weights"] = weights
        about["thresholds"] = plain_thresholds(image, pixel)
        if path.is_dir():
            write_description(path, about)
        else:
            files = {name: read_file(name, e["bytes"]) for name, e in about["files"].items()}
            _on_main(path, lambda: _write_files(path, about, files))


def write_description(path: pathlib.Path, about: dict) -> None:
    """Replaces `detector.json` in a directory; raises InputError if it cannot be written."""
    _on_main(path, lambda: write_json(path / DETECTOR, about))


def read(path: pathlib.Path) -> Saved:
    """Reads a saved detector of `write`, a directory or a .zip file.

    Raises:
      InputError: it is not a saved detector, it is of another format, or a file is missing, has
        changed or is damaged.
    """
    with damage_is_named(path):
        with _opened(path) as read_file:
            about = _description(path, read_file)
            states = {name: _verified(name, e, read_file) for name, e in about["files"].items()}
        thresholds, images = about["thresholds"], about["images"]
        held_out, reference = states.get(_HELD_OUT), states.get(_REFERENCE)
        return Saved(
            config=from_plain(about["config"]),
            weights=about["weights"],
            state=states[_SCORER],
            held_out=None if held_out is None else HeldOut.from_state(held_out),
            image_threshold=read_threshold(thresholds["image"]),
            pixel_threshold=read_threshold(thresholds["pixel"]),
            images=None if images is None else Profile.from_plain(images),
            reference=None if reference is None else Reference.from_state(reference),
            backbone=states.get(_BACKBONE),
            seed=int(about["weights"].get("seed", 0)),
            roi=region_from_state(states[_ROI]) if _ROI in states else None,
        )


def region_state(roi: CommonRegion | Foreground) -> dict[str, np.ndarray]:
    """The arrays of a region of interest by name, for `region_from_state`."""
    return {"mask": roi.mask} if isinstance(roi, CommonRegion) else roi.state_dict()


def region_from_state(state: State) -> CommonRegion | Foreground:
    """The inverse of `region_state`; raises InputError if it has other arrays."""
    if "mask" not in state:
        return Foreground.from_state(state)
    check(state, {"mask": Slot((None, None), np.bool_)})
    return CommonRegion(state["mask"])


def is_zip(path: pathlib.Path) -> bool:
    """Whether a path is that of a .zip file, by its name."""
    return path.suffix.lower() == ".zip"


def plain_thresholds(image: Threshold | None, pixel: Threshold | None) -> dict:
    """Thresholds as JSON values."""
    return {name: t and dataclasses.asdict(t) for name, t in (("image", image), ("pixel", pixel))}


def read_threshold(plain: dict | None) -> Threshold | None:
    """The inverse of `plain_thresholds` for one threshold.

    Raises:
      InputError: a field is missing, unknown or of another type.
    """
    if plain is None:
        return None
    try:
        value, interval = float(plain["value"]), plain["interval"]
        if np.isnan(value):
            raise ValueError("its value is NaN")
        if interval is not None:
            low, high = map(float, interval)
            interval = low, high
        return Threshold(**plain | {"value": value, "interval": interval})
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(
            f"A threshold is damaged, or was written by another version ({error}). Install that "
            "version, or train again."
        ) from error


def _is_wanted(path: pathlib.Path, tensors: Mapping[str, np.ndarray], wanted: bool | None) -> bool:
    """Whether the tensors of the backbone are saved; logs a warning if they are too large."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    if wanted is None and size >= _SMALL:
        _log.warning(
            "%s does not contain the weights of the backbone, which take %d MB. To load it where "
            "they are not available, save it with backbone=True.",
            path,
            size // 10**6,
        )
    return size < _SMALL if wanted is None else wanted


def _on_main(path: pathlib.Path, function: Callable[[], None]) -> None:
    """Calls a function that writes `path` in the first process; names failures of the disk."""

    def call() -> None:
        try:
            function()
        except OSError as error:
            raise InputError(
                f"{path} cannot be written: {error.strerror or error}. "
                f"{remedy(error) or 'Check the directory'}, or pass another path."
            ) from error

    parallel.on_main(call)


def _write_files(path: pathlib.Path, about: dict, files: Mapping[str, bytes]) -> None:
    """Writes a directory or a .zip file completely or not at all."""
    description = (json.dumps(about, indent=2) + "\n").encode()
    files = {DETECTOR: description, **files}
    with staged(path) as new:
        if not (path.is_file() or is_zip(path)):
            new.mkdir()
            for name, data in files.items():
                with replacing(new / name, "wb") as opened:
                    opened.write(data)
            return
        with replacing(new, "wb") as opened, zipfile.ZipFile(opened, "w") as archive:
            for name, data in files.items():
                info = zipfile.ZipInfo(name)  # of a fixed date: equal detectors give equal files
                info.external_attr = 0o644 << 16
                archive.writestr(info, data)


@contextlib.contextmanager
def damage_is_named(path: pathlib.Path) -> Iterator[None]:
    """Raises an InputError that names a file instead of other errors of the context."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error
    except Exception as error:  # a damaged or hostile file may cause any
        raise InputError(
            f"{path} is damaged ({reason(error)}). Restore it from a copy, or save the detector "
            "again."
        ) from error


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Callable[[str, int], bytes]]:
    """Yields a function that reads a file of a saved detector, if it has at most some bytes."""

    def read_file(name: str, limit: int) -> bytes:
        file = path / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        with file.open("rb") as opened:
            return opened.read(_checked_size(name, file.stat().st_size, limit))

    if path.is_dir():
        yield read_file
        return
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is not a saved detector, or it is incomplete. Pass a directory or a .zip file "
            "that Detector.save has written."
        )
    with zipfile.ZipFile(path) as archive:
        members = _members(archive, path.stat().st_size)

        def read_member(name: str, limit: int) -> bytes:
            if name not in members:
                raise ValueError(f"{name} is missing")
            with archive.open(members[name]) as opened:
                return opened.read(_checked_size(name, members[name].file_size, limit))

        yield read_member


def _checked_size(name: str, size: int, limit: int) -> int:
    if size > limit:
        raise ValueError(f"{name} has {size} bytes, more than {limit}")
    return size


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of a .zip file of `size` bytes by name; nothing is unpacked.

    Raises:
      ValueError: a member is not a file of a saved detector, or they are too large.
    """
    members = archive.infolist()
    for info in members:
        if info.filename not in (DETECTOR, *_FILES) or stat.S_ISLNK(info.external_attr >> 16):
            raise ValueError(f"{info.filename!r} is not a file of a saved detector")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{info.filename} is compressed by another method than deflate")
    if len({info.filename for info in members}) < len(members):
        raise ValueError("it has several files of one name")
    total = sum(info.file_size for info in members)
    if total > _MAX_RATIO * size + _MAX_DESCRIPTION:
        raise ValueError(f"its files claim {total} bytes, and it has {size}")
    return {info.filename: info for info in members}


def _description(path: pathlib.Path, read_file: Callable[[str, int], bytes]) -> dict[str, Any]:
    """The checked content of `detector.json`."""
    about = json.loads(read_file(DETECTOR, _MAX_DESCRIPTION))
    number = about["format"]
    if type(number) is not int or number != _FORMAT:
        raise InputError(
            f"{path} has the format {number!r}, and this version reads format {_FORMAT}. Install "
            "the version of fastflow-jax that wrote it, or a later one."
        )
    if differing := (about.keys() - _LATER_KEYS) ^ _KEYS:
        raise ValueError(f"the key {min(differing)!r} of {DETECTOR} is missing or unknown")
    if unknown := about["files"].keys() - set(_FILES):
        raise ValueError(f"the file {min(unknown)!r} in {DETECTOR} is unknown")
    if about["thresholds"].keys() != {"image", "pixel"}:
        raise ValueError(f"{DETECTOR} must have the thresholds image and pixel")
    for name, entry in about["files"].items():
        if entry.keys() != {"bytes", "sha256"} or type(entry["bytes"]) is not int:
            raise ValueError(f"{DETECTOR} must have the bytes and the sha256 of {name}")
    return about


def _verified(
    name: str, entry: dict[str, Any], read_file: Callable[[str, int], bytes]
) -> dict[str, np.ndarray]:
    """The arrays of a file with the recorded size and sha256."""
    data = read_file(name, entry["bytes"])
    if len(data) != entry["bytes"]:
        raise ValueError(f"{name} has {len(data)} bytes instead of {entry['bytes']}")
    if _sha256(data) != entry["sha256"]:
        raise ValueError(f"the sha256 of {name} is not the recorded one")
    return from_bytes(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
