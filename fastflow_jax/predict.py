"""Scores of image files with the detector of a run: lines, heat maps and anomaly maps."""

import contextlib
import csv
import dataclasses
import glob
import io
import json
import logging
import os
import pathlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastflow_jax.data import formats, layout
from fastflow_jax.data.arrays import Given, read_image
from fastflow_jax.data.roi import Region, open_region
from fastflow_jax.decision import Threshold
from fastflow_jax.errors import InputError
from fastflow_jax.exported import Exported
from fastflow_jax.files import (
    PRODUCTS,
    expanded,
    lock,
    make_folder,
    read_json,
    read_lines,
    replacing,
    sha256_of_detector,
    synchronise,
    write_json,
)
from fastflow_jax.prediction import Prediction, Predictor, encode_map, needs_masks
from fastflow_jax.report.heatmaps import OF_THE_NAME, draw_heatmap, save_picture

_log = logging.getLogger(__name__)

EXPORTED = "detector.onnx"  # in the run directory, for the engine "onnx"
STDIN = "-"  # in the place of images: their paths are read from stdin
_SETTINGS, _JSONL, _CSV = "predictions.json", "predictions.jsonl", "predictions.csv"
# File names may contain any bytes, which are written unchanged.
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@dataclasses.dataclass
class Line:
    """Result for one image, a line of the output; None for fields without a value."""

    path: str
    score: float | None = None  # higher is more anomalous
    p_value: float | None = None  # probability of a score at least this high for a normal image
    is_anomalous: bool | None = None  # the score is above the threshold
    threshold: float | None = None
    log_likelihood: float | None = None  # of the features, in nats per dimension
    distance: float | None = None  # from the training images, see `Prediction.distance`
    product: str | None = None  # of a model of several products, unless it was given
    is_known: bool | None = None  # whether the image seems to show one of the products
    anomalous_part: float | None = None  # share of pixels above the pixel threshold
    pixel_threshold: float | None = None
    height: int | None = None
    width: int | None = None
    heatmap: str | None = None  # path of the heat map in the output directory
    raw_map: str | None = None  # path of the anomaly map in the output directory
    raw_zero: float | None = None  # value of 0 in a map as PNG
    raw_full: float | None = None  # value of 65535 in a map as PNG
    error: str | None = None
    bytes: int | None = None  # size of the image file
    modified_ns: int | None = None  # modification time of the image file in ns since 1970


def predict(
    workdir: str | os.PathLike,
    images: str,
    output: str | os.PathLike | None = None,
    *,
    engine: str = "jax",
    weights: str | os.PathLike | None = None,
    rate: float | None = None,
    tile: bool = False,
    heatmaps: bool = True,
    raw: str | None = None,
    product: str | None = None,
    roi: str | os.PathLike | None = None,
    every: int = 1,
) -> int:
    """Scores images with the detector of a run and writes the results.

    After an interruption, the same call keeps the results of unchanged files and continues.

    Args:
      workdir: directory for `Detector.load`.
      images: an image or video file, a directory (with its sub-directories), a glob pattern, or
        `STDIN`. Paths are then read from stdin, one per line; each is scored, and its JSON line
        printed to stdout, before the next one is read.
      output: directory for `predictions.csv` and `predictions.jsonl` with a line per image, page or
        frame, `predictions.json` with the options, the image threshold and the result of
        `Detector.find_shift`, `heatmaps/` and `maps/`. With `STDIN` only for the last two, and
        None for neither.
      engine: "jax"; or "onnx" for ONNX Runtime, which starts faster and has neither
        log-likelihoods nor the test for a shift. The detector is exported into its directory once.
      weights: weight file of the backbone, see `Detector.load`.
      rate: false-alarm rate, see `Detector.with_threshold`; None for the detector's threshold.
      tile: split large images into tiles, see `Detector.predict`.
      heatmaps: draw heat maps.
      raw: write anomaly maps in the size of their image, "npy" as float32 or "png16" in 16 bits
        from their minimum to their maximum; None for no maps.
      product: of all images, for a model of several products; None to recognise it.
      roi: masks, for a detector that was trained with a mask per image: of all images, or a
        directory with `<name>.png` for each image, relative to the directory of the images.
      every: of videos, score each frame of this number.

    Returns:
      Exit status: 0 if all images are normal, 1 if some are anomalous, 3 if some images could not
      be read or some heat maps or maps not be written, 4 if the detector has no threshold.

    Raises:
      InputError: there are no images or no detector, or an argument is invalid.
    """
    if every < 1:
        raise InputError(f"--every must be at least 1, not {every}.")
    options = {"engine": engine, "rate": rate, "tile": tile, "heatmaps": heatmaps, "raw": raw}
    options |= {"product": product, "every": every}
    options |= {} if roi is None else {"roi": os.fspath(roi)}
    if images == STDIN:
        if output is None and raw:
            raise InputError(f"--raw={raw} writes files. Pass a directory for them as --output.")
        detector = with_rate(_load(expanded(workdir), engine, weights, product), rate)
        return _answer(detector, None if output is None else expanded(output), options)
    if output is None:
        raise InputError("--output is missing. Pass a directory for the results.")
    output = expanded(output)
    found = find_images(images)
    detector = with_rate(_load(expanded(workdir), engine, weights, product), rate)
    masks = None if roi is None else _masks(roi, found)
    if masks is None and detector.needs_masks:
        raise needs_masks()
    if others := found.others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        names = ", ".join(path.name for path in others[:3])
        _log.info("not images, not scored: %s%s", names, more)
    settings = {"detector": sha256_of_detector(expanded(workdir)), "options": options}
    settings |= {"threshold": _stated(detector.image_threshold)}
    counts = _continue(detector, found, output, settings, masks)
    return summarise(counts, len(others), output, detector.image_threshold is not None)


def _load(
    workdir: pathlib.Path,
    engine: str,
    weights: str | os.PathLike | None,
    product: str | None,
) -> Predictor:
    """Loads a detector, or a model of several products, for an engine."""
    of_several = (workdir / PRODUCTS).exists()
    if product is not None and not of_several:
        raise InputError(f"{workdir} has no model of several products. Leave --product out.")
    if engine == "onnx":
        if of_several:
            raise InputError(
                f"{workdir} has a model of several products, which is not exported as a whole. "
                "Pass the directory of one product, or leave --engine=onnx out."
            )
        return export_once(workdir, weights)
    from fastflow_jax.detector import Detector, Products

    if not of_several:
        return Detector.load(workdir, weights=weights)
    model = Products.load(workdir, weights=weights)
    return model if product is None else model.detector_of(product)


def _stated(threshold: Threshold | None) -> dict[str, Any] | None:
    """Logs what the image threshold promises; returns it as JSON values."""
    if threshold is None:
        return None
    if threshold.promise:
        count = f"{threshold.n} normal images, or groups of images"
        _log.info("The threshold comes from %s: %s.", count, threshold.promise)
    interval = threshold.interval and list(threshold.interval)
    return dataclasses.asdict(threshold) | {"interval": interval}


def _masks(roi: str | os.PathLike, found: "Found") -> Region:
    """The region of interest of each image by its path."""
    masks = open_region(roi)
    return lambda name, size: masks(found.locate(name)[1], size)


def export_once(workdir: pathlib.Path, weights: str | os.PathLike | None = None) -> Exported:
    """Returns the detector of a run directory, exported to `EXPORTED` in it.

    A file that was exported earlier is read without JAX, if the thresholds have not changed since.

    Args:
      workdir: directory for `Detector.load`.
      weights: weight file of the backbone, see `Detector.load`.

    Raises:
      InputError: see `Detector.load` and `Detector.export`.
    """
    if workdir.is_file():
        raise InputError(
            f"{workdir} is a file, and cannot take an exported detector. Export it with "
            "`fastflow-jax export`, and use that file."
        )
    file = workdir / EXPORTED
    if file.exists():
        with contextlib.suppress(InputError):  # it is exported again
            exported = Exported(file)
            if exported.metadata["source"] == sha256_of_detector(workdir):
                return exported
    from fastflow_jax.detector import Detector

    detector = Detector.load(workdir, weights=weights)
    _log.info("exporting the detector to %s, once", file)
    detector.export(file)
    return Exported(file)


def with_rate(detector: Predictor, rate: float | None) -> Predictor:
    """Returns a detector with the threshold of a rate, if not None; logs warnings about it."""
    if rate is None:
        if detector.image_threshold is None:
            _log.warning("No images were held out in training, so there is no threshold.")
        return detector
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        detector = detector.with_threshold(rate=rate)
    for warning in caught:
        _log.warning("%s", warning.message)
    return detector


def _continue(
    detector: Predictor,
    found: "Found",
    output: pathlib.Path,
    settings: dict,
    masks: Region | None,
) -> Counter:
    """Scores the files that an earlier call has not scored, and counts the outcomes of all."""

    def refuse() -> None:
        raise InputError(
            f"{output} is in use by another process. Wait for it, or pass another --output."
        )

    make_folder(output)
    with lock(output / ".lock", refuse):
        kept = _lines_to_keep(output, settings, found.names, detector.batch_size)
        if kept:
            _log.info("%d images were already scored with the same options. Continuing.", len(kept))
        return _score(detector, found, output, settings, kept, masks)


def _score(
    detector: Predictor,
    found: "Found",
    output: pathlib.Path,
    settings: dict,
    kept: list[Line],
    masks: Region | None,
) -> Counter:
    """Scores the files without a kept line, writes their results, and counts all outcomes."""
    options = settings["options"]
    done = {line.path for line in kept}
    todo = [path for path in found.names if path not in done]
    before = {path: _size_and_time(path) for path in todo}
    counts = Counter(outcome for line in kept for outcome in _outcomes(line))
    distances = {line.path: line.distance for line in kept}
    style = {"desc": "predict", "unit": "img", "dynamic_ncols": True, "smoothing": 0}
    bar = tqdm(total=len(found.names), initial=len(done), **style)
    with _writer(output, settings, kept) as write_line, bar:

        def write(line: Line) -> None:
            if line.error is not None:
                _log.warning("%s%s", "skipped: " * (line.score is None), line.error)
            counts.update(_outcomes(line))
            distances[line.path] = line.distance
            write_line(line)
            # Each page after the first is one more image than expected.
            bar.total += line.path not in found.names and not line.path.endswith("#1")
            bar.update()

        def report(path: str, error: InputError) -> None:
            write(Line(path, error=str(error)))

        how = {"tile": options["tile"], "every": options["every"], "roi": masks}
        for prediction in detector.stream(todo, on_error=report, **how):
            path, name = found.locate(prediction.name)
            line = _drawn(detector, prediction, name, output, options, before[path])
            if _size_and_time(path) != before[path]:
                line.error = f"{prediction.name}: the file changed while it was scored"
            write(line)
    known = {path: distance for path, distance in distances.items() if distance is not None}
    shift = detector.find_shift({found.locate(path)[1]: d for path, d in known.items()})
    if shift and shift.message:
        _log.warning(shift.message)
    write_json(output / _SETTINGS, settings | {"shift": shift and dataclasses.asdict(shift)})
    return counts


def _drawn(
    detector: Predictor,
    prediction: Prediction,
    name: str,
    output: pathlib.Path | None,
    options: dict,
    file: tuple[int, int] | tuple[None, None],
) -> Line:
    """Writes the heat map and the map of an image as `name` to a directory; returns its line."""
    owner = detector.for_prediction(prediction)
    line = _line(owner, prediction, file)
    if prediction.is_known is False:
        _log.warning("%s seems to show none of the products.", prediction.name)
    if output is None:
        return line
    try:
        if options["heatmaps"]:
            picture = draw_prediction(owner, prediction, name)
            save_picture(output / f"heatmaps/{name}.png", picture)
            line.heatmap = f"heatmaps/{name}.png"
        if options["raw"]:
            _write_raw(output, options["raw"], name, prediction.anomaly_map, line)
    except (OSError, InputError) as error:
        if isinstance(error, OSError) and error.errno not in OF_THE_NAME:
            raise
        line.error = f"{prediction.name}: its heat map or map cannot be written: {error}"
    return line


def _answer(detector: Predictor, output: pathlib.Path | None, options: dict) -> int:
    """Scores the images whose paths are read from stdin, see `predict`; returns the exit status."""
    counts, file = Counter(), (None, None)

    def paths() -> Iterator[Given]:
        nonlocal file  # of the path that is scored
        for text in iter(sys.stdin.buffer.readline, b""):
            if path := os.fsdecode(text.rstrip(b"\r\n")):
                given = _given(path)
                file = (None, None) if given.error else _size_and_time(str(given.path))
                yield given

    def write(line: Line) -> None:
        counts.update(_outcomes(line))
        try:
            print(_json_line(line), end="", flush=True)
        except BrokenPipeError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
            raise InputError("The reader of stdout has ended. Start it again.") from error

    def report(path: str, error: InputError) -> None:
        write(Line(path, error=str(error)))

    how = {"tile": options["tile"], "every": options["every"], "roi": options.get("roi")}
    for prediction in detector.stream(paths(), live=True, on_error=report, **how):
        write(_drawn(detector, prediction, _place(prediction.name), output, options, file))
    decides = detector.image_threshold is not None
    _log.info(_summary(counts, decides))
    return _exit_status(counts, decides)


def _given(path: str) -> Given:
    try:
        if "\0" in path:
            raise InputError(f"{path!r} is not a path. Send a path per line.")
        return Given(str(expanded(path)) if path.startswith("~") else path, path=expanded(path))
    except InputError as error:
        return Given(path, error=error)


def _place(path: str) -> str:
    """Path of the results of a file in the output directory."""
    absolute, here = pathlib.Path(os.path.abspath(path)), pathlib.Path.cwd()
    root = here if absolute.is_relative_to(here) else pathlib.Path(absolute.anchor)
    return absolute.relative_to(root).as_posix()


def _outcomes(line: Line) -> list[str]:
    """Returns the outcomes that `summarise` counts: a decision, an error, or both."""
    if line.score is None:
        return ["unreadable"]
    return ["anomalous" if line.is_anomalous else "normal"] + ["unwritten"] * bool(line.error)


def summarise(counts: Counter, n_others: int, output: pathlib.Path, decides: bool) -> int:
    """Prints the number of images per outcome; returns the exit status."""
    others = f", {n_others} other files" if n_others else ""
    with contextlib.suppress(BrokenPipeError):  # a closed pipe must not change the status
        print(f"{_summary(counts, decides)}{others}: {output}", flush=True)
    return _exit_status(counts, decides)


def _summary(counts: Counter, decides: bool) -> str:
    scored = counts["anomalous"] + counts["normal"]
    summary = f"{counts['anomalous']} of {scored} images are anomalous"
    if not decides:
        summary = f"{scored} images were scored without a decision (no threshold)"
    return f"{summary}, {counts['unreadable']} unreadable"


def _exit_status(counts: Counter, decides: bool) -> int:
    if counts["unreadable"] or counts["unwritten"]:
        return 3
    return int(counts["anomalous"] > 0) if decides else 4


@contextlib.contextmanager
def _writer(
    output: pathlib.Path, settings: dict, kept: list[Line]
) -> Iterator[Callable[[Line], None]]:
    """Starts the output files with the kept lines; yields a function that appends a line."""
    write_json(output / _SETTINGS, settings)
    heads = {_CSV: _csv_row([field.name for field in dataclasses.fields(Line)]), _JSONL: ""}
    texts = {_CSV: _csv_line, _JSONL: _json_line}
    for name, text in texts.items():
        # The file of an earlier call exists until the new one contains the kept lines.
        with replacing(output / name, "w", **_TEXT) as file:
            file.write(heads[name] + "".join(map(text, kept)))
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context((output / name).open("a", **_TEXT)) for name in texts]

        def write(line: Line) -> None:
            for file, text in zip(opened, texts.values(), strict=True):
                file.write(text(line))
                file.flush()

        yield write
        for name in texts:
            synchronise(output / name)


def _json_line(line: Line) -> str:
    return json.dumps(dataclasses.asdict(line)) + "\n"


def _csv_line(line: Line) -> str:
    words = {True: "true", False: "false", None: None}
    plain = dataclasses.asdict(line)
    plain |= {name: words[plain[name]] for name in ("is_anomalous", "is_known")}
    return _csv_row(plain.values())


def _csv_row(cells: Iterable) -> str:
    file = io.StringIO(newline="")
    csv.writer(file).writerow(cells)
    return file.getvalue()


def _lines_to_keep(
    output: pathlib.Path, settings: dict, names: dict[str, str], batch_size: int
) -> list[Line]:
    """Returns the lines of an earlier call with the same settings whose files are unchanged.

    Lines with errors and lines of pages are not kept: their files are scored again. Of a call that
    was interrupted, only whole batches are kept, because the last digits of a score depend on its
    batch.
    """
    if not (output / _SETTINGS).exists():
        return []
    known = read_json(output / _SETTINGS)
    if {k: v for k, v in known.items() if k != "shift"} != settings:
        return []
    fields = [field.name for field in dataclasses.fields(Line)]
    read = [Line(**plain) for plain in read_lines(output / _JSONL) if [*plain] == fields]
    lines = list({line.path: line for line in read if line.score is not None}.values())

    def is_valid(line: Line) -> bool:
        return (
            line.error is None
            and line.path in names
            and (line.bytes, line.modified_ns) == _size_and_time(line.path)
            and all((output / file).exists() for file in (line.heatmap, line.raw_map) if file)
        )

    if "shift" in known:  # the call ended
        return list(filter(is_valid, lines))
    starts = range(0, len(lines) - batch_size + 1, batch_size)
    batches = [lines[start : start + batch_size] for start in starts]
    return [line for batch in batches if all(map(is_valid, batch)) for line in batch]


def _size_and_time(path: str) -> tuple[int, int] | tuple[None, None]:
    try:
        stat = os.stat(path)
    except OSError:
        return None, None
    return stat.st_size, stat.st_mtime_ns


def draw_prediction(
    detector: Predictor, prediction: Prediction, name: str | None = None
) -> Image.Image:
    """Draws the heat map of an image file, with its score and decision as title.

    All images of a detector with held-out images have the same colour range.

    Args:
      detector: that made the prediction.
      prediction: of an image file.
      name: of the image in the title; None for the name of the file.
    """
    low, high = detector.colour_range or (
        prediction.anomaly_map.min(),
        prediction.anomaly_map.max(),
    )
    title = f"{name or pathlib.Path(prediction.name).name}  score {prediction.score:.3f}"
    if detector.image_threshold is not None:
        title += f" (threshold {detector.image_threshold.value:.3f})"
    if prediction.p_value is not None:
        title += f"  p {prediction.p_value:.3f}"
    if prediction.is_anomalous is not None:
        title += "  anomalous" if prediction.is_anomalous else "  normal"
    return draw_heatmap(
        read_image(prediction.name, detector.levels),
        prediction.anomaly_map,
        low=low,
        high=high,
        threshold=detector.pixel_threshold and detector.pixel_threshold.value,
        title=title,
        region=prediction.region,
    )


@dataclasses.dataclass(frozen=True)
class Found:
    """Files that match `--input`."""

    names: dict[str, str]  # path -> path relative to the common directory, sorted
    others: list[pathlib.Path]  # files that are not images, see `data.formats.is_image`

    def locate(self, name: str) -> tuple[str, str]:
        """Returns the file of a prediction `file` or `file#page`, and its relative name."""
        path = name if name in self.names else name.rpartition("#")[0]
        return path, self.names[path] + name.removeprefix(path)


def find_images(pattern: str) -> Found:
    """Finds the files of a file name, a directory or a glob pattern.

    Earlier predictions and run directories are left out unless they are named.

    Raises:
      InputError: there are no images.
    """
    whole = expanded(pattern)
    images, others = [], []
    if whole.is_file() or (whole.is_symlink() and not whole.exists()):
        images = [whole]
    else:
        for path in [whole] if whole.is_dir() else _matches(whole):
            if path.is_dir():
                below = layout.find_images(path)
                images += below.images
                others += below.others
            else:
                (images if formats.is_image(path) else others).append(path)
    if not images:
        raise InputError(
            f"--input={pattern} is not a file, and not a directory or pattern with images. Pass "
            "one of these, a pattern in quotes."
        )
    root = whole if whole.is_dir() else os.path.commonpath([path.parent for path in images])
    names = {str(path): path.relative_to(root).as_posix() for path in images}
    return Found(names, list(dict.fromkeys(others)))


def _matches(pattern: pathlib.Path) -> list[pathlib.Path]:
    """Returns the sorted matches of a glob pattern; existing folders are taken literally."""
    root = next(parent for parent in pattern.parents if os.path.exists(parent))
    escaped = os.path.join(glob.escape(str(root)), pattern.relative_to(root))
    found = map(pathlib.Path, sorted(glob.glob(escaped, recursive=True)))
    return [path for path in found if not layout.is_left_out(path, root)]


def _line(
    detector: Predictor, prediction: Prediction, file: tuple[int, int] | tuple[None, None]
) -> Line:
    height, width = prediction.anomaly_map.shape
    return Line(
        path=prediction.name,
        score=prediction.score,
        p_value=prediction.p_value,
        is_anomalous=prediction.is_anomalous,
        threshold=detector.image_threshold and detector.image_threshold.value,
        log_likelihood=prediction.log_likelihood,
        distance=prediction.distance,
        product=prediction.product,
        is_known=prediction.is_known,
        anomalous_part=prediction.anomalous_part,
        pixel_threshold=detector.pixel_threshold and detector.pixel_threshold.value,
        height=height,
        width=width,
        bytes=file[0],
        modified_ns=file[1],
    )


def _write_raw(
    output: pathlib.Path, raw: str, name: str, anomaly_map: np.ndarray, line: Line
) -> None:
    """Writes an anomaly map, and its path and scale to the line."""
    file = f"maps/{name}.{raw.removesuffix('16')}"
    content, line.raw_zero, line.raw_full = encode_map(anomaly_map, raw)
    make_folder((output / file).parent)
    with replacing(output / file, "wb") as opened:
        opened.write(content)
    line.raw_map = file
