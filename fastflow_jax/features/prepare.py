"""Data, backbone and features of a run, shared by the runs that need the same ones."""

import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax import data, parallel
from fastflow_jax.backbones import Backbone, open_backbone
from fastflow_jax.data import checks, roi
from fastflow_jax.data.changes import augmented, bounds_of, tampered
from fastflow_jax.data.pipeline import Batch, batches
from fastflow_jax.data.profile import Profile, profile_of
from fastflow_jax.data.tiles import Tiles, resized
from fastflow_jax.data.tiling import Tiling
from fastflow_jax.errors import InputError
from fastflow_jax.features import cache, siblings
from fastflow_jax.features.extract import (
    FeatureBatch,
    Features,
    TrainingFeatures,
    cached_features,
    extractor,
    maps_of,
    recomputed_features,
)
from fastflow_jax.features.foreground import Foreground, regions
from fastflow_jax.features.split import Split, split
from fastflow_jax.files import to_plain

_FEWEST_ALIGNED = 4  # held-out images of different parts, for statistics of the places of tiles

_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Training:
    """Features of the training and the held-out images of a run.

    With N training images and copies of them, row i + k N of `train` has image i in copy k, see
    `changes.with_copies`. Each held-out image is then changed once. If images are cut into tiles,
    the rows of `train` and `holdout` are tiles.
    """

    contents: list[str]  # see `Split.contents`
    train: TrainingFeatures
    holdout: Features | None
    holdout_valid: np.ndarray | None  # bool [N, H, W], see `Batch.valid`
    holdout_groups: np.ndarray | None  # int [N], of images, see `HeldOut.groups`
    holdout_tiles: Tiles | None  # the rows of `holdout`; None if they are images
    groups: np.ndarray | None  # int [N], see `Split.groups`
    image: np.ndarray | None  # int [N], see `Split.image`
    profile: Profile | None  # of the training images
    n_trained_on: int  # training images, without their copies
    defects: Features | None  # of images with labelled defects
    defects_valid: np.ndarray | None  # bool [D, H, W], see `Batch.valid`
    foreground: Foreground | None  # of config.data.roi=auto, if it can be separated


@dataclasses.dataclass(frozen=True)
class Prepared(_Training):
    """Data, backbone and features that a run starts from.

    Attributes:
      test: function of optional indices that yields all test images, or those at the indices, in
        batches with features in the place of `image`. The features are computed at the first call,
        and cached if those of the training images are. If images are cut into tiles, it yields all
        tiles of these images, without masks.
      test_tiles: the tiles of the test images; None if images are not cut.
    """

    dataset: data.Dataset
    backbone: Backbone
    test: Callable[..., Iterable[FeatureBatch]]
    test_tiles: Tiles | None


def is_augmented(config) -> bool:
    """Whether training images change from epoch to epoch."""
    return not config.augment.copies and any(bounds_of(config.augment).values())


def feature_fingerprint(config, seed: int) -> str:
    """Every setting that affects the features of an image. Runs with equal ones share features.

    The seed counts only for random weights, which differ between seeds.
    """
    plain = to_plain(config)
    fields = (
        *("backbone", "layers", "weights", "function", "mean", "std"),
        *("image_size", "length_power", "feature_dtype"),
    )
    values = [plain[f] for f in fields]
    of_data = ("resize", "tile", "resolution", "train_tiles", "bits", "window", "levels")
    values += [plain["data"][f] for f in of_data]
    return json.dumps([*values, seed if config.weights == "random" else None])


def preparer(
    config,
    folder: pathlib.Path,
    open_category: Callable[[str | None], data.Dataset] | None = None,
    backbone: Backbone | None = None,
) -> Callable[[Any, str | None, int], Prepared]:
    """Returns the function `(configuration, category, seed) -> Prepared` for runs on the same data.

    It keeps the last data set, backbone, training features and test features for the following
    calls that need the same ones. Features of images that categories share are computed once for
    all categories, see `data.Source.part_of`.

    Args:
      config: names the data set.
      folder: directory for features that do not fit in memory; those of an interrupted run are
        reused, see `cache.load_or_compute`. The caller removes it.
      open_category: function from a category to its data set; None to open `config.data`.
      backbone: of all configurations; None to create those that they name.
    """
    return _Preparer(folder, open_category or data.opener(config.data), backbone)


class KeepLast(Generic[T]):
    """Cache of one value: the one made for the last key."""

    def __init__(self):
        self._values: dict[Hashable, T] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The last value if it has this key; otherwise the value that `make` returns."""
        if key not in self._values:
            self._values.clear()  # before the next one is made, as both may not fit in memory
            self._values[key] = make()
        return self._values[key]


class _Preparer:
    """See `preparer`."""

    def __init__(
        self,
        folder: pathlib.Path,
        open_category: Callable[[str | None], data.Dataset],
        backbone: Backbone | None,
    ):
        self._folder, self._open_category = parallel.own_folder(folder), open_category
        self._backbone = backbone
        self._checked: set[str | None] = set()  # categories
        self._datasets: KeepLast[data.Dataset] = KeepLast()
        self._backbones: KeepLast[Backbone] = KeepLast()
        self._training: KeepLast[_Training] = KeepLast()
        self._test: KeepLast[tuple[Callable[..., Iterable[FeatureBatch]], Tiles | None]] = (
            KeepLast()
        )
        # Features of all images that categories share.
        self._shared_train: KeepLast[Features] = KeepLast()
        self._shared_test: KeepLast[Features] = KeepLast()

    def __call__(self, config, category: str | None, seed: int) -> Prepared:
        # The data come before the backbone, as they are missing more often.
        dataset = self._dataset(config, category)
        settings, tamper = feature_fingerprint(config, seed), _key(config.data.tamper)
        backbone = self._backbones.get(
            settings, lambda: open_backbone(config, seed, self._backbone)
        )
        of_data = [config.data[field] for field in ("name", "root", "dir")]
        fingerprint = {"settings": settings, "weights": backbone.weights, "data": of_data}
        cached = _FeatureCache(
            config, backbone, fingerprint, self._folder, dataset.name, category, self._shared_train
        )
        cached_test = dataclasses.replace(
            cached, fingerprint=fingerprint | {"tamper": tamper}, shared=self._shared_test
        )
        key = (settings, category, config.train.cache, config.batch_size)
        # Test images come first: broken files are found before training features are computed.
        test, test_tiles = self._test.get(
            (*key, tamper, config.data.mask_resize),
            lambda: _test_batches(cached_test, dataset.test),
        )
        augment = (_key(config.augment), seed if is_augmented(config) else None)
        training = self._training.get(
            (*key, config.data.holdout, config.data.groups, config.data.roi, *augment),
            lambda: _prepare_training(cached, dataset, seed),
        )
        if config.data.aligned:
            _check_aligned(training, test_tiles)
        if training.foreground is not None:
            test = _test_in_foreground(test, training.foreground, config.image_size)
        return Prepared(
            dataset=dataset, backbone=backbone, test=test, test_tiles=test_tiles, **vars(training)
        )

    def _dataset(self, config, category: str | None) -> data.Dataset:
        """The data set of a category, checked once, with its test images tampered as configured."""

        def get():
            return self._datasets.get(
                category, lambda: roi.with_regions(self._open_category(category), config.data)
            )

        parallel.on_main(lambda: get() and None)  # it may prepare files for the other processes
        dataset = _at_resolution(config, get())
        if not dataset.test:
            return dataset
        train, test = dataset.train, dataset.test
        if category not in self._checked:
            self._checked.add(category)
            found = parallel.on_main(lambda: checks.tested_on_training_images(train, test))
            _warn(dataset.name, found)
        return dataclasses.replace(dataset, test=tampered(test, config.data.tamper))


def _check_aligned(training: _Training, test: Tiles | None) -> None:
    """Raises InputError if `config.data.aligned` does not suit the images, before the training."""
    held_out, groups = training.holdout_tiles, training.holdout_groups
    assert held_out is not None
    sizes = {*held_out.sizes, *(() if test is None else test.sizes)}
    if len(sizes) > 1:
        (height, width), (other, wide), *_ = sorted(sizes)
        raise InputError(
            f"config.data.aligned needs images of one size, but there are {width} x {height} and "
            f"{wide} x {other} pixels. Leave it out, or cut the images to one size."
        )
    n = len(held_out.sizes) if groups is None else len(np.unique(groups))
    if n < _FEWEST_ALIGNED:
        unit = "images" if groups is None else "groups of images"
        raise InputError(
            f"config.data.aligned needs {_FEWEST_ALIGNED} held-out {unit}, but there are {n}. Set "
            "config.data.holdout higher, or leave it out."
        )


def _at_resolution(config, dataset: data.Dataset) -> data.Dataset:
    """The data set with images that have the resolution of their tiles."""
    how = config.data.resolution, config.data.mask_resize
    of = {name: getattr(dataset, name) for name in ("train", "test", "calibration")}
    return dataclasses.replace(dataset, **{k: v and resized(v, *how) for k, v in of.items()})


# Titles of features in messages.
_KINDS = {
    "train": "features",
    "holdout": "held-out features",
    "unchanged": "features of unchanged held-out images",
    "test": "test features",
    "defects": "features of labelled defects",
}


@dataclasses.dataclass(frozen=True)
class _FeatureCache:
    """Computes and caches the features of images for one backbone and configuration."""

    config: Any
    backbone: Backbone
    fingerprint: dict  # see `cache.load_or_compute`; without the category
    folder: pathlib.Path  # for features on disk
    dataset: str
    category: str | None
    shared: KeepLast[Features] | None  # of all images that categories share; None to share none

    @property
    def title(self) -> str:
        """First words of messages and progress bars."""
        return self.category or self.dataset

    def has_valid(self, source: data.Source) -> bool:
        """Whether some pixels of model inputs do not count, by padding or a mask."""
        return self.config.data.resize == "pad" or source.roi is not None

    def compute(self, source: data.Source, rows: np.ndarray, kind: str) -> Features:
        """Features of the images at `rows`, int [N]: [N, h, w, C] per scale.

        `kind` is a key of `_KINDS`; it names the features in messages and on disk.
        """
        # Padding masks are not shared, so features of padded images are not either.
        is_whole = source.part_of is not None and not self.has_valid(source)
        if self.shared is not None and source.part_of is not None and is_whole:
            whole, places = source.part_of
            places = np.arange(len(whole))[places][rows]
            of_all = dataclasses.replace(self, category=None, shared=None)
            pool = "test" if kind == "test" else "train"
            maps_of_all = self.shared.get(
                json.dumps(self.fingerprint),
                lambda: of_all.compute(whole, np.arange(len(whole)), pool),
            )
            return cast(Features, tuple(cache.Rows(maps, places) for maps in maps_of_all))
        config, backbone = self.config, self.backbone
        maps = maps_of(backbone.module, config.length_power, config.feature_dtype)
        image = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)

        def compute(places):
            for batch in feature_batches(config, backbone, source, rows[places]):
                yield batch.features

        return cache.load_or_compute(
            compute,
            self.fingerprint | {"category": self.category},
            [source.versions[i] for i in rows],
            jax.eval_shape(maps, backbone.variables, image),
            block=config.batch_size,
            location=config.train.cache,
            folder=self.folder / kind,
            title=f"{self.title}: {_KINDS[kind]}",
        )

    def masks_and_valid(
        self, source: data.Source, rows: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Masks and `Batch.valid` of the images at `rows`, bool [N, H, W], or None without any."""

        def read(rows, size):
            for batch in image_batches(self.config, self.backbone, source, rows, size):
                yield batch.mask, batch.valid

        size = self.config.batch_size
        parts = tqdm(
            parallel.shared_out(read, rows, size),
            total=-(-len(rows) // size),
            desc=f"{self.title}: images",
            unit="batch",
            leave=False,
            dynamic_ncols=True,
        )
        masks, valid = (
            None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True)
        )
        return masks, valid

    def valid(self, source: data.Source, rows: np.ndarray) -> np.ndarray | None:
        """`Batch.valid` of the images at `rows`, bool [N, H, W]; None if all pixels count."""
        return self.masks_and_valid(source, rows)[1] if self.has_valid(source) else None


def image_batches(
    config, backbone: Backbone, source: data.Source, indices=None, batch_size: int | None = None
) -> Iterator[Batch]:
    """Batches of input images of a backbone: all of `source`, or those at `indices`."""
    return batches(
        source,
        image_size=config.image_size,
        mean=backbone.spec.mean,
        std=backbone.spec.std,
        batch_size=batch_size or config.batch_size,
        indices=indices,
        resize_by=config.data.resize,
        mask_resize=config.data.mask_resize,
    )


def extractor_of(
    config, backbone: Backbone, size: int | None = None
) -> Callable[[np.ndarray], Features]:
    """`extract.extractor` of a configuration, for batches of `size`; default `batch_size`."""
    c = config
    size = size or c.batch_size
    return extractor(backbone, c.length_power, c.parallel, size, c.feature_dtype)


def feature_batches(
    config, backbone: Backbone, source: data.Source, indices=None
) -> Iterator[FeatureBatch]:
    """`image_batches` with features in the place of images; each process computes its share."""
    extract = extractor_of(config, backbone)

    def read(rows, size):
        for batch in image_batches(config, backbone, source, rows, size):
            yield FeatureBatch(extract(batch.image), *batch[1:])

    rows = np.arange(len(source)) if indices is None else np.asarray(indices)
    return parallel.shared_out(read, rows, config.batch_size)


def _key(section: ConfigDict) -> str:
    return json.dumps(to_plain(section))


def _warn(title: str, message: str | None) -> None:
    """Logs the result of a check of the data, if there is one."""
    if message is not None:
        _log.warning(f"{title}: {message}")


def _prepare_training(cached: _FeatureCache, dataset: data.Dataset, seed: int) -> _Training:
    """Computes the features of the training and the held-out images."""
    config, images = cached.config, split(cached.config, dataset)
    profile = profile_of(images.source, images.train)
    _warn(cached.title, checks.dark_images(images.source))
    defects = defects_valid = None
    if images.defects is not None:
        rows = np.arange(len(images.defects))
        defects = cached.compute(images.defects, rows, "defects")
        defects_valid = cached.valid(images.defects, rows)
    parts = images
    if config.augment.copies:
        parts = images.with_copies(config.augment)
        fingerprint = cached.fingerprint | {"augment": _key(config.augment)}
        cached = dataclasses.replace(cached, fingerprint=fingerprint, shared=None)
    if config.data.tile is not None:
        parts = parts.tiled(config)
    is_cached = config.train.cache != "none" and not is_augmented(config)
    if not is_cached:  # only held-out features are cached: do not compute those of all categories
        cached = dataclasses.replace(cached, shared=None)
    holdout = holdout_valid = None
    if len(parts.held_out):
        holdout = cached.compute(parts.held_out_source, parts.held_out, "holdout")
        holdout_valid = cached.valid(parts.held_out_source, parts.held_out)
    if is_cached:
        train = _cached_training(cached, parts)
        if holdout is not None and parts.held_out_tiles is None:
            _warn_of_siblings(cached, images, train, holdout)
    else:
        train = _recomputed_training(cached, parts, seed)
    if defects is not None:
        _check_labels(images, defects, train, holdout)
    training = _Training(
        contents=images.contents,
        train=train,
        holdout=holdout,
        holdout_valid=holdout_valid,
        holdout_groups=parts.held_out_groups if len(parts.held_out) else None,
        holdout_tiles=parts.held_out_tiles,
        groups=parts.groups,
        image=parts.image,
        profile=profile,
        n_trained_on=len(images.train),
        defects=defects,
        defects_valid=defects_valid,
        foreground=None,
    )
    if config.data.roi == roi.AUTO:
        training = _in_foreground(cached, training)
    if training.train.valid is not None and (config.data.roi or config.data.roi_dir):
        share = training.train.valid.mean()
        _log.info(
            f"{cached.title}: {share:.0%} of the training pixels are in the region of interest."
        )
    return training


def _in_foreground(cached: _FeatureCache, training: _Training) -> _Training:
    """Fits the foreground of `config.data.roi=auto`, in which alone pixels count then."""
    size, train = cached.config.image_size, training.train
    found = Foreground.fit(train, size)
    if found is None:
        _log.warning(
            f"{cached.title}: no foreground can be separated from a background, so all pixels "
            "count, as without config.data.roi=auto. Pass a mask, --config.data.roi=FILE, if only "
            "a part of the images is of interest."
        )
        return training

    def counted(maps: Features | None, valid: np.ndarray | None) -> np.ndarray | None:
        return None if maps is None else regions(found, maps, valid, size)

    valid = np.concatenate([regions(found, maps, seen, size) for maps, seen in train.parts()])
    return dataclasses.replace(
        training,
        train=train.with_valid(valid),
        holdout_valid=counted(training.holdout, training.holdout_valid),
        defects_valid=counted(training.defects, training.defects_valid),
        foreground=found,
    )


def _test_in_foreground(
    test: Callable[..., Iterable[FeatureBatch]], foreground: Foreground, size: tuple[int, int]
) -> Callable[..., Iterable[FeatureBatch]]:
    """`Prepared.test` with the pixels that count."""

    def batches_of(indices=None) -> Iterator[FeatureBatch]:
        for batch in test(indices):
            valid = regions(foreground, batch.features, batch.valid, size)
            yield batch._replace(valid=valid)

    return batches_of


def _check_labels(
    images: Split, maps: Features, train: TrainingFeatures, holdout: Features | None
) -> None:
    """Raises InputError if a labelled defect is also a normal image; `maps` are its features."""
    assert images.defects is not None
    if train.cached is not None:
        unchanged = tuple(m[: len(images.train)] for m in train.cached)
        _check_defects(images.defects, maps, images.source, images.train, unchanged)
    if holdout is not None:
        normal = images.held_out_source, images.held_out, holdout
        _check_defects(images.defects, maps, *normal)


def _check_defects(
    defects: data.Source, maps: Features, normal: data.Source, rows: np.ndarray, others: Features
) -> None:
    """Raises InputError if an image is among the defects and among the normal images.

    Each defect is compared with the normal image of the most similar features.

    Args:
      defects: images with labelled defects.
      maps: their features.
      normal: source of normal images.
      rows: int [N], the normal images in it.
      others: features of these, [N, h, w, C] per scale.
    """
    for i, nearest in enumerate(siblings.nearest_rows(maps, others)):
        other = int(rows[nearest])
        if np.array_equal(defects[i].image, normal[other].image):
            raise InputError(
                f"{defects.names[i]} is a defect, but equals the normal image "
                f"{normal.names[other]}. Remove it from one of them."
            )


def _cached_training(cached: _FeatureCache, parts: Split) -> TrainingFeatures:
    maps = cached.compute(parts.source, parts.train, "train")
    size = cache.n_bytes(len(parts.train), maps)
    fits = cache.fits_on_device(size, cached.config.train.cache)
    on_device = not parallel.any_process(not fits)
    if not parallel.on_cpu():
        how = "held on the device" if on_device else "sent to the device step by step"
        _log.info(f"{cached.title}: during training, features are {how}.")
    return cached_features(maps, cached.valid(parts.source, parts.train), on_device)


def _recomputed_training(cached: _FeatureCache, parts: Split, seed: int) -> TrainingFeatures:
    config, backbone, source = cached.config, cached.backbone, parts.source

    def batches_of(epoch, rows, size):
        images = augmented(source, config.augment, seed, epoch) if is_augmented(config) else source
        return image_batches(config, backbone, images, parts.train[rows], size)

    size = config.train.batch_size
    extract = extractor_of(config, backbone, size)
    valid = cached.valid(source, parts.train)
    return recomputed_features(len(parts.train), batches_of, extract, size, valid)


def _warn_of_siblings(
    cached: _FeatureCache, images: Split, train: TrainingFeatures, holdout: Features
) -> None:
    """Warns if held-out images seem to show the same parts as training images.

    Only unchanged images are compared, because an image is a sibling of its copies.
    """
    maps = train.cached
    assert maps is not None
    if cached.config.augment.copies:
        maps = tuple(m[: len(images.train)] for m in maps)
        holdout = cached.compute(images.held_out_source, images.held_out, "unchanged")
    same_source = images.held_out_source is images.source and images.held_out_groups is None
    found = siblings.find(maps, holdout, same_source=same_source)
    if found is None:
        return
    held_out = images.held_out_source.names[images.held_out[found.held_out]]
    trained_on = images.source.names[images.train[found.trained_on]]
    _log.warning(
        f"{cached.title}: {found.kind}, such as {held_out} and {trained_on}. If several images "
        "show the same part, stated false-alarm rates do not hold for new parts. Pass "
        "--config.data.groups (folder, a .csv file or a regular expression) to name the images "
        "that belong together, or put images of other parts into calibration/good."
    )


def _test_batches(
    cached: _FeatureCache, source: data.Source | None
) -> tuple[Callable[..., Iterable[FeatureBatch]], Tiles | None]:
    """See `Prepared.test` and `Prepared.test_tiles`."""
    config = cached.config
    tiling = Tiling.of(config.data)
    if source is None:
        return lambda indices=None: (), None
    if tiling is None:
        return _batches_of(cached, source), None
    every = np.arange(len(source))
    if source[0].mask is not None:
        masks, _ = cached.masks_and_valid(source, every)
        assert masks is not None
        _warn(cached.title, checks.inverted_masks(masks, source))
        _warn(cached.title, checks.cut_masks(source))
    tiles = Tiles.of(source, tiling, config.image_size, config.data.resize)
    of_tiles = _batches_of(cached, tiles.source)
    return lambda indices=None: of_tiles(tiles.rows(every if indices is None else indices)), tiles


def _batches_of(
    cached: _FeatureCache, source: data.Source
) -> Callable[..., Iterable[FeatureBatch]]:
    """The function of `Prepared.test` for a source of images, or of tiles."""
    config, every = cached.config, np.arange(len(source))
    if config.train.cache == "none":
        return lambda indices=None: feature_batches(config, cached.backbone, source, indices)
    masks = valid = None
    has_masks = source.part_of is None and source[0].mask is not None
    if has_masks or cached.has_valid(source):
        # Masks and padding are read at once, so that broken images and masks of a wrong size are
        # found before hours of training. The features are computed after it.
        masks, valid = cached.masks_and_valid(source, every)
        if has_masks and masks is not None:
            _warn(cached.title, checks.blank_masks(masks, source))
            _warn(cached.title, checks.inverted_masks(masks, source))
            _warn(cached.title, checks.cut_masks(source))

    @functools.cache
    def features() -> Features:
        return cached.compute(source, every, "test")

    def batches_of(indices=None):
        rows = every if indices is None else np.asarray(indices)
        for i in range(0, len(rows), config.batch_size):
            part = rows[i : i + config.batch_size]
            mask, padding = (None if a is None else a[part] for a in (masks, valid))
            maps = tuple(m[part] for m in features())
            yield FeatureBatch(maps, mask, source.labels[part], part, padding)

    return batches_of
