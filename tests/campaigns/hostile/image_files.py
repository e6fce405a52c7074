"""Targets: image files and masks."""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from fastflow_jax.data.arrays import Given
from fastflow_jax.data.levels import Levels
from fastflow_jax.data.transforms import check_image, decode_mask, decode_stored
from hostile import mutation
from hostile.detectors import batch
from hostile.target import Target

_LEVELS = Levels(0, 4096, bits=12)


def _saved(kind: str, mode: str, **how: Any) -> bytes:
    """A small image of a mode as a file."""
    values = np.random.default_rng(0).integers(0, 256, (9, 7, 4), np.uint8)
    image = Image.fromarray(values)
    if mode.startswith("I;16"):
        image = Image.fromarray(values[..., 0].astype(np.uint16) << 7)
    elif mode == "F":
        image = Image.fromarray(values[..., 0].astype(np.float32))
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode)
    content = io.BytesIO()
    image.save(content, kind, **how)
    return content.getvalue()


def _pages(kind: str) -> bytes:
    frames = [Image.new("RGB", (6, 5), (i * 90, 0, 0)) for i in range(3)]
    content = io.BytesIO()
    frames[0].save(content, kind, save_all=True, append_images=frames[1:])
    return content.getvalue()


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[274] = 6  # turned
    return exif


def png() -> list[bytes]:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    extra = [_saved("PNG", "P", transparency=3), _saved("PNG", "RGB", exif=_exif()), _pages("PNG")]
    return [_saved("PNG", mode) for mode in modes] + extra


def _jpeg() -> list[bytes]:
    plain = [_saved("JPEG", mode) for mode in ("L", "RGB", "CMYK")]
    how = {"exif": _exif(), "icc_profile": bytes(150), "progressive": True}
    return [*plain, _saved("JPEG", "RGB", **how)]


def _tiff() -> list[bytes]:
    modes = ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F")
    packed = [_saved("TIFF", "RGB", compression=f"tiff_{how}") for how in ("lzw", "adobe_deflate")]
    packed += [_saved("TIFF", "1", compression="group4"), _saved("TIFF", "RGB", compression="jpeg")]
    return [_saved("TIFF", mode) for mode in modes] + packed + [_pages("TIFF"), _deep_tiff()]


def _deep_tiff() -> bytes:
    """Colours of 16 bits, which Pillow cannot write."""
    pixels = np.random.default_rng(0).integers(0, 65536, (4, 5, 3), np.uint16).tobytes()
    entries = [(256, 3, 1, 5), (257, 3, 1, 4), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, len(pixels))]
    at = 14 + len(pixels)
    head = b"II*\0" + struct.pack("<I", at) + struct.pack("<3H", 16, 16, 16) + pixels
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return head + struct.pack("<H", len(entries)) + fields + bytes(4)


def _of_tiff(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes an entry of the first directory of a TIFF file."""
    order = "<" if data[:2] == b"II" else ">"
    if len(data) < 8 or rng.random() < 0.3:
        return mutation.of_bytes(data, rng, others)
    (at,) = struct.unpack(f"{order}I", data[4:8])
    if at + 2 > len(data):
        return mutation.of_bytes(data, rng, others)
    (count,) = struct.unpack(f"{order}H", data[at : at + 2])
    place = at + 2 + 12 * rng.randrange(max(1, count))
    if place + 12 > len(data):
        return mutation.of_bytes(data, rng, others)
    entry = list(struct.unpack(f"{order}HHII", data[place : place + 12]))
    field = rng.randrange(4)
    numbers = (
        (254, 255, 258, 259, 262, 273, 277, 284, 322, 330, 338, 339, 34665, 50706),
        range(14),
    )
    choices = numbers[field] if field < 2 else mutation.NUMBERS[:-1]
    entry[field] = rng.choice(choices)
    return data[:place] + struct.pack(f"{order}HHII", *entry) + data[place + 12 :]


def _bmp() -> list[bytes]:
    return [_saved("BMP", mode) for mode in ("1", "L", "P", "RGB", "RGBA")]


def _webp() -> list[bytes]:
    still = [_saved("WEBP", "RGB"), _saved("WEBP", "RGBA", lossless=True)]
    return [*still, _saved("WEBP", "RGB", exif=_exif()), _pages("WEBP")]


def _gif() -> list[bytes]:
    return [_saved("GIF", "P"), _saved("GIF", "P", transparency=1), _pages("GIF")]


def _others() -> list[bytes]:
    kinds = (("PPM", "1"), ("PPM", "L"), ("PPM", "RGB"), ("PPM", "I;16"), ("ICO", "RGBA"))
    kinds += (("TGA", "RGB"), ("DDS", "RGB"), ("JPEG2000", "RGB"), ("PCX", "L"), ("SGI", "RGB"))
    return [_saved(kind, mode) for kind, mode in kinds]


def _read(data: bytes) -> None:
    """Reads all pages in one of the ways in which images are read, which the content decides."""
    given = Given("case", content=data)
    match zlib.crc32(data) % 6:
        case 0 | 1:
            _check(given.read())
        case 2:
            _check(given.read(_LEVELS))
        case 3:
            decode_stored(data, "case")
        case 4:
            check_image(data, "case")
        case _:
            decode_mask(data, "case")


def _check(pages: Iterator) -> None:
    for _, image, _ in pages:
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.size


_MODULES = (
    "fastflow_jax.data.formats",
    "fastflow_jax.data.transforms",
    "fastflow_jax.data.arrays",
    "fastflow_jax.data.levels",
)


def _target(kind: str, seeds: Any, change: mutation.Change) -> Target:
    return Target(f"image_{kind.lower()}", seeds, change, _read, _MODULES, command=batch)


TARGETS = (
    _target("PNG", png, mutation.of_png),
    _target("JPEG", _jpeg, mutation.of_jpeg),
    _target("TIFF", _tiff, _of_tiff),
    _target("BMP", _bmp, mutation.of_bytes),
    _target("WebP", _webp, mutation.of_bytes),
    _target("GIF", _gif, mutation.of_bytes),
    _target("other", _others, mutation.of_bytes),
)
