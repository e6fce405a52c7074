"""A run folder's detector on files: a line an image, heat maps, raw maps."""

import csv
import dataclasses
import glob
import json
import os
import pathlib
import sys
import warnings

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastflow_jax import thresholds
from fastflow_jax.data.given import read_image
from fastflow_jax.data.layout import images_below
from fastflow_jax.detector import Detector, Prediction
from fastflow_jax.errors import InputError
from fastflow_jax.paths import expanded, make_folder
from fastflow_jax.report.heatmaps import OF_THE_NAME, draw_heatmap, save_picture

RAW = ("npy", "png16")


@dataclasses.dataclass
class Line:
    """What is told of one image; None where there is nothing to tell."""

    path: str
    score: float | None = None  # higher is more anomalous
    p_value: float | None = None  # how often a normal image scores so high
    is_anomalous: bool | None = None  # the score is above the threshold
    threshold: float | None = None
    log_likelihood: float | None = None  # of what the flows see, in nats per dimension
    anomalous_part: float | None = None  # of its pixels, by the pixel threshold
    pixel_threshold: float | None = None
    height: int | None = None
    width: int | None = None
    heatmap: str | None = None  # files, by their path in the output folder
    raw_map: str | None = None
    raw_zero: float | None = None  # of a PNG: what 0 stands for,
    raw_full: float | None = None  # and 65535
    error: str | None = None


def predict(
    workdir: str | os.PathLike,
    images: str,
    output: str | os.PathLike,
    *,
    weights: str | os.PathLike | None = None,
    rate: float | None = None,
    tile: bool = False,
    heatmaps: bool = True,
    raw: str | None = None,
) -> int:
    """Look at images with the detector of a training, and write what it makes of them.

    Args:
      workdir: see `Detector.load`.
      images: a file, a folder, of which all images in it and below are meant, or a glob pattern.
      output: gets `predictions.csv` and `predictions.jsonl`, in the order in which images are
        done, and, by the names of the images, `heatmaps/` and `maps/`.
      weights: see `Detector.load`.
      rate: of false alarms, see `Detector.with_threshold`; None: as the detector has it.
      tile: see `Detector.predict`.
      heatmaps: draw pictures.
      raw: one of `RAW`: anomaly maps, of the size of their image, as float32 or, from its lowest
        value to its highest, in 16 bits; None: not at all.

    Returns:
      The exit status: 0 where all images are normal, 1 where some are anomalous, 3 where some could
      not be read or their pictures not be written, 4 where the detector has no threshold, so that
      nothing is decided.

    Raises:
      InputError: nothing could be done.
    """
    output = expanded(output)
    names = find_images(images, besides=output)
    detector = Detector.load(workdir, weights=weights)
    if rate is not None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            detector = detector.with_threshold(rate=rate)
        for warning in said:
            _say(f"warning: {warning.message}")
    elif detector.image_threshold is None:
        _say("warning: no images were held out in training: there are scores, and no decisions")
    make_folder(output)

    anomalous = unwritten = 0
    broken: list[Line] = []
    fields = [field.name for field in dataclasses.fields(Line)]
    bar = tqdm(total=len(names), desc="predict", unit="img", dynamic_ncols=True)
    with (
        # A file's name may be no text: its bytes are written as they are.
        (output / "predictions.csv").open(
            "w", newline="", encoding="utf-8", errors="surrogateescape"
        ) as table,
        (output / "predictions.jsonl").open("w") as lines,
        bar,
    ):
        rows = csv.DictWriter(table, fields)
        rows.writeheader()

        def write(line: Line) -> None:
            plain = dataclasses.asdict(line)
            lines.write(json.dumps(plain) + "\n")
            said = {True: "true", False: "false", None: None}
            rows.writerow(plain | {"is_anomalous": said[line.is_anomalous]})
            for file in (lines, table):
                file.flush()
            bar.update()

        def report(path: str, error: InputError) -> None:
            broken.append(Line(path, error=str(error)))
            _say(f"skipped: {error}")
            write(broken[-1])

        for prediction in detector.stream(names, tile=tile, on_error=report):
            line = _line(detector, prediction)
            name = names[prediction.name]
            try:
                if heatmaps:
                    _write_heatmap(output, name, detector, prediction, line)
                if raw:
                    _write_raw(output, raw, name, prediction.anomaly_map, line)
            except (OSError, InputError) as error:
                if isinstance(error, OSError) and error.errno not in OF_THE_NAME:
                    raise
                line.error = f"{prediction.name}: its picture or map cannot be written: {error}"
                _say(line.error)
            anomalous += bool(line.is_anomalous)
            unwritten += line.error is not None
            write(line)
    done = len(names) - len(broken)
    decides = detector.image_threshold is not None
    found = f"{anomalous} of {done} images are" if decides else f"none of {done} images is called"
    print(f"{found} anomalous, {len(broken)} unreadable: {output}")
    if broken or unwritten:
        return 3
    return int(anomalous > 0) if decides else 4


def draw_prediction(
    detector: Detector, prediction: Prediction, name: str | None = None
) -> Image.Image:
    """Heat map of an image in a file, with its score and decision; all have the same colours.

    Args:
      detector: that looked at it.
      prediction: what it made of it.
      name: that the picture is titled with; None: the file's.
    """
    low, high = _colours(detector) or (prediction.anomaly_map.min(), prediction.anomaly_map.max())
    file = pathlib.Path(prediction.name)
    title = f"{name or file.name}  score {prediction.score:.3f}"
    if prediction.p_value is not None:
        title += f"  p {prediction.p_value:.3f}"
    if prediction.is_anomalous is not None:
        title += "  anomalous" if prediction.is_anomalous else "  normal"
    return draw_heatmap(
        read_image(file),
        prediction.anomaly_map,
        low=low,
        high=high,
        threshold=detector.pixel_threshold and detector.pixel_threshold.value,
        title=title,
    )


def find_images(pattern: str, *, besides: pathlib.Path) -> dict[str, str]:
    """The files that a file name, a folder or a glob pattern means, sorted.

    Args:
      pattern: as it was typed.
      besides: the folder of results, whose pictures do not count.

    Returns:
      Path -> a name that tells it from the others, its path below the folder that all lie in.

    Raises:
      InputError: there are none.
    """
    whole = expanded(pattern)
    found = [whole] if whole.exists() else _matches(whole)
    paths: list[pathlib.Path] = []
    for path in found:
        paths += images_below(path) if path.is_dir() else [path]
    results = {(besides / name).resolve() for name in ("heatmaps", "maps")}
    paths = [path for path in paths if not results & set(path.resolve().parents)]
    if not paths:
        raise InputError(
            f"--input={pattern} is no file, no folder and no pattern that finds any, apart from "
            f"what predict wrote to {besides}"
        )
    root = whole if whole.is_dir() else os.path.commonpath([path.parent for path in paths])
    return {str(path): path.relative_to(root).as_posix() for path in dict.fromkeys(paths)}


def _matches(pattern: pathlib.Path) -> list[pathlib.Path]:
    """The sorted matches of a glob pattern; brackets in a folder that exists are no pattern."""
    root = next(str(parent) for parent in pattern.parents if os.path.exists(parent))
    escaped = os.path.join(glob.escape(root), pattern.relative_to(root))
    return sorted(map(pathlib.Path, glob.glob(escaped, recursive=True)))


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def _line(detector: Detector, prediction: Prediction) -> Line:
    mask, height_width = prediction.mask, prediction.anomaly_map.shape
    return Line(
        prediction.name,
        prediction.score,
        prediction.p_value,
        prediction.is_anomalous,
        detector.image_threshold and detector.image_threshold.value,
        prediction.log_likelihood,
        None if mask is None else float(mask.mean()),
        detector.pixel_threshold and detector.pixel_threshold.value,
        *height_width,
    )


def _colours(detector: Detector) -> tuple[float, float] | None:
    """From the typical pixel of normal images to twice as far as they reach, but for outliers."""
    if detector.held_out is None:
        return None
    typical = detector.held_out.tails.mean(0)  # falls with what is exceeded
    low, high = (float(np.interp(-part, -thresholds.EXCEEDANCES, typical)) for part in (0.5, 0.001))
    return low, high + (high - low)


def _write_heatmap(
    output: pathlib.Path, name: str, detector: Detector, prediction: Prediction, line: Line
) -> None:
    """Write a heat map, and then to the line where it is."""
    file = f"heatmaps/{name}.png"
    save_picture(output / file, draw_prediction(detector, prediction, name))
    line.heatmap = file


def _write_raw(
    output: pathlib.Path, raw: str, name: str, anomaly_map: np.ndarray, line: Line
) -> None:
    """Write a map, and then to the line where it is and what its numbers mean."""
    file = f"maps/{name}.{raw.removesuffix('16')}"
    (output / file).parent.mkdir(parents=True, exist_ok=True)
    if raw == "npy":
        np.save(output / file, anomaly_map)
    else:
        low, high = float(anomaly_map.min()), float(anomaly_map.max())
        part = (anomaly_map - low) / (high - low if high > low else 1)
        save_picture(output / file, Image.fromarray(np.round(65535 * part).astype(np.uint16)))
        line.raw_zero, line.raw_full = low, high
    line.raw_map = file
