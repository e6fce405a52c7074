"""`Detector`, the class that applications import: fit, load, save, predict."""

import dataclasses
import functools
import numbers
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fastflow_jax import data, parallel
from fastflow_jax.backbones import Backbone, open_backbone
from fastflow_jax.config import AUTO, default, fill, name_data, with_function
from fastflow_jax.data.arrays import Images, as_dataset, is_one
from fastflow_jax.data.inputs import stacked
from fastflow_jax.data.levels import Levels
from fastflow_jax.data.pipeline import kinds_of_pixels
from fastflow_jax.data.profile import Profile
from fastflow_jax.data.roi import AUTO as ROI_AUTO
from fastflow_jax.data.roi import CommonRegion
from fastflow_jax.data.tiling import Places, Tiling
from fastflow_jax.data.transforms import counted, normalise
from fastflow_jax.decision import Decision, Threshold, rounded_down
from fastflow_jax.detectors.base import (
    InvertibleScorer,
    PickledByFields,
    Scorer,
    method,
    recipe,
)
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import labelled
from fastflow_jax.evaluation.held_out import HeldOut
from fastflow_jax.export.detector import Options, Parity, export
from fastflow_jax.features import shift
from fastflow_jax.features.extract import Features
from fastflow_jax.features.foreground import Foreground, regions
from fastflow_jax.features.prepare import extractor_of, preparer
from fastflow_jax.features.shift import Reference, Shift
from fastflow_jax.features.split import split
from fastflow_jax.files import expanded
from fastflow_jax.prediction import Predictor, needs_masks
from fastflow_jax.runs import directory, durable, few_images, saved
from fastflow_jax.runs.durable import Saved
from fastflow_jax.runs.fit import fit
from fastflow_jax.runs.levels import with_levels
from fastflow_jax.scoring import (
    BATCH_SIZES,
    ImageScorer,
    in_batches,
    pure_function,
    resize_pixels,
    scoring_function,
    state_of,
)
from fastflow_jax.teach import update


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detector(PickledByFields, Predictor):
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
    backbone: Backbone  # with its weights
    scorer: Scorer  # from features to scores and maps
    held_out: HeldOut | None = None  # scores of held-out images; None if none were held out
    image_threshold: Threshold | None = None  # of image scores; None for scores without decisions
    pixel_threshold: Threshold | None = None  # of anomaly maps
    # Directory or .zip file that it was loaded from; None if it was fitted without `workdir`.
    folder: pathlib.Path | None = None
    training_images: Profile | None = None  # None in directories of older versions
    reference: Reference | None = None  # for `find_shift`; None in directories of older versions
    roi: CommonRegion | None = None  # region of interest of all images
    foreground: Foreground | None = None  # finds the region of interest of each image

    @classmethod
    def fit(
        cls,
        images: Images | data.Dataset | ConfigDict | Mapping[str, Images],
        *,
        config: ConfigDict | str | None = None,
        workdir: str | os.PathLike | None = None,
        groups: Sequence[Any] | None = None,
        calibrate: Images | None = None,
        backbone: Backbone | None = None,
        defects: Images | None = None,
    ) -> "Detector | Any":
        """Trains a detector on normal images, or one model of several products.

        Args:
          images: one of
            - a directory of images, bare or with the layout of `data.folder`;
            - paths, or uint8 arrays [H, W, 3] in RGB; uint16 with `config.data.bits`, and other
              types with `config.data.window`;
            - a `data.Dataset`;
            - the name of a data set, such as "elpv/mono";
            - a configuration that names a data set, without `config`;
            - a dictionary of the images of each product by its name.
            Some images are held out for calibration and thresholds, see `config.data.holdout`.
          config: the configuration, see `config.default`; or the name of a detector for its recipe.
            By default the number of images decides, see docs/few_images.md: k-NN below 16 images,
            otherwise FastFlow; below 100 images, none is held out.
          workdir: the run directory, as with `main`. An interrupted fit is continued; a finished
            one is loaded with its saved thresholds. By default a temporary one, which is removed;
            call `save` to keep the detector.
          groups: a label per image, if `images` is a list or an array. Images with equal labels
            show the same part and are held out together. For directories see `config.data.groups`.
          calibrate: normal images of other parts than `images`, for calibration and thresholds.
            All of `images` are then used for training. By default `calibration/good` of a
            directory if it exists, otherwise held-out images.
          defects: at least five defective images, which improve the image score if they can, see
            docs/labelled_defects.md.
          backbone: your own, from `Backbone.from_function`, instead of `config.backbone`.

        Returns:
          A `Detector`. A `Products` if `images` is a dictionary, or if `config.one_model` is set,
          which finds the products of mixed images.

        Raises:
          InputError: the images or the configuration do not suit a training, `workdir` has another
            run, the groups do not fit the images, a defective image is also a normal one, or the
            detector cannot learn from defects.
          Interrupted: SIGTERM or SIGINT was received; the state is saved in `workdir`.
        """
        parallel.check_not_forked()
        given = images if isinstance(images, ConfigDict) else config
        of_several = isinstance(given, ConfigDict) and given.one_model
        if of_several or isinstance(images, Mapping):
            from fastflow_jax.detector.products import Products

            if not (groups is calibrate is defects is None):
                raise InputError(
                    "groups, calibrate and defects are for one product. For several, set "
                    "config.data.groups."
                )
            return Products.fit(images, config=config, workdir=workdir, backbone=backbone)
        folder = None if workdir is None else expanded(workdir)
        chosen = fit_config(images, config, backbone)
        dataset = fit_dataset(images, fill(chosen), groups, calibrate)
        config = fill(with_levels(few_images.resolve(chosen, dataset), dataset))
        if defects is not None:
            labelled.check(config)
            of_defects = as_dataset(defects, levels=dataset.levels).train
            dataset = dataclasses.replace(dataset, defects=of_defects)
        if folder is not None:
            return cls._fit_in(folder, config, dataset, backbone)
        with tempfile.TemporaryDirectory(
            prefix="fastflow_jax_", ignore_cleanup_errors=True
        ) as temporary:
            detector = cls._fit_in(pathlib.Path(temporary), config, dataset, backbone)
        return dataclasses.replace(detector, folder=None)

    @classmethod
    def _fit_in(
        cls,
        folder: pathlib.Path,
        config: ConfigDict,
        dataset: data.Dataset,
        backbone: Backbone | None,
    ) -> "Detector":
        """Trains in a run directory, or continues its training, or loads a finished one."""
        with directory.claim(folder, config):
            if parallel.on_main(lambda: saved.is_finished(folder)):
                detector = cls.load(folder, backbone=backbone)
                contents = split(config, dataset).contents
                directory.check_same_data(folder, contents, detector.backbone.weights)
                return detector
            prepare = preparer(config, folder / "features", lambda category: dataset, backbone)
            prepared = prepare(config, config.data.category, config.seed)
            label = f"{dataset.name}: train"
            fit(config, prepared, seed=config.seed, directory=folder, label=label)
            parallel.on_main(lambda: shutil.rmtree(folder / "features", ignore_errors=True))
        return cls.load(folder, backbone=backbone)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        weights: str | os.PathLike | None = None,
        backbone: Backbone | None = None,
    ) -> "Detector":
        """Loads a detector that `save`, `fit` or `main` has written.

        Args:
          folder: the directory or .zip file. If a run has several trainings, the directory of one
            of them, that is, of a category, a variant or a seed.
          weights: weight file of the backbone, if the detector does not contain the weights and
            the file was moved after the training. By default the recorded file, or a file of its
            name in or next to the run directory. Its sha256 must be the recorded one.
          backbone: the backbone that was passed to `fit`, which is not saved.

        Raises:
          InputError: there is no detector, or there are several trainings, which are listed; a file
            is missing or damaged; or the weights of the backbone were not found, or are not those
            of the training.
        """
        parallel.check_not_forked()
        folder = expanded(folder)
        record = saved.read(folder)
        return cls.of_record(record, saved.load_backbone(record, folder, weights, backbone), folder)

    @classmethod
    def of_record(cls, record: Saved, backbone: Backbone, folder: pathlib.Path) -> "Detector":
        """The detector of a record that was read from a directory or a .zip file.

        Args:
          record: content of the directory or file.
          backbone: the backbone with its weights.
          folder: where the record was read from.
        """
        shapes, roi = _shapes(record.config, backbone), record.roi
        if roi is None and record.config.data.roi not in (None, ROI_AUTO):
            raise InputError(
                f"{folder} lacks its region of interest. Restore it from a copy, or train again."
            )
        return cls(
            config=record.config,
            backbone=backbone,
            scorer=method(record.config.detector).load(record.config, shapes, record.state),
            held_out=record.held_out,
            image_threshold=record.image_threshold,
            pixel_threshold=record.pixel_threshold,
            folder=folder,
            training_images=record.images,
            reference=record.reference,
            **_region(roi),
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
        backbone = open_backbone(config, seed)
        of_kind = method(config.detector)
        scorer = of_kind.load(config, _shapes(config, backbone), of_kind.read(config, folder))
        return cls(config, backbone, scorer, **_region(saved.read_region(folder)))

    def save(
        self, folder: str | os.PathLike | None = None, *, backbone: bool | None = None
    ) -> pathlib.Path:
        """Saves the detector for `load`; returns the path.

        It is written completely or not at all. docs/detector.md describes the format.

        Args:
          folder: a new directory, or a new file whose name ends with .zip. By default where the
            detector was loaded from; only the thresholds change there.
          backbone: whether to save the weights of the backbone. By default they are saved if they
            take less than 100 MB. A detector without them needs the weight file, the package or
            the hub that they came from.

        Raises:
          InputError: the path exists with other content or cannot be written; or no path was given
            and the detector has none, or it no longer exists.
        """
        path = self.folder if folder is None else expanded(folder)
        if path is None:
            raise InputError("This detector was not loaded from a path. Pass one to save it to.")
        if self.folder is not None and path.resolve() == self.folder.resolve() and path.exists():
            saved.change(path, self.config.weights, self.image_threshold, self.pixel_threshold)
            return path
        if folder is None:
            raise InputError(f"{path} of this detector no longer exists. Pass another path.")
        durable.write(path, self.record(), backbone=backbone)
        return path

    def record(self) -> Saved:
        """The content of a saved detector."""
        return Saved(
            config=self.config,
            weights=self.backbone.weights,
            state=self.scorer.state_dict(),
            held_out=self.held_out,
            image_threshold=self.image_threshold,
            pixel_threshold=self.pixel_threshold,
            images=self.training_images,
            reference=self.reference,
            backbone=self.backbone.state_dict(),
            roi=self.roi or self.foreground,
        )

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

    def update(
        self,
        images: Images,
        *,
        groups: Sequence[Any] | None = None,
        keep_threshold: bool = False,
    ) -> "Detector":
        """Returns a detector that also knows new normal images, without training.

        The images extend its memory banks and held-out scores, see docs/teaching.md. Logs what
        this means for the threshold, and which images may be defective.

        Args:
          images: normal images that were flagged, or that are of a new kind, such as under another
            lighting; see `predict`.
          groups: a label per image, equal for images of the same part, as in `fit`. By default
            `config.data.groups` is applied to their names.
          keep_threshold: keep the thresholds. For images that were chosen because they were
            flagged, which say nothing on the scores of others. By default the thresholds rise as
            far as the stated false-alarm rate on images like these needs it.

        Raises:
          InputError: the detector stores no normal images, an image cannot be read, there are no
            images or more than 1,000, or the memory banks are full.
        """
        found = update(self, images, groups=groups, keep_threshold=keep_threshold)
        found.log()
        return found.detector

    def as_function(self, *, any_size: bool = False) -> Callable[[jax.Array], dict[str, jax.Array]]:
        """The detector as a pure function, which can be jitted and exported.

        Args:
          any_size: resize images of any size inside the function, to within a grey level of
            `predict`, and maps back to their size. By default images must have the input size.

        Returns:
          A function of images, uint8 [B, H, W, 3] in RGB, with any B. It returns
          "score" [B] and "anomaly_map" [B, H, W], float32; and as far as the detector has held-out
          images and thresholds, "p_value" float32 [B], "is_anomalous" bool [B] and "mask" bool
          [B, H, W]. They are those of `Prediction` for images of this size. Of a detector that was
          trained on tiles, an image here is a tile: the score of a larger image is the highest
          score of its tiles, and its p-value and decision follow from this score.

        Raises:
          InputError: the score of the detector is not a pure function (SPADE); images are padded
            (`config.data.resize` of "pad"), and so have a padding mask as well; each image has a
            mask (`config.data.roi_dir`); or images of any size would be cropped.
        """
        function = scoring_function(self.scorer, likelihood=False)
        if function is None:
            raise InputError(
                f"The score of the detector {self.config.detector} is not a pure function. Use "
                "predict, or fit another detector."
            )
        if self.resize == "pad":
            raise InputError(
                "Images of this detector are padded, so their score depends on a padding mask as "
                "well. Fit with config.data.resize of square or crop."
            )
        if any_size and self.tiling is not None:
            raise InputError(
                "This detector scores tiles of images, which are cut outside of the function. "
                "Leave any_size out."
            )
        if self.needs_masks:
            raise InputError(
                "Each image of this detector has a mask, which is not part of the function. Fit "
                "with one mask of all images, config.data.roi=FILE, or with config.data.roi=auto."
            )
        if any_size and self.resize != "square":
            raise InputError(
                f"Images of this detector are resized by {self.resize!r}, which is not part of the "
                "function. Leave any_size out."
            )
        run = pure_function(self.config, self.backbone.module, function)
        state = parallel.on_default_device(state_of(self.backbone, self.scorer, self.foreground))
        kinds = self._kinds

        def of_images(images: jax.Array) -> dict[str, jax.Array]:
            pixels = resize_pixels(images, self.image_size) if any_size else images
            valid = None
            if kinds is not None:
                valid = jnp.broadcast_to(kinds, pixels.shape[:3])
            found = run(state, (pixels, valid))
            score, anomaly_map = found["score"], self._below_threshold(found, jnp)
            if any_size:
                anomaly_map = jax.image.resize(anomaly_map, images.shape[:3], "linear")
            decided = self.decision(score, anomaly_map)
            return {"score": score, "anomaly_map": anomaly_map, **decided}

        return of_images

    def export(
        self,
        file: str | os.PathLike,
        *,
        kind: str = "onnx",
        opset: int = 18,
        any_size: bool = False,
        runtime: str | os.PathLike | None = None,
    ) -> Parity:
        """Writes `as_function` to a file for a runtime without JAX.

        The file has the backbone, its weights, the thresholds and a description of itself. It is
        run on held-out images, if they are still available, and on images of random pixels, and is
        written only if its results are those of the detector.

        Args:
          file: file to write. An existing file is replaced.
          kind: "onnx", for `exported.Exported`, ONNX Runtime, OpenVINO and others; "html", a web
            page that scores images in the browser; "stablehlo", for `jax.export.deserialize` on
            a CPU, GPU or TPU; or "litert" (experimental), for LiteRT, one image at a time. The
            last two have their description in `<file>.json`. JAX reads StableHLO for six months
            after the release that wrote it.
          opset: of ONNX's operations.
          any_size: the ONNX model resizes images of any size itself, bilinearly. That of a page
            always does.
          runtime: for a page, the npm package onnxruntime-web, as the file that
            `npm pack onnxruntime-web` writes or as a directory.

        Returns:
          The differences between the file and the detector.

        Raises:
          InputError: the detector or its options cannot be exported, the packages of the format
            are missing, the directory of the file or the runtime does not exist, or
            the results differ by more than rounding.
        """
        options = Options(opset, any_size, None if runtime is None else expanded(runtime))
        return export(self, expanded(file), kind, options)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of model inputs."""
        return tuple(self.config.image_size)

    @property
    def resize(self) -> str:
        """`config.data.resize`."""
        return self.config.data.resize

    @functools.cached_property
    def levels(self) -> Levels | None:
        """`config.data.bits`, or the levels of `config.data.window`."""
        return Levels.of(self.config.data)

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut into tiles; None if they are not."""
        return Tiling.of(self.config.data)

    @functools.cached_property
    def places(self) -> Places | None:
        """Statistics of the places of tiles, with `config.data.aligned`."""
        table = None if self.held_out is None else self.held_out.places
        return None if table is None else Places(table)

    @property
    def decision(self) -> Decision:
        """The thresholds, and the scores of held-out images."""
        held_out = self.held_out
        known = () if held_out is None else (held_out.scores, held_out.groups, held_out.kinds)
        return Decision(self.image_threshold, self.pixel_threshold, *known)

    @property
    def colour_range(self) -> tuple[float, float] | None:
        """From m to m + 2 (q - m) of held-out maps, see `pictures.write_pictures`."""
        if self.held_out is None:
            return None
        low, high = self.held_out.typical_levels(0.5, 0.001)
        return low, high + (high - low)

    @property
    def batch_size(self) -> int:
        """Largest number of images that are scored together."""
        return BATCH_SIZES[0]

    def run(self, images: np.ndarray, valid: np.ndarray | None) -> dict[str, np.ndarray | None]:
        """Scores model inputs, see `Predictor.run`."""
        found = self._image_scorer(images, self._with_kinds(len(images), valid))
        means = found.pop("means")
        found["anomaly_map"] = self._below_threshold(found, np)
        region = found.pop("counted", None) if self.region_inside else None
        distance = self.reference and self.reference.distances(means)
        return found | {"distance": distance, "region": region}

    @property
    def needs_masks(self) -> bool:
        """Whether a mask of each image must be passed, see `config.data.roi_dir`."""
        return self.config.data.roi_dir is not None

    @property
    def region_inside(self) -> bool:
        """Whether the region of interest of an image is its foreground."""
        return self.foreground is not None

    @functools.cached_property
    def _kinds(self) -> np.ndarray | None:
        """Kinds of the pixels of all model inputs, uint8 [H, W], see `pipeline.as_input`."""
        if self.roi is None:
            return None
        return kinds_of_pixels(self.roi.mask, self.image_size, self.resize)

    def _with_kinds(self, n: int, valid: np.ndarray | None) -> np.ndarray | None:
        """Which pixels of n model inputs count, where neither masks nor tiles determine it."""
        if valid is not None and valid.dtype != bool:
            return valid
        if self.needs_masks:
            raise needs_masks()
        if self._kinds is None:
            return valid
        return np.broadcast_to(self._kinds, (n, *self.image_size))

    def _below_threshold(self, found: Mapping[str, Any], xp: Any) -> Any:
        """Anomaly maps of `pure_function`, at most at the pixel threshold where no pixel counts."""
        anomaly_map, limit, valid = found["anomaly_map"], self.pixel_threshold, found.get("counted")
        if limit is None or valid is None:
            return anomaly_map
        outside = xp.minimum(anomaly_map, rounded_down(limit.value))
        return xp.where(valid, anomaly_map, outside)

    def counted(self, features: Features, valid: np.ndarray | None) -> np.ndarray | None:
        """The pixels of model inputs that count, bool [B, H, W]; None if all do.

        Args:
          features: of the inputs.
          valid: see `Predictor.run`.
        """
        valid = counted(self._with_kinds(len(features[0]), valid))
        if self.foreground is None:
            return valid
        return regions(self.foreground, features, valid, self.image_size)

    @functools.cached_property
    def _image_scorer(self) -> ImageScorer:
        return ImageScorer(self.config, self.backbone, self.scorer, self.foreground)

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
        """Returns features of images, [B, h, w, C] per scale, as `scorer` takes them.

        Args:
          images: see `predict`.
        """
        spec, found = self.backbone.spec, []
        # Features do not depend on masks.
        whole = (lambda name, size: np.ones(size, bool)) if self.needs_masks else None
        for _, image in self.inputs(images, roi=whole):
            if isinstance(image, InputError):
                raise image
            pixels, valid = stacked(list(image.parts))
            normalised = normalise(pixels, spec.mean, spec.std, valid)
            found.append(self._in_batches(lambda extract, _, x: extract(x), normalised))
        return tuple(np.concatenate(scale) for scale in zip(*found, strict=True))

    def latents(self, features: Features) -> Features:
        """Returns latents of features, [B, h, w, C] per scale; standard normal under the model.

        Args:
          features: features [B, h, w, C] per scale, see `features`.

        Raises:
          InputError: the detector has no latents.
        """
        self._check_invertible()
        return self._in_batches(lambda _, scorer, x: scorer.latents(x), features)

    def invert(self, latents: Features) -> Features:
        """Returns the features of latents, [B, h, w, C] per scale; the inverse of `latents`.

        Args:
          latents: latents [B, h, w, C] per scale.

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
          valid: see `Predictor.run`. Pixels that do not count affect neither scores nor maps.

        Returns:
          Image scores [B] and anomaly maps [B, H, W].
        """
        features = self.extract(images)
        return self.scorer.score(features, self.counted(features, valid), size=images.shape[1:3])

    @functools.cached_property
    def extract(self) -> Callable[[np.ndarray], Features]:
        """Function from images [B, H, W, 3] to features, see `extract.extractor`."""
        return extractor_of(self.config, self.backbone)

    def _in_batches(self, function: Callable, *arrays: Any) -> Any:
        """Computes `function(extract, scorer, *arrays)` for any number of images in batches."""
        return in_batches(lambda n, part: function(*self.sized(n), *part), arrays)

    @functools.cached_property
    def sized(self) -> Callable[[int], tuple[Callable, Scorer]]:
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


def _region(roi: CommonRegion | Foreground | None) -> dict[str, Any]:
    """The field of a detector that has its region of interest."""
    return {"foreground" if isinstance(roi, Foreground) else "roi": roi}


def fit_config(
    images: Any, config: ConfigDict | str | None, backbone: Backbone | None = None
) -> ConfigDict:
    """The configuration of a fit, not filled; its `data` names `images` if they are a data set."""
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
        if config is None:
            c.detector = AUTO
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
    c = c if backbone is None else with_function(c, backbone)
    if c.seeds > 1 or len(c.variants) or (len(data.categories(c.data)) > 1 and not c.one_model):
        raise InputError(
            "A detector has one seed, one variant and one category. Train several with python -m "
            "fastflow_jax.main."
        )
    return c


def fit_dataset(
    images: Any, config: ConfigDict, groups: Any = None, calibrate: Any = None
) -> data.Dataset:
    """The images of a fit as a data set without test images."""
    if isinstance(images, data.Dataset):
        dataset = data.without_excluded(images, config.data.exclude)
    elif isinstance(images, ConfigDict) or config.data.name != "folder" or config.data.root:
        dataset = data.open_dataset(config.data)
    else:
        given = as_dataset(images, groups, Levels.of(config.data))
        dataset = data.without_excluded(given, config.data.exclude)
    if groups is not None and dataset.train.groups is None:
        raise InputError(
            "groups are for a list or an array of images. For a directory, set config.data.groups."
        )
    calibration = dataset.calibration
    if calibrate is not None:
        several = [calibrate] if is_one(calibrate) else calibrate
        calibration = as_dataset(several, levels=dataset.levels).train
    return dataclasses.replace(dataset, test=None, calibration=calibration)


def _shapes(config, backbone: Backbone) -> list[tuple[int, int, int]]:
    """(h, w, C) of each scale."""
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    maps = jax.eval_shape(backbone.module.apply, backbone.variables, images)
    return [m.shape[1:] for m in maps]
