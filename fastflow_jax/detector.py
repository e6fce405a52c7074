"""The detector that applications import: it is fitted, saved, loaded, and scores images."""

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
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fastflow_jax import data, parallel
from fastflow_jax.backbones import Backbone, create_backbone
from fastflow_jax.config import default, fill, name_data
from fastflow_jax.data.arrays import Given, Images, ahead, as_dataset, each, is_one
from fastflow_jax.data.inputs import Inputs, Outputs, Part, cut, stacked
from fastflow_jax.data.profile import Profile
from fastflow_jax.detectors.base import (
    DETECTORS,
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
from fastflow_jax.features.extract import Features, in_batches
from fastflow_jax.features.prepare import extractor_of, preparer, split
from fastflow_jax.files import expanded
from fastflow_jax.runs import directory, saved
from fastflow_jax.runs.fit import fit

_log = logging.getLogger(__name__)

# Numbers of images that are scored at a time. The smallest that is large enough is used: a single
# image takes the time of one, many images use the devices well, and at most three programs are
# compiled.
_BATCH_SIZES = (1, 8, 32)


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What a detector makes of one image, [H, W] pixels large.

    The p-value, `is_anomalous` and the mask are None for a detector without held-out images, the
    log-likelihood is for one that has none.
    """

    name: str  # its path, or "image 3" for the fourth array
    score: float  # higher is more anomalous
    p_value: float | None  # how often a normal image scores so high, see `thresholds.p_values`
    is_anomalous: bool | None  # the score is above the threshold
    anomaly_map: np.ndarray  # float32 [H, W]
    mask: np.ndarray | None  # bool [H, W], where the map is above the pixel threshold
    log_likelihood: float | None  # of what the flows see, in nats per dimension


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detector(PickledByFields):
    """Finds what is anomalous in images, having seen normal ones.

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
    folder: pathlib.Path | None = None  # where it lies, see `save`
    training_images: Profile | None = None  # None if it is not known
    # Of a detector that was fitted without a folder: removed with its last copy in the process.
    _temporary: "_TemporaryFolder | None" = None

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
        """Learn from normal images.

        Args:
          images: a folder, bare or as `data.folder` has it; paths or uint8 arrays [H, W, 3] in
            RGB; a `data.Dataset`; a data set's name, such as "elpv/mono", or a configuration that
            names one. Some of them are held out for thresholds: see `config.data.holdout`.
          config: see `config.default`; or the name of a detector, for its recipe; None: FastFlow.
          workdir: run folder, as of `main`: an interrupted fit goes on there, and a finished one
            is loaded, with the thresholds that it was saved with. None: a temporary one; `save`
            keeps the detector.
          groups: a label per image of a list or an array of images. Images with equal labels show
            the same part and are held out together. For directories see `config.data.groups`.
          calibrate: normal images of other parts than `images`, for calibration and thresholds;
            all of `images` are then trained on. None: `calibration/good` of a directory, or held
            out images.

        Raises:
          InputError: images or configuration that no training can have, a folder of another run,
            or groups that do not fit the images.
          Interrupted: SIGTERM or SIGINT came; in a `workdir`, the state is saved.
        """
        parallel.check_not_forked()
        folder = None if workdir is None else expanded(workdir)
        config, dataset = _asked_for(images, config, groups, calibrate)
        temporary = None
        if folder is None:
            temporary = _TemporaryFolder()
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
        """The detector in a folder that `save`, `fit` or `main` wrote.

        Of a run of several trainings, give the folder of one: of a category, variant or seed.

        Args:
          folder: of the detector.
          weights: the weight file of the backbone, if it is no longer where it was in training;
            None for the recorded one, or a file of its name in or next to the run directory. Its
            sha256 must be the recorded one.

        Raises:
          InputError: the folder holds no training, or several, which are listed; or the backbone's
            weights were not found, or are not those that it was trained with.
        """
        folder = expanded(folder)
        kept = saved.read(folder)
        kept.config.weights = saved.find_weights(kept, folder, weights)
        detector = cls.from_training(kept.config, kept.training, kept.seed)
        found = detector.backbone.weights
        if found.get("sha256") != kept.weights.get("sha256"):
            raise InputError(
                f"{folder} was trained with other weights of {kept.config.backbone}: "
                f"{kept.weights}, not {found}. Restore them, or train again."
            )
        return dataclasses.replace(
            detector,
            held_out=kept.held_out,
            image_threshold=kept.image_threshold,
            pixel_threshold=kept.pixel_threshold,
            folder=folder,
            training_images=kept.images,
        )

    @classmethod
    def from_training(cls, config: ConfigDict, folder: pathlib.Path, seed: int = 0) -> "Detector":
        """What scores, as a training left it; it has no thresholds.

        Args:
          config: filled, that it was trained with.
          folder: of one training, see `runs.experiment.run`.
          seed: that it was trained with: of random backbones.
        """
        parallel.check_not_forked()
        backbone = create_backbone(
            config.backbone, weights=config.weights, layers=config.layers, seed=seed
        )
        scorer = method(config.detector).load(config, _shapes(config, backbone), folder)
        return cls(config, backbone, scorer)

    def save(self, folder: str | os.PathLike | None = None) -> pathlib.Path:
        """Write what `load` reads to a new folder; or, where it lies, the thresholds alone.

        The backbone's weights are not copied: they are found again where they are now, see `load`.

        Raises:
          InputError: the folder holds something else, or the detector's own folder is gone.
        """
        if self.folder is None:
            raise InputError("a detector without a folder cannot be saved: make it by fit or load")
        if not self.folder.exists():
            raise InputError(
                f"{self.folder}, the folder of this detector, no longer exists. Bring it back, or "
                "load the detector from where it is now. If it was fitted without workdir, its "
                "folder was temporary: call save(FOLDER) before you pickle it."
            )
        folder = self.folder if folder is None else expanded(folder)
        limits = self.image_threshold, self.pixel_threshold
        saved.save(self.folder, folder, self.config.weights, *limits)
        return folder

    def with_threshold(
        self,
        image: Threshold | float | None = None,
        *,
        rate: float | None = None,
        pixel: Threshold | float | None = None,
        pixel_rate: float | None = None,
    ) -> "Detector":
        """The same detector with other thresholds; nothing is fitted again. `save` keeps them.

        Args:
          image: of scores: a number, or `thresholds.f1_optimal(scores, labels)`.
          rate: in its place, the part of normal images that may be called anomalous.
          pixel: of maps, likewise.
          pixel_rate: in its place, the part of normal images' pixels that masks may hold.

        Raises:
          InputError: a threshold and a rate, a rate that is not between 0 and 1, or a rate and no
            held-out images.
        """
        if (image is not None and rate is not None) or (
            pixel is not None and pixel_rate is not None
        ):
            raise InputError("give a threshold or a rate of false alarms, not both")
        held_out = self.held_out or HeldOut(np.zeros(0), np.zeros((0, 1)))
        if rate is not None:
            image = held_out.image_threshold(rate)
        if pixel_rate is not None:
            pixel = held_out.pixel_threshold(pixel_rate)
        given = {"image_threshold": image, "pixel_threshold": pixel}
        for name, t in given.items():
            value = t.value if isinstance(t, Threshold) else t
            if value is None:
                continue
            if not isinstance(value, numbers.Real) or np.isnan(value):
                raise InputError(f"{name} must be a number, not {value!r}")
        return dataclasses.replace(
            self,
            **{
                name: t if isinstance(t, Threshold) else Threshold(float(t))
                for name, t in given.items()
                if t is not None
            },
        )

    def predict(self, images: Images, *, tile: bool = False) -> Prediction | list[Prediction]:
        """Scores one image, or many: a `Prediction`, or a list of these.

        Args:
          images: a path, the content of a file, uint8 [H, W, 3] in RGB or [H, W], an image of
            Pillow's, or several of these, each of any size; of a directory, all images in it and
            below; of a file of several pages, all pages. Each is resized to the input's size as in
            training (`config.data.resize`), and its map back to its own.
          tile: cut images larger than the input into tiles of its size that overlap, so that
            details are seen as large as they are. The score is the highest of a tile, and the
            p-value that tile's, so that rates of false alarms are a tile's too: a normal image of
            k tiles is flagged up to k times as often. For a detector that was fitted on images of
            about the input's size.

        Raises:
          InputError: a file or array that is no image.
        """
        results = list(self.stream(images, tile=tile))
        return results[0] if is_one(images) and len(results) == 1 else results

    def stream(
        self,
        images: Images,
        *,
        tile: bool = False,
        on_error: Callable[[str, InputError], None] | None = None,
        live: bool = False,
    ) -> Iterator[Prediction]:
        """`predict`, one after the other, for more images than fit into memory.

        Args:
          images: see `predict`; an iterator may go on for ever.
          tile: see `predict`.
          on_error: `on_error(name, error)` is called for an image that cannot be read, and the rest
            goes on. None: the error is raised after the results of the images before.
          live: score each image before the next one is asked for, as for a camera. Otherwise
            batches of 32 are scored, and some more images are read ahead.
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

            # Each batch is blended into the maps of its images before the next one is cut.
            remaining, error = parts(), None
            while error is None:
                batch = collections.deque()
                try:
                    batch.extend(itertools.islice(remaining, size))
                except Exception as failure:  # of the images: what came before is scored first
                    error = failure
                if batch:
                    yield from self._predicted(batch)
                elif error is None:
                    return
            raise error

    def features(self, images: Images) -> Features:
        """What the scorer sees of images, [B, h, w, C] a scale."""
        found = []
        for _, image in self._all_inputs(images):
            if isinstance(image, InputError):
                raise image
            (part,) = image.parts
            extract = self._in_batches(lambda extract, _, x: extract(x), part.image[None])
            found.append(extract)
        return tuple(np.concatenate(scale) for scale in zip(*found, strict=True))

    def latents(self, features: Features) -> Features:
        """The z of features, [B, h, w, C] a scale: standard normal under the model."""
        self._invertible()
        return self._in_batches(lambda _, scorer, x: scorer.latents(x), features)

    def invert(self, latents: Features) -> Features:
        """The flow backwards: the features that have these z.

        Raises:
          InputError: a detector without z, or see `model.invert`.
        """
        self._invertible()
        return self._in_batches(lambda _, scorer, z: scorer.invert(z), latents)

    def sample(self, n: int = 1, *, seed: int = 0, temperature: float = 1.0) -> Features:
        """Features of normal images, as the flow imagines them: of z drawn at random.

        Args:
          n: how many.
          seed: of z.
          temperature: deviation of z, 1 in the model; lower ones are more typical.

        Raises:
          InputError: n is below 1, or see `invert`.
        """
        if n < 1:
            raise InputError(f"n is a number of images, 1 or more, not {n}")
        rng = np.random.default_rng(seed)
        shapes = _shapes(self.config, self.backbone)
        return self.invert(
            tuple(temperature * rng.standard_normal((n, *s), np.float32) for s in shapes)
        )

    def score(
        self, images: np.ndarray, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images -> scores [B] and anomaly maps [B, H, W].

        Args:
          images: [B, H, W, 3], normalised, B up to the batch size of the configuration.
          valid: bool [B, H, W], False in padding; None without padding. What lies there counts
            for nothing.
        """
        return self.scorer.score(self.extract(images), valid, size=images.shape[1:3])

    @functools.cached_property
    def extract(self) -> Callable[[np.ndarray], Features]:
        """Images [B, H, W, 3] -> what `scorer` scores, see `extract.extractor`."""
        return extractor_of(self.config, self.backbone)

    def _in_batches(self, function: Callable, *arrays: Any) -> Any:
        """`function(extract, scorer, *arrays)` of any number of images, in batches."""
        parallel.check_not_forked()

        def run(part):
            n = len(part[0] if isinstance(part[0], np.ndarray) else part[0][0])
            return function(*self._with_batch_size(next(b for b in _BATCH_SIZES if n <= b)), *part)

        return in_batches(run, arrays, _BATCH_SIZES[-1])

    @functools.cached_property
    def _with_batch_size(self) -> Callable[[int], tuple[Callable, Scorer]]:
        """Batch size -> extractor and scorer whose programs are compiled for it."""
        config, backbone, scorer = self.config, self.backbone, self.scorer

        def make(batch_size: int) -> tuple[Callable, Scorer]:
            c = config.copy_and_resolve_references()
            with c.unlocked():
                c.batch_size = batch_size
            return extractor_of(c, backbone), dataclasses.replace(scorer, config=c)

        return functools.cache(make)

    def _invertible(self) -> InvertibleScorer:
        if not isinstance(self.scorer, InvertibleScorer):
            raise InputError(
                f"The detector {self.config.detector} has no latents. Use fastflow for that."
            )
        return self.scorer

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

        # Images to be tiled are large: of few the decoded pixels fit into memory.
        calls = (functools.partial(start, given) for given in each(images))
        threads, logged = 0 if live else 1 if tile else None, set()
        with contextlib.closing(ahead(calls, threads)) as started:
            for first, rest in started:
                for name, inputs, unlike in itertools.chain([first], rest):
                    if new := unlike.keys() - logged:
                        _log_differences(name, [unlike[field] for field in unlike if field in new])
                        logged |= new
                    yield name, inputs

    def _predicted(self, batch: collections.deque[tuple[Outputs, Part]]) -> Iterator[Prediction]:
        """Scores a batch of parts; yields the predictions of images that are complete with it.

        The batch is emptied, so that the maps of its images are not held together.
        """
        scores, maps, likelihoods = self._in_batches(
            _predict, *stacked([part for _, part in batch])
        )
        for i in range(len(batch)):
            outputs, part = batch.popleft()
            outputs.add(part, scores[i], maps[i], None if likelihoods is None else likelihoods[i])
            if outputs.is_complete:
                yield self._prediction(outputs)

    def _prediction(self, outputs: Outputs) -> Prediction:
        score, anomaly_map = outputs.score, outputs.anomaly_map
        if not np.isfinite(score):
            raise InputError(
                f"{outputs.name} scores {score}: the training or the backbone's weights are "
                "broken, train anew"
            )
        image_limit, pixel_limit = self.image_threshold, self.pixel_threshold
        return Prediction(
            name=outputs.name,
            score=score,
            p_value=None if self.held_out is None else self.held_out.p_value(score),
            is_anomalous=None if image_limit is None else score > image_limit.value,
            anomaly_map=anomaly_map,
            mask=None if pixel_limit is None else anomaly_map > pixel_limit.value,
            log_likelihood=outputs.log_likelihood,
        )


def _predict(extract: Callable, scorer: Scorer, images: np.ndarray, valid: np.ndarray | None):
    """Scores [B], anomaly maps [B, H, W], and log-likelihoods [B] or None."""
    features = extract(images)
    if isinstance(scorer, LikelihoodScorer):
        return scorer.score_with_likelihood(features, valid)
    return *scorer.score(features, valid), None


def _log_differences(name: str, sentences: list[str]) -> None:
    _log.warning(
        "%s differs from the training images: it %s. Normal images may be flagged: use images like "
        "those of training, or train on images like these.",
        name,
        "; it ".join(sentences),
    )


class _TemporaryFolder:
    """A folder that is there as long as this object is, and no longer than the process.

    Copies and what is unpickled in the same process share the object; elsewhere there is None.
    """

    def __init__(self):
        self.path = tempfile.mkdtemp(prefix="fastflow_jax_")
        _temporary_folders[self.path] = self
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def __reduce__(self):
        return _temporary_folder, (self.path,)


_temporary_folders = weakref.WeakValueDictionary()  # of this process, by their paths


def _temporary_folder(path: str) -> _TemporaryFolder | None:
    return _temporary_folders.get(path)


def _asked_for(images, config, groups, calibrate) -> tuple[ConfigDict, data.Dataset]:
    """The filled configuration of a fit, and its training images as a data set."""
    if isinstance(images, ConfigDict):
        if config is not None:
            raise InputError("give a configuration that names a data set, or images and a config")
        images, config = None, images
    if isinstance(config, str):
        data.check_choice("the detector", config, DETECTORS)
        c = default()
        held_out = c.data.holdout
        c.update(recipe(config))
        c.data.holdout = held_out  # some recipes do without; thresholds do not
    else:
        c = default() if config is None else config.copy_and_resolve_references()
    path = expanded(images) if isinstance(images, str | pathlib.Path) else None
    with c.unlocked():
        if isinstance(images, str) and not path.exists():
            if images.partition("/")[0] not in data.DATASETS:
                raise InputError(
                    f"{images} is neither a folder nor a data set ({', '.join(data.DATASETS)})"
                )
            name_data(c, images)
        elif images is not None:
            is_folder = path is not None and path.is_dir()
            c.data.name, c.data.category = "folder", None
            c.data.root = str(path) if is_folder else None
    config = fill(c)
    if config.seeds > 1 or len(config.variants) or len(data.categories(config.data)) > 1:
        raise InputError("a detector has one seed, one variant and one category: main runs several")
    if isinstance(images, data.Dataset):
        dataset = images
    elif images is None or config.data.name != "folder" or config.data.root is not None:
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
    return config, dataclasses.replace(dataset, test=None, calibration=calibration)


def _shapes(config, backbone: Backbone) -> list[tuple[int, int, int]]:
    """(h, w, C) of each scale."""
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    maps = jax.eval_shape(backbone.module.apply, backbone.variables, images)
    return [m.shape[1:] for m in maps]
