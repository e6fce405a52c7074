"""`Products`: one model of several products."""

import dataclasses
import functools
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fastflow_jax import data, parallel
from fastflow_jax.backbones import Backbone
from fastflow_jax.config import AUTO, check_one_model, fill
from fastflow_jax.data.arrays import Images
from fastflow_jax.data.inputs import Outputs
from fastflow_jax.data.levels import Levels
from fastflow_jax.data.transforms import normalise
from fastflow_jax.decision import Threshold
from fastflow_jax.detector.detector import Detector, fit_config, fit_dataset
from fastflow_jax.detectors.base import PickledByFields
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.held_out import HeldOut
from fastflow_jax.features.extract import image_means
from fastflow_jax.features.gate import Gate
from fastflow_jax.features.prepare import preparer
from fastflow_jax.features.split import split
from fastflow_jax.files import expanded
from fastflow_jax.prediction import Masks, Prediction, Predictor
from fastflow_jax.runs import directory, durable, saved
from fastflow_jax.runs.fit import fit
from fastflow_jax.runs.products import (
    SHARED,
    Membership,
    discovered,
    fit_shared,
    needed,
    of_several,
    read_products,
    write_products,
)
from fastflow_jax.scoring import in_batches

_log = logging.getLogger(__name__)
_FEWEST = 19  # held-out images that a false-alarm rate of 5 % needs


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Products(PickledByFields, Predictor):
    """Anomaly detectors of several products in one model.

    They share the backbone, and FastFlow detectors one flow per scale that is conditioned on the
    product. Norm, memory banks, calibration and thresholds are those of each product. The product
    of an image is given, or that of the nearest training image, see `gate.Gate`.

    >>> from fastflow_jax import Detector
    >>> model = Detector.fit({"bottle": "photos/bottle", "screw": "photos/screw"})
    >>> result = model.predict("new.jpg")
    >>> result.product, result.is_known, result.is_anomalous
    ('screw', True, False)
    """

    detectors: Mapping[str, Detector]  # by the name of the product
    folder: pathlib.Path | None = None  # see `Detector.folder`

    @classmethod
    def fit(
        cls,
        images: Mapping[str, Images] | Images | data.Dataset,
        *,
        config: ConfigDict | str | None = None,
        workdir: str | os.PathLike | None = None,
        backbone: Backbone | None = None,
    ) -> "Products":
        """Trains one model of several products, see `Detector.fit`.

        Args:
          images: normal images of each product by its name; or a configuration that names a data
            set with several categories; or images of unnamed products together, which are found
            and named by their numbers, see `gate.find_products`.
          config: see `Detector.fit`.
          workdir: see `Detector.fit`.
          backbone: see `Detector.fit`.

        Raises:
          InputError: see `Detector.fit` and `config.check_one_model`; there are fewer than two
            products, or too few images of one to recognise it.
          Interrupted: SIGTERM or SIGINT was received; the state is saved in `workdir`.
        """
        parallel.check_not_forked()
        chosen = fit_config([] if isinstance(images, Mapping) else images, config, backbone)
        if chosen.detector == AUTO:
            chosen.detector = "fastflow"
        config = fill(chosen)
        check_one_model(config)
        if workdir is not None:
            return cls._fit_in(expanded(workdir), config, images, backbone)
        with tempfile.TemporaryDirectory(
            prefix="fastflow_jax_", ignore_cleanup_errors=True
        ) as temporary:
            model = cls._fit_in(pathlib.Path(temporary), config, images, backbone)
        each = {k: dataclasses.replace(d, folder=None) for k, d in model.detectors.items()}
        return cls(each)

    @classmethod
    def _fit_in(
        cls, folder: pathlib.Path, config: ConfigDict, images: Any, backbone: Backbone | None
    ) -> "Products":
        with directory.claim(folder, config):
            features = folder / "features"
            datasets = _datasets(images, config, features, backbone)
            config = of_several(config, len(datasets))
            if read_products(folder) is not None:
                return cls._finished(folder, config, datasets, backbone)
            prepare = preparer(config, features, lambda name: datasets[str(name)], backbone)
            prepared = {name: prepare(config, name, config.seed) for name in datasets}
            shared = fit_shared(config, prepared, folder / SHARED, config.seed)
            places = {name: f"product_{i}" for i, name in enumerate(datasets)}
            for i, (name, place) in enumerate(places.items()):
                fit(
                    config,
                    prepared.pop(name),
                    seed=config.seed,
                    directory=folder / place,
                    member=Membership(i, shared),
                    label=f"{name}: train",
                )
            write_products(folder, places)
            parallel.on_main(lambda: shutil.rmtree(features, ignore_errors=True))
            return cls.load(folder, backbone=backbone)

    @classmethod
    def _finished(
        cls,
        folder: pathlib.Path,
        config: ConfigDict,
        datasets: Mapping[str, data.Dataset],
        backbone: Backbone | None,
    ) -> "Products":
        """Loads a finished model after a check that it was trained on the same images."""
        model = cls.load(folder, backbone=backbone)
        if model.detectors.keys() != datasets.keys():
            raise InputError(f"{folder} has a model of other products. Pass another workdir.")
        for name, detector in model.detectors.items():
            contents = split(config, datasets[name]).contents
            assert detector.folder is not None
            directory.check_same_data(detector.folder, contents, detector.backbone.weights)
        return model

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike,
        *,
        weights: str | os.PathLike | None = None,
        backbone: Backbone | None = None,
    ) -> "Products":
        """Loads a model of `fit`, `save`, or of a run with `config.one_model`.

        Args:
          folder: its directory.
          weights: see `Detector.load`.
          backbone: see `Detector.load`.

        Raises:
          InputError: there is no such model, or see `Detector.load`.
        """
        parallel.check_not_forked()
        path = expanded(folder)
        places = read_products(path)
        if places is None:
            raise InputError(
                f"{path} has no model of several products. Pass the directory of one, or use "
                "Detector.load."
            )
        records = {name: saved.read(place) for name, place in places.items()}
        first = next(iter(records))
        backbone = saved.load_backbone(records[first], places[first], weights, backbone)
        common = records[first].state
        detectors = {}
        for name, record in records.items():
            record.config.weights = records[first].config.weights
            whole = dataclasses.replace(record, state={**common, **record.state})
            detectors[name] = Detector.of_record(whole, backbone, places[name])
        return cls(_with_pooled_thresholds(detectors), path)

    def save(self, folder: str | os.PathLike, *, backbone: bool | None = None) -> pathlib.Path:
        """Saves the model for `load`; returns the path.

        Arrays that all products share are stored with the first one only.

        Args:
          folder: a new directory.
          backbone: see `Detector.save`.

        Raises:
          InputError: the directory exists and is not empty, or cannot be written.
        """
        path = expanded(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} exists. Save to a new directory.")
        places = {name: f"product_{i}" for i, name in enumerate(self.detectors)}
        common: Mapping[str, np.ndarray] = {}
        for name, place in places.items():
            record = self.detectors[name].record()
            own = {k: v for k, v in record.state.items() if not _is_same(common.get(k), v)}
            only_first = dataclasses.replace(record, state=own, backbone=None)
            durable.write(path / place, only_first if common else record, backbone=backbone)
            common = common or record.state
        write_products(path, places)
        return path

    def export(self, file: str | os.PathLike, **options: Any) -> None:
        """Refuses: a product is exported by itself, `detectors[name].export(file)`.

        Args:
          file: path that is named in the message.
          **options: ignored.
        """
        raise InputError(
            f"{file} is not written: a model of several products is not exported as a whole. Use "
            "the export of one product, model.detectors[name].export(file)."
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of model inputs."""
        return self._first.image_size

    @property
    def resize(self) -> str:
        """`config.data.resize`."""
        return self._first.resize

    @property
    def levels(self) -> Levels | None:
        """See `Detector.levels`."""
        return self._first.levels

    @property
    def batch_size(self) -> int:
        """Largest number of images that are scored together."""
        return self._first.batch_size

    @property
    def training_images(self) -> None:
        """None: the product of an image is unknown when it is read."""

    @property
    def image_threshold(self) -> Threshold | None:
        """Threshold of image scores of the first product; None if there are no thresholds."""
        return self._first.image_threshold

    @property
    def pixel_threshold(self) -> Threshold | None:
        """Threshold of anomaly maps of the first product."""
        return self._first.pixel_threshold

    def with_threshold(
        self, *, rate: float | None = None, pixel_rate: float | None = None
    ) -> "Products":
        """Returns a copy with the thresholds of a false-alarm rate, see `Detector`.

        Args:
          rate: false-alarm rate of images of each product; None leaves their thresholds.
          pixel_rate: false-alarm rate of pixels, likewise.
        """
        rates = {"rate": rate, "pixel_rate": pixel_rate}
        each = {name: d.with_threshold(**rates) for name, d in self.detectors.items()}
        return dataclasses.replace(self, detectors=each)

    def for_prediction(self, prediction: Prediction) -> Detector:
        """The detector of the product of a prediction."""
        assert prediction.product is not None
        return self.detectors[prediction.product]

    def predict(
        self, images: Images, *, product: str | None = None, tile: bool = False, every: int = 1
    ) -> Prediction | list[Prediction]:
        """Scores one image or several, see `Detector.predict`.

        Args:
          images: see `Detector.predict`.
          product: of all images; by default each image shows the product that it is nearest to.
          tile: see `Detector.predict`. The product must be given.
          every: see `Detector.predict`.

        Raises:
          InputError: there is no such product, or it is missing with `tile`, or a file or an array
            is not an image.
        """
        if product is not None:
            return self.detector_of(product).predict(images, tile=tile, every=every)
        return super().predict(images, tile=tile, every=every)

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
        """Yields a `Prediction` per image, see `Detector.stream`.

        Raises:
          InputError: see `Detector.stream`; or `tile` is true, because the product of a tile cannot
            be found.
        """
        if tile:
            raise InputError(
                "The product of an image cannot be found from its tiles. Name the product, or "
                "leave tile out."
            )
        return super().stream(images, on_error=on_error, live=live, roi=roi, every=every)

    def detector_of(self, product: str) -> Detector:
        """The detector of a product; raises InputError if there is no such product.

        Args:
          product: name of the product.
        """
        if product not in self.detectors:
            raise InputError(
                f"The product {product!r} is unknown. Choose one of {', '.join(self.detectors)}."
            )
        return self.detectors[product]

    def run(self, images: np.ndarray, valid: np.ndarray | None) -> dict[str, np.ndarray | None]:
        """Scores model inputs, see `Predictor.run`; also returns "product" and "is_known" [B]."""
        first, n = self._first, len(images)
        spec = first.backbone.spec
        pixels = normalise(images, spec.mean, spec.std, valid)
        features = in_batches(lambda size, part: first.sized(size)[0](part), pixels)
        means = image_means(features, valid)
        found = self._gate(means)
        score, distance = np.empty(n, np.float32), np.empty(n)
        anomaly_map = np.empty((n, *self.image_size), np.float32)
        for i in np.unique(found.product):
            rows, detector = found.product == i, self._each[i]
            own = tuple(m[rows] for m in features), None if valid is None else valid[rows]
            score[rows], anomaly_map[rows] = in_batches(
                lambda size, part, of=detector: of.sized(size)[1].score(*part), own
            )
            assert detector.reference is not None
            distance[rows] = detector.reference.distances(means[rows])
        results = {"score": score, "anomaly_map": anomaly_map, "distance": distance}
        return results | {"product": found.product, "is_known": found.is_known}

    def prediction(self, outputs: Outputs) -> Prediction:
        """Returns the result of the detector of the product, with the name of the product."""
        name = [*self.detectors][outputs.product]
        prediction = self.detectors[name].prediction(outputs)
        return dataclasses.replace(prediction, product=name, is_known=outputs.is_known)

    @functools.cached_property
    def _gate(self) -> Gate:
        return Gate.fit([needed(name, d.reference) for name, d in self.detectors.items()])

    @property
    def _each(self) -> list[Detector]:
        return [*self.detectors.values()]

    @property
    def _first(self) -> Detector:
        return self._each[0]


def _datasets(
    images: Any, config: ConfigDict, folder: pathlib.Path, backbone: Backbone | None
) -> dict[str, data.Dataset]:
    """The images of each product by its name; `folder` is for features."""
    if isinstance(images, Mapping):
        return {name: _dataset(name, each, config) for name, each in images.items()}
    names = data.categories(config.data)
    if len(names) == 1:
        return discovered(config, fit_dataset(images, config), folder, backbone)
    open_category = data.opener(config.data)
    return {str(name): dataclasses.replace(open_category(name), test=None) for name in names}


def _dataset(name: Any, images: Any, config: ConfigDict) -> data.Dataset:
    """The images of a product as a data set of its name."""
    if not isinstance(name, str) or not name:
        raise InputError(f"The name of a product must be a text, not {name!r}.")
    c = config.copy_and_resolve_references()
    if isinstance(images, str | pathlib.Path):
        path = expanded(images)
        if not path.is_dir():
            raise InputError(f"{path}, the images of {name}, is not a directory. Pass another one.")
        with c.unlocked():
            c.data.root = str(path)
    return dataclasses.replace(fit_dataset(images, c), name=name)


def _with_pooled_thresholds(detectors: dict[str, Detector]) -> dict[str, Detector]:
    """Replaces the thresholds of detectors that have too few held-out images by common ones.

    A product with fewer than 19 held-out images cannot support a false-alarm rate of 5 %. Scores
    are calibrated per product, so that those of all products are pooled for it, if there are 19.
    """
    known = [d.held_out for d in detectors.values() if d.held_out is not None]
    if len(known) < len(detectors):
        return detectors
    pooled, found = _pooled(known), dict(detectors)
    if pooled.n_parts < _FEWEST:
        return detectors
    common_image, common_pixel = saved.default_thresholds(pooled)
    for name, detector in detectors.items():
        image = detector.image_threshold
        if image is None or image.kind != "image" or image.n >= _FEWEST:
            continue
        _log.warning(
            "%s has %d held-out images, too few for a false-alarm rate of 5 %%. Its thresholds and "
            "p-values are those of the %d held-out images of all products.",
            name,
            image.n,
            pooled.n_parts,
        )
        found[name] = dataclasses.replace(
            detector,
            held_out=pooled,
            image_threshold=common_image,
            pixel_threshold=common_pixel,
        )
    return found


def _pooled(several: list[HeldOut]) -> HeldOut:
    """The held-out images of several products as those of one."""
    groups, first = [], 0
    for each in several:
        own = np.arange(len(each.scores)) if each.groups is None else each.groups
        groups.append(np.unique(own, return_inverse=True)[1] + first)
        first += each.n_parts
    scores, tails = (
        np.concatenate([getattr(h, of) for h in several]) for of in ("scores", "tails")
    )
    return HeldOut(scores, tails, np.concatenate(groups))


def _is_same(one: np.ndarray | None, other: np.ndarray) -> bool:
    return one is not None and one.dtype == other.dtype and np.array_equal(one, other)
