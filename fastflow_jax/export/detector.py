"""Files of detectors for other runtimes, compared with the detector before they are written."""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy

import fastflow_jax
from fastflow_jax import data, exported
from fastflow_jax.backbones.weights import licence
from fastflow_jax.data.roi import AUTO
from fastflow_jax.decision import rounded_down
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.held_out import HeldOut
from fastflow_jax.export.litert import load_litert, to_litert
from fastflow_jax.export.onnx import to_onnx
from fastflow_jax.export.page import page, read_runtime
from fastflow_jax.export.resize import resize_inside
from fastflow_jax.exported import INPUT, Exported, to_metadata
from fastflow_jax.features.split import split
from fastflow_jax.files import replacing, sha256_of_detector, write_text
from fastflow_jax.prediction import Predictor

# The formats, with the usual suffix of their files.
FORMATS = {"onnx": ".onnx", "html": ".html", "stablehlo": ".stablehlo", "litert": ".tflite"}
_EXPORTABLE = ("fastflow", "knn", "gaussian", "subspace", "patchcore", "cflow")
_SCORE, _MAP = 1e-4, 1e-3  # largest differences of a verified file, see `Parity`
_HELD_OUT, _RANDOM = 16, 4  # images of the comparison
_PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class Parity:
    """Differences between an exported file and the detector, on the same model inputs."""

    held_out: int  # images held out in training that were compared
    random: int  # images of random pixels that were compared
    # Largest difference of a score, over its value, or over the highest held-out score if that is
    # larger: scores of normal images may be near 0.
    score: float
    # Largest difference of a map, over its largest value if that is above 1; of a detector that
    # finds the region of interest, within the region.
    anomaly_map: float
    p_value: float | None  # largest difference of a p-value
    # Decisions that differ although the score differs from the threshold by more than 1e-4 of the
    # same size.
    flips: int

    def __str__(self) -> str:
        return (
            f"compared on {self.held_out} held-out and {self.random} random images: scores differ "
            f"by up to {self.score:.1e} of their size, maps by {self.anomaly_map:.1e}, "
            f"{self.flips} decisions differ"
        )

    def check(self, file: pathlib.Path) -> None:
        """Raises InputError if a difference is too large."""
        is_close = self.score <= _SCORE and self.anomaly_map <= _MAP  # False for NaN
        if not is_close or self.flips:
            raise InputError(
                f"{file} was not written, because its results differ from those of the detector: "
                f"{self}. Update jax and the packages of the format, or report this with the "
                "configuration."
            )


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an export, see `Detector.export`."""

    opset: int = 18
    any_size: bool = False
    runtime: pathlib.Path | None = None


def export(detector: Any, file: pathlib.Path, kind: str, options: Options) -> Parity:
    """Writes a detector to a file for another runtime, see `Detector.export`.

    Raises:
      InputError: see `Detector.export`.
    """
    if kind not in FORMATS:
        raise InputError(f"The format {kind!r} is unknown. Choose from {', '.join(FORMATS)}.")
    if options.any_size and kind not in ("onnx", "html"):
        raise InputError("Images of any size need the format onnx. Leave the option out.")
    if options.runtime and kind != "html":
        raise InputError("A runtime is for the format html. Leave the option out.")
    if detector.config.detector not in _EXPORTABLE:
        raise InputError(
            f"The detector {detector.config.detector} cannot be exported. Fit one of "
            f"{', '.join(_EXPORTABLE)}."
        )
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} is not a directory. Create it, or pass another file.")
    writer = {"onnx": _onnx, "html": _html, "stablehlo": _stablehlo, "litert": _litert}[kind]
    return writer(detector, file, options)


def _onnx(detector, file: pathlib.Path, options: Options) -> Parity:
    content, parity = _verified_model(detector, file, options)
    with replacing(file, "wb") as opened:
        opened.write(content)
    return parity


def _html(detector, file: pathlib.Path, options: Options) -> Parity:
    if detector.levels is not None:
        raise InputError(
            "Images of this detector have more than 8 bits, which browsers do not read. Export "
            "another format."
        )
    runtime = read_runtime(options.runtime)
    options = dataclasses.replace(options, any_size=True)
    model, parity = _verified_model(detector, file, options)
    fields, threshold = metadata(detector), detector.image_threshold
    about = {key: fields[key] for key in ("version", "detector", "backbone", "licence")}
    about |= {"name": file.stem, "parity": str(parity), "colour_range": detector.colour_range}
    about |= {"threshold": threshold and threshold.value, "rate": threshold and threshold.rate}
    write_text(file, page(model, runtime, about))
    return parity


def _verified_model(detector, file: pathlib.Path, options: Options) -> tuple[bytes, Parity]:
    """Content of an ONNX file, after its results were compared with those of the detector."""
    if options.any_size and detector.tiling is not None:
        raise InputError(
            "This detector scores tiles of images, which are cut outside of the model. Export an "
            "ONNX file without --resize=inside, which fastflow_jax.exported cuts images for."
        )
    if options.any_size and detector.resize != "square":
        raise InputError(
            f"Images of this detector are resized by {detector.resize!r}, which cannot be inside "
            "the model. Export an ONNX file without --resize=inside."
        )
    function = detector.as_function()
    model = to_onnx(function, {INPUT: _input_shape(detector)}, opset=options.opset)
    if options.any_size:
        limit = detector.pixel_threshold
        resize_inside(model, detector.image_size, limit and rounded_down(limit.value))
    fields = metadata(detector) | {"any_size": options.any_size, "opset": options.opset}
    with tempfile.TemporaryDirectory(prefix="fastflow_jax_") as folder:
        trial = pathlib.Path(folder, "trial.onnx")
        trial.write_bytes(_with_metadata(model, fields))
        parity = compare(detector, Exported(trial).run)
    parity.check(file)
    return _with_metadata(model, fields | {"parity": parity}), parity


def _with_metadata(model, fields: dict[str, Any]) -> bytes:
    import onnx

    onnx.helper.set_model_props(model, to_metadata(fields))
    return model.SerializeToString()


def _stablehlo(detector, file: pathlib.Path, options: Options) -> Parity:
    function = detector.as_function()
    whole = jax.jit(lambda images: function(images))
    written = jax.export.export(whole, platforms=_PLATFORMS)(_input_shape(detector))
    content = bytes(written.serialize())
    run = jax.jit(jax.export.deserialize(bytearray(content)).call)
    parity = compare(detector, lambda x: jax.tree.map(np.asarray, run(x)))
    parity.check(file)
    _write_with_description(file, content, metadata(detector) | {"platforms": _PLATFORMS}, parity)
    return parity


def _litert(detector, file: pathlib.Path, options: Options) -> Parity:
    shape = jax.ShapeDtypeStruct((1, *detector.image_size, 3), jnp.uint8)
    content = to_litert(detector.as_function(), shape)
    parity = compare(detector, load_litert(content))
    parity.check(file)
    _write_with_description(file, content, metadata(detector) | {"batch": 1}, parity)
    return parity


def _write_with_description(
    file: pathlib.Path, content: bytes, fields: dict[str, Any], parity: Parity
) -> None:
    """Writes a file that has no metadata, and `<file>.json` that describes it."""
    with replacing(file, "wb") as opened:
        opened.write(content)
    text = json.dumps(fields | {"parity": parity}, default=dataclasses.asdict, indent=2)
    write_text(file.with_name(file.name + ".json"), text + "\n")


def _input_shape(detector: Predictor) -> jax.ShapeDtypeStruct:
    (batch,) = jax.export.symbolic_shape("batch", constraints=["batch >= 1"])
    return jax.ShapeDtypeStruct((batch, *detector.image_size, 3), jnp.uint8)


def metadata(detector: Any) -> dict[str, Any]:
    """Fields that describe a detector in its exported file, see `exported.Exported`."""
    config, held_out = detector.config, detector.held_out
    weights = detector.backbone.weights
    height, width = detector.image_size
    colours = {"channels": "RGB", "type": "uint8", "layout": "NHWC", "range": [0, 255]}
    return {
        "format": exported.FORMAT,
        "version": fastflow_jax.__version__,
        "detector": config.detector,
        "backbone": config.backbone,
        "layers": list(config.layers),
        "weights": weights,
        "licence": licence(weights),
        "classes": ["normal", "anomalous"],
        "input": {
            **{"height": height, "width": width, "resize": detector.resize, **colours},
            "levels": detector.levels and detector.levels.plain,
        },
        "tiling": detector.tiling,
        "places": detector.places and detector.places.table.tolist(),
        "outputs": _OUTPUTS,
        "image_threshold": detector.image_threshold,
        "pixel_threshold": detector.pixel_threshold,
        "held_out": held_out and _plain_scores(held_out),
        "training_images": detector.training_images,
        "colour_range": detector.colour_range,
        "region": AUTO if detector.foreground else detector.roi and detector.roi.to_plain(),
        "precision": _PRECISION,
        "fingerprint": fingerprint(detector),
        "source": detector.folder and sha256_of_detector(detector.folder),
    }


def _plain_scores(held_out: HeldOut) -> dict[str, list | None]:
    """Scores, groups and kinds as JSON values."""
    arrays = {name: getattr(held_out, name) for name in ("scores", "groups", "kinds")}
    return {name: None if x is None else x.tolist() for name, x in arrays.items()}


_OUTPUTS = {
    "score": "float32 [batch], higher is more anomalous",
    "anomaly_map": "float32 [batch, height, width], higher is more anomalous",
    "p_value": "float32 [batch], share of normal images with such a score",
    "is_anomalous": "bool [batch], the score is above the image threshold",
    "mask": "bool [batch, height, width], the map is above the pixel threshold",
}
_PRECISION = (
    "Run in float32. On some CPUs OpenVINO computes in bfloat16 by default, which changes "
    "decisions: set INFERENCE_PRECISION_HINT to f32."
)


def fingerprint(detector: Any) -> str:
    """Hash of all arrays that the scores depend on, and of the decisions."""
    digest = hashlib.sha256(detector.config.to_json_best_effort().encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        (detector.backbone.variables, detector.scorer.arrays(), *_region(detector))
    ):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    limits = detector.image_threshold, detector.pixel_threshold
    digest.update(repr([limit and limit.value for limit in limits]).encode())
    return digest.hexdigest()


def _region(detector: Any) -> list[Any]:
    """The arrays of the region of interest; empty without one."""
    if detector.roi is not None:
        return [detector.roi.mask]
    return [] if detector.foreground is None else [detector.foreground.state_dict()]


def compare(detector: Any, run: Callable[[np.ndarray], dict[str, np.ndarray]]) -> Parity:
    """Compares an exported function with `Detector.run` on held-out and random images.

    Args:
      detector: the detector.
      run: images uint8 [B, H, W, 3] -> outputs by name.
    """
    held_out, shape = _held_out_inputs(detector), (_RANDOM, *detector.image_size, 3)
    images = np.concatenate([held_out, np.random.default_rng(0).integers(0, 256, shape, np.uint8)])
    expected, found = detector.run(images, None), run(images)
    expected |= detector.decision(expected["score"], expected["anomaly_map"])
    score, maps, sure = expected["score"], expected["anomaly_map"], expected.get("region")
    map_size, found_maps = np.maximum(1, np.abs(maps).max((1, 2))), found["anomaly_map"]
    if sure is not None:
        # The edge of a foreground depends on rounding. So does the lowest value inside.
        inside = np.stack([scipy.ndimage.binary_erosion(each, np.ones((3, 3))) for each in sure])
        maps, found_maps = np.where(inside, maps, 0), np.where(inside, found_maps, 0)
    # A single held-out image scores 0, since it is calibrated on itself.
    held = np.zeros(0) if detector.held_out is None else detector.held_out.scores
    usual = float(np.abs(held).max(initial=0)) or float(len(held) > 0)
    score_size = np.maximum(usual, np.abs(score))
    flips, p_value = 0, None
    if "is_anomalous" in expected:
        level = detector.image_threshold.value
        is_clear = np.abs(score - level) > _SCORE * max(usual, abs(level))
        flips = int((is_clear & (found["is_anomalous"] != expected["is_anomalous"])).sum())
    if "p_value" in expected:
        p_value = float(np.abs(found["p_value"] - expected["p_value"]).max())
    return Parity(
        held_out=len(held_out),
        random=_RANDOM,
        score=float((np.abs(found["score"] - score) / score_size).max()),
        anomaly_map=float((np.abs(found_maps - maps).max((1, 2)) / map_size).max()),
        p_value=p_value,
        flips=flips,
    )


def _held_out_inputs(detector: Any) -> np.ndarray:
    """Model inputs of some held-out images, or of a tile of each in the middle of the image.

    None if the images are not available any more.
    """
    none = np.zeros((0, *detector.image_size, 3), np.uint8)
    c = detector.config.data
    if c.name == "folder" and c.root is None and c.manifest is None:
        return none  # it was fitted on arrays or paths
    try:
        parts = split(detector.config, data.open_dataset(detector.config.data))
        images = [parts.held_out_source[int(i)].image for i in parts.held_out[:_HELD_OUT]]
    except (InputError, OSError):
        return none
    parts = [list(given.parts) for _, given in detector.inputs(images)]
    return np.concatenate([none, *(each[len(each) // 2].image[None] for each in parts)])
