"""Decoding, resizing and normalisation of images and masks.

Images are uint8 until `normalise`, so that Pillow resizes them, as in torchvision's `Resize` of
PIL images and in the reference code.
"""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps

from fastflow_jax.data.formats import broken, cannot_read, open_image, pages_of, tiff_tags
from fastflow_jax.errors import InputError

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262  # 0: white is zero
_TIFF_PLANAR = 284  # 2: one plane per channel

RESIZES = ("square", "crop", "pad")
MASK_RESIZES = ("nearest", "floor", "threshold")

# Kinds of pixels of a model input with a region of interest: padding, pixels of the image outside
# of the region, and pixels that count.
PADDING, CONTEXT, COUNTED = range(3)


def read_file(path: Path) -> bytes:
    """Returns the content of a file. Raises an InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def check_image(data: bytes, name: str) -> None:
    """Raises the errors of `decode_image`; PNG is checked by its checksums, not decoded."""
    with open_image(io.BytesIO(data), name) as image:
        if image.format != "PNG":
            decode_image(data, name)
            return
        try:
            image.verify()  # thirty times faster than decoding
        except Exception as error:  # as in open_image
            raise broken(name, error) from error


def decode_image(data: bytes, name: str = "the image", page: int = 0) -> np.ndarray:
    """Decodes an image file to RGB, uint8 [H, W, 3].

    - The EXIF orientation is applied.
    - Grey is repeated over the channels. Pillow converts palettes, CMYK, YCbCr, HSV and LAB.
    - Transparent pixels are composited over black, because their hidden colour is arbitrary.
    - 16-bit images, grey or colour, keep their high byte: 65535 is white, even if the camera has
      fewer bits. In TIFF files of 12 bits 4095 is white.

    Args:
        data: content of the file.
        name: name of the image in messages, usually its path.
        page: page of a file with several images, see `formats.pages_of`.

    Raises:
        InputError: a broken, truncated or too large file, or 32-bit integers or floats, whose
            white level is unknown.
    """
    return _rgb(_load(data, name, page), name)


def convert_image(image: Image.Image, name: str = "the image") -> np.ndarray:
    """Converts a Pillow image like `decode_image`, with its errors. The image is not changed."""
    if isinstance(image, ImageFile.ImageFile) and image.format == "TIFF":
        is_unread = image.tile and image.tell() == 0
        if is_unread and (path := Path(os.fsdecode(image.filename))).is_file():
            # Pillow would map a TIFF file that has an orientation with its sides swapped.
            return decode_image(read_file(path), name)
    if 0 in image.size:
        raise InputError(f"{name} has {image.width} x {image.height} pixels. It must not be empty.")
    try:
        image.load()
    except Exception as error:  # as in open_image
        raise broken(name, error) from error
    turned = Image.fromarray(_rgb(image, name))
    turned.getexif().update(image.getexif())
    return np.asarray(ImageOps.exif_transpose(turned))


def decode_mask(
    data: bytes,
    name: str = "the mask",
    page: int = 0,
    on_cut: Callable[[str], object] | None = None,
) -> np.ndarray:
    """Decodes a mask file to bool [H, W], True in defective pixels.

    The level of a pixel is its grey value or the maximum of its channels. Pixels of levels above 0
    are defective, so a mask may have levels 0 and 1, 0 and 255, class or instance indices, or one
    colour or palette entry per class. Transparent pixels are normal; if all pixels are black and
    some are transparent, the others are defective.

    Lossy compression, antialiasing and resizing leave a halo of low levels around defects. A mask
    has a halo, and is cut, if it has more than three levels, the highest is above half of the range
    (127; 32767 with 16 or 32 bits; 0.5 with floats), and the levels below half of the highest are
    not classes. Classes fill areas of one level: levels below 1/8 of the highest are classes if
    more than 90 % of their pixels are in blocks of 3x3 pixels of one level, levels from 1/8 to 1/2
    if more than 25 % are.

    - Neither are classes: pixels from 1/2 of the highest level on are defective.
    - Levels from 1/8 on are classes: pixels from 1/8 of the highest level on are defective.
    - Levels below 1/8 are classes: the mask is not cut.

    Args:
        data: content of the file.
        name: name of the mask in messages, usually its path.
        page: page of a file with several masks, see `formats.pages_of`.
        on_cut: called with the name of a mask that is cut.

    Raises:
        InputError: a broken, truncated or too large file.
    """
    mask = _load(data, name, page)
    levels = np.asarray(mask) if mask.mode[0] in "IF" else _rgb(mask, name).max(axis=-1)
    if not levels.any() and mask.has_transparency_data:
        alpha = np.asarray(mask.convert("RGBA"))[..., 3]
        levels = alpha if alpha.min() == 0 else levels
    lowest = _lowest_defective(levels)
    if lowest is None:
        return levels > 0
    if on_cut:
        on_cut(name)
    return levels >= lowest


def _lowest_defective(levels: np.ndarray) -> float | None:
    """Lowest defective level of a mask with a halo, else None; see `decode_mask`."""
    highest = levels.max()
    is_float = levels.dtype.kind == "f"
    if not highest > (0.5 if is_float else 127 if levels.dtype == np.uint8 else 32767):
        return None
    half = highest / 2 if is_float else highest // 2
    low = (levels > 0) & (levels < highest / 8)
    middle = (levels >= highest / 8) & (levels < half)
    if not (low.any() or middle.any()) or len(np.unique(levels)) <= 3:
        return None
    from scipy import ndimage  # on use, because predictions need neither masks nor scipy

    is_even = ndimage.maximum_filter(levels, 3) == ndimage.minimum_filter(levels, 3)
    if _share_in_blocks(low, is_even) > 0.9:
        return None
    if _share_in_blocks(middle, is_even) > 0.25:
        return highest / 8 if low.any() else None
    return half


def _share_in_blocks(pixels: np.ndarray, is_even: np.ndarray) -> float:
    """Fraction of `pixels`, bool [H, W], in 3x3 blocks of one level; 0 if there are none."""
    from scipy import ndimage

    in_blocks = ndimage.binary_dilation(pixels & is_even, np.ones((3, 3), bool)) & pixels
    return in_blocks.sum() / max(1, pixels.sum())


def _load(data: bytes, name: str, page: int = 0) -> Image.Image:
    with open_image(io.BytesIO(data), name) as image:
        try:
            if page:
                image.seek(pages_of(image)[page])
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        except Exception as error:  # as in open_image
            raise broken(name, error) from error
        return image


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    tags = tiff_tags(image)
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    if image.mode.startswith("I;16"):
        levels = np.asarray(image) >> (bits - 8)
        return _repeat(255 - levels if tags.get(_TIFF_PHOTOMETRIC) == 0 else levels)
    if tags.get(_TIFF_PLANAR) == 2 and bits == 16:
        raise InputError(
            f"{name} has planar channels of 16 bits, which Pillow misreads. Save it with "
            "interleaved channels."
        )
    if image.mode == "I" and image.format == "PPM":  # Pillow scales it to 16 bits
        return _repeat(np.asarray(image) >> 8)
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise InputError(
            f"{name} has {kind}, whose white level is unknown. Save it with 8 or 16 unsigned bits "
            "per channel."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))


def _repeat(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


class Placement(NamedTuple):
    """Position of an image in a model input; sizes are (height, width)."""

    resized: tuple[int, int]  # size of the resized image
    crop: tuple[slice, slice]  # part of the resized image in the input
    place: tuple[slice, slice]  # position of this part in the input; the rest is padding


def placement(size: tuple[int, int], target: tuple[int, int], how: str) -> Placement:
    """Returns the position of an image in a model input.

    Args:
        size: (height, width) of the image.
        target: (height, width) of the input.
        how: "square" resizes to the target; "crop" keeps the aspect ratio, resizes to cover the
            target and crops the centre (as torchvision's Resize and CenterCrop); "pad" keeps the
            aspect ratio, resizes to fit into the target and centres the image.
    """
    if how == "square":
        return Placement(target, _middle(target, target), _middle(target, target))
    (height, width), (rows, columns) = size, target
    is_wide = width * rows > height * columns
    if is_wide == (how == "crop"):
        resized = (rows, max(1, width * rows // height))
    else:
        resized = (max(1, height * columns // width), columns)
    if how == "crop":
        return Placement(resized, _middle(resized, target), _middle(target, target))
    return Placement(resized, _middle(resized, resized), _middle(target, resized))


def _middle(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a centred rectangle."""
    top, left = (round((a - b) / 2) for a, b in zip(outer, inner, strict=True))
    return slice(top, top + inner[0]), slice(left, left + inner[1])


def seen_part(array: np.ndarray, placed: Placement) -> np.ndarray:
    """Returns the part of an image or mask [H, W, ...] that is in the input, not resized."""

    def scaled(part: slice, length: int, resized: int) -> slice:
        return slice(part.start * length // resized, -(-part.stop * length // resized))

    return array[tuple(map(scaled, placed.crop, array.shape[:2], placed.resized))]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to `size` (height, width) by Pillow's antialiased bilinear filter."""
    return _resize(image, size, Image.Resampling.BILINEAR)


def resize_mask(mask: np.ndarray, size: tuple[int, int], how: str = "nearest") -> np.ndarray:
    """Resizes bool [H, W] to `size` (height, width).

    Published pixel metrics depend on how masks were resized:

    - "nearest": nearest pixel (Pillow), as in CFLOW and SPADE;
    - "floor": resized like an image, defective where the result is 1, which erodes defects, as in
      the PyTorch reference of FastFlow and in PatchCore;
    - "threshold": resized like an image, defective where the result is at least one half.
    """
    if how == "nearest":
        return _resize(mask.astype(np.uint8), size, Image.Resampling.NEAREST).astype(bool)
    share = _resize(mask * np.uint8(255), size, Image.Resampling.BILINEAR)
    return share == 255 if how == "floor" else share >= 128


def _resize(array, size, resample):
    if array.shape[:2] == size:
        return array
    height, width = size
    return np.asarray(Image.fromarray(array).resize((width, height), resample))


def normalise(image: Any, mean: Sequence[float], std: Sequence[float], valid: Any = None) -> Any:
    """Scales images of numpy or JAX to [0, 1], subtracts `mean` and divides by `std`, per channel.

    Args:
        image: uint8 [..., 3].
        mean: [3].
        std: [3].
        valid: bool [...], False in padded pixels, which become 0; or uint8 [...], the kinds of
            pixels, of which `PADDING` becomes 0; or None without padding.

    Returns:
        float32 [..., 3].
    """
    scaled = image.astype(np.float32) / np.float32(255)
    normalised = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return normalised if valid is None else normalised * (valid > PADDING)[..., None]


def counted(valid: Any) -> Any:
    """Returns bool [...], True in pixels that count, of numpy or JAX; None if all count.

    Args:
        valid: as in `normalise`.
    """
    return valid if valid is None or valid.dtype == bool else valid == COUNTED
