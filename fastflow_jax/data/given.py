"""Images that a program has at hand: files, or arrays in memory, one or many."""

import collections
import concurrent.futures
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image

from fastflow_jax.data.dataset import GOOD, Dataset, Source
from fastflow_jax.data.layout import images_below
from fastflow_jax.data.transforms import convert_image, decode_image, image_size, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.paths import expanded

# A file, a folder of them, an image of Pillow's, uint8 [H, W, 3] or [H, W], or several of these.
Image = str | Path | np.ndarray | PIL.Image.Image
Images = Image | Iterable[Image]
T = TypeVar("T")


def is_one(images: Images) -> bool:
    """One image, not several: a file, an image of Pillow's, [H, W, 3] or [H, W].

    An array of three axes is never several: [3, H, W] or [H, W, 4] is more likely a slip.
    """
    if isinstance(images, PIL.Image.Image):
        return True
    if _is_array(images):
        return len(np.shape(images)) in (2, 3)
    return isinstance(images, str | Path) and not expanded(images).is_dir()


def each(images: Images) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """The name of each image, and what reads it as uint8 [H, W, 3].

    Of a folder all images in it and in the folders below, sorted by path.

    Raises:
        InputError: a folder without images; and by what reads: a file or array that is no image.
    """
    if is_one(images):
        images = [images]
    elif isinstance(images, str | Path):
        images = images_below(expanded(images))
    elif _is_array(images):
        images = np.asarray(images)
    for i, image in enumerate(images):
        if isinstance(image, str | Path):
            path = expanded(image)
            name = image if path == Path(image) else path
            yield str(name), functools.partial(read_image, path)
        else:
            yield f"image {i}", functools.partial(_checked, image, f"image {i}")


def read_image(path: Path) -> np.ndarray:
    """The image in a file, uint8 [H, W, 3], see `transforms.decode_image`."""
    return decode_image(read_file(path), str(path))


def as_dataset(images: Images) -> Dataset:
    """Normal images to train on, as a data set; arrays are told apart by their content.

    Raises:
        InputError: there are none, one comes twice, or one is no image.
    """
    names, loads, files = [], [], []
    for name, load in each(images):
        if isinstance(load.args[0], Path):
            image_size(load.args[0])
            files.append(load.args[0].stat())
        else:
            image = np.ascontiguousarray(load())
            files.append(None)
            name = f"{name}, {image.nbytes} bytes, {zlib.crc32(image):08x}"
        names.append(name)
        loads.append(load)
    if not names:
        raise InputError("there are no images to train on")
    if len(set(names)) < len(names):
        twice = next(name for name, n in collections.Counter(names).items() if n > 1)
        raise InputError(f"{twice} is given twice: each image is to be there once")
    source = Source(
        tuple(names),
        (GOOD,) * len(names),
        lambda i: (loads[i](), None),
        files=tuple(files),
    )
    return Dataset("images", source, None, {"source": "given", "train_images": len(names)})


def ahead(calls: Iterable[Callable[[], T]], threads: int | None = None) -> Iterator[T]:
    """What the calls return, in order.

    Threads, by default one a core, work up to two calls each ahead: decoding and resizing release
    the interpreter's lock.
    """
    threads = threads or os.cpu_count() or 1
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    waiting = collections.deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_array(images: Any) -> bool:
    """Of numpy, JAX and the like."""
    return hasattr(images, "__array__") or hasattr(images, "__array_interface__")


def _checked(image: Any, name: str) -> np.ndarray:
    if isinstance(image, PIL.Image.Image):
        return convert_image(image, name)
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
