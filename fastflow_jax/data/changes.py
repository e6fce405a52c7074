"""Images changed on purpose: test images tampered with, training images augmented.

Both are sources made of sources, so that nothing after them knows. Where an image is turned, made
smaller or moved, it goes on beyond its edges as in a mirror: a black corner would be an anomaly of
our own making.
"""

import dataclasses
import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance

from fastflow_jax.data.dataset import Source


def tampered(source: Source, tamper: ConfigDict) -> Source:
    """The source with every image, and its mask with it, changed as `config.data.tamper` says."""
    move = tamper.to_dict()
    if warp_matrix((1, 1), **move) == (1, 0, 0, 0, 1, 0):
        return source

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        image, mask = source.load(index)
        return warp(image, **move), None if mask is None else warp(mask, **move)

    part_of = source.part_of and (tampered(source.part_of[0], tamper), source.part_of[1])
    return dataclasses.replace(source, load=load, part_of=part_of)


def augmented(source: Source, augment: ConfigDict, seed: int, epoch: int) -> Source:
    """The source with every image changed at random, within the bounds of `config.augment`.

    What happens to an image hangs on the seed, the epoch and the image alone.
    """

    def load(index: int) -> tuple[np.ndarray, None]:
        rng = np.random.default_rng((seed, epoch, index))
        return augment_image(source.load(index)[0], rng, **augment), None

    return dataclasses.replace(source, load=load, part_of=None)


def augment_image(
    image: np.ndarray, rng: np.random.Generator, *, flips: bool, rotate: float, colour: float
) -> np.ndarray:
    """An image [H, W, 3] flipped, turned and coloured at random.

    Args:
        image: uint8.
        rng: drawn from the same number of times whatever is asked for.
        flips: left and right exchanged in one half of the cases, and top and bottom likewise.
        rotate: turned by up to this many degrees either way.
        colour: brightness, contrast and saturation, in this order, times a factor within this of 1
            (torchvision's ColorJitter).
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
    picture = Image.fromarray(np.ascontiguousarray(image))
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhancer, factor in zip(enhancers, factors, strict=True):
        picture = enhancer(picture).enhance(factor)
    return np.asarray(picture)


def warp(
    array: np.ndarray,
    *,
    rotate: float = 0.0,
    zoom: float = 1.0,
    down: float = 0.0,
    right: float = 0.0,
) -> np.ndarray:
    """An image or mask turned, scaled and moved about its middle; its size stays.

    Args:
        array: uint8 [H, W, 3], interpolated bilinearly, or bool [H, W], by the nearest pixel.
        rotate: degrees, counter-clockwise.
        zoom: factor; above 1 the image grows.
        down: part of the height.
        right: part of the width.
    """
    height, width = array.shape[:2]
    matrix = warp_matrix((height, width), rotate, zoom, down, right)
    a, b, x0, c, d, y0 = matrix
    xs = [a * x + b * y + x0 for x in (0, width) for y in (0, height)]
    ys = [c * x + d * y + y0 for x in (0, width) for y in (0, height)]
    # One pixel more than is seen, for the interpolation.
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
    """(a, b, x0, c, d, y0): what stands at (x, y) comes from (a x + b y + x0, c x + d y + y0).

    For `warp` of an image of `size`; x to the right, y down, from the upper left corner.
    """
    height, width = size
    # Rounded, so that quarter turns are exact: Pillow cuts fractions of a grey level off.
    cos, sin = (round(f(math.radians(rotate)), 12) / zoom for f in (math.cos, math.sin))
    x, y = width * (0.5 + right), height * (0.5 + down)  # where the middle comes to lie
    return (cos, -sin, width / 2 - cos * x + sin * y, sin, cos, height / 2 - sin * x - cos * y)
