"""Images that a program has: files, or arrays in memory, one or many."""

import collections
import concurrent.futures
import dataclasses
import io
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import PIL.Image

from fastflow_jax.data.dataset import GOOD, Dataset, Record, Source
from fastflow_jax.data.formats import Header, header_of, open_image
from fastflow_jax.data.layout import find_images, no_images, page_of, pages
from fastflow_jax.data.transforms import convert_image, decode_image, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

# A file, a directory of files, the content of a file, an image of Pillow's, uint8 [H, W, 3] or
# [H, W], or several of these.
Image = str | os.PathLike | bytes | IO[bytes] | np.ndarray | PIL.Image.Image
Images = Image | Iterable[Image]
T = TypeVar("T")

_log = logging.getLogger(__name__)


def is_one(images: Images) -> bool:
    """One image, not several: a file or its content, an image of Pillow's, [H, W, 3] or [H, W].

    An array of three axes is never several: [3, H, W] or [H, W, 4] is more likely a mistake.
    """
    if isinstance(images, str | os.PathLike):
        return not expanded(images).is_dir()
    if images is None or _is_content(images) or isinstance(images, PIL.Image.Image):
        return True
    return _is_array(images) and len(np.shape(images)) != 4


def read_image(name: str | Path) -> np.ndarray:
    """The image in a file, or the page `<path>#<number>` of one, uint8 [H, W, 3].

    Raises:
        InputError: see `transforms.decode_image`.
    """
    path, page = page_of(str(name))
    return decode_image(read_file(path), str(name), page)


@dataclasses.dataclass(frozen=True)
class Given:
    """An image that a program has: a file, the content of one, or an array."""

    name: str  # its path, or "image 3" for the fourth one in memory
    path: Path | None = None
    content: bytes | None = None
    array: np.ndarray | None = None  # uint8 [H, W, 3]
    header: Header | None = None  # of the array
    error: InputError | None = None  # why it is no image

    def read(self) -> Iterator[tuple[str, np.ndarray, Header]]:
        """Name, uint8 [H, W, 3] and header of the image, or of each page of a file.

        Raises:
            InputError: it is no image.
        """
        if self.error is not None:
            raise self.error
        if self.array is not None:
            yield self.name, self.array, self.header
            return
        data = read_file(self.path) if self.path is not None else self.content
        for record in self.records(data):
            yield record.name, decode_image(data, record.name, record.page), record.header

    def records(self, data: bytes | None = None) -> list[Record]:
        """The examples in it, of which nothing is decoded.

        Args:
            data: content of its file, if it was read before.

        Raises:
            InputError: it is no image.
        """
        if self.error is not None:
            raise self.error
        if self.array is not None:
            return [Record(None, None, GOOD, self.name, 0, self.header)]
        data = self.content if data is None else data
        file = self.path if data is None else io.BytesIO(data)
        with open_image(file, self.name) as opened:
            return pages(self.path, header_of(opened, self.name), self.name)


def each(images: Images) -> Iterator[Given]:
    """The images one by one; files are not opened yet.

    Of a directory all images in it and in the directories below, sorted by path. What is in memory
    is taken when it is asked for: a camera may write the next image into the same array.

    Raises:
        InputError: a directory without images, or something that holds no images.
    """
    if is_one(images):
        images = [images]
    elif isinstance(images, str | os.PathLike):
        folder = expanded(images)
        found = find_images(folder)
        images = found.images
        if not images:
            raise no_images(folder)
        if found.others:
            names = ", ".join(path.name for path in found.others)
            _log.info("%d files of %s are not images: %s", len(found.others), folder, names)
    elif _is_array(images):
        images = np.asarray(images)
    elif isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise InputError(
            f"{type(images).__name__} is no image and no list of images. Give paths or arrays."
        )
    is_lasting = isinstance(images, Sequence | np.ndarray)  # else what came before may change
    opened = []  # files of several frames, of which Pillow shows one at a time
    for i, image in enumerate(images):
        try:
            if is_lasting and getattr(image, "n_frames", 1) > 1:
                if any(image is other for other in opened):
                    raise InputError(
                        f"image {i} is the same open file as an earlier image. Give copies of its "
                        "frames: [frame.copy() for frame in PIL.ImageSequence.Iterator(file)]."
                    )
                opened.append(image)
            given = _given(image, f"image {i}", is_lasting)
        except InputError as error:
            given = Given(f"image {i}", error=error)
        yield given


def _given(image: Image, name: str, is_lasting: bool) -> Given:
    if isinstance(image, str | os.PathLike):
        path = expanded(os.fsdecode(image))
        return Given(os.fsdecode(image) if path == Path(image) else str(path), path=path)
    if _is_content(image):
        return Given(name, content=image.read() if hasattr(image, "read") else bytes(image))
    array = _checked(image, name)
    if isinstance(image, PIL.Image.Image) and image.format is not None:
        header = dataclasses.replace(header_of(image, name), size=array.shape[:2], pages=1)
    else:
        header = Header(array.shape[:2])
    return Given(name, array=array if is_lasting else array.copy(), header=header)


def as_dataset(images: Images, groups: Sequence[Any] | None = None) -> Dataset:
    """Normal images to train on, as a data set; arrays are identified by their content.

    Args:
        images: see `Images`.
        groups: a label per image, see `Source.groups`.

    Raises:
        InputError: there are none, one is given twice, one is not an image, or there are more or
            fewer labels than images.
    """
    given = list(each(images))
    if not given:
        raise InputError("There are no images to train on. Give two or more.")
    records, owners, seen = [], [], {}
    for i, one in enumerate(given):
        mark = one.name if one.path is not None else _fingerprint(one)
        if (twin := seen.setdefault(mark, one)) is not one:
            raise InputError(
                f"{one.name} is given twice. Give each image once."
                if one.path is not None
                else f"{twin.name} and {one.name} are equal. Give each image once."
            )
        new = one.records()
        if one.path is None:
            new = [record._replace(name=f"{record.name}, {mark}") for record in new]
        records += new
        owners += [i] * len(new)
    if groups is not None and len(groups) != len(given):
        raise InputError(f"{len(groups)} groups were given for {len(given)} images. Give one each.")

    def load(index: int) -> tuple[np.ndarray, None]:
        record, one = records[index], given[owners[index]]
        if one.array is not None:
            return one.array, None
        data = one.content if one.path is None else read_file(one.path)
        return decode_image(data, record.name, record.page), None

    source = Source(
        tuple(record.name for record in records),
        (GOOD,) * len(records),
        load,
        files=tuple(record.image and record.image.stat() for record in records),
        header=lambda index: records[index].header,
        groups=None if groups is None else tuple(str(groups[i]) for i in owners),
    )
    return Dataset("images", source, None, {"source": "given", "train_images": len(records)})


def _fingerprint(given: Given) -> str:
    """What tells the content of an image in memory from that of another one."""
    if given.error is not None:
        raise given.error
    content = given.content if given.array is None else np.ascontiguousarray(given.array)
    return f"{memoryview(content).nbytes} bytes, {zlib.crc32(content):08x}"


def ahead(calls: Iterable[Callable[[], T]], threads: int | None = None) -> Iterator[T]:
    """What the calls return, in order.

    Threads, by default one a core, work up to two calls each ahead: decoding and resizing release
    the interpreter's lock. With 0 threads each call is made when its result is asked for.
    """
    if threads == 0:
        yield from (call() for call in calls)
        return
    threads = threads or os.cpu_count() or 1
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    waiting, remaining, error = collections.deque(), iter(calls), None
    try:
        while waiting or error is None:
            while error is None and len(waiting) <= 2 * threads:
                try:
                    waiting.append(pool.submit(next(remaining)))
                except Exception as end:  # StopIteration, or what the caller's iterator raises
                    error = end
            if waiting:
                yield waiting.popleft().result()
        if not isinstance(error, StopIteration):
            raise error
    finally:
        pool.shutdown(cancel_futures=True)


def _is_content(image: Any) -> bool:
    """The bytes of a file, or an open one."""
    return isinstance(image, bytes | bytearray | memoryview) or hasattr(image, "read")


def _is_array(images: Any) -> bool:
    """Of numpy, JAX and the like."""
    return hasattr(images, "__array__") or hasattr(images, "__array_interface__")


def _checked(image: Any, name: str) -> np.ndarray:
    if isinstance(image, PIL.Image.Image):
        return convert_image(image, name)
    if image is None:
        raise InputError(f"{name} is None. cv2.imread returns None for a file that it cannot read.")
    if not _is_array(image):
        raise InputError(
            f"{name} is of type {type(image).__name__}. Give a path, the content of a file, or an "
            "array."
        )
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise InputError(
            f"{name} is an array of {array.dtype}, which does not say which value is white: "
            "give uint8, 0 to 255."
        )
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=-1)
    if array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise InputError(
            f"{name} has shape {array.shape}: give [H, W, 3] in RGB, or [H, W] in grey; of several "
            "grey ones a list."
        )
    return array
