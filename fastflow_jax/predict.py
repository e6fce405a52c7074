"""Scores image files with a run's detector: one line per image, heat maps, raw maps."""

import contextlib
import csv
import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import sys
import warnings
from collections import Counter
from typing import IO

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastflow_jax.data import formats, layout
from fastflow_jax.data.arrays import read_image
from fastflow_jax.detector import Detector, Prediction
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import thresholds
from fastflow_jax.files import (
    expanded,
    make_folder,
    read_json,
    read_lines,
    replacing,
    write_json,
)
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
    heatmap: str | None = None  # files, by their path in the output directory
    raw_map: str | None = None
    raw_zero: float | None = None  # of a PNG: the value that 0 stands for,
    raw_full: float | None = None  # and 65535
    error: str | None = None
    bytes: int | None = None  # size of the image's file
    modified_ns: int | None = None  # when it was last written to, since 1970


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
    """Score images with the detector of a run, and write the results.

    An interrupted call continues: lines of the same files, detector and options are kept.

    Args:
      workdir: see `Detector.load`.
      images: a file, a directory, of which all images in it and below are scored, or a glob
        pattern.
      output: gets `predictions.csv` and `predictions.jsonl`, one line per image or page, in the
        order in which they are scored, `predictions.json` with the options, and, by the names of
        the images, `heatmaps/` and `maps/`.
      weights: see `Detector.load`.
      rate: false-alarm rate, see `Detector.with_threshold`; None: the detector's own threshold.
      tile: see `Detector.predict`.
      heatmaps: draw heat maps.
      raw: one of `RAW`: anomaly maps, of the size of their image, as float32 or, from its lowest
        value to its highest, in 16 bits; None: no maps.

    Returns:
      The exit status: 0 if all images are normal, 1 if some are anomalous, 3 if some could not be
      read or their heat maps not be written, 4 if the detector has no threshold, so that nothing is
      decided.

    Raises:
      InputError: nothing could be done.
    """
    output = expanded(output)
    found = find_images(images)
    detector = _with_rate(Detector.load(workdir, weights=weights), rate)
    make_folder(output)
    _report_others(found.others)
    settings = {
        "detector": _fingerprint(detector),
        "options": {"rate": rate, "tile": tile, "heatmaps": heatmaps, "raw": raw},
    }
    kept = _lines_to_keep(output, settings, found.names)
    done = {line.path for line in kept}
    if done:
        _say(f"{len(done)} images were scored before by the same command: continuing")
    todo = [path for path in found.names if path not in done]
    before = {path: _size_and_time(path) for path in todo}
    counts = Counter(_outcome(line) for line in kept)
    bar = tqdm(
        total=len(found.names),
        initial=len(done),
        desc="predict",
        unit="img",
        dynamic_ncols=True,
        smoothing=0,
    )
    with _Output(output, settings, kept) as lines, bar:

        def write(line: Line) -> None:
            counts[_outcome(line)] += 1
            lines.write(line)
            bar.total += line.path not in found.names and not line.path.endswith("#1")  # a page
            bar.update()

        def report(path: str, error: InputError) -> None:
            _say(f"skipped: {error}")
            write(Line(path, error=str(error)))

        for prediction in detector.stream(todo, tile=tile, on_error=report):
            path = found.path(prediction.name)
            line = _line(detector, prediction, before[path])
            name = found.relative(prediction.name)
            try:
                if heatmaps:
                    _write_heatmap(output, name, detector, prediction, line)
                if raw:
                    _write_raw(output, raw, name, prediction.anomaly_map, line)
            except (OSError, InputError) as error:
                if isinstance(error, OSError) and error.errno not in OF_THE_NAME:
                    raise
                line.error = f"{prediction.name}: its heat map or map cannot be written: {error}"
            if _size_and_time(path) != before[path]:
                line.error = f"{prediction.name}: the file changed while it was scored"
            if line.error is not None:
                _say(line.error)
            write(line)
    return _summarise(counts, found.others, output, detector.image_threshold is not None)


def _with_rate(detector: Detector, rate: float | None) -> Detector:
    if rate is None:
        if detector.image_threshold is None:
            _say("warning: no images were held out in training: there are scores, and no decisions")
        return detector
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector = detector.with_threshold(rate=rate)
    for warning in caught:
        _say(f"warning: {warning.message}")
    return detector


def _report_others(others: list[pathlib.Path]) -> None:
    if others:
        shown = ", ".join(path.name for path in others[:3])
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        _say(f"not images, and not scored: {shown}{more}")


def _outcome(line: Line) -> str:
    """What a line counts as."""
    if line.score is None:
        return "unreadable"
    if line.error is not None:
        return "anomalous, unwritten" if line.is_anomalous else "normal, unwritten"
    return "anomalous" if line.is_anomalous else "normal"


def _summarise(counts: Counter, others: list, output: pathlib.Path, decides: bool) -> int:
    """Print what was found; returns the exit status."""
    unreadable = counts["unreadable"]
    scored = counts.total() - unreadable
    anomalous = counts["anomalous"] + counts["anomalous, unwritten"]
    found = (
        f"{anomalous} of {scored} images are" if decides else f"none of {scored} images is called"
    )
    skipped = f", {len(others)} other files" if others else ""
    with contextlib.suppress(BrokenPipeError):  # nobody reads it; the status says the same
        print(f"{found} anomalous, {unreadable} unreadable{skipped}: {output}", flush=True)
    if unreadable or counts["anomalous, unwritten"] or counts["normal, unwritten"]:
        return 3
    return int(anomalous > 0) if decides else 4


class _Output:
    """The files of lines, written as they come; use it as a context manager."""

    def __init__(self, output: pathlib.Path, settings: dict, kept: list[Line]):
        write_json(output / _SETTINGS, settings)
        # The files of before stay until those with the lines that are kept are whole.
        with replacing(output / _JSONL, "w", **_TEXT) as jsonl:
            for line in kept:
                _write_json_line(jsonl, line)
        with replacing(output / _CSV, "w", **_TEXT) as table:
            csv.DictWriter(table, _FIELDS).writeheader()
            for line in kept:
                _write_row(table, line)
        self._jsonl, self._csv = ((output / name).open("a", **_TEXT) for name in (_JSONL, _CSV))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._jsonl.close()
        self._csv.close()

    def write(self, line: Line) -> None:
        _write_row(self._csv, line)
        _write_json_line(self._jsonl, line)
        self._csv.flush()
        self._jsonl.flush()


_SETTINGS, _JSONL, _CSV = "predictions.json", "predictions.jsonl", "predictions.csv"
_FIELDS = [field.name for field in dataclasses.fields(Line)]
# A file's name may be no text: its bytes are written as they are.
_TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


def _write_json_line(file: IO[str], line: Line) -> None:
    file.write(json.dumps(dataclasses.asdict(line)) + "\n")


def _write_row(file: IO[str], line: Line) -> None:
    words = {True: "true", False: "false", None: None}
    plain = dataclasses.asdict(line) | {"is_anomalous": words[line.is_anomalous]}
    csv.DictWriter(file, _FIELDS).writerow(plain)


def _fingerprint(detector: Detector) -> str:
    """Hash of the description of a detector, with its thresholds."""
    return hashlib.sha256((detector.folder / "detector.json").read_bytes()).hexdigest()


def _lines_to_keep(output: pathlib.Path, settings: dict, names: dict[str, str]) -> list[Line]:
    """The lines that an interrupted call with the same settings wrote of the same files.

    Lines with errors are left out, and so are those of pages, whose file is scored again.
    """
    if not (output / _SETTINGS).exists() or read_json(output / _SETTINGS) != settings:
        return []
    lines = [Line(**plain) for plain in read_lines(output / _JSONL) if [*plain] == _FIELDS]
    return [
        line
        for line in {line.path: line for line in lines}.values()
        if line.error is None
        and line.path in names
        and (line.bytes, line.modified_ns) == _size_and_time(line.path)
        and all((output / file).exists() for file in (line.heatmap, line.raw_map) if file)
    ]


def _size_and_time(path: str) -> tuple[int, int] | tuple[None, None]:
    try:
        stat = os.stat(path)
    except OSError:
        return None, None
    return stat.st_size, stat.st_mtime_ns


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
    title = f"{name or pathlib.Path(prediction.name).name}  score {prediction.score:.3f}"
    if prediction.p_value is not None:
        title += f"  p {prediction.p_value:.3f}"
    if prediction.is_anomalous is not None:
        title += "  anomalous" if prediction.is_anomalous else "  normal"
    return draw_heatmap(
        read_image(prediction.name),
        prediction.anomaly_map,
        low=low,
        high=high,
        threshold=detector.pixel_threshold and detector.pixel_threshold.value,
        title=title,
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """The files that `--input` means."""

    names: dict[str, str]  # path -> path below the directory that all are in, sorted
    others: list[pathlib.Path]  # that are no images, see `data.formats.is_image`

    def path(self, name: str) -> str:
        """The file of a prediction, which may be of one of its pages."""
        return name if name in self.names else name.rpartition("#")[0]

    def relative(self, name: str) -> str:
        """The name of a prediction below that directory; of a page, with its number."""
        path = self.path(name)
        return self.names[path] + name.removeprefix(path)


def find_images(pattern: str) -> Found:
    """The files that a file name, a directory or a glob pattern means.

    Results of earlier predictions and run directories are left out unless they are named.

    Raises:
      InputError: there are no images.
    """
    whole = expanded(pattern)
    images, others = [], []
    if whole.is_file() or (whole.is_symlink() and not whole.exists()):
        images = [whole]
    else:
        matches = [whole] if whole.is_dir() else _matches(whole)
        for path in matches:
            if path.is_dir():
                below = layout.find_images(path)
                images += below.images
                others += below.others
            else:
                (images if formats.is_image(path) else others).append(path)
    if not images:
        raise InputError(
            f"--input={pattern} is no file, and no directory or pattern with images. Give one of "
            "these, a pattern in quotes."
        )
    root = whole if whole.is_dir() else os.path.commonpath([path.parent for path in images])
    names = {str(path): path.relative_to(root).as_posix() for path in images}
    return Found(names, list(dict.fromkeys(others)))


def _matches(pattern: pathlib.Path) -> list[pathlib.Path]:
    """The sorted matches of a glob pattern; brackets in a folder that exists are no pattern."""
    root = next(parent for parent in pattern.parents if os.path.exists(parent))
    escaped = os.path.join(glob.escape(str(root)), pattern.relative_to(root))
    found = map(pathlib.Path, sorted(glob.glob(escaped, recursive=True)))
    return [path for path in found if not layout.is_left_out(path, root)]


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def _line(detector: Detector, prediction: Prediction, file: tuple[int, int]) -> Line:
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
        bytes=file[0],
        modified_ns=file[1],
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
