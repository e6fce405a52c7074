"""Images passed by a program: files or arrays in memory, one or many."""

import dataclasses
import io
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeGuard

import numpy as np
import PIL.Image

from fastflow_jax.data import video
from fastflow_jax.data.dataset import GOOD, Dataset, Source
from fastflow_jax.data.formats import Header, header_of, is_video, open_image, wrong_channels
from fastflow_jax.data.layout import find_images, no_images, page_names, page_of
from fastflow_jax.data.levels import Levels, unknown_white
from fastflow_jax.data.transforms import convert_image, decode_image, decode_stored, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

# A file, a directory, the content of a file, a Pillow image, or uint8 [H, W, 3] or [H, W]; other
# types with `config.data.bits` or `config.data.window`.
Image = str | os.PathLike | bytes | IO[bytes] | np.ndarray | PIL.Image.Image
Images = Image | Iterable[Image] | Iterable["Given"]

_log = logging.getLogger(__name__)


def is_one(images: Images) -> bool:
    """Whether `images` is a single image: a file, its content, a Pillow image or an array.

    An array of three axes is always a single image: [3, H, W] and [H, W, 4] are refused later.
    """
    if isinstance(images, str | os.PathLike):
        return not expanded(images).is_dir()
    if images is None or _is_content(images) or isinstance(images, PIL.Image.Image):
        return True
    return _is_array(images) and len(np.shape(images)) != 4


def read_image(name: str | Path, levels: Levels | None = None) -> np.ndarray:
    """Reads a file, or its page or frame `<path>#<number>`, as uint8 [H, W, 3].

    Args:
        name: path of the file, or name of the page.
        levels: see `decode_image`.

    Raises:
        InputError: see `decode_image` and `video.frames`.
    """
    path, page = page_of(str(name))
    if is_video(path):
        image = video.frame(path, page)
        return image if levels is None else levels.apply(image, str(name))
    return decode_image(read_file(path), str(name), page, levels)


class Page(NamedTuple):
    """One image of a file, or an array."""

    name: str
    number: int  # from 0
    header: Header


@dataclasses.dataclass(frozen=True)
class Given:
    """An image passed by a program: a file, the content of a file, or an array."""

    name: str  # its path, or "image 3" for the fourth one in memory
    path: Path | None = None
    content: bytes | None = None
    array: np.ndarray | None = None  # uint8 [H, W, 3]; another type while levels are pending
    header: Header | None = None  # of the array
    error: InputError | None = None  # raised when the image is used

    def read(
        self, levels: Levels | None = None, every: int = 1
    ) -> Iterator[tuple[str, np.ndarray, Header]]:
        """Yields name, pixels (uint8 [H, W, 3]) and header of each page, or frame of a video.

        Frames are decoded one by one.

        Args:
            levels: see `decode_image`.
            every: of a video, each frame of this number, from the first one on.

        Raises:
            InputError: it is not an image or video, or a video is damaged, after the frames that
                could be decoded.
        """
        if self.path is not None and is_video(self.path):
            for number, image, codec in video.frames(self.path, every):
                name = f"{self.name}#{number + 1}"
                header = Header((image.shape[0], image.shape[1]), codec, "RGB")
                yield name, image if levels is None else levels.apply(image, name), header
            return
        data = self._read()
        for page in self.pages(data):
            yield page.name, self.decode(page, data, levels), page.header

    def pages(self, data: bytes | None = None) -> list[Page]:
        """Returns the pages without decoding them.

        Args:
            data: content of the file, if it was read before.

        Raises:
            InputError: it is not an image.
        """
        if self.error is not None:
            raise self.error
        header = self.header
        if header is None:
            data = self.content if data is None else data
            file = self.path if data is None else io.BytesIO(data)
            assert file is not None
            with open_image(file, self.name) as opened:
                header = header_of(opened, self.name)
        names = page_names(self.name, header)
        return [Page(name, number, header) for number, name in enumerate(names)]

    def decode(
        self, page: Page, data: bytes | None = None, levels: Levels | None = None
    ) -> np.ndarray:
        """Returns the pixels of a page, uint8 [H, W, 3].

        Args:
            page: of `pages`.
            data: content of the file, if it was read before.
            levels: see `decode_image`.
        """
        if self.array is not None:
            if levels is None or self.array.dtype == np.uint8:
                return self.array
            return levels.apply(self.array, page.name)
        data = self._read() if data is None else data
        assert data is not None
        return decode_image(data, page.name, page.number, levels)

    def stored(self, page: Page) -> np.ndarray:
        """Returns the pixels of a page as stored, see `transforms.decode_stored`."""
        if self.array is not None:
            return self.array
        data = self._read()
        assert data is not None
        return decode_stored(data, page.name, page.number)

    def identity(self) -> str:
        """Returns the path of a file; size and checksum of an image in memory."""
        if self.error is not None:
            raise self.error
        if self.path is not None:
            return self.name
        content = self.content if self.array is None else np.ascontiguousarray(self.array).data
        assert content is not None
        return f"{memoryview(content).nbytes} bytes, {zlib.crc32(content):08x}"

    def _read(self) -> bytes | None:
        return self.content if self.path is None else read_file(self.path)


def each(images: Images, levels: Levels | None = None) -> Iterator[Given]:
    """Yields the images one by one. Files are not opened yet.

    Of a directory all images in it and below it, sorted by path. Images in memory are taken when
    they are requested, because a camera may write the next image into the same array.

    Args:
        images: see `Images`.
        levels: of images in memory, see `decode_image`.

    Raises:
        InputError: a directory without images, or an object of another type.
    """
    several: Any = images
    if is_one(images):
        several = [images]
    elif isinstance(images, str | os.PathLike):
        folder = expanded(images)
        several, others = find_images(folder)
        if not several:
            raise no_images(folder)
        if others:
            names = ", ".join(path.name for path in others)
            _log.info("%d files of %s are not images: %s", len(others), folder, names)
    elif _is_array(images):
        several = np.asarray(images)
    elif isinstance(images, Mapping) or not isinstance(images, Iterable):
        kind = type(images).__name__
        raise InputError(f"{kind} is neither an image nor a list of images. Pass paths or arrays.")
    is_lasting = isinstance(several, Sequence | np.ndarray)  # iterators may reuse their images
    opened = []  # files of several frames: Pillow has one current frame per file
    for i, image in enumerate(several):
        try:
            if is_lasting and getattr(image, "n_frames", 1) > 1:
                if any(image is other for other in opened):
                    raise InputError(
                        f"image {i} is the same open file as an earlier image. Pass copies of its "
                        "frames: [frame.copy() for frame in PIL.ImageSequence.Iterator(file)]."
                    )
                opened.append(image)
            given = _given(image, f"image {i}", is_lasting, levels)
        except InputError as error:
            given = Given(f"image {i}", error=error)
        yield given


def _given(image: Image | Given, name: str, is_lasting: bool, levels: Levels | None) -> Given:
    if isinstance(image, Given):
        return image
    if isinstance(image, str | os.PathLike):
        path = expanded(os.fsdecode(image))
        return Given(os.fsdecode(image) if path == Path(image) else str(path), path=path)
    if _is_content(image):
        return Given(name, content=bytes(image) if isinstance(image, _BYTES) else image.read())
    array = _checked(image, name, levels)
    header = Header((array.shape[0], array.shape[1]))
    if isinstance(image, PIL.Image.Image) and image.format is not None:
        header = dataclasses.replace(header_of(image, name), size=header.size, pages=1)
    return Given(name, array=array if is_lasting else array.copy(), header=header)


def as_dataset(
    images: Images, groups: Sequence[Any] | None = None, levels: Levels | None = None
) -> Dataset:
    """Data set of normal images for training. Arrays are identified by their content.

    Args:
        images: see `Images`.
        groups: a label per image, see `Source.groups`.
        levels: see `decode_image`; pending ones are those of these images.

    Raises:
        InputError: no images, an image given twice, an invalid image, or another number of labels
            than of images.
    """
    given = list(each(images, levels))
    if not given:
        raise InputError("There are no images to train on. Pass at least two.")
    pages, names, owners, seen = [], [], [], {}
    for i, one in enumerate(given):
        identity = one.identity()
        if (twin := seen.setdefault(identity, one)) is not one:
            raise InputError(
                f"{one.name} is given twice. Pass each image once."
                if one.path is not None
                else f"{twin.name} and {one.name} are equal. Pass each image once."
            )
        for page in one.pages():
            pages.append(page)
            names.append(page.name if one.path is not None else f"{page.name}, {identity}")
            owners.append(i)
    if groups is not None and len(groups) != len(given):
        raise InputError(f"{len(groups)} groups for {len(given)} images. Pass one per image.")

    if levels is not None:
        levels = levels.resolved(names, lambda i: given[owners[i]].stored(pages[i]))

    def load(index: int) -> tuple[np.ndarray, None]:
        return given[owners[index]].decode(pages[index], levels=levels), None

    paths = [given[i].path for i in owners]
    source = Source(
        tuple(names),
        (GOOD,) * len(names),
        load,
        files=tuple(None if path is None else path.stat() for path in paths),
        header=lambda index: pages[index].header,
        groups=None if groups is None else tuple(str(groups[i]) for i in owners),
    )
    provenance = {"source": "given", "train_images": len(names)}
    return Dataset("images", source, None, provenance, levels=levels)


_BYTES = bytes | bytearray | memoryview


def _is_content(image: Any) -> TypeGuard[bytes | IO[bytes]]:
    """Whether it is the content of a file, or an open file."""
    return isinstance(image, _BYTES) or hasattr(image, "read")


def _is_array(images: Any) -> TypeGuard[np.ndarray]:
    """Whether it is an array of numpy, JAX or a similar library."""
    return hasattr(images, "__array__") or hasattr(images, "__array_interface__")


def _checked(image: Any, name: str, levels: Levels | None) -> np.ndarray:
    """Converts an image in memory to uint8 [H, W, 3]; with pending levels to any type."""
    if isinstance(image, PIL.Image.Image):
        return convert_image(image, name, levels)
    if image is None:
        raise InputError(f"{name} is None. cv2.imread returns None for a file that it cannot read.")
    if not _is_array(image):
        kind = type(image).__name__
        raise InputError(
            f"{name} is of type {kind}. Pass a path, the content of a file, or an array."
        )
    array = np.asarray(image)
    if array.dtype != np.uint8 and (levels is None or array.dtype.kind not in "uif"):
        subject = f"{name} is an array of {array.dtype}"
        raise unknown_white(subject, array.dtype, "Pass uint8, 0 to 255")
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim == 3 and (array.shape[-1] == 2 or 4 < array.shape[-1] < min(array.shape[:2])):
        raise wrong_channels(name, array.shape[-1])
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise InputError(
            f"{name} has shape {array.shape}. Pass [H, W, 3] in RGB or [H, W] in grey; several "
            "grey images as a list."
        )
    if levels is None or (array.dtype == np.uint8 and not levels.is_pending):
        return array  # as a data set with these levels returns it
    return levels.apply(array, name)
