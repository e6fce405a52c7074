"""Exported detectors: an ONNX file scores images without JAX.

    from fastflow_jax.exported import Exported
    detector = Exported("screws.onnx")
    result = detector.predict("new.jpg")

This module needs numpy, Pillow and onnxruntime only. `Detector.export` writes the files.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastflow_jax.data.levels import Levels
from fastflow_jax.data.pipeline import n_threads
from fastflow_jax.data.profile import Profile
from fastflow_jax.data.roi import AUTO, CommonRegion
from fastflow_jax.data.tiling import Places, Tiling
from fastflow_jax.data.transforms import RESIZES
from fastflow_jax.decision import Decision, Threshold
from fastflow_jax.errors import InputError, reason
from fastflow_jax.files import expanded
from fastflow_jax.prediction import Predictor

FORMAT = 1  # of the metadata
INPUT, OUTPUTS = "images", ("score", "anomaly_map", "p_value", "is_anomalous", "mask")


class Exported(Predictor):
    """A detector in an ONNX file.

    Its predictions are those of the `Detector` that was exported, without `log_likelihood` and
    `distance`. Objects can be pickled; the file is then read again.

    Attributes:
      metadata: the metadata of the file: "version" of the package, "detector", "backbone",
        "weights" with their "licence", "input", thresholds, "fingerprint", and "parity", the
        differences from the original detector that were measured when the file was written.
      image_size: (height, width) of model inputs.
      resize: how images become inputs, see `config.data.resize`.
      tiling: how images are cut into tiles; None if they are not.
      places: statistics of the tiles, with `config.data.aligned`; None without it.
      levels: levels of images of more than 8 bits; None for their high byte.
      decision: thresholds and scores of held-out images.
      training_images: formats, sizes and colours of the training images; None if unknown.
      roi: region of interest of all images; None if there is none, or if the model finds it.
      region_inside: whether the model itself leaves out what is outside of the region of interest.
    """

    def __init__(
        self,
        file: str | os.PathLike,
        *,
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ):
        """Reads a file of `Detector.export`.

        Args:
          file: the ONNX file.
          threads: threads of one prediction; by default $NPROC, or one per core.
          providers: execution providers of ONNX Runtime, in the order of preference.

        Raises:
          InputError: onnxruntime is not installed; or the file does not exist, is damaged, was not
            written by `Detector.export`, or was written by a later version.
        """
        self.file, self.threads, self.providers = expanded(file), threads, tuple(providers)
        self._session = _session(self.file, threads, self.providers)
        self.metadata = _metadata(self.file, self._session)
        given = self.metadata["input"]
        self.image_size: tuple[int, int] = (given["height"], given["width"])
        self.resize: str = given["resize"]
        self.tiling: Tiling | None = self.metadata.pop("tiling")
        self.places: Places | None = self.metadata.pop("places")
        self.levels: Levels | None = self.metadata.pop("levels")
        self.decision: Decision = self.metadata.pop("decision")
        self.training_images: Profile | None = self.metadata.pop("training_images")
        self.roi: CommonRegion | None = self.metadata.pop("roi")
        self.region_inside: bool = self.metadata["region"] is not None
        # On a CPU larger batches are not faster, and need more memory.
        self.batch_size = 8 if self.providers == ("CPUExecutionProvider",) else 32
        self._outputs = [output.name for output in self._session.get_outputs()]

    @property
    def name(self) -> str:
        """Name of the file without its suffix."""
        return self.file.stem

    @property
    def colour_range(self) -> tuple[float, float] | None:
        """See `Predictor.colour_range`."""
        colours = self.metadata["colour_range"]
        return None if colours is None else (colours[0], colours[1])

    def with_threshold(self, *, rate: float) -> "Exported":
        """Returns a copy with the threshold of a false-alarm rate, see `Detector.with_threshold`.

        This needs scipy and scikit-learn. The outputs of `run` keep the threshold of the file.

        Args:
          rate: false-alarm rate: the expected share of normal images above the threshold.
        """
        from fastflow_jax.evaluation.thresholds import image_threshold

        known = self.decision
        scores = np.zeros(0) if known.held_out is None else known.held_out
        threshold = image_threshold(scores, rate, groups=known.groups, kinds=known.kinds)
        other = copy.copy(self)
        other.decision = dataclasses.replace(known, image_threshold=threshold)
        return other

    def run(self, images: np.ndarray, valid: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Scores model inputs by the model in the file, see `Predictor.run`.

        Args:
          images: uint8 [B, H, W, 3] in RGB, of `image_size`.
          valid: has no effect: exported detectors have no padding, and a region of interest is part
            of the model.

        Returns:
          The outputs of the file: "score" [B] and "anomaly_map" [B, H, W], float32; "p_value"
          float32 [B], "is_anomalous" bool [B] and "mask" bool [B, H, W] if the detector has them.
        """
        del valid
        try:
            found = self._session.run(self._outputs, {INPUT: images})
        except Exception as error:  # as in `_session`
            raise InputError(
                f"{self.file} cannot score images ({reason(error)}). Export the detector again."
            ) from error
        return dict(zip(self._outputs, found, strict=True))

    def __reduce__(self):
        changed = {"decision": self.decision}
        return _again, (self.file, self.threads, self.providers), changed


def _again(file, threads, providers) -> Exported:
    return Exported(file, threads=threads, providers=providers)


def _session(file, threads: int | None, providers: Sequence[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError(
            "onnxruntime is not installed. Install it: pip install 'fastflow-jax[onnx]'."
        ) from error
    if not file.is_file():
        raise InputError(f"{file} was not found. Pass a file of `fastflow-jax export`.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or n_threads()
    options.log_severity_level = 3  # errors are raised as well
    # Waiting threads would use half of the time of all cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:  # of several classes without a common base
        raise InputError(
            f"{file} cannot be loaded ({reason(error)}). Export the detector again."
        ) from error


def _metadata(file, session: Any) -> dict[str, Any]:
    """Metadata of a file; InputError if they are not those of an exported detector."""
    try:
        given = session.get_modelmeta().custom_metadata_map
        if "format" not in given or "input" not in given:
            raise InputError(
                f"{file} is not an exported detector. Pass a file of `fastflow-jax export`."
            )
        found = {key: json.loads(value) for key, value in given.items()}
        if found["format"] == FORMAT:
            _check_signature(session, found)
            return found | _parsed(found)
    except InputError:
        raise
    except Exception as error:  # damaged metadata may cause any
        raise InputError(
            f"The metadata of {file} are damaged ({reason(error)}). Export the detector again."
        ) from error
    raise InputError(
        f"{file} was written by another version of this package ({found.get('version')}), in "
        "another format. Install that version, or export the detector again."
    )


def _check_signature(session: Any, found: dict[str, Any]) -> None:
    """Raises ValueError if a model has not the input and the outputs of an exported detector."""
    sizes, (images,) = [found["input"]["height"], found["input"]["width"], 3], session.get_inputs()
    expected = ["height", "width", 3] if found.get("any_size") else sizes
    if not all(type(size) is int for size in sizes) or list(images.shape[1:]) != expected:
        raise ValueError(f"images of {sizes} for a model of {images.shape[1:]}")
    if (images.name, images.type) != (INPUT, "tensor(uint8)"):
        raise ValueError(f"an input {images.name} of {images.type}")
    names = [output.name for output in session.get_outputs()]
    if not set(OUTPUTS[:2]) <= set(names) <= set(OUTPUTS):
        raise ValueError(f"outputs {', '.join(names)}")


def _parsed(found: dict[str, Any]) -> dict[str, Any]:
    """The fields of the metadata that are objects."""
    profile, given = found["training_images"], found["input"]
    # Missing in files of older versions
    tiling, places = found.get("tiling"), found.get("places")
    if given["resize"] not in RESIZES or not min(given["height"], given["width"]) > 0:
        raise ValueError("an input of an unknown kind")
    return {
        "decision": Decision(
            _threshold(found["image_threshold"]),
            _threshold(found["pixel_threshold"]),
            **_held_out(found["held_out"] or {}),
        ),
        "tiling": None if tiling is None else Tiling(tuple(tiling["side"]), tiling["resolution"]),
        "places": None if places is None else Places(np.array(places).reshape(-1, 6)),
        "levels": Levels.from_plain(given.get("levels")),  # files of earlier versions have none
        "training_images": None if profile is None else Profile.from_plain(profile),
        "colour_range": found["colour_range"],
        "region": found.get("region"),  # files of earlier versions have none
        **_region(found.get("region")),
    }


def _held_out(plain: dict[str, Any]) -> dict[str, np.ndarray]:
    """Scores of held-out images, and their groups and kinds if there are some, as arrays [n]."""
    scores = np.asarray(plain.get("scores") or (), np.float32)
    if scores.ndim != 1 or not len(scores):
        return {}
    found = {"held_out": scores}
    for name in ("groups", "kinds"):
        if plain.get(name) is not None:
            found[name] = np.asarray(plain[name])
            if found[name].shape != scores.shape or found[name].dtype.kind not in "iu":
                raise ValueError(f"{name} of held-out images that do not fit their scores")
    return found


def _region(plain: Any) -> dict[str, Any]:
    """The region of interest; None if there is none, or if the model finds it."""
    return {"roi": None if plain in (None, AUTO) else CommonRegion.from_plain(plain)}


def _threshold(plain: dict | None) -> Threshold | None:
    if plain is None:
        return None
    interval = plain["interval"] and tuple(plain["interval"])
    return Threshold(**plain | {"interval": interval, "value": float(plain["value"])})


def to_metadata(fields: dict[str, Any]) -> dict[str, str]:
    """Metadata of a file from their values; dataclasses become dictionaries."""
    return {key: json.dumps(value, default=dataclasses.asdict) for key, value in fields.items()}
