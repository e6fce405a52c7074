"""Predictions: from images of any size to scores, decisions and anomaly maps.

`Predictor` is the base of `Detector` and of `exported.Exported`. This module loads without JAX.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image

from fastflow_jax.data.arrays import Given, Images, each, is_one
from fastflow_jax.data.inputs import Inputs, Outputs, Part, cut, stacked
from fastflow_jax.data.levels import Levels
from fastflow_jax.data.pipeline import n_threads, prefetch
from fastflow_jax.data.profile import Profile
from fastflow_jax.data.roi import CommonRegion, Region, RegionFolder, open_region
from fastflow_jax.data.tiling import Places, Tiling
from fastflow_jax.decision import Decision, Threshold
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

_log = logging.getLogger(__name__)

# Of a model input
_RESULTS = ("score", "anomaly_map", "log_likelihood", "distance", "product", "is_known", "region")

# Masks of a region of interest: a file or an array of all images, a directory of a mask per image,
# or a function of names and sizes.
Masks = str | os.PathLike | np.ndarray | Region


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Result for one image of [H, W] pixels.

    `p_value`, `is_anomalous` and `mask` are None if the detector has no held-out images and no
    threshold was set.
    """

    name: str  # path of the image, or "image 3" for the fourth array
    score: float  # higher is more anomalous
    p_value: float | None  # bound of the share of normal images with this score or a higher one
    is_anomalous: bool | None  # whether the score is above the threshold
    anomaly_map: np.ndarray  # float32 [H, W], higher is more anomalous
    mask: np.ndarray | None  # bool [H, W], True where the map is above the pixel threshold
    # In nats per dimension; None if the detector has no likelihood, or was exported.
    log_likelihood: float | None
    # From the image as a whole to the nearest training image, see `shift.Reference`; 1 is typical
    # of normal images. None for tiled images, exported detectors and `Detector.reference` of None.
    distance: float | None
    # Nearest product of a model of several products; None if the product was given.
    product: str | None = None
    is_known: bool | None = None  # False if the image seems to show none of the products
    # bool [H, W], the region of interest: outside, the map has its lowest value, and the mask is
    # False. None if all pixels count, or if an exported detector finds the region.
    region: np.ndarray | None = None

    @property
    def anomalous_part(self) -> float | None:
        """Share of the pixels that count in the mask; None without a mask."""
        if self.mask is None:
            return None
        return float((self.mask if self.region is None else self.mask[self.region]).mean())


MAP_FORMS = ("npy", "png16")


def encode_map(anomaly_map: np.ndarray, form: str) -> tuple[bytes, float | None, float | None]:
    """Encodes an anomaly map, float32 [H, W], as a file.

    Args:
      anomaly_map: the map.
      form: "npy" for float32, or "png16" for a PNG in 16 bits from its minimum to its maximum.

    Returns:
      The content of the file, and the values of the levels 0 and 65535 of a PNG, or None.
    """
    file = io.BytesIO()
    if form == "npy":
        np.save(file, anomaly_map)
        return file.getvalue(), None, None
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    part = (anomaly_map - low) / (high - low if high > low else 1)
    PIL.Image.fromarray(np.round(65535 * part).astype(np.uint16)).save(file, "PNG")
    return file.getvalue(), low, high


class Predictor:
    """Predictions for images of any size, given a function of model inputs.

    A subclass defines the attributes and `run`.
    """

    image_size: tuple[int, int]  # (height, width) of model inputs
    resize: str  # `config.data.resize`: how images become inputs
    tiling: Tiling | None = None  # of a detector that was trained on tiles
    places: Places | None = None  # statistics of the tiles, with `config.data.aligned`
    decision: Decision  # thresholds and scores of held-out images
    levels: Levels | None = None  # of images of more than 8 bits; None for their high byte
    training_images: Profile | None  # None if unknown
    batch_size: int  # largest number of images that are scored together
    roi: CommonRegion | None = None  # region of interest of all images
    needs_masks: bool = False  # whether a mask of each image must be passed
    region_inside: bool = False  # whether the model itself leaves out what is outside of the region

    def run(self, images: np.ndarray, valid: np.ndarray | None) -> Mapping[str, np.ndarray | None]:
        """Scores model inputs.

        Args:
          images: uint8 [B, H, W, 3] of the size of model inputs; any B.
          valid: [B, H, W], which pixels count, see `pipeline.as_input`; or None if there is neither
            padding nor a mask. A region of the detector itself counts in either case.

        Returns:
          "score" [B] and "anomaly_map" [B, H, W], float32. Optionally "log_likelihood" and
          "distance" [B], or None, see `Prediction`; and "region", bool [B, H, W], if the detector
          finds it. Other results are ignored: decisions are made on maps of the size of the image.
        """
        raise NotImplementedError

    @property
    def image_threshold(self) -> Threshold | None:
        """Threshold of image scores."""
        return self.decision.image_threshold

    @property
    def pixel_threshold(self) -> Threshold | None:
        """Threshold of anomaly maps."""
        return self.decision.pixel_threshold

    @property
    def colour_range(self) -> tuple[float, float] | None:
        """Values of anomaly maps at the ends of the colours of heat maps; None if unknown."""
        return None

    def for_prediction(self, prediction: Prediction) -> "Predictor":
        """The predictor with the thresholds and colours of a prediction.

        Args:
          prediction: result of `predict` or `stream`.
        """
        del prediction
        return self

    def with_threshold(self, *, rate: float) -> "Predictor":
        """Returns a copy with the threshold of a false-alarm rate.

        Args:
          rate: false-alarm rate: the expected share of normal images above the threshold.
        """
        raise NotImplementedError

    def find_shift(self, distances: Mapping[str, float | None]) -> Any:
        """Tests whether images look shifted as a whole, see `Detector.find_shift`; None here.

        Args:
          distances: distance of each image by its name, see `Prediction.distance`.
        """
        del distances

    def predict(
        self, images: Images, *, tile: bool = False, roi: Masks | None = None, every: int = 1
    ) -> Prediction | list[Prediction]:
        """Scores one image or several; logs a warning if several look shifted, see `find_shift`.

        Args:
          images: a path, the content of a file, an open file, an array uint8 [H, W, 3] in RGB or
            [H, W], a Pillow image, or several of these, each of any size. A directory stands for
            all images in it and its subdirectories, a file of several pages for all pages, a video
            for its frames (`pip install 'fastflow-jax[video]'`; for long ones use `stream`). Images
            are resized to the input size as in training (`config.data.resize`), and their anomaly
            maps back to the size of the image. Arrays of other types than uint8 need
            `config.data.bits` or `config.data.window` in training; uint8 arrays are then taken as
            mapped to 8 bits.
          tile: cuts images larger than the input size into overlapping tiles of the input size,
            which keeps small details. Meant for detectors that were trained on images of about the
            input size. The score of an image is the highest score of its tiles. False-alarm rates
            then hold per tile: a normal image of k tiles is flagged up to k times as often.
            Detectors that were trained on tiles (`config.data.tile`) always cut images as in
            training, and their rates hold for whole images.
          roi: masks of a detector that was trained with a mask per image (`config.data.roi_dir`):
            a file or an array of all images; or a directory with `<name>.png` for each image,
            relative to the directory that `images` is. White pixels count.
          every: of videos, scores each frame of this number, from the first one on.

        Returns:
          A `Prediction` for one image, a list of them for several.

        Raises:
          InputError: a file or an array is not an image; masks are missing, damaged or not of the
            aspect ratio of the image, or were passed to a detector that takes none; or tiles of a
            detector that finds the region of interest of whole images.
        """
        results = list(self.stream(images, tile=tile, roi=roi, every=every))
        if is_one(images) and len(results) == 1:
            return results[0]
        found = self.find_shift({result.name: result.distance for result in results})
        if found and found.message:
            _log.warning(found.message)
        return results

    def stream(
        self,
        images: Images,
        *,
        tile: bool = False,
        on_error: Callable[[str, InputError], None] | None = None,
        live: bool = False,
        roi: Masks | None = None,
        every: int = 1,
    ) -> Iterator[Prediction]:
        """Yields a `Prediction` per image, for more images than fit into memory.

        Args:
          images: see `predict`; also an endless iterator.
          tile: see `predict`.
          on_error: called as `on_error(name, error)` for each image that cannot be read; the other
            images are scored. By default the error is raised after the results of earlier images.
          live: scores each image before the next one is requested, for cameras. Otherwise images
            are read ahead and scored in batches.
          roi: see `predict`.
          every: see `predict`.
        """
        size = 1 if live else self.batch_size
        with contextlib.closing(self.inputs(images, tile, live, roi, every)) as inputs:

            def parts():
                for name, image in inputs:
                    if isinstance(image, Inputs):
                        outputs = Outputs(image)
                        yield from ((outputs, part) for part in image.parts)
                    elif on_error:
                        on_error(name, image)
                    else:
                        raise image

            # The maps of a batch are added to their images before the next batch is cut.
            remaining, error = parts(), None
            while error is None:
                batch = collections.deque()
                try:
                    batch.extend(itertools.islice(remaining, size))
                except Exception as failure:  # raised after earlier images are scored
                    error = failure
                if batch:
                    yield from self._predicted(batch)
                elif error is None:
                    return
            raise error

    def inputs(
        self,
        images: Images,
        tile: bool = False,
        live: bool = False,
        roi: Masks | None = None,
        every: int = 1,
    ) -> Generator[tuple[str, Inputs | InputError], None, None]:
        """Yields each name with its model inputs or error; for the arguments see `stream`.

        Logs how files differ from the training images.

        Args:
          images: see `stream`.
          tile: see `stream`.
          live: see `stream`.
          roi: see `stream`.
          every: see `stream`.
        """
        tiling = self.tiling or (Tiling(self.image_size) if tile else None)
        region = self._region(images, tile, roi)

        def read(
            given: Given,
        ) -> Generator[tuple[str, Inputs | InputError, dict[str, str]], None, None]:
            try:
                for name, image, header in given.read(self.levels, every):
                    profile = self.training_images
                    unlike = {} if profile is None else profile.differences(header, image)
                    part = None if region is None else region(name, image.shape[:2])
                    how = self.image_size, self.resize, tiling, self.places, part
                    inputs = cut(image, name, *how)
                    yield name, inputs, unlike
            except InputError as error:
                yield given.name, error, {}

        def start(given: Given):
            """Reads the first page in this thread; returns it and an iterator over the others."""
            pages = read(given)
            first = next(pages)
            if first[0] != given.name:
                return first, pages
            pages.close()  # it is the only page: its file and its pixels are freed
            return first, ()

        # Most of the next batch is read while one is scored. One thread for images to be tiled:
        # they are large, and few of them fit into memory.
        calls = (functools.partial(start, given) for given in each(images, self.levels))
        threads, logged = 0 if live else 1 if tiling else n_threads(), set()
        ahead = 2 * threads if tiling else max(2 * threads, 3 * self.batch_size // 4)
        with contextlib.closing(prefetch(calls, threads, ahead)) as started:
            for first, rest in started:
                for name, inputs, unlike in itertools.chain([first], rest):
                    if new := unlike.keys() - logged:
                        _log_differences(name, [unlike[field] for field in unlike if field in new])
                        logged |= new
                    yield name, inputs

    def _region(self, images: Images, tile: bool, roi: Masks | None) -> Region | None:
        """The region of interest of each image; None if all pixels count or it is found later."""
        if roi is None:
            if self.needs_masks:
                raise needs_masks()
            if tile and self.region_inside:
                raise InputError(
                    "The model has a region of interest of whole images, not of tiles. Leave tile "
                    "out, or train with config.data.roi=FILE and use the detector in JAX."
                )
            return self.roi
        if not self.needs_masks:
            raise InputError(
                "The detector was not trained with a mask per image, and takes none. Leave roi out."
            )
        if callable(roi):
            return roi
        masks = open_region(roi)
        if isinstance(masks, CommonRegion):
            return masks
        if isinstance(images, str | os.PathLike) and not is_one(images):
            return relative_to(masks, expanded(images))
        return relative_to(masks, None)

    def _predicted(self, batch: collections.deque[tuple[Outputs, Part]]) -> Iterator[Prediction]:
        """Scores a batch of parts; yields the predictions of the images that it completes.

        The batch is emptied, so that completed maps are freed.
        """
        found = self.run(*stacked([part for _, part in batch]))
        known = {name: found.get(name) for name in _RESULTS}
        known = {name: array for name, array in known.items() if array is not None}
        for i in range(len(batch)):
            outputs, part = batch.popleft()
            outputs.add(part, **{name: array[i] for name, array in known.items()})
            if outputs.is_complete:
                yield self.prediction(outputs)

    def prediction(self, outputs: Outputs) -> Prediction:
        """Returns the result for an image whose parts are scored.

        Args:
          outputs: results of all parts of the image.
        """
        score, anomaly_map = outputs.score, outputs.anomaly_map
        if not np.isfinite(score):
            raise InputError(
                f"{outputs.name} scores {score}. The training or the weights of the backbone are "
                "damaged: train again."
            )
        decided, region = self.decision(np.float32(score), anomaly_map), outputs.region
        p_value, is_anomalous = decided.get("p_value"), decided.get("is_anomalous")
        mask = decided.get("mask")
        return Prediction(
            name=outputs.name,
            score=score,
            p_value=None if p_value is None else float(p_value),
            is_anomalous=None if is_anomalous is None else bool(is_anomalous),
            anomaly_map=anomaly_map,
            mask=mask if mask is None or region is None else mask & region,
            log_likelihood=outputs.log_likelihood,
            distance=outputs.distance,
            region=region,
        )


def relative_to(masks: RegionFolder, folder: pathlib.Path | None) -> Region:
    """The regions of images by their paths relative to a directory, or by their file names."""

    def region(name: str, size: tuple[int, int]) -> np.ndarray:
        path = pathlib.Path(name)
        own = pathlib.Path(path.name) if folder is None else path.relative_to(folder)
        return masks(str(own), size)

    return region


def needs_masks() -> InputError:
    """Returns the error for missing masks."""
    return InputError(
        "The detector was trained with a mask per image (config.data.roi_dir), and needs one for "
        "each new image. Pass them to Detector.predict as roi, or to `fastflow-jax predict` as "
        "--roi."
    )


def _log_differences(name: str, sentences: list[str]) -> None:
    _log.warning(
        "%s differs from the training images: it %s. Normal images may be flagged: use images like "
        "those of training, or train on images like these.",
        name,
        "; it ".join(sentences),
    )
