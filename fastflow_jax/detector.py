"""`Detector`, the class that applications import: fit, load, save, predict."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import numbers
import os
import pathlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fastflow_jax import data, parallel
from fastflow_jax.backbones import Backbone, create_backbone
from fastflow_jax.config import default, fill, name_data
from fastflow_jax.data.arrays import Given, Images, as_dataset, each, is_one
from fastflow_jax.data.inputs import Inputs, Outputs, Part, cut, stacked
from fastflow_jax.data.pipeline import prefetch
from fastflow_jax.data.profile import Profile
from fastflow_jax.detectors.base import (
    InvertibleScorer,
    LikelihoodScorer,
    PickledByFields,
    Scorer,
    method,
    recipe,
)
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.held_out import HeldOut
from fastflow_jax.evaluation.thresholds import Threshold
from fastflow_jax.features import shift
from fastflow_jax.features.extract import Features, image_means, in_batches
from fastflow_jax.features.prepare import extractor_of, preparer, split
from fastflow_jax.features.shift import Reference, Shift
from fastflow_jax.files import expanded
from fastflow_jax.runs import directory, saved
from fastflow_jax.runs.fit import fit

_log = logging.getLogger(__name__)

# Batch sizes of scoring; the smallest one that holds the images is used. A single image is then not
# padded to a large batch, and at most three programs are compiled.
_BATCH_SIZES = (1, 8, 32)


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
    log_likelihood: float | None  # in nats per dimension; None if the detector has no likelihood
    # From the image as a whole to the nearest training image, see `shift.Reference`; 1 is typical
    # of normal images. None for tiled images and if `Detector.reference` is None.
    distance: float | None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detector(PickledByFields):
    """Anomaly detector that is trained on normal images.

    >>> from fastflow_jax import Detector
    >>> detector = Detector.fit(normal_images, config=config)
    >>> result = detector.predict(image)
    >>> result.is_anomalous, result.anomaly_map.shape == image.shape[:2]
    (True, True)
    >>> careful = detector.with_threshold(rate=0.25)  # one normal image in four is flagged
    >>> careful.image_threshold.value <= detector.image_threshold.value
    True
    """

    config: ConfigDict  # filled, see `config.fill`
    backbone: Backbone
    scorer: Scorer
    held_out: HeldOut | None = None
    image_threshold: Threshold | None = None
    pixel_threshold: Threshold | None = None
    folder: pathlib.Path | None = None  # directory that it was loaded from, see `save`
    training_images: Profile | None = None  # None in directories of older versions
    reference: Reference | None = None  # for `find_shift`; None in directories of older versions
    # Directory of a detector that was fitted without `workdir`; removed with its last copy.
    _temporary: "_TemporaryDirectory | None" = None

    @classmethod
    def fit(
        cls,
        images: Images | data.Dataset | ConfigDict,
        *,
        config: ConfigDict | str | None = None,
        workdir: str | os.PathLike | None = None,
        groups: Sequence[Any] | None = None,
        calibrate: Images | None = None,
    ) -> "Detector":
        """Trains a detector on normal images.

        Args:
          images: one of
            - a directory of images, bare or with the layout of `data.folder`;
            - paths, or uint8 arrays [H, W, 3] in RGB;
            - a `data.Dataset`;
            - the name of a data set, such as "elpv/mono";
            - a configuration that names a data set, without `config`.
            Some images are held out for calibration and thresholds, see `config.data.holdout`.
          config: the configuration, see `config.default`; or the name of a detector for its recipe.
            FastFlow by default.
          workdir: the run directory, as with `main`. An interrupted fit is continued; a finished
            one is loaded with its saved thresholds. By default a temporary directory; call `save`
            to keep the detector.
          groups: a label per image, if `images` is a list or an array. Images with equal labels
            show the same part and are held out together. For directories see `config.data.groups`.
          calibrate: normal images of other parts than `images`, for calibration and thresholds.
            All of `images` are then used for training. By default `calibration/good` of a
            directory if it exists, otherwise held-out images.

        Raises:
          InputError: the images or the configuration do not suit a training, `workdir` has another
            run, or the groups do not fit the images.
          Interrupted: SIGTERM or SIGINT was received; the state is saved in `workdir`.
        """
        parallel.check_not_forked()
        folder = None if workdir is None else expanded(workdir)
        config = _fit_config(images, config)
        dataset = _fit_dataset(images, config, groups, calibrate)
        temporary = None
        if folder is None:
            temporary = _TemporaryDirectory()
            folder = pathlib.Path(temporary.path)
        with directory.claim(folder, config):
            if parallel.on_main(lambda: saved.is_finished(folder)):
                detector = cls.load(folder)
                contents = split(config, dataset).contents
                directory.check_same_data(folder, contents, detector.backbone.weights)
                return detector
            prepare = preparer(config, folder / "features", lambda category: dataset)
            prepared = prepare(config, config.data.category, config.seed)
            label = f"{dataset.name}: train"
            fit(config, prepared, seed=config.seed, directory=folder, label=label)
            parallel.on_main(lambda: shutil.rmtree(folder / "features", ignore_errors=True))
        return dataclasses.replace(cls.load(folder), _temporary=temporary)

    @classmethod
    def load(
        cls, folder: str | os.PathLike, *, weights: str | os.PathLike | None = None
    ) -> "Detector":
        """Loads a detector from a directory that `save`, `fit` or `main` has written.

        Args:
          folder: the directory. If a run has several trainings, the directory of one of them, that
            is, of a category, a variant or a seed.
          weights: weight file of the backbone, if it was moved after the training. By default the
            recorded file, or a file of its name in or next to the run directory. Its sha256 must
            be the recorded one.

        Raises:
          InputError: the directory has no training, or several, which are listed; or the weights of
            the backbone were not found, or are not those of the training.
        """
        folder = expanded(folder)
        record = saved.read(folder)
        record.config.weights = saved.find_weights(record, folder, weights)
        detector = cls.from_training(record.config, record.training, record.seed)
        found = detector.backbone.weights
        if found.get("sha256") != record.weights.get("sha256"):
            raise InputError(
                f"{folder} was trained with other weights of {record.config.backbone}: "
                f"{record.weights}, not {found}. Restore them, or train again."
            )
        return dataclasses.replace(
            detector,
            held_out=record.held_out,
            image_threshold=record.image_threshold,
            pixel_threshold=record.pixel_threshold,
            folder=folder,
            training_images=record.images,
            reference=record.reference,
        )

    @classmethod
    def from_training(cls, config: ConfigDict, folder: pathlib.Path, seed: int = 0) -> "Detector":
        """Loads a detector without thresholds from the directory of a training.

        Args:
          config: the filled configuration of the training.
          folder: the directory of the training, see `runs.experiment.run`.
          seed: the seed of the training, which determines the weights of random backbones.
        """
        parallel.check_not_forked()
        backbone = create_backbone(
            config.backbone, weights=config.weights, layers=config.layers, seed=seed
        )
        scorer = method(config.detector).load(config, _shapes(config, backbone), folder)
        return cls(config, backbone, scorer)

    def save(self, folder: str | os.PathLike | None = None) -> pathlib.Path:
        """Saves the detector for `load`; returns the directory.

        The weight file of the backbone is not copied; `load` reads it where it is.

        Args:
          folder: a new directory. By default the directory of the detector, in which only the
            thresholds change.

        Raises:
          InputError: the directory has other files, or the directory of the detector was removed.
        """
        if self.folder is None:
            raise InputError(
                "This detector has no directory to copy. Make it with Detector.fit or "
                "Detector.load to save it."
            )
        if not self.folder.exists():
            raise InputError(
                f"{self.folder}, the directory of this detector, no longer exists. Restore it, or "
                "load the detector from another directory. A detector that is fitted without "
                "workdir has a temporary directory: call save(folder) before you pickle it."
            )
        folder = self.folder if folder is None else expanded(folder)
        thresholds = self.image_threshold, self.pixel_threshold
        saved.save(self.folder, folder, self.config.weights, *thresholds)
        return folder

    def with_threshold(
        self,
        image: Threshold | float | None = None,
        *,
        rate: float | None = None,
        pixel: Threshold | float | None = None,
        pixel_rate: float | None = None,
    ) -> "Detector":
        """Returns a copy with other thresholds, without training. `save` stores them.

        Args:
          image: threshold of image scores: a number, or `thresholds.f1_optimal(scores, labels)`.
          rate: false-alarm rate, instead of `image`: the expected share of normal images above the
            threshold.
          pixel: threshold of anomaly maps, as `image`.
          pixel_rate: false-alarm rate of pixels, instead of `pixel`: the expected share of the
            pixels of normal images above the threshold.

        Raises:
          InputError: both a threshold and a rate were given, a rate is not between 0 and 1, or a
            rate was given and there are no held-out images.
        """
        held_out = self.held_out or HeldOut(np.zeros(0), np.zeros((0, 1)))
        changes = {}
        for name, threshold, share, of_rate in (
            ("image", image, rate, held_out.image_threshold),
            ("pixel", pixel, pixel_rate, held_out.pixel_threshold),
        ):
            if threshold is not None and share is not None:
                raise InputError(
                    f"A threshold and a false-alarm rate were given for {name}. Pass one of them."
                )
            if share is not None:
                threshold = of_rate(share)
            if threshold is None:
                continue
            value = threshold.value if isinstance(threshold, Threshold) else threshold
            if not isinstance(value, numbers.Real) or np.isnan(value):
                raise InputError(f"{name}_threshold must be a number, not {value!r}.")
            if not isinstance(threshold, Threshold):
                threshold = Threshold(float(value))
            changes[f"{name}_threshold"] = threshold
        return dataclasses.replace(self, **changes)

    def predict(self, images: Images, *, tile: bool = False) -> Prediction | list[Prediction]:
        """Scores one image or several; logs a warning if several look shifted, see `find_shift`.

        Args:
          images: a path, the content of a file, an open file, an array uint8 [H, W, 3] in RGB or
            [H, W], a Pillow image, or several of these, each of any size. A directory stands for
            all images in it and its subdirectories, a file of several pages for all pages. Images
            are resized to the input size as in training (`config.data.resize`), and their anomaly
            maps back to the size of the image.
          tile: cuts images larger than the input size into overlapping tiles of the input size,
            which keeps small details. Meant for detectors that were trained on images of about the
            input size. The score of an image is the highest score of its tiles. False-alarm rates
            then hold per tile: a normal image of k tiles is flagged up to k times as often.

        Returns:
          A `Prediction` for one image, a list of them for several.

        Raises:
          InputError: a file or an array is not an image.
        """
        results = list(self.stream(images, tile=tile))
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
    ) -> Iterator[Prediction]:
        """Yields a `Prediction` per image, for more images than fit into memory.

        Args:
          images: see `predict`; also an endless iterator.
          tile: see `predict`.
          on_error: called as `on_error(name, error)` for each image that cannot be read; the other
            images are scored. By default the error is raised after the results of earlier images.
          live: scores each image before the next one is requested, for cameras. Otherwise images
            are read ahead and scored in batches of 32.
        """
        size = 1 if live else _BATCH_SIZES[-1]
        with contextlib.closing(self._all_inputs(images, tile, live)) as inputs:

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

    def find_shift(self, distances: Mapping[str, float | None]) -> Shift | None:
        """Tests whether images look shifted as a whole against the training images.

        Args:
          distances: `Prediction.distance` by `Prediction.name`. `config.data.groups` is applied to
            the names, so that images of a part are counted once.

        Returns:
          None if there are too few images, see `shift.find`, or if the detector has no reference.
        """
        known = {name: value for name, value in distances.items() if value is not None}
        return self.reference and shift.find(self.reference, known, self.config.data.groups)

    def features(self, images: Images) -> Features:
        """Returns features of images, [B, h, w, C] per scale, as `scorer` takes them."""
        found = []
        for _, image in self._all_inputs(images):
            if isinstance(image, InputError):
                raise image
            (part,) = image.parts
            found.append(self._in_batches(lambda extract, _, x: extract(x), part.image[None]))
        return tuple(np.concatenate(scale) for scale in zip(*found, strict=True))

    def latents(self, features: Features) -> Features:
        """Returns latents of features, [B, h, w, C] per scale; standard normal under the model.

        Raises:
          InputError: the detector has no latents.
        """
        self._check_invertible()
        return self._in_batches(lambda _, scorer, x: scorer.latents(x), features)

    def invert(self, latents: Features) -> Features:
        """Returns the features of latents, [B, h, w, C] per scale; the inverse of `latents`.

        Raises:
          InputError: the detector has no latents, or its features were normalised in a way that
            cannot be inverted.
        """
        self._check_invertible()
        return self._in_batches(lambda _, scorer, z: scorer.invert(z), latents)

    def sample(self, n: int = 1, *, seed: int = 0, temperature: float = 1.0) -> Features:
        """Draws features from the model, [n, h, w, C] per scale.

        Args:
          n: number of images, at least 1.
          seed: seed of the latents.
          temperature: standard deviation of the latents, 1 under the model. Lower values give more
            typical features.

        Raises:
          InputError: n is below 1, or as for `invert`.
        """
        if n < 1:
            raise InputError(f"n must be at least 1, not {n}.")
        rng = np.random.default_rng(seed)
        shapes = _shapes(self.config, self.backbone)
        return self.invert(
            tuple(temperature * rng.standard_normal((n, *s), np.float32) for s in shapes)
        )

    def score(
        self, images: np.ndarray, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores a batch of normalised images.

        Args:
          images: float32 [B, H, W, 3], normalised, with B up to the batch size of the
            configuration.
          valid: bool [B, H, W], False in padded pixels, or None if there is no padding. Padded
            pixels affect neither scores nor maps.

        Returns:
          Image scores [B] and anomaly maps [B, H, W].
        """
        return self.scorer.score(self.extract(images), valid, size=images.shape[1:3])

    @functools.cached_property
    def extract(self) -> Callable[[np.ndarray], Features]:
        """Function from images [B, H, W, 3] to features, see `extract.extractor`."""
        return extractor_of(self.config, self.backbone)

    def _in_batches(self, function: Callable, *arrays: Any) -> Any:
        """Computes `function(extract, scorer, *arrays)` for any number of images in batches."""
        parallel.check_not_forked()

        def run(part):
            n = len(part[0] if isinstance(part[0], np.ndarray) else part[0][0])
            return function(*self._with_batch_size(next(b for b in _BATCH_SIZES if n <= b)), *part)

        return in_batches(run, arrays, _BATCH_SIZES[-1])

    @functools.cached_property
    def _with_batch_size(self) -> Callable[[int], tuple[Callable, Scorer]]:
        """Function from a batch size to an extractor and a scorer that are compiled for it."""
        config, backbone, scorer = self.config, self.backbone, self.scorer

        def make(batch_size: int) -> tuple[Callable, Scorer]:
            c = config.copy_and_resolve_references()
            with c.unlocked():
                c.batch_size = batch_size
            return extractor_of(c, backbone), dataclasses.replace(scorer, config=c)

        return functools.cache(make)

    def _check_invertible(self) -> None:
        if not isinstance(self.scorer, InvertibleScorer):
            raise InputError(
                f"The detector {self.config.detector} has no latents. Fit a fastflow detector."
            )

    def _all_inputs(
        self, images: Images, tile: bool = False, live: bool = False
    ) -> Generator[tuple[str, Inputs | InputError], None, None]:
        """Yields each name with its image or error; logs how files differ from training images."""

        def read(given: Given) -> Iterator[tuple[str, Inputs | InputError, dict[str, str]]]:
            try:
                for name, image, header in given.read():
                    profile = self.training_images
                    unlike = {} if profile is None else profile.differences(header, image)
                    inputs = cut(image, name, self.config, self.backbone.spec, tile=tile)
                    yield name, inputs, unlike
            except InputError as error:
                yield given.name, error, {}

        def start(given: Given):
            """Reads the first page in this thread; returns it and an iterator over the others."""
            pages = read(given)
            return next(pages), pages

        # One thread for images to be tiled: they are large, and few of them fit into memory.
        calls = (functools.partial(start, given) for given in each(images))
        threads, logged = 0 if live else 1 if tile else None, set()
        with contextlib.closing(prefetch(calls, threads)) as started:
            for first, rest in started:
                for name, inputs, unlike in itertools.chain([first], rest):
                    if new := unlike.keys() - logged:
                        _log_differences(name, [unlike[field] for field in unlike if field in new])
                        logged |= new
                    yield name, inputs

    def _predicted(self, batch: collections.deque[tuple[Outputs, Part]]) -> Iterator[Prediction]:
        """Scores a batch of parts; yields the predictions of the images that it completes.

        The batch is emptied, so that completed maps are freed.
        """
        predict = functools.partial(_predict, self.reference)
        scores, maps, *optional = self._in_batches(predict, *stacked([part for _, part in batch]))
        for i in range(len(batch)):
            outputs, part = batch.popleft()
            outputs.add(
                part, scores[i], maps[i], *(None if each is None else each[i] for each in optional)
            )
            if outputs.is_complete:
                yield self._prediction(outputs)

    def _prediction(self, outputs: Outputs) -> Prediction:
        score, anomaly_map = outputs.score, outputs.anomaly_map
        if not np.isfinite(score):
            raise InputError(
                f"{outputs.name} scores {score}. The training or the weights of the backbone are "
                "damaged: train again."
            )
        image_threshold, pixel_threshold = self.image_threshold, self.pixel_threshold
        return Prediction(
            name=outputs.name,
            score=score,
            p_value=None if self.held_out is None else self.held_out.p_value(score),
            is_anomalous=None if image_threshold is None else score > image_threshold.value,
            anomaly_map=anomaly_map,
            mask=None if pixel_threshold is None else anomaly_map > pixel_threshold.value,
            log_likelihood=outputs.log_likelihood,
            distance=outputs.distance,
        )


def _predict(
    reference: Reference | None,
    extract: Callable,
    scorer: Scorer,
    images: np.ndarray,
    valid: np.ndarray | None,
):
    """Scores [B], anomaly maps [B, H, W], and log-likelihoods and distances, [B] or None."""
    features = extract(images)
    distances = reference and reference.distances(image_means(features, valid))
    if isinstance(scorer, LikelihoodScorer):
        return *scorer.score_with_likelihood(features, valid), distances
    return *scorer.score(features, valid), None, distances


def _log_differences(name: str, sentences: list[str]) -> None:
    _log.warning(
        "%s differs from the training images: it %s. Normal images may be flagged: use images like "
        "those of training, or train on images like these.",
        name,
        "; it ".join(sentences),
    )


class _TemporaryDirectory:
    """A directory that is removed with this object, or at the end of the process.

    Copies and pickles that are loaded in the same process share the object. In other processes they
    have None instead.
    """

    def __init__(self):
        self.path = tempfile.mkdtemp(prefix="fastflow_jax_")
        _temporary_directories[self.path] = self
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __reduce__(self):
        return _temporary_directory, (self.path,)


_temporary_directories = weakref.WeakValueDictionary()  # of this process, by path


def _temporary_directory(path: str) -> _TemporaryDirectory | None:
    return _temporary_directories.get(path)


def _fit_config(images: Any, config: ConfigDict | str | None) -> ConfigDict:
    """The filled configuration of a fit; its `data` names `images` if they are a data set."""
    if isinstance(images, ConfigDict):
        if config is not None:
            raise InputError(
                "Two configurations were given. Pass one that names a data set, or images and a "
                "configuration."
            )
        images, config = None, images
    if isinstance(config, str):
        c = default()
        holdout = c.data.holdout
        c.update(recipe(config))
        c.data.holdout = holdout  # some recipes hold no images out, but thresholds need them
    else:
        c = default() if config is None else config.copy_and_resolve_references()
    path = expanded(images) if isinstance(images, str | pathlib.Path) else None
    with c.unlocked():
        if isinstance(images, str) and path and not path.exists():
            if images.partition("/")[0] not in data.DATASETS:
                raise InputError(
                    f"{images} is neither a directory nor a data set. Pass a directory of images, "
                    f"or one of {', '.join(data.DATASETS)}."
                )
            name_data(c, images)
        elif images is not None:
            c.data.name, c.data.category = "folder", None
            c.data.root = str(path) if path and path.is_dir() else None
    c = fill(c)
    if c.seeds > 1 or len(c.variants) or len(data.categories(c.data)) > 1:
        raise InputError(
            "A detector has one seed, one variant and one category. Train several with python -m "
            "fastflow_jax.main."
        )
    return c


def _fit_dataset(images: Any, config: ConfigDict, groups: Any, calibrate: Any) -> data.Dataset:
    """The images of a fit as a data set without test images."""
    if isinstance(images, data.Dataset):
        dataset = images
    elif isinstance(images, ConfigDict) or config.data.name != "folder" or config.data.root:
        dataset = data.open_dataset(config.data)
    else:
        dataset = as_dataset(images, groups)
    if groups is not None and dataset.train.groups is None:
        raise InputError(
            "groups are for a list or an array of images. For a directory, set config.data.groups."
        )
    calibration = dataset.calibration
    if calibrate is not None:
        calibration = as_dataset([calibrate] if is_one(calibrate) else calibrate).train
    return dataclasses.replace(dataset, test=None, calibration=calibration)


def _shapes(config, backbone: Backbone) -> list[tuple[int, int, int]]:
    """(h, w, C) of each scale."""
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    maps = jax.eval_shape(backbone.module.apply, backbone.variables, images)
    return [m.shape[1:] for m in maps]
