"""Image file formats: which files are images, what their headers say, and what cannot be read.

HEIC, HEIF and JPEG XL are read if `pillow-heif` and `pillow-jxl-plugin` are installed
(`pip install 'fastflow-jax[formats]'`).
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from fastflow_jax.errors import InputError

_EXIF_ORIENTATION = 274
_EXIF_SIDEWAYS = (5, 6, 7, 8)
_TIFF_SUBFILE_TYPE = 254  # bit 0: a reduced copy of another page, bit 2: a transparency mask
_TIFF_DNG_VERSION = 50706

# Formats with several images in one file. Others have previews (MPO, ICO) or layers (PSD).
_PAGED = ("TIFF", "GIF", "PNG", "WEBP", "AVIF")

_RAW_REMEDY = "develop it into PNG or TIFF first"
_CAMERA_RAW = frozenset(
    [
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc"),
        *(".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl"),
        *(".sr2", ".srf", ".srw", ".x3f"),
    ]
)

# Formats that Pillow does not read by itself: where which bytes stand, its name, and the remedy.
_HEIF_REMEDY = "pip install pillow-heif, or convert it to PNG"
_JXL_REMEDY = "pip install pillow-jxl-plugin, or convert it to PNG"
_SIGNATURES = (
    *((4, b"ftyp" + brand, "HEIC", _HEIF_REMEDY) for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftypavi", "AVIF", "install a Pillow that reads AVIF, or convert it to PNG"),
    (4, b"ftypcrx ", "camera raw", _RAW_REMEDY),
    (4, b"ftyp", "a video", "extract its frames as images"),
    (0, b"\xff\x0a", "JPEG XL", _JXL_REMEDY),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL", _JXL_REMEDY),
    (128, b"DICM", "DICOM", "convert it to PNG"),
    (0, b"FUJIFILMCCD-RAW", "camera raw", _RAW_REMEDY),
    (0, b"\x93NUMPY", "a numpy array", "pass arrays to Detector.predict, or convert it to PNG"),
    (0, b"\x1aE\xdf\xa3", "a video", "extract its frames as images"),
)

# Files that stand next to images: text, tables, documents, archives, code, models, databases.
_NOT_IMAGES = frozenset(
    [
        *(".txt", ".md", ".rst", ".log", ".tex", ".pdf", ".doc", ".docx", ".odt", ".htm", ".html"),
        *(".csv", ".tsv", ".json", ".jsonl", ".xml", ".xmp", ".yaml", ".yml", ".toml", ".ini"),
        *(".cfg", ".conf", ".xls", ".xlsx", ".db", ".sqlite", ".parquet", ".avro", ".h5", ".hdf5"),
        *(".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"),
        *(".py", ".ipynb", ".sh", ".js", ".pkl", ".pt", ".pth", ".onnx", ".safetensors"),
        *(".bak", ".lock", ".lnk", ".url", ".md5", ".sha256"),
    ]
)

for _plugin, _register in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", None)):
    with contextlib.suppress(ImportError):
        _module = importlib.import_module(_plugin)
        if _register:
            getattr(_module, _register)()


@dataclasses.dataclass(frozen=True)
class Header:
    """What the header of an image file says; of an array, its size alone."""

    size: tuple[int, int]  # (height, width), as viewers show it
    format: str | None = None  # Pillow's name, such as "PNG"
    mode: str | None = None  # Pillow's name, such as "RGB"
    quality: int | None = None  # of a JPEG file, 1 to 100, estimated
    pages: int = 1  # images in the file

    @property
    def depth(self) -> int:
        """Bits a channel, 16 or 8; colour PNG files of 16 bits count as 8, as Pillow opens them."""
        return 16 if (self.mode or "").startswith("I;16") else 8


def is_image(path: Path) -> bool:
    """Whether a file is, or should be, an image; False for text, tables, documents and the like.

    Known extensions decide. Files with other extensions, or none, are images if Pillow can open
    them, or if their content is not text: unknown binary files are reported when they are decoded.
    A link to a missing file is an image unless its extension says otherwise.
    """
    extension = path.suffix.lower()
    if extension in _NOT_IMAGES:
        return False
    if extension in readable_extensions() or extension in _CAMERA_RAW or not path.exists():
        return True
    if not path.is_file():  # a device or a pipe
        return False
    try:
        with Image.open(path):
            return True
    except Exception:  # whatever Pillow's readers raise
        return not _is_text(path)


@functools.cache
def readable_extensions() -> frozenset[str]:
    """Extensions of the formats that Pillow and its installed plug-ins read, in lower case."""
    extensions = Image.registered_extensions()  # of formats to read or to write
    return frozenset(extension for extension, kind in extensions.items() if kind in Image.OPEN)


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    if not head or b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end >= len(head) - 3  # a character that was cut
    return True


def open_image(file: Path | IO[bytes], name: str) -> Image.Image:
    """Opens an image file with Pillow; pixels are not decoded yet.

    Args:
        file: a path, or an open binary file.
        name: what a message calls the image.

    Raises:
        InputError: it is not an image that Pillow reads, it is camera raw, it cannot be read, or it
            has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} is too large: {error} Scale it down or cut it up.") from error
    except OSError as error:
        if error.errno is not None:
            raise cannot_read(name, error) from error
        raise _unreadable(file, name) from error
    except Exception as error:  # Pillow's readers raise almost anything on a damaged file
        raise _unreadable(file, name) from error
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS  # up to twice this limit Pillow only warns
    if limit is not None and width * height > limit:
        image.close()
        raise InputError(
            f"{name} is too large: {width} x {height} pixels exceed the limit of {limit} pixels "
            "(PIL.Image.MAX_IMAGE_PIXELS). Scale it down or cut it up."
        )
    if image.format == "TIFF" and _is_camera_raw(image, name):
        image.close()  # Pillow would read its thumbnail
        raise InputError(f"{name} is camera raw, which Pillow cannot read: {_RAW_REMEDY}.")
    return image


def cannot_read(name: str | Path, error: OSError) -> InputError:
    """The message for a file that the system cannot read."""
    if Path(name).is_symlink() and not Path(name).exists():
        return InputError(f"{name} is a link to a missing file: restore it, or remove the link.")
    return InputError(f"{name} cannot be read: {error.strerror or error}.")


def broken(name: str | Path, error: Exception) -> InputError:
    """The message for an image that Pillow opens but cannot decode."""
    reason = str(error) or f"{type(error).__name__}; is its file closed?"
    return InputError(f"{name} is broken ({reason}): replace or remove it.")


def read_header(path: Path) -> Header:
    """The header of an image file.

    A PNG may have its EXIF orientation after its pixels; only decoding finds that.

    Raises:
        InputError: see `open_image`.
    """
    with open_image(path, str(path)) as image:
        return header_of(image, str(path))


def header_of(image: Image.Image, name: str) -> Header:
    """The header of an image that Pillow has opened.

    Raises:
        InputError: it is broken.
    """
    try:
        size, tables = _size(image), getattr(image, "quantization", None)
        quality = _jpeg_quality(tables) if image.format in ("JPEG", "MPO") else None
        return Header(size, image.format, image.mode, quality, len(pages_of(image)))
    except Exception as error:  # as in open_image
        raise broken(name, error) from error


def pages_of(image: Image.Image) -> list[int]:
    """The frames of a file that are images of their own: all but previews and layers."""
    frames = getattr(image, "n_frames", 1) if image.format in _PAGED else 1
    if frames == 1:
        return [0]
    if image.format != "TIFF":
        return list(range(frames))
    pages = []
    for frame in range(frames):
        image.seek(frame)
        if not image.tag_v2.get(_TIFF_SUBFILE_TYPE, 0) & 0b101:
            pages.append(frame)
    image.seek(0)
    return pages or [0]


def _size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    is_plain = image.format == "PNG" and not {"exif", "XML:com.adobe.xmp"} & set(image.info)
    if image.format == "TIFF" or is_plain:
        return height, width  # Pillow has turned a TIFF's; looking would decode a PNG
    sideways = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
    return (width, height) if sideways else (height, width)


# Luminance table of ITU-T T.81, Annex K, at quality 50, in zigzag order: its mean is 57.6.
_MEAN_AT_50 = 57.625


def _jpeg_quality(tables: dict[int, list[int]] | None) -> int | None:
    """The quality, 1 to 100, at which the Independent JPEG Group's encoder has such a table.

    Its tables are those of the standard times 50 / quality below 50 and 2 - quality / 50 above,
    so that the mean of the luminance table is enough, whatever its order.
    """
    if not tables:
        return None
    scale = float(np.mean(tables[min(tables)])) / _MEAN_AT_50
    quality = 50 / scale if scale > 1 else 100 - 50 * scale
    return int(np.clip(round(quality), 1, 100))


def _is_camera_raw(image: Image.Image, name: str) -> bool:
    return Path(name).suffix.lower() in _CAMERA_RAW or _TIFF_DNG_VERSION in image.tag_v2


def _unreadable(file: Path | IO[bytes], name: str) -> InputError:
    """The message for a file that Pillow cannot open, by its first bytes and its extension."""
    with contextlib.suppress(OSError), _start_of(file) as head:
        for offset, signature, kind, remedy in _SIGNATURES:
            if head[offset:].startswith(signature):
                return InputError(f"{name} is {kind}, which Pillow cannot read here: {remedy}.")
    if Path(name).suffix.lower() in _CAMERA_RAW:
        return InputError(f"{name} is camera raw, which Pillow cannot read: {_RAW_REMEDY}.")
    return InputError(f"{name} is not an image that Pillow can read: replace or remove it.")


@contextlib.contextmanager
def _start_of(file: Path | IO[bytes]) -> Iterator[bytes]:
    with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as content:
        content.seek(0)
        yield content.read(256)
