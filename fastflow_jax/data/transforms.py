"""From the bytes of a file to arrays: decoding, resizing, normalising.

Images stay uint8 until `normalise`, so that resizing is Pillow's own, as in torchvision's
`Resize` on PIL images and in the reference code.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from fastflow_jax.data.formats import broken, cannot_read, open_image, pages_of
from fastflow_jax.errors import InputError

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262  # 0: white is zero
_TIFF_PLANAR = 284  # 2: one plane a channel

RESIZES = ("square", "crop", "pad")
MASK_RESIZES = ("nearest", "floor", "threshold")


def read_file(path: Path) -> bytes:
    """The content of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise cannot_read(path, error) from error


def check_image(data: bytes, name: str) -> None:
    """Sees that the bytes of an image file are whole, at the least cost.

    Raises:
        InputError: as `decode_image`.
    """
    with open_image(io.BytesIO(data), name) as image:
        if image.format != "PNG":
            decode_image(data, name)
            return
        try:
            image.verify()  # the checksums: thirty times faster than decoding
        except Exception as error:  # as in open_image
            raise broken(name, error) from error


def decode_image(data: bytes, name: str = "the image", page: int = 0) -> np.ndarray:
    """Decodes the bytes of an image file into uint8 RGB, [H, W, 3].

    - The image is turned as its EXIF orientation says, so it comes out as viewers show it.
    - Grey is repeated over the channels, palettes are looked up, and CMYK, YCbCr, HSV and LAB
      are converted by Pillow.
    - Transparent pixels are laid over black: the colour hidden under them is arbitrary.
    - 16-bit images, grey or colour, keep their high byte: 65535 is white, whatever part of the
      range a camera uses. TIFF files of 12 bits say so, and 4095 is white.

    Args:
        data: content of the file.
        name: what a message calls the image, best its path.
        page: of a file with several images, see `formats.pages_of`.

    Raises:
        InputError: broken, truncated or too large; or of 32-bit integers or floats, which do not
            say which value is white.
    """
    return _rgb(_load(data, name, page), name)


def convert_image(image: Image.Image, name: str = "the image") -> np.ndarray:
    """As `decode_image`, of an image that Pillow has opened or made; it stays as it is.

    Raises:
        InputError: as there.
    """
    is_unread = image.format == "TIFF" and image.tile and image.tell() == 0
    if is_unread and Path(image.filename).is_file():
        # Of a TIFF that is to be turned Pillow would map the file with its sides swapped.
        return decode_image(read_file(Path(image.filename)), name)
    if 0 in image.size:
        raise InputError(f"{name} has {image.width} x {image.height} pixels. Give an image.")
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
    """Decodes the bytes of a mask file into bool, [H, W], True where the image is defective.

    The level of a pixel is its grey value or the maximum of its channels. A pixel is defective
    unless its level is 0, so masks of 0 and 1, of 0 and 255, of class or instance indices and of
    one colour or palette entry per class are all valid.

    Lossy compression, antialiasing and resizing leave a halo of low levels around defects. The
    halo is recognised by the levels, whatever the file format. A mask is cut if it has more than
    three levels, the highest is above half of the range (127; 32767 with 16 or 32 bits; 0.5 with
    floats), and the levels below half of the highest are not those of classes. Classes fill areas
    of one level, halos do not: levels below 1/8 of the highest are classes if more than 90 % of
    their pixels lie in blocks of 3x3 pixels of one level, and those from 1/8 to 1/2 if more than
    25 % do.

    - Neither are classes: pixels from half of the highest level on are defective.
    - Those from 1/8 on are classes: pixels from 1/8 of the highest level on are defective.
    - Those below 1/8 are classes: the mask is not cut.

    Args:
        data: content of the file.
        name: of the mask in messages, best its path.
        page: of a file with several masks, see `formats.pages_of`.
        on_cut: called with the name of a mask that is cut.

    Raises:
        InputError: broken, truncated or too large.
    """
    mask = _load(data, name, page)
    levels = np.asarray(mask) if mask.mode[0] in "IF" else _rgb(mask, name).max(axis=-1)
    lowest = _lowest_defective(levels)
    if lowest is None:
        return levels > 0
    if on_cut:
        on_cut(name)
    return levels >= lowest


def _lowest_defective(levels: np.ndarray) -> float | None:
    """The lowest defective level of a mask with a halo; None without, see `decode_mask`."""
    highest = levels.max()
    is_float = levels.dtype.kind == "f"
    if not highest > (0.5 if is_float else 127 if levels.dtype == np.uint8 else 32767):
        return None
    half = highest / 2 if is_float else highest // 2
    low = (levels > 0) & (levels < highest / 8)
    middle = (levels >= highest / 8) & (levels < half)
    if not (low.any() or middle.any()) or len(np.unique(levels)) <= 3:
        return None
    is_even = ndimage.maximum_filter(levels, 3) == ndimage.minimum_filter(levels, 3)
    if _share_in_blocks(low, is_even) > 0.9:
        return None
    if _share_in_blocks(middle, is_even) > 0.25:
        return highest / 8 if low.any() else None
    return half


def _share_in_blocks(pixels: np.ndarray, is_even: np.ndarray) -> float:
    """The share of these pixels, bool [H, W], in 3x3 blocks of one level; 0 if there are none."""
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
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    if image.mode.startswith("I;16"):
        levels = np.asarray(image) >> (bits - 8)
        return _repeat(255 - levels if tags.get(_TIFF_PHOTOMETRIC) == 0 else levels)
    if tags.get(_TIFF_PLANAR) == 2 and bits == 16:
        raise InputError(
            f"{name} has a plane for each channel of 16 bits, which Pillow misreads: save it with "
            "its channels interleaved."
        )
    if image.mode == "I" and image.format == "PPM":  # scaled to 16 bits by Pillow
        return _repeat(np.asarray(image) >> 8)
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit or signed integers"
        raise InputError(
            f"{name} holds {kind}, which do not say which value is white: "
            "save it with 8 or 16 unsigned bits a channel."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return np.asarray(image.convert("RGB"))


def _repeat(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=-1)


class Placement(NamedTuple):
    """How an image comes to lie in what a backbone sees; sizes are (height, width)."""

    resized: tuple[int, int]  # the whole image
    crop: tuple[slice, slice]  # what is kept of that
    place: tuple[slice, slice]  # where this lies in the input; around it is padding


def placement(size: tuple[int, int], target: tuple[int, int], how: str) -> Placement:
    """Where an image of `size` lies in an input of size `target`.

    Args:
        size: (height, width) of the image.
        target: (height, width) of the input.
        how: "square" stretches the image to the target; "crop" keeps its proportions, fits the
            side that is shorter for the target and keeps the middle of the other (torchvision's
            Resize and CenterCrop); "pad" keeps its proportions, fits the longer side and puts the
            image in the middle.
    """
    whole = tuple(slice(0, length) for length in target)
    if how == "square":
        return Placement(target, whole, whole)
    (height, width), (rows, columns) = size, target
    is_wide = width * rows > height * columns
    if is_wide == (how == "crop"):
        resized = (rows, max(1, width * rows // height))
    else:
        resized = (max(1, height * columns // width), columns)
    if how == "crop":
        return Placement(resized, _middle(resized, target), whole)
    return Placement(
        resized, tuple(slice(0, length) for length in resized), _middle(target, resized)
    )


def _middle(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[slice, slice]:
    starts = [round((a - b) / 2) for a, b in zip(outer, inner, strict=True)]
    return tuple(slice(start, start + b) for start, b in zip(starts, inner, strict=True))


def seen_part(array: np.ndarray, placed: Placement) -> np.ndarray:
    """The part of an image or mask [H, W, ...], at its own resolution, that the input shows."""

    def scaled(part, length, resized):
        return slice(part.start * length // resized, -(-part.stop * length // resized))

    return array[tuple(map(scaled, placed.crop, array.shape[:2], placed.resized))]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [H, W, 3] to `size` = (height, width), bilinear and antialiased (Pillow)."""
    return _resize(image, size, Image.Resampling.BILINEAR)


def resize_mask(mask: np.ndarray, size: tuple[int, int], how: str = "nearest") -> np.ndarray:
    """Resizes bool [H, W] to `size` = (height, width).

    Published pixel figures differ by how masks were resized:

    - "nearest": the pixel whose centre is nearest (Pillow), as CFLOW and SPADE have it;
    - "floor": resized as images are, and defective where nothing good has mixed in, which takes
      the edges off a defect: the PyTorch reference of FastFlow, and PatchCore;
    - "threshold": resized as images are, and defective from one half on.
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


def normalise(image: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [..., 3] to float32: scaled to [0, 1], then less `mean`, over `std`, by channel."""
    scaled = image.astype(np.float32) / np.float32(255)
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
