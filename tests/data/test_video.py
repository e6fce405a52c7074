"""Frames of videos, which the tests encode without loss."""

import sys
import weakref

import numpy as np
import PIL.Image
import pytest

from fastflow_jax.data import video
from fastflow_jax.data.arrays import as_dataset, each, read_image
from fastflow_jax.data.formats import read_header
from fastflow_jax.errors import InputError

av = pytest.importorskip("av", reason="videos need the extra video")

FRAMES = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), np.uint8)


def write(path, frames=FRAMES, rotation=0, codec="ffv1", pixels="bgr0"):
    """Encodes frames to a file; its extension is the container."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        if rotation:
            stream.set_display_rotation(rotation)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture
def clip(tmp_path):
    return write(tmp_path / "clip.mkv")


@pytest.mark.parametrize("every", [1, 5, 100])
def test_frames_are_exact_and_numbered(clip, every):
    found = list(video.frames(clip, every))
    assert [number for number, *_ in found] == [*range(0, 12, every)]
    for number, image, codec in found:
        np.testing.assert_array_equal(image, FRAMES[number])
        assert codec == "FFV1"


def test_frames_are_in_memory_one_at_a_time(clip):
    alive = []
    for _, image, _ in video.frames(clip):
        alive.append(weakref.ref(image))
        del image
        assert sum(of() is not None for of in alive) <= 1


def test_a_frame_is_found_by_its_number_in_any_order(clip):
    for number in (0, 1, 7, 3, 3, 11):
        np.testing.assert_array_equal(read_image(f"{clip}#{number + 1}"), FRAMES[number])
    with pytest.raises(InputError, match=r"clip\.mkv has no frame 13\. Choose"):
        read_image(f"{clip}#13")


def test_a_given_video_has_a_page_for_each_frame(clip):
    (given,) = each(clip)
    names, images, headers = zip(*given.read(every=4), strict=True)
    assert list(names) == [f"{clip}#{number}" for number in (1, 5, 9)]
    np.testing.assert_array_equal(images, FRAMES[::4])
    assert {(header.size, header.format) for header in headers} == {((48, 64), "FFV1")}


@pytest.mark.parametrize("name", ["clip.mkv", "clip.avi"])
def test_a_truncated_video_gives_its_frames_and_an_error(tmp_path, name):
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found, frames = [], video.frames(path)
    with pytest.raises(InputError, match=rf"{name} ends after \d+ of 12 frames"):
        found += (image for _, image, _ in frames)
    assert 0 < len(found) < 12
    np.testing.assert_array_equal(found, FRAMES[: len(found)])


@pytest.mark.parametrize("content", [b"", b"not a video", bytes(range(256)) * 40])
def test_a_file_that_is_not_a_video_is_named(tmp_path, content):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"clip\.mp4 (is broken|ends) after 0"):
        list(video.frames(path))


def test_a_missing_video_is_named(tmp_path):
    with pytest.raises(InputError, match=r"clip\.mp4 cannot be read: No such file"):
        list(video.frames(tmp_path / "clip.mp4"))


def test_a_file_without_pictures_is_named(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"sound\.mkv has no video stream"):
        list(video.frames(tmp_path / "sound.mkv"))


def test_a_video_with_too_large_frames_is_refused(clip, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 48 * 64 - 1)
    with pytest.raises(InputError, match=r"clip\.mkv is too large: 64 x 48 pixels"):
        list(video.frames(clip))


def test_a_turned_video_is_upright(tmp_path):
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this version of PyAV writes no rotation")
    turned = write(tmp_path / "turned.mov", rotation=90, codec="mjpeg", pixels="yuvj420p")
    plain = write(tmp_path / "plain.mov", codec="mjpeg", pixels="yuvj420p")
    for (_, found, _), (_, image, _) in zip(video.frames(turned), video.frames(plain), strict=True):
        np.testing.assert_array_equal(found, np.rot90(image))


def test_without_pyav_the_command_to_install_it_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"PyAV is not installed.*pip install 'fastflow-jax\[v"):
        list(video.frames(clip))


@pytest.mark.parametrize("name", ["clip.mkv", "clip.avi", "clip.mp4", "clip.mpg"])
def test_training_refuses_videos(tmp_path, name):
    path = tmp_path / name
    if name.endswith("mpg"):
        path.write_bytes(b"\0\0\1\xb3" + bytes(range(64)))  # Pillow knows it, but cannot read it
    else:
        write(path, codec="mpeg4", pixels="yuv420p")
    for call in (lambda: as_dataset([path]), lambda: read_header(path)):
        with pytest.raises(InputError, match=rf"{name} is a video.*Extract its frames: ffmpeg -i"):
            call()
