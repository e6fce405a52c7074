"""Decoding, resizing and normalisation of images and masks.

Images are uint8 until `normalise`, so that Pillow resizes them, as in torchvision's `Resize` of
PIL images and in the reference code.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps

from fastflow_jax.data.formats import broken, cannot_read, open_image, pages_of, tiff_tags
from fastflow_jax.data.levels import Levels, kind_of, unknown_white
from fastflow_jax.errors import InputError

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262  # 0: white is zero
_TIFF_PLANAR = 284  # 2: one plane per channel
# Pillow decodes colours of 16 bits to their high byte; with the other byte order, to the low one.
_DEEP = (";16B", ";16L", ";16N")
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}

RESIZES = ("square", "crop", "pad")
MASK_RESIZES = ("nearest", "floor", "threshold")

# Kinds of pixels of a model input with a region of interest: padding, pixels of the image outside
# of the region, and pixels that count.
PADDING, CONTEXT, COUNTED = range(3)


def read_file(path: Path) -> bytes:
    """Returns the content of a file. Raises an InputError if it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # the latter for a NUL character in the path
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


def decode_image(
    data: bytes, name: str = "the image", page: int = 0, levels: Levels | None = None
) -> np.ndarray:
    """Decodes an image file to RGB, uint8 [H, W, 3].

    - The EXIF orientation is applied.
    - Grey is repeated over the channels. Pillow converts palettes, CMYK, YCbCr, HSV and LAB.
    - Transparent pixels are composited over black, because their hidden colour is arbitrary.
    - 16-bit images, grey or colour, keep their high byte: 65535 is white, even if the camera has
      fewer bits. In TIFF files of 12 bits 4095 is white. `levels` replaces this rule.

    Args:
        data: content of the file.
        name: name of the image in messages, usually its path.
        page: page of a file with several images, see `formats.pages_of`.
        levels: of images of more than 8 bits; None for the high byte. With pending levels the
            result has the type of `decode_stored`.

    Raises:
        InputError: a broken, truncated or too large file; or values whose white level is unknown,
            that is, of 32-bit integers or floats, unless `levels` has a window.
    """
    if levels is None:
        return _rgb(_load(data, name, page), name)
    return _three_channels(levels.apply(decode_stored(data, name, page), name))


def decode_stored(data: bytes, name: str = "the image", page: int = 0) -> np.ndarray:
    """Decodes an image file to its values as stored, for `levels.Levels`.

    Returns:
        uint16, int32 or float32, [H, W] for grey or [H, W, 3]; uint8 [H, W, 3] as by `decode_image`
        if the file has 8 bits per channel.

    Raises:
        InputError: as by `decode_image`, or channels of 16 bits that Pillow cannot read.
    """
    image = _load(data, name, page)
    args = _arguments(data, name, page)
    if image.format == "PPM" and image.mode in ("I", "RGB"):
        return _of_ppm(image, args[1] if len(args) == 2 else None, name)
    if image.mode in ("RGB", "RGBA", "RGBX") and args and str(args[0]).endswith(_DEEP):
        return _deep_colours(image, str(args[0]), data, name, page)
    return _stored(image, name)


def _of_ppm(image: Image.Image, highest: int | None, name: str) -> np.ndarray:
    """Values of a PGM or PPM file, given the highest one in its header unless it is usual."""
    if image.mode == "I":  # Pillow scales them to 16 bits
        scaled = np.asarray(image).astype(np.int64)
        return ((scaled * (highest or 65535) + 32767) // 65535).astype(np.uint16)
    if highest is not None and highest > 255:
        raise InputError(
            f"{name} is a PPM file of 16 bits, which Pillow reads with 8. Save it as PNG or TIFF."
        )
    return _rgb(image, name)


def _deep_colours(
    image: Image.Image, rawmode: str, data: bytes, name: str, page: int
) -> np.ndarray:
    """Colours of 16 bits, uint16 [H, W, 3], given the image of their high bytes."""
    if rawmode[:-4] not in ("RGB", "RGBA", "RGBX"):
        raise InputError(
            f"{name} has 16 bits per channel of the kind {rawmode}, which Pillow cannot read. Save "
            "it as RGB or grey, without transparency."
        )
    low = np.asarray(_load(data, name, page, swap=True)).astype(np.uint16)
    values = np.asarray(image).astype(np.uint16) << 8 | low
    if values.shape[-1] == 3 or image.mode == "RGBX":
        return values[..., :3]
    alpha = values[..., 3:].astype(np.uint64)
    return ((values[..., :3] * alpha + 32767) // 65535).astype(np.uint16)


def _stored(image: Image.Image, name: str) -> np.ndarray:
    """Values of a loaded image, see `decode_stored`; colours have 8 bits."""
    if image.mode.startswith("I;16"):
        values, tags = np.asarray(image).astype(np.uint16), tiff_tags(image)
        highest = 2 ** tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] - 1
        return highest - values if tags.get(_TIFF_PHOTOMETRIC) == 0 else values
    if image.mode in ("I", "F"):
        return np.asarray(image)
    return _rgb(image, name)


def convert_image(
    image: Image.Image, name: str = "the image", levels: Levels | None = None
) -> np.ndarray:
    """Converts a Pillow image like `decode_image`, with its errors. The image is not changed.

    Pillow images have colours of 8 bits; of a file that was not read yet, its values are used.
    """
    of_file = isinstance(image, ImageFile.ImageFile)
    if of_file and (image.format == "TIFF" or levels is not None):
        is_unread = image.tile and image.tell() == 0
        if is_unread and (path := Path(os.fsdecode(image.filename))).is_file():
            # Pillow would map a TIFF file that has an orientation with its sides swapped.
            return decode_image(read_file(path), name, levels=levels)
    if 0 in image.size:
        raise InputError(f"{name} has {image.width} x {image.height} pixels. It must not be empty.")
    try:
        image.load()
    except Exception as error:  # as in open_image
        raise broken(name, error) from error
    turned = Image.fromarray(_rgb(image, name) if levels is None else _stored(image, name))
    turned.getexif().update(image.getexif())
    values = np.asarray(ImageOps.exif_transpose(turned))
    return values if levels is None else _three_channels(levels.apply(values, name))


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


def _load(data: bytes, name: str, page: int = 0, *, swap: bool = False) -> Image.Image:
    """Loads a page; with `swap` the low bytes of colours of 16 bits instead of the high ones."""
    opened: Any = open_image(io.BytesIO(data), name)
    with opened as image:
        try:
            if page:
                image.seek(pages_of(image)[page])
            if swap:
                image.tile = [tile._replace(args=_swapped(tile.args)) for tile in image.tile]
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
        except Exception as error:  # as in open_image
            raise broken(name, error) from error
        return image


def _arguments(data: bytes, name: str, page: int) -> tuple:
    """Arguments of Pillow's decoder of a page; the first one is the form of its pixels."""
    opened: Any = open_image(io.BytesIO(data), name)
    with opened as image:
        if page:
            image.seek(pages_of(image)[page])
        args = image.tile[0].args if image.tile else ()
    return args if isinstance(args, tuple) else (args,)


def _swapped(args: Any) -> Any:
    """Arguments of a decoder of Pillow with the other byte order."""
    if isinstance(args, tuple):
        return (_swapped(args[0]), *args[1:])
    return args[:-1] + _SWAPPED[args[-1]]


def _check_planes(image: Image.Image, name: str) -> None:
    tags = tiff_tags(image)
    if tags.get(_TIFF_PLANAR) == 2 and tags.get(_TIFF_BITS_PER_SAMPLE, (8,))[0] == 16:
        raise InputError(
            f"{name} has planar channels of 16 bits, which Pillow misreads. Save it with "
            "interleaved channels."
        )


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I;16"):
        tags = tiff_tags(image)
        levels = np.asarray(image) >> (tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0] - 8)
        levels = 255 - levels if tags.get(_TIFF_PHOTOMETRIC) == 0 else levels
        return _three_channels(levels.astype(np.uint8))
    _check_planes(image, name)
    if image.mode == "I" and image.format == "PPM":  # Pillow scales it to 16 bits
        return _three_channels((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        dtype = np.asarray(image).dtype
        raise unknown_white(f"{name} has {kind_of(dtype)}", dtype)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))


def _three_channels(values: np.ndarray) -> np.ndarray:
    """Repeats grey values [H, W] over three channels; [H, W, 3] is returned as it is."""
    return np.repeat(values[..., None], 3, axis=-1) if values.ndim == 2 else values


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
        valid: bool [...], False in padded pixels; or uint8 [...], the kinds of pixels, `PADDING`
            in padded ones; or None without padding. Padded pixels become 0.

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
