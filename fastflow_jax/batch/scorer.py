"""Scores of a batch of images as a table, for any engine."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from fastflow_jax.batch import Options
from fastflow_jax.batch.items import Item
from fastflow_jax.errors import InputError
from fastflow_jax.exported import Exported
from fastflow_jax.files import expanded
from fastflow_jax.predict import with_rate
from fastflow_jax.prediction import MAP_FORMS, Prediction, Predictor, encode_map

# A row per image, or per page of a file. Fields without a value are null.
SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # of the image file, or the name of its content
        ("page", pa.int32()),  # from 1, in a file of several pages
        ("pages", pa.int32()),  # number of rows of this file
        ("score", pa.float64()),  # higher is more anomalous
        ("p_value", pa.float64()),  # see `Prediction.p_value`
        ("is_anomalous", pa.bool_()),  # the score is above the threshold
        ("threshold", pa.float64()),
        ("anomalous_part", pa.float64()),  # share of pixels above the pixel threshold
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("anomaly_map", pa.binary()),  # content of a .npy or PNG file, see `encode_map`
        ("map_zero", pa.float64()),  # value of 0 in a map as PNG
        ("map_full", pa.float64()),  # value of 65535 in a map as PNG
        ("error", pa.string()),
        ("fingerprint", pa.string()),  # of the detector
        ("bytes", pa.int64()),  # size of the file with the image
        ("modified_ns", pa.int64()),  # its modification time in ns since 1970
    ]
)


class Scorer:
    """A detector that scores batches of images; each worker process has one.

    Attributes:
      detector: the detector, with the threshold of `Options.rate`.
      fingerprint: hash of everything that scores and decisions of the detector depend on.
      options: how images are scored.
    """

    def __init__(self, model: str | os.PathLike, options: Options | None = None):
        """Loads a detector.

        Args:
          model: an exported detector (`.onnx`), or a directory or `.zip` file for `Detector.load`.
          options: how images are scored; by default as `Options()`.

        Raises:
          InputError: the detector cannot be loaded, or an option is invalid.
        """
        self.options = Options() if options is None else options
        if self.options.maps not in (None, *MAP_FORMS):
            raise InputError(
                f"Maps of the form {self.options.maps!r} are unknown. Choose from "
                f"{', '.join(MAP_FORMS)}."
            )
        detector, self.fingerprint = _load(model, self.options)
        if detector.needs_masks:
            raise InputError(
                "The detector was trained with a mask per image (config.data.roi_dir), which are "
                "not passed here. Use `fastflow-jax predict --roi=MASKS`, or fit with one mask of "
                "all images, config.data.roi=FILE."
            )
        self.detector = with_rate(detector, self.options.rate)
        self._reader = self.detector

    def __call__(self, items: Sequence[Item]) -> pa.Table:
        """Scores images with different paths; returns rows of `SCHEMA` in their order.

        An image that cannot be read has a row with an error. Differences from the training images
        are logged for the first batch only.

        Args:
          items: images to score.
        """
        known = [item.size_and_time() for item in items]
        index = {item.path: i for i, item in enumerate(items)}
        rows: list[list[dict[str, Any]]] = [[] for _ in items]

        def report(name: str, error: InputError) -> None:
            rows[index[name]].append({"error": str(error)})

        images = (item.given() for item in items)
        for prediction in self._reader.stream(images, tile=self.options.tile, on_error=report):
            path, page = prediction.name, None
            if path not in index:
                path, _, number = path.rpartition("#")
                page = int(number)
            rows[index[path]].append({"page": page, **self._row(prediction)})
        self._reader = _without_profile(self.detector)
        table = []
        for item, (size, time), found in zip(items, known, rows, strict=True):
            same = {"path": item.path, "pages": len(found), "fingerprint": self.fingerprint}
            same |= {"bytes": size, "modified_ns": time}
            table += [same | row for row in found]
        return pa.Table.from_pylist([_as_text(row) for row in table], SCHEMA)

    def _row(self, prediction: Prediction) -> dict[str, Any]:
        height, width = prediction.anomaly_map.shape
        threshold = self.detector.image_threshold
        row = {
            "score": prediction.score,
            "p_value": prediction.p_value,
            "is_anomalous": prediction.is_anomalous,
            "threshold": threshold and threshold.value,
            "anomalous_part": prediction.anomalous_part,
            "height": height,
            "width": width,
        }
        if self.options.maps:
            content, zero, full = encode_map(prediction.anomaly_map, self.options.maps)
            row |= {"anomaly_map": content, "map_zero": zero, "map_full": full}
        return row


def as_text(path: str) -> str:
    """A path as valid UTF-8; other bytes are escaped.

    Args:
      path: a path as the operating system returns it.
    """
    return path.encode("utf-8", "backslashreplace").decode()


def _as_text(row: dict[str, Any]) -> dict[str, Any]:
    return {key: as_text(value) if isinstance(value, str) else value for key, value in row.items()}


def _load(model: str | os.PathLike, options: Options) -> tuple[Predictor, str]:
    """Loads a detector; returns it and its fingerprint."""
    path = expanded(model)
    if path.is_dir() or path.suffix == ".zip":
        from fastflow_jax.detector import Detector
        from fastflow_jax.export.detector import fingerprint

        detector = Detector.load(path)
        return detector, fingerprint(detector)
    exported = Exported(path, threads=options.threads, providers=options.providers)
    return exported, exported.metadata["fingerprint"]


def _without_profile(detector: Predictor) -> Predictor:
    """A copy that does not compare images with the training images."""
    if not isinstance(detector, Exported):
        return dataclasses.replace(detector, training_images=None)  # pyright: ignore
    other = copy.copy(detector)
    other.training_images = None
    return other
