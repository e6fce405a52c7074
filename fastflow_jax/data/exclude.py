"""Normal images to leave out: `config.data.exclude` names a list of them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fastflow_jax.data.dataset import Dataset, Source
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

CALIBRATION = "calibration/"  # before the names of images that were given for calibration


def without_excluded(
    dataset: Dataset,
    file: str | None,
    *,
    prefixes: Sequence[str] = ("",),
    others: Sequence[str] = (),
) -> Dataset:
    """Returns a data set without the images of a list, and with their number as provenance.

    Args:
        dataset: whose training and calibration images are left out; test images stay.
        file: text file with the name of an image per line, see `Source.names`, after
            "calibration/" for images given for calibration. Empty lines and lines that begin with
            "#" are ignored. None leaves out nothing.
        prefixes: what may precede the names in the file, such as a category and a slash.
        others: beginnings of lines that name images of other data sets, and are ignored.

    Raises:
        InputError: the file cannot be read, names an image that the data set does not have, or
            leaves no images to train or calibrate on.
    """
    if file is None:
        return dataset
    lines = _names(file)
    before = len(lines)
    train = _remaining(dataset.train, lines, prefixes, file)
    calibration = dataset.calibration
    if calibration is not None:
        inner = [f"{prefix}{CALIBRATION}" for prefix in prefixes]
        calibration = _remaining(calibration, lines, inner, file)
    unknown = [line for line in lines if not line.startswith(tuple(others))]
    if unknown:
        raise InputError(
            f"data.exclude {file} names {unknown[0]}, which is not a normal image of the data "
            f"({len(unknown)} such names). Use names such as {prefixes[0]}{dataset.train.names[0]}."
        )
    provenance = dataset.provenance | {"excluded_images": before - len(lines)}
    return dataclasses.replace(dataset, train=train, calibration=calibration, provenance=provenance)


def _names(file: str) -> dict[str, None]:
    """The names in a list, in order."""
    try:
        text = expanded(file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data.exclude {file} cannot be read: {error}. Pass a text file with the name of an "
            "image per line."
        ) from error
    lines = (line.strip() for line in text.splitlines())
    return dict.fromkeys(line for line in lines if line and not line.startswith("#"))


def _remaining(
    source: Source, lines: dict[str, None], prefixes: Sequence[str], file: str
) -> Source:
    """The images whose names are not in `lines`; the names of the others are removed from it."""
    kept = []
    for i, name in enumerate(source.names):
        found = [f"{prefix}{name}" for prefix in prefixes if f"{prefix}{name}" in lines]
        for line in found:
            del lines[line]
        if not found:
            kept.append(i)
    if not kept:
        raise InputError(
            f"data.exclude {file} names all {len(source)} images, such as {source.names[0]}. "
            "Remove the names of normal images from it."
        )
    return source if len(kept) == len(source) else subset(source, kept)


def subset(source: Source, rows: Sequence[int]) -> Source:
    """Returns the images of a source at `rows`.

    Args:
        source: the whole source.
        rows: numbers of the images, in the order of the subset.
    """

    def of_rows(values):
        return None if values is None else tuple(values[i] for i in rows)

    part_of = source.part_of
    if part_of is not None:
        part_of = part_of[0], np.arange(len(part_of[0]))[part_of[1]][list(rows)]
    load, header = source.load, source.header
    return dataclasses.replace(
        source,
        names=of_rows(source.names),
        defects=of_rows(source.defects),
        load=lambda index: load(rows[index]),
        part_of=part_of,
        files=of_rows(source.files),
        header=None if header is None else lambda index: header(rows[index]),
        groups=of_rows(source.groups),
    )
