"""Targets: files of backbone weights, and arrays of runs."""

import functools
import io
import pathlib
import struct
from random import Random

import numpy as np

from fastflow_jax.backbones.weights import read_state
from fastflow_jax.files import read_arrays
from fastflow_jax.state import to_bytes
from hostile import mutation
from hostile.target import Target

_GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
_ARRAYS = {
    "layer.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layer.bias": np.zeros(3, np.float16),
    "count": np.array(7),
}


def _golden(name: str) -> list[bytes]:
    return [(_GOLDENS / name).read_bytes()]


def _npz() -> list[bytes]:
    content = io.BytesIO()
    np.savez(content, **_ARRAYS)  # type: ignore[arg-type]
    return [content.getvalue()]


def _npy(name: str, content: bytes, rng: Random) -> bytes:
    """Changes the header of a .npy file, and corrects its length."""
    if rng.random() < 0.4 or len(content) < 10:
        return mutation.of_bytes(content, rng)
    (length,) = struct.unpack("<H", content[8:10])
    header = mutation.of_text(content[10 : 10 + length], rng)[:65535]
    return content[:8] + struct.pack("<H", len(header)) + header + content[10 + length :]


def _pickle(name: str, content: bytes, rng: Random) -> bytes:
    if not name.endswith("data.pkl") or rng.random() < 0.7:
        return mutation.of_bytes(content, rng)
    names = (
        b"posix\nsystem",
        b"builtins\neval",
        b"torch\nFloatStorage",
        b"collections\nOrderedDict",
    )
    at = rng.randrange(len(content) + 1)
    return content[:at] + b"c" + rng.choice(names) + b"\n" + content[at:]


def _read(data: bytes) -> None:
    path = pathlib.Path("case.pth")
    path.write_bytes(data)
    assert all(x.nbytes <= len(data) for x in read_state(path).values())


def _read_arrays(data: bytes) -> None:
    path = pathlib.Path("case.npz")
    path.write_bytes(data)
    read_arrays(path)


def _describe(path: str) -> list[str]:
    layers = ["--config.backbone=resnet18", "--config.image_size=64", f"--config.weights={path}"]
    return ["train", "--config=synthetic:gravel", *layers, "--config.layers=('layer1',)"]


_MODULES = (
    "fastflow_jax.backbones.weights",
    "fastflow_jax.backbones.torch_pickle",
)
TARGETS = (
    Target(
        "weights_zip",
        functools.partial(_golden, "backbone_zip.pth"),
        mutation.of_zip(_pickle),
        _read,
        _MODULES,
    ),
    Target(
        "weights_legacy",
        functools.partial(_golden, "backbone_legacy.pth"),
        mutation.of_bytes,
        _read,
        _MODULES,
    ),
    Target(
        "weights_safetensors",
        lambda: [to_bytes(_ARRAYS)],
        mutation.of_safetensors,
        _read,
        _MODULES,
    ),
    Target(
        "weights_npz",
        _npz,
        mutation.of_zip(_npy),
        _read,
        _MODULES,
    ),
    Target(
        "arrays",
        _npz,
        mutation.of_zip(_npy),
        _read_arrays,
        ("fastflow_jax.files",),
    ),
)
