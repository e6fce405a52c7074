"""Comparison of the files that two commands have written."""

import hashlib
import io
import json
import pathlib
import re
import zipfile

import numpy as np
from PIL import Image

# Files that other files make unnecessary to compare: locks, the state of the optimiser, whose
# variables are compared, and durations.
_IGNORED = re.compile(r"(^|/)(\.lock|\.unpacking|checkpoints/\d+/.*|seconds\.json)$")
_SECONDS = re.compile(rb'"(seconds|modified_ns)": (\{[^}]*\}|[\d.]+)')
_REPORTED = re.compile(rb"<dt>(features|train|evaluate|audit)</dt><dd>[\d.]+")  # in reports


def snapshot(folder: pathlib.Path) -> dict[str, str]:
    """A digest of each file of a directory by its relative path, without durations and paths.

    The variables of a checkpoint count as a file.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or _IGNORED.search(name):
            continue
        content = path.read_bytes()
        if path.suffix in (".json", ".jsonl", ".html", ".csv"):
            content = _SECONDS.sub(b"", content).replace(str(folder.parent).encode(), b"")
            content = _REPORTED.sub(b"", content)
        found[name] = hashlib.sha256(content).hexdigest()
    for checkpoints in folder.rglob("checkpoints"):
        if any(path.name.isdigit() for path in checkpoints.iterdir()):
            name = f"{checkpoints.relative_to(folder).as_posix()}/variables"
            found[name] = _variables(checkpoints.parent)
    return found


def _variables(training: pathlib.Path) -> str:
    import jax

    from fastflow_jax.training.loop import read_variables

    leaves = jax.tree_util.tree_leaves_with_path(read_variables(training))
    content = [(str(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def differences(folder: pathlib.Path, expected: dict[str, str]) -> list[str]:
    """Differences from a snapshot, each with the name of a file."""
    found = snapshot(folder)
    missing = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    extra = [f"{name} was left" for name in sorted(found.keys() - expected.keys())]
    both = sorted(found.keys() & expected.keys())
    return [*missing, *extra, *(f"{n} differs" for n in both if found[n] != expected[n])]


def incomplete(folder: pathlib.Path) -> list[str]:
    """Names of files that are present under their final name but cannot be read as a whole."""
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "orbax-checkpoint-tmp" not in str(path) and not _is_whole(path)
    ]


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a file can be read; files that grow line by line, and temporary ones, are whole."""
    try:
        content = path.read_bytes()
        if path.suffix == ".json" and "incomplete" not in str(path):
            json.loads(content)
        elif path.suffix == ".npz":
            with np.load(io.BytesIO(content)) as arrays:
                dict(arrays)
        elif path.suffix in (".png", ".webp"):
            Image.open(io.BytesIO(content)).load()
        elif path.suffix == ".html":
            return content.rstrip().endswith(b"</html>")
    except (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile):
        return False
    return True
