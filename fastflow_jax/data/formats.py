"""Image file formats: recognition of images, headers, and errors for unreadable files.

HEIC, HEIF and JPEG XL are read if `pillow-heif` and `pillow-jxl-plugin` are installed
(`pip install 'fastflow-jax[formats]'`).
"""

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, TiffImagePlugin

from fastflow_jax.errors import InputError

_EXIF_ORIENTATION = 274
_EXIF_SIDEWAYS = (5, 6, 7, 8)
_TIFF_SUBFILE_TYPE = 254  # bit 0: a reduced copy of another page, bit 2: a transparency mask
_TIFF_PHOTOMETRIC = 262
_TIFF_SAMPLES = 277  # channels
_TIFF_DNG_VERSION = 50706
_GREY_OR_RGB, _CFA = (0, 1, 2), 32803  # values of the photometric tag

# Formats with several images in one file. Others have previews (MPO, ICO) or layers (PSD).
_PAGED = ("TIFF", "GIF", "PNG", "WEBP", "AVIF")

_RAW_REMEDY = "Convert it to PNG or TIFF with a raw converter"
_CAMERA_RAW = frozenset(
    [
        *(".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc"),
        *(".mef", ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl"),
        *(".sr2", ".srf", ".srw", ".x3f"),
    ]
)

# Formats that Pillow does not read by itself: offset and bytes of the signature, name, remedy.
_HEIF_REMEDY = "Run pip install pillow-heif, or convert it to PNG"
_JXL_REMEDY = "Run pip install pillow-jxl-plugin, or convert it to PNG"
_VIDEO_REMEDY = (
    "Extract its frames: ffmpeg -i VIDEO frames/%06d.png. Predictions read videos themselves"
)
_SIGNATURES = (
    *((4, b"ftyp" + brand, "HEIC", _HEIF_REMEDY) for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftypavi", "AVIF", "Install a Pillow that reads AVIF, or convert it to PNG"),
    (4, b"ftypcrx ", "camera raw", _RAW_REMEDY),
    (4, b"ftyp", "a video", _VIDEO_REMEDY),
    (0, b"\xff\x0a", "JPEG XL", _JXL_REMEDY),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL", _JXL_REMEDY),
    (128, b"DICM", "DICOM", "Convert it to PNG"),
    (0, b"FUJIFILMCCD-RAW", "camera raw", _RAW_REMEDY),
    (0, b"\x93NUMPY", "a numpy array", "Pass arrays to Detector.predict, or convert it to PNG"),
    (0, b"\x1aE\xdf\xa3", "a video", _VIDEO_REMEDY),
    (8, b"AVI ", "a video", _VIDEO_REMEDY),
)
# Recognised by their names only.
_VIDEOS = frozenset(
    (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".wmv", ".mpg", ".mpeg", ".ts", ".mts")
)

# Files often found next to images: text, tables, documents, archives, code, models, databases.
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
    """Header of an image file; for an array, only its size."""

    size: tuple[int, int]  # (height, width) after EXIF orientation
    format: str | None = None  # name in Pillow, such as "PNG"
    mode: str | None = None  # name in Pillow, such as "RGB"
    quality: int | None = None  # of JPEG, 1 to 100, estimated
    pages: int = 1  # images in the file

    @property
    def depth(self) -> int:
        """Bits per channel, 16 or 8. Colour PNG of 16 bits counts as 8, as Pillow opens it."""
        return 16 if (self.mode or "").startswith("I;16") else 8


def is_image(path: Path) -> bool:
    """Whether a file is, or should be, an image; False for text, tables, documents and archives.

    Known extensions decide. Files with other extensions, or none, are images if Pillow can open
    them, or if their content is not text: unknown binary files are reported when they are decoded.
    A link to a missing file is an image unless it has the extension of another kind of file.
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
    except Exception:  # readers of Pillow raise many types
        return not _is_text(path)


@functools.cache
def readable_extensions() -> frozenset[str]:
    """Returns the extensions that Pillow and its installed plug-ins read, in lower case."""
    extensions = Image.registered_extensions()  # to read or to write
    return frozenset(extension for extension, kind in extensions.items() if kind in Image.OPEN)


def is_video(name: str | Path) -> bool:
    """Whether a file is a video, by its extension."""
    return Path(name).suffix.lower() in _VIDEOS


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
        return error.end >= len(head) - 3  # a character cut at the end
    return True


def open_image(file: Path | IO[bytes], name: str) -> Image.Image:
    """Opens an image file with Pillow without decoding pixels.

    Args:
        file: a path, or an open binary file.
        name: name of the image in messages.

    Raises:
        InputError: Pillow does not read it, it is camera raw or a video, the file cannot be read,
            it has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, or other channels than grey, RGB
            and transparency.
    """
    try:
        image = Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} is too large: {error} Resize it or cut it into tiles.") from error
    except OSError as error:
        if error.errno is not None:
            raise cannot_read(name, error) from error
        raise _unreadable(file, name) from error
    except Exception as error:  # readers of Pillow raise many types
        raise _unreadable(file, name) from error
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS  # Pillow only warns up to twice this limit
    if limit is not None and width * height > limit:
        image.close()
        raise InputError(
            f"{name} is too large: {width} x {height} pixels exceed the limit of {limit} pixels "
            "(PIL.Image.MAX_IMAGE_PIXELS). Resize it or cut it into tiles."
        )
    if image.format == "TIFF" and (_has_raw_name(name) or _TIFF_DNG_VERSION in tiff_tags(image)):
        image.close()  # Pillow would decode its thumbnail
        raise _unsupported(name, "camera raw", _RAW_REMEDY)
    if image.format == "MPEG":  # Pillow only recognises it
        image.close()
        raise _unsupported(name, "a video", _VIDEO_REMEDY)
    if (channels := _left_out(image)) is not None:
        image.close()
        raise wrong_channels(name, channels)
    return image


def _left_out(image: Image.Image) -> int | None:
    """Number of the channels of a TIFF file if Pillow leaves some out, else None."""
    tags = tiff_tags(image)
    samples = tags.get(_TIFF_SAMPLES, 1)
    if tags.get(_TIFF_PHOTOMETRIC) not in _GREY_OR_RGB or samples == 1 or image.mode == "LA":
        return None
    return samples if samples > 4 or not image.mode.startswith("RGB") else None


def cannot_read(name: str | Path, error: Exception) -> InputError:
    """Returns the error for a file that the system cannot read."""
    if os.path.islink(name) and not os.path.exists(name):
        return missing_target(name)
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{name} cannot be read: {reason}. Check its path and permissions.")


def missing_target(name: str | Path) -> InputError:
    """Returns the error for a broken link."""
    return InputError(f"{name} is a link to a missing file. Restore the file or remove the link.")


def broken(name: str | Path, error: Exception) -> InputError:
    """Returns the error for an image that Pillow opens but cannot decode."""
    reason = str(error) or f"{type(error).__name__}; is its file closed?"
    return InputError(f"{name} is broken ({reason}). Replace or remove it.")


def read_header(path: Path) -> Header:
    """Reads the header of an image file. Raises the errors of `open_image`.

    An EXIF orientation after the pixels of a PNG is found only by decoding.
    """
    with open_image(path, str(path)) as image:
        return header_of(image, str(path))


def header_of(image: Image.Image, name: str) -> Header:
    """Returns the header of a Pillow image. Raises an InputError if it is broken."""
    try:
        size, tables = _size(image), getattr(image, "quantization", None)
        quality = _jpeg_quality(tables) if image.format in ("JPEG", "MPO") else None
        return Header(size, image.format, image.mode, quality, len(pages_of(image)))
    except Exception as error:  # as in open_image
        raise broken(name, error) from error


def pages_of(image: Image.Image) -> list[int]:
    """Returns the frames of a file that are separate images, not previews or layers."""
    frames = getattr(image, "n_frames", 1) if image.format in _PAGED else 1
    if frames == 1:
        return [0]
    if image.format != "TIFF":
        return list(range(frames))
    pages = []
    for frame in range(frames):
        image.seek(frame)
        if not tiff_tags(image).get(_TIFF_SUBFILE_TYPE, 0) & 0b101:
            pages.append(frame)
    image.seek(0)
    return pages or [0]


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Returns the tags of the current frame, or none if the file is not TIFF."""
    return image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}


def _size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    is_plain = image.format == "PNG" and not {"exif", "XML:com.adobe.xmp"} & set(image.info)
    if image.format == "TIFF" or is_plain:  # Pillow rotates TIFF; `getexif` would decode the PNG
        return height, width
    sideways = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
    return (width, height) if sideways else (height, width)


# Luminance table of ITU-T T.81, Annex K, at quality 50, in zigzag order: its mean is 57.6.
_MEAN_AT_50 = 57.625


def _jpeg_quality(tables: dict[int, list[int]] | None) -> int | None:
    """Estimates the quality, 1 to 100, from quantisation tables of the IJG encoder.

    Its tables are the standard ones times 50 / quality below 50 and 2 - quality / 50 above, so the
    mean of the luminance table determines the quality.
    """
    if not tables:
        return None
    scale = float(np.mean(tables[min(tables)])) / _MEAN_AT_50
    quality = 50 / scale if scale > 1 else 100 - 50 * scale
    return int(np.clip(round(quality), 1, 100))


def wrong_channels(name: str, channels: int) -> InputError:
    """Returns the error for an image with channels that are not grey or RGB."""
    return InputError(
        f"{name} has {channels} channels, and images must be grey or RGB. Choose or compute three "
        "channels, such as image[..., [0, 2, 4]], or train a detector for each three of them."
    )


def _of_tiff(file: Path | IO[bytes], name: str) -> InputError | None:
    """The error for a TIFF file that Pillow cannot open, if its first tags tell the reason."""
    with contextlib.suppress(Exception), _opened(file) as content:  # readers raise many types
        head = content.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + content.read(8 * (head[2] == 43)))
        content.seek(tags.next)
        tags.load(content)
        if tags.get(_TIFF_PHOTOMETRIC) == _CFA:
            return InputError(
                f"{name} has the mosaic of a Bayer sensor. Convert it to colours, such as by "
                "cv2.cvtColor(image, cv2.COLOR_BayerRG2RGB), or let the camera do it."
            )
        if (samples := tags.get(_TIFF_SAMPLES, 1)) not in (1, 3, 4):
            return wrong_channels(name, samples)
    return None


def _has_raw_name(name: str) -> bool:
    return Path(name).suffix.lower() in _CAMERA_RAW


def _unsupported(name: str, kind: str, remedy: str) -> InputError:
    return InputError(f"{name} is {kind}, which Pillow cannot read. {remedy}.")


def _unreadable(file: Path | IO[bytes], name: str) -> InputError:
    """The error for a file that Pillow cannot open, from its first bytes and its extension."""
    with contextlib.suppress(OSError), _opened(file) as content:
        head = content.read(256)
        for offset, signature, kind, remedy in _SIGNATURES:
            if head[offset:].startswith(signature):
                return _unsupported(name, kind, remedy)
    if _has_raw_name(name):
        return _unsupported(name, "camera raw", _RAW_REMEDY)
    if is_video(name):
        return _unsupported(name, "a video", _VIDEO_REMEDY)
    return _of_tiff(file, name) or InputError(
        f"{name} is not an image that Pillow can read. Replace or remove it."
    )


@contextlib.contextmanager
def _opened(file: Path | IO[bytes]) -> Iterator[IO[bytes]]:
    """Yields a file at its start."""
    with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as content:
        content.seek(0)
        yield content
