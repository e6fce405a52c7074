"""Cached features: equal in every location, and on disk only complete blocks are reused."""

import errno
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from fastflow_jax import parallel
from fastflow_jax.errors import InputError
from fastflow_jax.features import cache
from fastflow_jax.features.extract import DTYPES

N, BLOCK = 11, 4
NAMES = [f"good/{i:03}.png" for i in range(N)]


def maps_of(dtype="float16"):
    return [jax.ShapeDtypeStruct((1, *shape), jnp.dtype(dtype)) for shape in [(3, 2, 4), (2, 2, 5)]]


def whole(dtype="float16"):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(N, *m.shape[1:])).astype(m.dtype) for m in maps_of(dtype)]


class Backbone:
    """Stand-in that records its images, and fails after `dies_after` of them."""

    def __init__(self, dtype="float16", dies_after=N):
        self.dtype, self.dies_after, self.seen = dtype, dies_after, []

    def __call__(self, rows):
        for i in range(0, len(rows), BLOCK):
            part = rows[i : i + BLOCK]
            if len(self.seen) >= self.dies_after:
                raise RuntimeError("killed")
            self.seen += part.tolist()
            yield tuple(m[part] for m in whole(self.dtype))


def load(folder, backbone=None, *, location="disk", of="brick", names=NAMES, dtype="float16"):
    return cache.load_or_compute(
        backbone or Backbone(dtype),
        {"data": of},
        names,
        maps_of(dtype),
        block=BLOCK,
        location=location,
        folder=folder / "features",
        title="brick: features",
    )


def assert_whole(features, dtype="float16"):
    for m, expected in zip(features, whole(dtype), strict=True):
        assert m.dtype == expected.dtype
        np.testing.assert_array_equal(m, expected)


@pytest.mark.parametrize("location", ["memory", "disk"])
def test_features_are_complete_without_a_progress_bar(tmp_path, monkeypatch, location):
    class Disabled(tqdm):  # as with TQDM_DISABLE=1: it does not count
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})

    monkeypatch.setattr(cache, "tqdm", Disabled)
    assert_whole(load(tmp_path, location=location))


@pytest.fixture
def interrupted(tmp_path):
    """A directory in which a run has failed after two of three blocks."""
    with pytest.raises(RuntimeError, match="killed"):
        load(tmp_path, Backbone(dies_after=8))
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("location", ["auto", "device", "memory", "disk"])
def test_features_are_equal_in_every_location(tmp_path, location, dtype):
    features = load(tmp_path, location=location, dtype=dtype)
    assert_whole(features, dtype)
    assert (tmp_path / "features").exists() == (location == "disk")
    assert all(isinstance(m, np.memmap) == (location == "disk") for m in features)


def test_an_interrupted_computation_is_resumed(interrupted):
    backbone = Backbone()
    assert_whole(load(interrupted, backbone))
    assert backbone.seen == [8, 9, 10]
    backbone = Backbone()
    assert_whole(load(interrupted, backbone))
    assert backbone.seen == []


def test_a_truncated_record_loses_only_its_last_block(interrupted):
    record = interrupted / "features" / "record.jsonl"
    record.write_text(record.read_text()[:-5])
    backbone = Backbone()
    assert_whole(load(interrupted, backbone))
    assert backbone.seen == [4, 5, 6, 7, 8, 9, 10]
    backbone = Backbone()
    load(interrupted, backbone)
    assert backbone.seen == []


def test_blocks_with_missing_bytes_are_computed_again(interrupted):
    file = interrupted / "features" / "scale_1.raw"
    file.write_bytes(file.read_bytes()[:-1])
    backbone = Backbone()
    assert_whole(load(interrupted, backbone))
    assert backbone.seen == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("image", "again"), [(0, [0, 1, 2, 3]), (5, [4, 5, 6, 7]), (10, [8, 9, 10])]
)
def test_a_block_with_a_wrong_bit_is_computed_again(tmp_path, image, again):
    load(tmp_path)
    file = tmp_path / "features" / "scale_0.raw"
    data = bytearray(file.read_bytes())
    data[image * len(data) // N + 7] ^= 1
    file.write_bytes(data)
    backbone = Backbone()
    assert_whole(load(tmp_path, backbone))
    assert backbone.seen == again


@pytest.mark.parametrize(
    "other",
    [
        {"of": "gravel"},
        {"names": [*NAMES[:-1], "good/999.png"]},
        {"names": NAMES[::-1]},
        {"dtype": "bfloat16"},  # of the same size
    ],
)
def test_features_with_another_fingerprint_are_computed_again(tmp_path, other):
    before = load(tmp_path)
    backbone = Backbone(other.get("dtype", "float16"))
    load(tmp_path, backbone, **other)
    assert len(backbone.seen) == N
    assert_whole(before)  # arrays in use do not change


def test_a_damaged_record_is_ignored(interrupted):
    (interrupted / "features" / "record.jsonl").write_bytes(b"\xff\x00{")
    backbone = Backbone()
    assert_whole(load(interrupted, backbone))
    assert len(backbone.seen) == N


def test_rows_select_images_of_an_array(tmp_path):
    part = cache.Rows(load(tmp_path)[0], np.array([7, 2, 9]))
    expected = whole()[0][[7, 2, 9]]
    assert (len(part), part.shape, part.dtype) == (3, expected.shape, expected.dtype)
    np.testing.assert_array_equal(part[1:], expected[1:])
    np.testing.assert_array_equal(part[np.array([2, 0])], expected[[2, 0]])
    np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize(("available", "place"), [(10**9, "in memory"), (1000, "on disk")])
def test_auto_caches_in_memory_if_there_is_room(tmp_path, monkeypatch, caplog, available, place):
    caplog.set_level(logging.INFO, logger="fastflow_jax")
    monkeypatch.setattr(parallel, "available_host_memory", lambda: available)
    assert_whole(load(tmp_path, location="auto"))
    (message,) = caplog.messages
    assert f"brick: features of 11 images, 0.0 MiB in float16, are cached {place}" in message


def test_n_bytes_is_the_size_of_the_arrays():
    assert cache.n_bytes(N, maps_of()) == sum(m.nbytes for m in whole())


class Device:
    def __init__(self, limit, used):
        self.stats = {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self.stats


@pytest.mark.parametrize(
    ("size", "location", "expected"),
    [
        (300, "auto", True),
        (301, "auto", False),
        (301, "device", True),
        (300, "memory", False),
        (300, "disk", False),
    ],
)
def test_devices_hold_features_that_leave_half_their_memory(monkeypatch, size, location, expected):
    assert not cache.fits_on_device(size, location)  # a CPU has no memory of its own
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(1000, 400), Device(2000, 100)])
    assert cache.fits_on_device(size, location) == expected


def test_a_full_disk_is_an_error_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    backbone = Backbone()
    with pytest.raises(InputError, match=r"features has room for 0\.0 MiB\. Make room"):
        load(tmp_path, backbone)
    assert backbone.seen == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
class Unwritable(np.ndarray):
    """Features that find the disk full."""

    def tobytes(self, order="C"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_complete_blocks_survive_a_disk_that_fills_up(tmp_path):
    load(tmp_path)
    file = tmp_path / "features" / "scale_1.raw"
    content = file.read_bytes()
    file.write_bytes(b"")

    def compute(rows):
        for first, second in Backbone()(rows):
            yield first, second.view(Unwritable)

    with pytest.raises(OSError, match="No space left on device"):
        load(tmp_path, compute)
    file.write_bytes(content)
    backbone = Backbone()
    assert_whole(load(tmp_path, backbone))
    assert backbone.seen == []
