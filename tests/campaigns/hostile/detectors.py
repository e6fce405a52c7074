"""Targets: saved detectors, exported detectors, feature caches."""

import contextlib
import functools
import hashlib
import json
import pathlib
import tempfile
from importlib.util import find_spec
from random import Random

import jax
import numpy as np
from PIL import Image

from fastflow_jax.detector import Detector
from fastflow_jax.errors import InputError
from fastflow_jax.exported import Exported
from fastflow_jax.features import cache
from hostile import mutation
from hostile.target import Target

_GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
_DESCRIPTION = "detector.json"


def _saved() -> list[bytes]:
    kinds = ("knn", "gaussian", "cflow")
    files = [(_GOLDENS / f"durable/{kind}.zip").read_bytes() for kind in kinds]
    folder = _GOLDENS / "durable/fastflow"
    return [*files, mutation.packed({f.name: f.read_bytes() for f in sorted(folder.iterdir())})]


def _of_member(name: str, content: bytes, rng: Random) -> bytes:
    change = mutation.of_json if name.endswith(".json") else mutation.of_safetensors
    return change(content, rng)


def _of_saved(data: bytes, rng: Random, others=()) -> bytes:
    """Changes a saved detector; mostly, its checksums are corrected."""
    changed = mutation.of_zip(_of_member)(data, rng, others)
    try:
        files = mutation.unpacked(changed)
        about = json.loads(files[_DESCRIPTION])
        if rng.random() < 0.1:
            return changed
        for name in about["files"].keys() & files.keys():
            digest = hashlib.sha256(files[name]).hexdigest()
            about["files"][name] = {"bytes": len(files[name]), "sha256": digest}
    except Exception:  # other changes are kept as they are
        return changed
    return mutation.packed(files | {_DESCRIPTION: json.dumps(about).encode()})


def _read_saved(data: bytes) -> None:
    path = pathlib.Path("case.zip")
    path.write_bytes(data)
    Detector.load(path)


def _run() -> list[bytes]:
    folder = _GOLDENS / "run"
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [mutation.packed({str(f.relative_to(folder)): f.read_bytes() for f in files})]


def _of_run(name: str, content: bytes, rng: Random) -> bytes:
    return (mutation.of_json if name.endswith(".json") else mutation.of_bytes)(content, rng)


def _read_run(data: bytes) -> None:
    """Reads the directory of a training; its files are packed, as only its reader is tried."""
    _unpack(data)
    Detector.load(pathlib.Path("run").absolute())


def _unpack(data: bytes) -> None:
    """Writes the files of a case to the directory `run`."""
    try:
        files = mutation.unpacked(data)
    except Exception as error:
        raise InputError("The case cannot be unpacked. It is not tried.") from error
    root = pathlib.Path("run").absolute()
    for name, content in files.items():
        path = (root / name).resolve()
        if root in path.parents and "\0" not in name:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@functools.cache
def exported() -> list[bytes]:
    """An exported detector, whose map is the brightness."""
    from onnx import TensorProto, helper, numpy_helper

    from fastflow_jax.decision import Threshold
    from fastflow_jax.exported import FORMAT, to_metadata

    node, shape = helper.make_node, ["batch", 8, 8]
    graph = helper.make_graph(
        [
            node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
            node("ReduceMean", ["floats"], ["grey"], axes=[3], keepdims=0),
            node("Div", ["grey", "white"], ["anomaly_map"]),
            node("ReduceMean", ["anomaly_map"], ["score"], axes=[1, 2], keepdims=0),
        ],
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [*shape, 3])],
        [
            helper.make_tensor_value_info("score", TensorProto.FLOAT, ["batch"]),
            helper.make_tensor_value_info("anomaly_map", TensorProto.FLOAT, shape),
        ],
        [numpy_helper.from_array(np.float32(255), "white")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    fields = {
        "format": FORMAT,
        "version": "0",
        "fingerprint": "0",
        "input": {"height": 8, "width": 8, "resize": "square"},
        "image_threshold": Threshold(0.5),
        "pixel_threshold": Threshold(0.75),
        "held_out": {"scores": [0.1, 0.2, 0.3, 0.4], "groups": None},
        "training_images": {"formats": ["PNG"], "height": [8, 8], "width": [8, 8],
                            "quality": None, "depths": [8], "coloured": False},
        "colour_range": [0.0, 1.0],
        "tiling": None,
        "places": None,
        "region": None,
    }  # fmt: skip
    helper.set_model_props(model, to_metadata(fields))
    return [model.SerializeToString()]


def _of_exported(data: bytes, rng: Random, others=()) -> bytes:
    """Changes the metadata of an ONNX file, or its bytes."""
    import onnx

    if rng.random() < 0.4:
        return mutation.of_bytes(data, rng, others)
    try:
        model = onnx.load_from_string(data)
    except Exception:  # the result of an earlier change
        return mutation.of_bytes(data, rng, others)
    if not model.metadata_props:
        return mutation.of_bytes(data, rng, others)
    entry = rng.choice(model.metadata_props)
    try:
        changed = mutation.of_json(entry.value.encode(), rng)
    except AttributeError:  # protobuf gives bytes if they are not UTF-8
        return mutation.of_bytes(data, rng, others)
    entry.value = changed.decode("utf-8", "replace")
    return model.SerializeToString()


def _read_exported(data: bytes) -> None:
    path = pathlib.Path("case.onnx")
    path.write_bytes(data)
    Exported(path, threads=1).predict(np.zeros((8, 8, 3), np.uint8))


def _batch(path: str) -> list[str]:
    """Command that scores the images of a file; also writes its detector."""
    pathlib.Path("tiny.onnx").write_bytes(exported()[0])
    return ["batch", "--model=tiny.onnx", f"--input={path}", "--output=out"]


# It needs packages that only some environments have.
batch = _batch if all(map(find_spec, ("onnx", "onnxruntime", "pyarrow"))) else None


def _batch_with(path: str) -> list[str]:
    """Command that scores an image with an exported detector."""
    Image.new("RGB", (8, 8)).save("a.png")
    return ["batch", f"--model={path}", "--input=a.png", "--output=out"]


_TRUE = np.arange(6 * 2 * 2 * 3, dtype=np.float32).reshape(6, 2, 2, 3)


def _load_or_compute() -> tuple[np.ndarray, ...]:
    """Features of six images, in blocks of two, cached in the directory `run`."""

    def compute(rows: np.ndarray):
        yield from ((_TRUE[rows[i : i + 2]],) for i in range(0, len(rows), 2))

    return cache.load_or_compute(
        compute,
        {"backbone": "x"},
        [f"{i}.png" for i in range(6)],
        [jax.ShapeDtypeStruct((2, 2, 2, 3), np.float32)],
        block=2,
        location="disk",
        folder=pathlib.Path("run").absolute(),
        title="features",
    )


def _cached() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _load_or_compute()
        files = {file.name: file.read_bytes() for file in pathlib.Path("run").iterdir()}
    return [mutation.packed(files)]


def _of_cache(name: str, content: bytes, rng: Random) -> bytes:
    """Changes the record line by line, so that its header often stays."""
    if not name.endswith(".jsonl") or rng.random() < 0.2:
        return mutation.of_bytes(content, rng)
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    lines[i] = mutation.of_json(lines[i], rng)
    return b"\n".join(lines)


def _read_cache(data: bytes) -> None:
    """Reads features; damaged ones must be computed again."""
    _unpack(data)
    (found,) = _load_or_compute()
    np.testing.assert_array_equal(found, _TRUE)


TARGETS = (
    Target("detector_zip", _saved, _of_saved, _read_saved,
           ("fastflow_jax.runs.durable", "fastflow_jax.state", "fastflow_jax.config",
            "fastflow_jax.detectors.calibration"), cases=8),
    Target("run", _run, mutation.of_zip(_of_run), _read_run,
           ("fastflow_jax.runs.saved", "fastflow_jax.files", "fastflow_jax.config"), cases=5),
    Target("exported", exported, _of_exported, _read_exported,
           ("fastflow_jax.exported",), command=batch and _batch_with, suffix=".onnx"),
    Target("cache", _cached, mutation.of_zip(_of_cache), _read_cache,
           ("fastflow_jax.features.cache",)),
)  # fmt: skip
