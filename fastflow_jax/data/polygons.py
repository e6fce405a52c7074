"""Masks from annotation tools: files of LabelMe and COCO.

A LabelMe file has the polygons and rectangles of one image. A COCO file has the annotations of many
images, each a list of polygons or an uncompressed run-length encoding; its image names are matched
with the ends of the paths of images. Coordinates are continuous: the pixel in column x covers
[x, x + 1], and is defective if its centre is inside a polygon (even-odd rule).
"""

import collections
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError

# A polygon [N, 2] of x and y, or a mask, bool [H, W].
Shape = np.ndarray


def draw(path: Path, image: Path, size: tuple[int, int]) -> np.ndarray:
    """Returns the mask of an image, bool [H, W], the union of its shapes.

    Args:
        path: file of LabelMe or COCO.
        image: path of the image.
        size: (height, width) of the image.

    Raises:
        InputError: see `shapes_of`.
    """
    mask = np.zeros(size, bool)
    for shape in shapes_of(path, image, size):
        mask |= shape if shape.dtype == bool else fill(shape, size)
    return mask


def shapes_of(path: Path, image: Path, size: tuple[int, int]) -> list[Shape]:
    """Returns the shapes of an image in a file of LabelMe or COCO; see `draw`.

    Raises:
        InputError: the file is damaged or of another kind, has shapes that are not supported, does
            not have the image, or states another size of it.
    """
    try:
        content = _read(path, path.stat().st_mtime_ns)
        if isinstance(content, _Coco):
            entry = content.entry_of(path, image)
            stated = entry.get("height"), entry.get("width")
            found = content.segmentations.get(entry["id"], ())
            shapes = [shape for each in found for shape in _coco_shapes(path, each)]
        else:
            stated = content.get("imageHeight"), content.get("imageWidth")
            shapes = [_labelme_shape(path, shape) for shape in content["shapes"]]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} is damaged ({error!r}). Export it again.") from error
    if None not in stated and stated != size:
        raise InputError(
            f"{path} states {stated[1]} x {stated[0]} pixels for {image}, which has {size[1]} x "
            f"{size[0]}. Annotate the image in this size."
        )
    return shapes


def annotated(path: Path, images: Sequence[Path]) -> list[Path]:
    """Returns those of `images` that have annotations in a COCO file.

    Raises:
        InputError: the file is damaged or is not COCO; an annotated image is not one of `images`,
            or several are meant by one name.
    """
    content = _read(path, path.stat().st_mtime_ns)
    if not isinstance(content, _Coco):
        raise InputError(f"{path} is not a COCO file. Move it into the directory of a defect.")
    by_name = collections.defaultdict(list)
    for image in images:
        by_name[image.name].append(image)
    found = []
    for entry in content.annotated:
        name = entry["file_name"]
        matches = [image for image in by_name[_parts(name)[-1]] if _is_named(image, name)]
        if len(matches) != 1:
            problem = "no image has" if not matches else "several images have"
            raise InputError(
                f"{path} annotates {name}, but {problem} that name. Name images uniquely, with "
                "their directory if needed."
            )
        found += matches
    return found


def fill(polygon: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the pixels, bool [H, W], whose centres are inside a polygon, float [N, 2]."""
    height, width = size
    crossings = np.zeros((height, width + 1), np.int32)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        first, last = (int(np.ceil(y - 0.5)) for y in sorted((y0, y1)))
        rows = np.arange(min(max(0, first), height), min(max(0, last), height))
        if len(rows):
            x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
            crossings[rows, np.clip(np.ceil(x - 0.5), 0, width).astype(int)] += 1
    return np.cumsum(crossings[:, :width], axis=1) % 2 == 1


class _Coco:
    """Content of a COCO file: entries of images by their last name, and their annotations."""

    def __init__(self, content: dict[str, Any]):
        self.entries = collections.defaultdict(list)
        self.segmentations = collections.defaultdict(list)  # by the id of the image
        for annotation in content["annotations"]:
            self.segmentations[annotation["image_id"]].append(annotation["segmentation"])
        for entry in content["images"]:
            self.entries[_parts(entry["file_name"])[-1]].append(entry)
        self.annotated = [each for each in content["images"] if each["id"] in self.segmentations]

    def entry_of(self, path: Path, image: Path) -> dict[str, Any]:
        """Returns the entry of an image; raises an InputError if there is not exactly one."""
        found = [each for each in self.entries[image.name] if _is_named(image, each["file_name"])]
        if len(found) != 1:
            problem = "has no entry" if not found else "has several entries"
            raise InputError(f"{path} {problem} for {image}. Export the annotations again.")
        return found[0]


@functools.lru_cache(maxsize=64)
def _read(path: Path, modified_ns: int) -> _Coco | dict[str, Any]:
    """Content of a file of COCO or LabelMe; `modified_ns` makes changed files be read again."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}). Export it again.") from error
    if isinstance(content, dict) and "shapes" in content:
        return content
    if not isinstance(content, dict) or "annotations" not in content:
        raise InputError(
            f"{path} is neither a LabelMe file (shapes) nor a COCO file (annotations). Export it "
            "as one of these, or as a mask image."
        )
    try:
        return _Coco(content)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error!r}). Export it again.") from error


def _labelme_shape(path: Path, shape: dict) -> Shape:
    kind, points = shape.get("shape_type", "polygon"), np.asarray(shape["points"], float)
    if kind == "rectangle":
        (left, top), (right, bottom) = points
        points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    elif kind != "polygon":
        raise InputError(f"{path} has a shape of the type {kind}. Draw polygons or rectangles.")
    return _polygon(points)


def _polygon(points: Any) -> Shape:
    """A polygon of JSON numbers; raises ValueError if they are not finite."""
    polygon = np.asarray(points, float).reshape(-1, 2)
    if not np.isfinite(polygon).all():
        raise ValueError("a point is not finite")
    return polygon


def _coco_shapes(path: Path, segmentation: Any) -> Iterable[Shape]:
    if isinstance(segmentation, list):
        return [_polygon(polygon) for polygon in segmentation]
    counts, (height, width) = segmentation["counts"], segmentation["size"]
    if isinstance(counts, str):
        raise InputError(
            f"{path} has compressed run-length encodings. Export polygons, or mask images."
        )
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError("the runs do not cover the image")
    values = np.arange(len(counts)) % 2 == 1  # runs alternate, beginning with normal pixels
    return [np.repeat(values, counts).reshape(width, height).T]


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parts


def _is_named(image: Path, name: str) -> bool:
    """Whether a path ends in a name such as "a.png" or "crack/a.png"."""
    parts = _parts(name)
    return image.parts[-len(parts) :] == parts
