"""PyTorch's files are read exactly, and hostile files are refused at little cost."""

import contextlib
import io
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflow_jax.backbones.torch_pickle import read_torch
from fastflow_jax.backbones.weights import read_state
from fastflow_jax.errors import InputError

FILES = [
    Path(__file__).parents[1] / "goldens" / f"backbone_{kind}.pth" for kind in ("zip", "legacy")
]
LEGACY_START = b"".join(
    pickle.dumps(x, 2)
    for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001})
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reads_every_kind_of_tensor(path):
    checkpoint = read_torch(path)
    state = checkpoint.pop("state_dict")
    assert checkpoint == {"epoch": 3, "rate": 0.1, "best": [None, True, (1, "x", -(2**40))]}
    numbers = np.arange(24, dtype=np.float32)
    grid = numbers.reshape(2, 3, 4)
    expected = {
        "0.weight": grid[0, :, :2],
        "0.bias": numbers[5:8],
        "transposed": grid.transpose(2, 0, 1),
        "slice": grid[1, ::2, 1:3],
        "parameter": numbers[:3],
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(7),
        "half": numbers[:5].astype(np.float16),
        "bfloat16": numbers[:5],
        "double": numbers[:5].astype(np.float64),
        "bytes": np.array([0, 255], np.uint8),
        "bool": np.array([True, False]),
    }
    assert list(state) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name].astype(value.dtype), value)
        assert name == "bfloat16" or state[name].dtype == value.dtype


class Evil:
    """An object whose pickle runs a command."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def as_zip(pickled: bytes, **members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in members.items():
            archive.writestr(f"x/data/{name}", data)
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [as_zip, lambda pickled: LEGACY_START + pickled, lambda p: p])
def test_other_functions_are_refused_by_name(tmp_path, monkeypatch, wrap):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    path.write_bytes(wrap(pickle.dumps({"conv1.weight": Evil()}, 2)))
    with pytest.raises(InputError, match=r"evil\.pth.* (posix|nt)\.system, which is not allowed"):
        read_torch(path)
    assert not (tmp_path / "owned").exists()


def persistent(key: bytes, numel: int) -> bytes:
    """The instructions for a float storage."""
    text = lambda s: b"X" + struct.pack("<I", len(s)) + s  # noqa: E731
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(key) + text(b"cpu")
    return storage + b"J" + struct.pack("<i", numel) + b"tQ"


def tensor(size: bytes, stride: bytes, numel: int = 4) -> bytes:
    """The instructions for a tensor over storage "0"."""
    start = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return start + persistent(b"0", numel) + b"K\x00" + size + stride + b"\x89}tR"


ONE = b"K\x01\x85"
HUGE = b"J\xff\xff\xff\x7f"
HOSTILE = {
    "memo": b"\x80\x02Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "long text": b"\x80\x02X\xff\xff\xff\xff.",
    "long bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    "long bytes of protocol 3": b"\x80\x03B\xff\xff\xff\xff.",
    "long integer": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "endless": b"\x80\x02" + b"N" * 3_000_000 + b".",
    "square of pairs": b"\x80\x02]q\x00("
    + b"h\x00" * 250_000
    + b"ecollections\nOrderedDict\nh\x00\x85R.",
    "one list for many dicts": b"\x80\x02ccollections\nOrderedDict\nq\x01]q\x00("
    + b"".join(b"M" + struct.pack("<H", i) + b"N\x86" for i in range(30_000))
    + b"e("
    + b"h\x01h\x00\x85R" * 1_000
    + b"t.",
    "no stop": b"\x80\x02}",
    "empty stack": b"\x80\x020.",
    "mark missing": b"\x80\x02t.",
    "call of data": b"\x80\x02})R.",
    "call of a type": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "append to a tensor": b"\x80\x02" + tensor(ONE, ONE) + b"Na.",
    "item of a tensor": b"\x80\x02" + tensor(ONE, ONE) + b"K\x00Ns.",
    "repeated": b"\x80\x02" + tensor(HUGE + b"\x85", b"K\x00\x85") + b".",
    "beyond": b"\x80\x02" + tensor(b"K\x02\x85", b"K\x04\x85") + b".",
    "negative": b"\x80\x02" + tensor(b"J\xff\xff\xff\xff\x85", ONE) + b".",
    "many axes": b"\x80\x02"
    + tensor(b"(" + b"K\x01" * 70 + b"t", b"(" + b"K\x00" * 70 + b"t")
    + b".",
    "storage claims": b"\x80\x02" + tensor(ONE, ONE, 2**31 - 1) + b".",
    "not a storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))tR.",
}


def test_build_changes_nothing(tmp_path):
    """BUILD of `pickle` would change the attributes of any object, such as a dtype of numpy."""
    path = tmp_path / "build.pth"
    path.write_bytes(as_zip(b"\x80\x02}X\x01\x00\x00\x00actorch\nFloatStorage\n}bs."))
    assert read_torch(path) == {"a": np.dtype(np.float32)}


@pytest.mark.parametrize("wrap", [as_zip, None], ids=["zip", "legacy"])
@pytest.mark.parametrize("pickled", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_pickles_cost_little(tmp_path, pickled, wrap):
    path = tmp_path / "hostile.pth"
    path.write_bytes(as_zip(pickled, **{"0": bytes(16)}) if wrap else LEGACY_START + pickled)
    start = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"hostile\.pth"):
            read_torch(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e8
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda deep: as_zip(b"\x80\x02}" + deep + b"Ns."),
        lambda deep: as_zip(
            b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + deep + b"NNtQ."
        ),
        lambda deep: LEGACY_START + b"\x80\x02}.\x80\x02](" + deep + b"e.",
    ],
    ids=["key", "storage", "storage of the old format"],
)
def test_deep_tuple_is_not_hashed(tmp_path, wrapped):
    """The hash of such a tuple overflows the C stack and ends the process."""
    path = tmp_path / "deep.pth"
    path.write_bytes(wrapped(b")" + b"\x85" * 250_000))
    with pytest.raises(InputError, match="neither text nor a number"):
        read_torch(path)


def test_compressed_members_are_refused(tmp_path):
    """50 MB of zeros, compressed to 50 kB."""
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", bytes(50_000_000))
    with pytest.raises(InputError, match="compressed"):
        read_torch(path)


def test_zip_in_a_zip_is_refused(tmp_path):
    path = tmp_path / "nested.pth"
    path.write_bytes(as_zip(as_zip(b"\x80\x02}.")))
    with pytest.raises(InputError, match=r"nested\.pth cannot be read"):
        read_torch(path)


def test_overlapping_members_are_refused(tmp_path):
    """Many entries of the directory for the same bytes."""
    data = as_zip(b"\x80\x02}.", **{"0": bytes(10_000)})
    end = data.rindex(b"PK\x05\x06")
    directory_start = struct.unpack("<I", data[end + 16 : end + 20])[0]
    directory = data[directory_start:end]
    entry = directory[directory.rindex(b"PK\x01\x02") :]
    copies = b"".join(entry.replace(b"x/data/0", b"x/data/%c" % c) for c in b"abcdefgh")
    size = len(directory + copies)
    tail = struct.pack("<HHII", 10, 10, size, directory_start)
    path = tmp_path / "overlap.pth"
    path.write_bytes(data[:end] + copies + data[end : end + 8] + tail + b"\x00\x00")
    with pytest.raises(InputError, match="claim more bytes"):
        read_torch(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_truncated_files_are_refused(path, tmp_path):
    data = path.read_bytes()
    cut = tmp_path / "cut.pth"
    for end in {*range(0, len(data), 97), len(data) - 1}:
        cut.write_bytes(data[:end])
        with pytest.raises(InputError, match=r"cut\.pth"):
            read_state(cut)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(tmp_path, data):
    """Fuzzing: bytes are changed, removed or inserted."""
    content = bytearray(data.draw(st.sampled_from(FILES)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        removed = data.draw(st.integers(0, 3))
        content[place : place + removed] = data.draw(st.binary(max_size=4))
    path = tmp_path / "fuzzed.pth"
    path.write_bytes(content)
    with contextlib.suppress(InputError):  # any other exception fails
        state = read_state(path)
        assert all(isinstance(x, np.ndarray) and x.size < 100 for x in state.values())
