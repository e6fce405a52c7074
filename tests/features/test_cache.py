"""Kept features: the same in every home, and on disk never more than what is whole."""

import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

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
    """Stands for one; counts the images that it sees, and dies when it has seen enough."""

    def __init__(self, dtype="float16", dies_after=N):
        self.dtype, self.dies_after, self.seen = dtype, dies_after, []

    def __call__(self, rows):
        for i in range(0, len(rows), BLOCK):
            part = rows[i : i + BLOCK]
            if len(self.seen) >= self.dies_after:
                raise RuntimeError("killed")
            self.seen += part.tolist()
            yield tuple(m[part] for m in whole(self.dtype))


def keep(folder, backbone=None, *, home="disk", of="brick", names=NAMES, dtype="float16"):
    return cache.keep(
        backbone or Backbone(dtype),
        {"of": of},
        names,
        maps_of(dtype),
        block=BLOCK,
        home=home,
        folder=folder / "features",
        title="brick: features",
    )


def assert_whole(kept, dtype="float16"):
    for m, expected in zip(kept, whole(dtype), strict=True):
        assert m.dtype == expected.dtype
        np.testing.assert_array_equal(m, expected)


@pytest.mark.parametrize("home", ["memory", "disk"])
def test_features_do_not_hang_on_the_bar(tmp_path, monkeypatch, home):
    class Disabled(tqdm):  # as TQDM_DISABLE=1 has them, which then do not count
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | {"disable": True})

    monkeypatch.setattr(cache, "tqdm", Disabled)
    assert_whole(keep(tmp_path, home=home))


@pytest.fixture
def interrupted(tmp_path):
    """A folder in which a run has died after two of three blocks."""
    with pytest.raises(RuntimeError, match="killed"):
        keep(tmp_path, Backbone(dies_after=8))
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("home", ["auto", "device", "memory", "disk"])
def test_every_home_keeps_the_very_features(tmp_path, home, dtype):
    kept = keep(tmp_path, home=home, dtype=dtype)
    assert_whole(kept, dtype)
    assert (tmp_path / "features").exists() == (home == "disk")
    assert all(isinstance(m, np.memmap) == (home == "disk") for m in kept)


def test_an_interrupted_computation_goes_on(interrupted):
    backbone = Backbone()
    assert_whole(keep(interrupted, backbone))
    assert backbone.seen == [8, 9, 10]
    backbone = Backbone()
    assert_whole(keep(interrupted, backbone))
    assert backbone.seen == []


def test_a_record_that_was_cut_off_loses_its_last_block_only(interrupted):
    record = interrupted / "features" / "record.jsonl"
    record.write_text(record.read_text()[:-5])
    backbone = Backbone()
    assert_whole(keep(interrupted, backbone))
    assert backbone.seen == [4, 5, 6, 7, 8, 9, 10]
    backbone = Backbone()
    keep(interrupted, backbone)
    assert backbone.seen == []


def test_data_that_never_reached_the_disk_is_computed_again(interrupted):
    file = interrupted / "features" / "scale_1.raw"
    file.write_bytes(file.read_bytes()[:-1])
    backbone = Backbone()
    assert_whole(keep(interrupted, backbone))
    assert backbone.seen == [4, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    ("image", "again"), [(0, [0, 1, 2, 3]), (5, [4, 5, 6, 7]), (10, [8, 9, 10])]
)
def test_one_wrong_bit_is_found(tmp_path, image, again):
    keep(tmp_path)
    file = tmp_path / "features" / "scale_0.raw"
    data = bytearray(file.read_bytes())
    data[image * len(data) // N + 7] ^= 1
    file.write_bytes(data)
    backbone = Backbone()
    assert_whole(keep(tmp_path, backbone))
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
def test_features_of_something_else_are_not_taken(tmp_path, other):
    before = keep(tmp_path)
    backbone = Backbone(other.get("dtype", "float16"))
    keep(tmp_path, backbone, **other)
    assert len(backbone.seen) == N
    assert_whole(before)  # whoever still has them does not see them change


def test_what_is_no_record_is_not_taken(interrupted):
    (interrupted / "features" / "record.jsonl").write_bytes(b"\xff\x00{")
    backbone = Backbone()
    assert_whole(keep(interrupted, backbone))
    assert len(backbone.seen) == N


def test_features_are_read_as_they_are_needed(tmp_path):
    part = cache.Rows(keep(tmp_path)[0], np.array([7, 2, 9]))
    expected = whole()[0][[7, 2, 9]]
    assert (len(part), part.shape, part.dtype) == (3, expected.shape, expected.dtype)
    np.testing.assert_array_equal(part[1:], expected[1:])
    np.testing.assert_array_equal(part[np.array([2, 0])], expected[[2, 0]])
    np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize(("free", "place"), [(10**9, "in memory"), (1000, "on disk")])
def test_the_home_follows_from_the_size_and_is_told(tmp_path, monkeypatch, capsys, free, place):
    monkeypatch.setattr(cache, "free_memory", lambda: free)
    assert_whole(keep(tmp_path, home="auto"))
    assert f"brick: features of 11 images, 0.0 MiB in float16, kept {place}" in (
        capsys.readouterr().out
    )


def test_the_size_is_that_of_the_arrays():
    assert cache.n_bytes(N, maps_of()) == sum(m.nbytes for m in whole())


def test_free_memory_is_some():
    assert 2**20 < cache.free_memory() < 2**50


@pytest.mark.parametrize(
    ("limit", "statistics", "name"),
    [
        ("memory.max", "memory.stat", "anon"),
        ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
    ],
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, limit, statistics, name):
    monkeypatch.setattr(cache, "_CGROUP_ROOT", tmp_path)
    before = cache.free_memory()
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("3000000\n")
    (tmp_path / statistics).write_text(f"file 5000000\n{name} 1000000\n")
    assert cache.free_memory() == 2_000_000 < before


class Device:
    def __init__(self, limit, used):
        self.stats = {"bytes_limit": limit, "bytes_in_use": used}

    def memory_stats(self):
        return self.stats


@pytest.mark.parametrize(
    ("size", "home", "expected"),
    [
        (300, "auto", True),
        (301, "auto", False),
        (301, "device", True),
        (300, "memory", False),
        (300, "disk", False),
    ],
)
def test_devices_hold_what_leaves_room_on_each(monkeypatch, size, home, expected):
    assert not cache.goes_on_device(size, home)  # a CPU has no memory of its own
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(1000, 400), Device(2000, 100)])
    assert cache.goes_on_device(size, home) == expected


def test_a_disk_without_room_is_named_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    backbone = Backbone()
    with pytest.raises(InputError, match=r"room for 0\.0 MiB in .*features: make room, choose"):
        keep(tmp_path, backbone)
    assert backbone.seen == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_up_says_so_and_the_rest_stands(tmp_path):
    keep(tmp_path)
    file = tmp_path / "features" / "scale_1.raw"
    aside = file.rename(tmp_path / "aside")
    file.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        keep(tmp_path)
    file.unlink()
    aside.rename(file)
    backbone = Backbone()
    assert_whole(keep(tmp_path, backbone))
    assert backbone.seen == []
