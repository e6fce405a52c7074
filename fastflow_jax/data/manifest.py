"""Lists of images with their splits, labels and masks, for files that are not in directories.

A CSV file with a header, or a JSON file with a list of objects. Columns:

    path     of an image, relative to `data.root`, or to the list if that is not set
    split    train, test or calibration
    label    good, or the kind of defect
    mask     optional: path of a mask or of polygons; several masks are separated by semicolons in
             CSV, and are a list in JSON
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastflow_jax.data.dataset import GOOD, check_choice
from fastflow_jax.data.formats import missing_target
from fastflow_jax.data.layout import Item, Splits, to_records
from fastflow_jax.errors import InputError

SPLITS = ("train", "test", "calibration")
_REQUIRED = ("path", "split", "label")


def read(path: Path, root: Path | None) -> Splits:
    """Reads a list, the headers of its images, and those of its masks.

    Args:
        path: the list.
        root: directory of the paths in the list; None for the directory of the list.

    Returns:
        "train", "test" and "calibration", in the order of the list; missing splits are empty.

    Raises:
        InputError: a damaged list, a missing or unreadable file, an image that is listed twice,
            defective training or calibration images, or masks of some defective images only.
    """
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for where, row in _rows(path):
        split = check_choice(f"{where}: split", row["split"], SPLITS)
        if split != "test" and row["label"] != GOOD:
            raise InputError(
                f"{where}: {row['path']} is {row['label']}, but {split} must contain only images "
                f"with the label {GOOD}. Move it to test."
            )
        folder = path.parent if root is None else root
        image, *masks = (_existing(folder / name, where) for name in (row["path"], *row["mask"]))
        items[split].append(Item(image, row["path"], row["label"], tuple(masks)))
    if not items["train"]:
        raise InputError(f"{path} has no images of the split train. Add them.")
    _check_masks(path, items["test"])
    return {split: to_records(found) for split, found in items.items()}


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place of each entry, for messages, and its fields; `mask` is a list."""
    try:
        text = path.read_text("utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        rows = json.loads(text) if is_json else list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(
            f"data.manifest {path} cannot be read ({error}). Write it again, in UTF-8."
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        fields = ", ".join(_REQUIRED)
        raise InputError(f"{path} must be a list of objects with the fields {fields}.")
    for number, row in enumerate(rows, 1 if is_json else 2):
        where = f"{path}, {'entry' if is_json else 'line'} {number}"
        for field in _REQUIRED:
            if not isinstance(row.get(field), str) or not row[field]:
                raise InputError(
                    f"{where} has no {field}. Each image needs {', '.join(_REQUIRED)}; mask is "
                    "optional."
                )
        mask = row.get("mask") or []
        if isinstance(mask, str):
            mask = mask.split(";")
        if not isinstance(mask, list) or not all(isinstance(name, str) for name in mask):
            raise InputError(f"{where}: mask is {mask!r}. It must be a path, or a list of paths.")
        yield where, row | {"mask": [name.strip() for name in mask if name.strip()]}


def _existing(path: Path, where: str) -> Path:
    if os.path.islink(path) and not os.path.exists(path):
        raise missing_target(path)
    if not os.path.isfile(path):
        raise InputError(f"{where}: {path} does not exist. Correct the path, or set data.root.")
    return path


def _check_masks(path: Path, test: list[Item]) -> None:
    """Raises an InputError if some defective images have masks and others do not."""
    defective = [item for item in test if item.defect != GOOD]
    missing = [item for item in defective if not item.masks]
    if missing and any(item.masks for item in test):
        raise InputError(
            f"{missing[0].image} has no mask in {path} (missing: {len(missing)} of "
            f"{len(defective)}). Add it, or list no masks."
        )
