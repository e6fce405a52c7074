"""Changes of images: tampering with test images and augmentation of training images.

Both wrap a source in a source. Images are mirrored at their borders before they are rotated,
reduced or moved, because a black corner would be an artificial anomaly.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance

from fastflow_jax.data.dataset import Regions, Source


def tampered(source: Source, tamper: ConfigDict) -> Source:
    """Returns `source` with each image and mask warped by the fields of `config.data.tamper`."""
    move = tamper.to_dict()
    if warp_matrix((1, 1), **move) == (1, 0, 0, 0, 1, 0):
        return source

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        image, mask = source.load(index)
        return warp(image, **move), None if mask is None else warp(mask, **move)

    def regions(index: int) -> Regions:
        assert source.regions is not None
        masks, saturation = source.regions(index)
        warped = [warp(mask, **move) for mask in masks]
        return Regions(np.array(warped, bool).reshape(masks.shape), saturation)

    part_of = source.part_of and (tampered(source.part_of[0], tamper), source.part_of[1])
    return dataclasses.replace(
        source, load=load, part_of=part_of, regions=source.regions and regions
    )


def augmented(source: Source, augment: ConfigDict, seed: int, epoch: int) -> Source:
    """Returns `source` with each image changed at random, within the bounds of `config.augment`.

    The change of an image depends only on seed, epoch and index.
    """
    bounds = bounds_of(augment)

    def load(index: int) -> tuple[np.ndarray, None]:
        rng = np.random.default_rng((seed, epoch, index))
        return augment_image(source.load(index)[0], rng, **bounds), None

    return dataclasses.replace(source, load=load, part_of=None)


def bounds_of(augment: ConfigDict) -> dict[str, Any]:
    """The fields of `config.augment` that bound the change of an image, see `augment_image`."""
    return {field: value for field, value in augment.to_dict().items() if field != "copies"}


def with_copies(source: Source, augment: ConfigDict) -> Source:
    """Returns `source` followed by `augment.copies` copies of it with changed images.

    With n images, row i + k n has image i in copy k; copy 0 is unchanged. The copies are the same
    in every run, and have no masks.
    """
    n, copies, roi = len(source), range(augment.copies + 1), source.roi
    sources = [source, *(augmented(source, augment, 0, k) for k in copies[1:])]

    def load(index: int) -> tuple[np.ndarray, None]:
        return sources[index // n].load(index % n)[0], None

    return Source(
        names=tuple(f"{name}, copy {k}" if k else name for k in copies for name in source.names),
        defects=source.defects * len(copies),
        load=load,
        files=source.files and source.files * len(copies),
        roi=None if roi is None else lambda index, size: roi(index % n, size),
    )


def augment_image(
    image: np.ndarray, rng: np.random.Generator, *, flips: bool, rotate: float, colour: float
) -> np.ndarray:
    """Flips, rotates and colours an image at random.

    Args:
        image: uint8 [H, W, 3].
        rng: source of randomness; the number of draws does not depend on the other arguments.
        flips: whether to flip horizontally and vertically, each with probability 1/2.
        rotate: largest rotation in degrees, in both directions.
        colour: brightness, contrast and saturation are multiplied, in this order, by factors from
            1 - colour to 1 + colour (as in torchvision's ColorJitter).
    """
    left_right, up_down = rng.random(2) < 0.5
    angle = rotate * rng.uniform(-1, 1)
    factors = 1 + colour * rng.uniform(-1, 1, 3)
    if flips and left_right:
        image = image[:, ::-1]
    if flips and up_down:
        image = image[::-1]
    if rotate:
        image = warp(image, rotate=angle)
    if not colour:
        return image
    pillow = Image.fromarray(np.ascontiguousarray(image))
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, factors, strict=True):
        pillow = enhancer(pillow).enhance(factor)
    return np.asarray(pillow)


def warp(
    array: np.ndarray,
    *,
    rotate: float = 0.0,
    zoom: float = 1.0,
    down: float = 0.0,
    right: float = 0.0,
) -> np.ndarray:
    """Rotates, scales and moves an image or mask; its size is unchanged.

    Args:
        array: uint8 [H, W, 3], interpolated bilinearly, or bool [H, W], nearest pixel.
        rotate: degrees counter-clockwise, about the centre.
        zoom: scale factor, about the centre; above 1 the image is enlarged.
        down: shift as a fraction of the height.
        right: shift as a fraction of the width.
    """
    height, width = array.shape[:2]
    matrix = warp_matrix((height, width), rotate, zoom, down, right)
    a, b, x0, c, d, y0 = matrix
    xs = [a * x + b * y + x0 for x in (0, width) for y in (0, height)]
    ys = [c * x + d * y + y0 for x in (0, width) for y in (0, height)]
    # One extra pixel for the interpolation.
    left, top = (max(0, math.ceil(1 - min(places))) for places in (xs, ys))
    beyond = [
        max(0, math.ceil(max(places) - length + 1))
        for places, length in ((xs, width), (ys, height))
    ]
    pads = [(top, beyond[1]), (left, beyond[0])] + [(0, 0)] * (array.ndim - 2)
    mirrored = Image.fromarray(np.pad(array.view(np.uint8), pads, "symmetric"))
    how = Image.Resampling.NEAREST if array.dtype == bool else Image.Resampling.BILINEAR
    moved = mirrored.transform(
        (width, height), Image.Transform.AFFINE, (a, b, x0 + left, c, d, y0 + top), how
    )
    return np.asarray(moved).view(array.dtype)


def warp_matrix(
    size: tuple[int, int], rotate: float, zoom: float, down: float, right: float
) -> tuple[float, ...]:
    """Returns (a, b, x0, c, d, y0): pixel (x, y) is read from (a x + b y + x0, c x + d y + y0).

    See `warp`. `size` is (height, width); x points right and y down from the upper left corner.
    """
    height, width = size
    # Rounded so that quarter turns are exact: Pillow truncates fractions of a grey level.
    cos, sin = (round(f(math.radians(rotate)), 12) / zoom for f in (math.cos, math.sin))
    x, y = width * (0.5 + right), height * (0.5 + down)  # new position of the centre
    return (cos, -sin, width / 2 - cos * x + sin * y, sin, cos, height / 2 - sin * x - cos * y)
