"""Frames of video files, decoded one by one by PyAV (`pip install 'fastflow-jax[video]'`)."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from fastflow_jax.data.formats import cannot_read
from fastflow_jax.errors import InputError

_COMPLETE = 0.9  # share of the stated frames; some may be hidden


def frames(path: Path, every: int = 1) -> Iterator[tuple[int, np.ndarray, str]]:
    """Yields the frames of the first video stream; few of them are in memory at a time.

    Args:
        path: the video file.
        every: yields frames 0, `every`, 2 `every`, ...

    Returns:
        Number of the frame from 0, its pixels (uint8 [H, W, 3], upright), and the name of the
        codec, such as "H264".

    Raises:
        InputError: PyAV is not installed, the file is not a video or too large, or it is damaged,
            after the frames before the damage.
    """
    if every < 1:
        raise InputError(f"every is {every}. It must be at least 1.")
    try:
        import av
    except ImportError as error:
        raise InputError(
            f"{path} is a video, and PyAV is not installed. Install it: pip install "
            "'fastflow-jax[video]'."
        ) from error
    if not path.is_file():
        raise cannot_read(path, FileNotFoundError(2, "No such file"))
    number, stated = 0, 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path} has no video stream. Replace or remove it.")
            stream = container.streams.video[0]
            _check_size(path, stream.width, stream.height)
            stream.thread_type = "AUTO"
            codec = stream.codec_context.name.upper()
            stated = _stated(container)
            for frame in container.decode(stream):
                _check_size(path, frame.width, frame.height)
                if number % every == 0:
                    yield number, _pixels(frame), codec
                number += 1
    except InputError:
        raise
    except Exception as error:  # PyAV raises many types
        raise InputError(
            f"{path} is broken after {number} frames ({error}). Replace or remove it."
        ) from error
    if not number or number < _COMPLETE * stated:
        raise InputError(f"{path} ends after {number} of {stated} frames. Replace or remove it.")


def _stated(container: Any) -> int:
    """Number of frames that a video states; 0 if it is unknown."""
    (stream, *_), seconds = container.streams.video, (container.duration or 0) / 1e6
    if stream.frames or len(container.streams) > 1:  # a sound track may be longer
        return stream.frames
    return int(seconds * (stream.average_rate or 0))


def frame(path: Path, number: int) -> np.ndarray:
    """Returns a frame of a video, uint8 [H, W, 3].

    The decoder of the last video is kept, so that frames in increasing order are decoded once.

    Args:
        path: the video file.
        number: of the frame, from 0.

    Raises:
        InputError: see `frames`; or there is no such frame.
    """
    with _lock:
        return _last.frame(path, number)


class _Decoder:
    """Position in the video that was read last."""

    def __init__(self):
        self._path, self._next = Path(), 0
        self._frames: Any = iter(())

    def frame(self, path: Path, number: int) -> np.ndarray:
        if path != self._path or number < self._next:
            self._path, self._next, self._frames = path, 0, frames(path)
        for found, image, _ in self._frames:
            self._next = found + 1
            if found == number:
                return image
        self._path = Path()
        raise InputError(f"{path} has no frame {number + 1}. Choose an earlier one.")


_last, _lock = _Decoder(), threading.Lock()


def _check_size(path: Path, width: int, height: int) -> None:
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise InputError(
            f"{path} is too large: {width} x {height} pixels exceed the limit of {limit} pixels "
            "(PIL.Image.MAX_IMAGE_PIXELS). Convert it to a smaller size."
        )


def _pixels(frame: Any) -> np.ndarray:
    """Pixels of a frame, turned as its video states."""
    pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))  # anticlockwise
