"""Targets: archives of data sets, and the npm package for web pages."""

import functools
import io
import os
import pathlib
import tarfile
from random import Random

from fastflow_jax.data.tfds.manual import unpack
from fastflow_jax.export.page import read_runtime
from hostile import mutation
from hostile.target import Target

_FILES = {"set/train/a.png": b"\x89PNG", "set/test/b.png": b"12345", "set/readme.txt": b"x" * 2000}
_RUNTIME = {
    "package/dist/ort.wasm.bundle.min.mjs": b"export {}",
    "package/dist/ort-wasm-simd-threaded.wasm": b"\0asm",
}


def _tar(files: dict[str, bytes], *modes: str) -> list[bytes]:
    found = []
    for mode in modes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        found.append(buffer.getvalue())
    return found


def _of_content(name: str, content: bytes, rng: Random) -> bytes:
    return mutation.of_bytes(content, rng)


def _read(suffix: str, data: bytes) -> None:
    """Unpacks an archive; links in it must stay in its directory."""
    path = pathlib.Path(f"set{suffix}").absolute()
    path.write_bytes(data)
    try:
        unpack(path)
    finally:
        root = path.parent.resolve()
        for at, folders, files in os.walk(root):
            for name in (*folders, *files):
                real = pathlib.Path(at, name).resolve()
                assert real.is_relative_to(root), f"{at}/{name} leads to {real}"
        left = {each.name for each in root.iterdir()} - {path.name, "set", ".unpacking"}
        assert not left, f"{left} are left"


def _read_runtime(data: bytes) -> None:
    path = pathlib.Path("runtime.tgz")
    path.write_bytes(data)
    found = read_runtime(path)
    assert found.keys() == {"script", "wasm"}


_MODULES = ("fastflow_jax.data.tfds.manual",)
TARGETS = (
    Target("archive_zip", lambda: [mutation.packed(_FILES)],
           mutation.of_zip(_of_content), functools.partial(_read, ".zip"), _MODULES),
    Target("archive_tar", lambda: _tar(_FILES, "w", "w:gz", "w:xz", "w:bz2"),
           mutation.of_tar, functools.partial(_read, ".tar"), _MODULES),
    Target("runtime", lambda: _tar(_RUNTIME, "w:gz"), mutation.of_tar,
           _read_runtime, ("fastflow_jax.export.page",)),
)  # fmt: skip
