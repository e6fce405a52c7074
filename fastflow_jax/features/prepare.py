"""Data, backbone and features: made once, and shared by all runs that need the same."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax import data, parallel
from fastflow_jax.backbones import Backbone, create_backbone
from fastflow_jax.data import checks
from fastflow_jax.data.changes import augmented, tampered
from fastflow_jax.data.groups import labels_of
from fastflow_jax.data.pipeline import Batch, batches
from fastflow_jax.data.profile import Profile, profile_of
from fastflow_jax.errors import InputError
from fastflow_jax.features import cache, siblings
from fastflow_jax.features.extract import (
    Features,
    TrainingFeatures,
    cached_features,
    extractor,
    maps_of,
    recomputed_features,
)
from fastflow_jax.files import to_plain


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run starts from."""

    dataset: data.Dataset
    backbone: Backbone
    contents: list[str]  # see `Split.contents`
    train: TrainingFeatures
    holdout: Features | None
    holdout_valid: np.ndarray | None  # bool [N, H, W], see `Batch.valid`
    holdout_groups: np.ndarray | None  # int [N], see `HeldOut.groups`
    # The test images, or those of given indices, in batches with features in the place of `image`.
    # These are computed when they are first asked for, and then kept as those of the training
    # images are; or computed again each time.
    test: Callable[..., Iterable[Batch]]
    profile: Profile | None  # of the images to train on


def split_holdout(
    n: int, part: float, groups: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out: one, drawn, of each stretch of the file order.

    Stretches follow what drifts from the first file to the last; the draw follows what comes in
    turns, like several cameras, of which every so many-th file would be always the same. A fixed
    choice, the same for all seeds. At least one image is left on either side.

    Args:
      n: number of images.
      part: of them that is held out; 0: none.
      groups: a label per image. Images with equal labels are on the same side, and `part` is one of
        the groups, in the order of their first images.

    Raises:
      InputError: there is only one group.
    """
    if groups is not None:
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))[group]  # of each image's group, by its first image
        if part > 0 and len(first) < 2:
            raise InputError(
                "All training images belong to one group, so none can be held out. Check "
                "data.groups, put images of other parts into calibration/good, or pass "
                "--config.data.holdout=0."
            )
        held_groups = split_holdout(len(first), part)[1]
        held = np.isin(rank, held_groups)
        return np.flatnonzero(~held), np.flatnonzero(held)
    if part == 0 or n < 2:
        return np.arange(n), np.arange(0)
    edges = np.linspace(0, n, min(max(round(part * n), 1), n - 1) + 1).round().astype(int)
    held = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    return np.delete(np.arange(n), held), held


@dataclasses.dataclass(frozen=True)
class Split:
    """Which normal images are trained on, and which are held out for calibration and thresholds."""

    source: data.Source  # to train on: those at `train`
    train: np.ndarray  # int [N]
    held_out_source: data.Source  # the same, or images given for calibration: those at `held_out`
    held_out: np.ndarray  # int [M]
    held_out_groups: np.ndarray | None  # int [M], see `HeldOut.groups`

    @property
    def contents(self) -> list[str]:
        """Names and sizes of the images to train on and of those given for calibration.

        Without training images that are held out, see `data.Source.contents`.
        """
        contents = [self.source.contents[i] for i in self.train]
        if self.held_out_source is not self.source:
            contents += [f"calibration: {content}" for content in self.held_out_source.contents]
        return contents


def split(config, dataset: data.Dataset) -> Split:
    """Images given for calibration are held out, or a part of the training images.

    Raises:
      InputError: see `split_holdout` and `data.groups.labels_of`.
    """

    def labels(source: data.Source):
        return source.groups or labels_of(source.names, config.data.groups)

    source, held_out_source = dataset.train, dataset.calibration or dataset.train
    groups = labels(held_out_source)
    if dataset.calibration is not None:
        train, held_out = np.arange(len(source)), np.arange(len(held_out_source))
    else:
        train, held_out = split_holdout(len(source), config.data.holdout, groups)
    if groups is not None:
        groups = np.unique(np.asarray(groups)[held_out], return_inverse=True)[1]
    return Split(source, train, held_out_source, held_out, groups)


def is_augmented(config) -> bool:
    """Training images change from epoch to epoch."""
    return any(config.augment.values())


def seen_by(config, seed: int) -> str:
    """All that the features of an image hang on, but the image: runs with equal keys share them.

    Each seed of the control has an untrained backbone of its own.
    """
    plain = to_plain(config)
    fields = ("backbone", "layers", "weights", "image_size", "length_power", "feature_dtype")
    key = [plain[f] for f in fields]
    return json.dumps([*key, config.data.resize, seed if config.weights == "random" else None])


def preparer(
    config,
    folder: pathlib.Path,
    open_category: Callable[[str | None], data.Dataset] | None = None,
) -> Callable[[Any, str | None, int], Prepared]:
    """`(configuration, category, seed) -> Prepared`, for all runs on the data of `config`.

    Of each kind of thing the last one made is kept, and serves the calls that follow as long as
    they need the same. Features of images that categories share are computed once for all of them,
    see `data.Source.part_of`. Those that have no room in memory are kept in the folder, from which
    an interrupted run takes up what it had, see `cache.keep`; the caller removes it in the end.

    The data are those that `open_category` gives, by default what `config.data` names.
    """
    folder = parallel.own_folder(folder)
    dataset, checked = _keep_last(open_category or data.opener(config.data)), set()
    backbone = _keep_last(_open_backbone)
    train_pool, test_pool = _keep_last(_kept), _keep_last(_kept)
    train, test = _keep_last(_train), _keep_last(_test)

    def prepare(config, category: str | None, seed: int) -> Prepared:
        # The data before the weights: it is what lacks most often.
        # One process alone prepares what others may share with it.
        parallel.on_main(lambda: dataset(category, category) and None)
        images = dataset(category, category)
        if images.test and category not in checked:
            checked.add(category)
            found = parallel.on_main(
                lambda: checks.tested_on_training_images(images.train, images.test)
            )
            _note(images.name, found)
        if images.test:
            images = dataclasses.replace(images, test=tampered(images.test, config.data.tamper))
        seen, tamper = seen_by(config, seed), _key(config.data.tamper)
        net = backbone(seen, config, seed)
        # All that the features of an image hang on, and that its name does not tell.
        of = {"seen": seen, "weights": net.weights, "data": [config.data[f] for f in _OF_DATA]}
        of_test = of | {"tamper": tamper}

        def all_for_training(source):
            title = f"{images.name}: features"
            return train_pool(seen, config, net, source, None, of, folder / "train", title)

        def all_for_test(source):
            title, key = f"{images.name}: test features", (seen, tamper)
            return test_pool(key, config, net, source, None, of_test, folder / "test", title)

        title, own = category or images.name, {"category": category}
        key = (seen, category, config.train.cache, config.batch_size)
        tested_on = (*key, tamper, config.data.mask_resize)
        arguments = (of_test | own, folder, images.test, all_for_test, title)
        tested = test(tested_on, config, net, *arguments)
        drawn = seed if is_augmented(config) else None
        held_out = (config.data.holdout, config.data.groups)
        trained_on = (*key, *held_out, _key(config.augment), drawn)
        arguments = (of | own, folder, images, seed, all_for_training, title)
        learnt = train(trained_on, config, net, *arguments)
        *learnt, profile = learnt
        return Prepared(images, net, *learnt, tested, profile)

    return prepare


def image_batches(
    config, backbone: Backbone, source: data.Source, indices=None, batch_size: int | None = None
) -> Iterator[Batch]:
    """Images as the backbone takes them, all or those of `indices`."""
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
    """`extract.extractor` for a configuration; of up to `size` images, if not its own number."""
    c = config
    size = size or c.batch_size
    return extractor(backbone, c.length_power, c.parallel, size, c.feature_dtype)


def feature_batches(
    config, backbone: Backbone, source: data.Source, indices=None
) -> Iterator[Batch]:
    """`image_batches` with features in the place of images; each process computes its share."""
    extract = extractor_of(config, backbone)

    def read(rows, size):
        for batch in image_batches(config, backbone, source, rows, size):
            yield batch._replace(image=extract(batch.image))

    rows = np.arange(len(source)) if indices is None else np.asarray(indices)
    return parallel.shared_out(read, rows, config.batch_size)


def _keep_last(function: Callable) -> Callable:
    """`(key, *arguments) -> function(*arguments)`, kept until another key is asked for."""
    kept = {}

    def call(key, *arguments):
        if key not in kept:
            kept.clear()  # before the next is made: two might not fit into memory
            kept[key] = function(*arguments)
        return kept[key]

    return call


_OF_DATA = ("name", "root", "dir")  # which data set it is, but for the category


def _key(section: ConfigDict) -> str:
    return json.dumps(to_plain(section))


def _open_backbone(config, seed: int) -> Backbone:
    return create_backbone(config.backbone, weights=config.weights, layers=config.layers, seed=seed)


def _kept(
    config,
    backbone: Backbone,
    source: data.Source,
    rows: np.ndarray | None,
    of: dict,
    folder: pathlib.Path,
    title: str,
) -> Features:
    """The features of the images at `rows`, or of all."""
    rows = np.arange(len(source)) if rows is None else rows

    def compute(places):
        for batch in feature_batches(config, backbone, source, rows[places]):
            yield batch.image

    maps = maps_of(backbone.module, config.length_power, config.feature_dtype)
    image = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    return cache.keep(
        compute,
        of,
        [source.versions[i] for i in rows],
        jax.eval_shape(maps, backbone.variables, image),
        block=config.batch_size,
        home=config.train.cache,
        folder=folder,
        title=title,
    )


def _is_kept(config) -> bool:
    return config.train.cache != "none"


def _is_shared(config, source: data.Source) -> bool:
    """Features are computed for all that the source is a part of; padding is not kept with them."""
    return source.part_of is not None and config.data.resize != "pad"


def _part(source: data.Source, pooled: Callable, rows=slice(None)) -> Features:
    """Features of those images of a part, from those of the whole."""
    whole, places = source.part_of
    places = np.arange(len(whole))[places][rows]
    return tuple(cache.Rows(maps, places) for maps in pooled(whole))


def _train(config, backbone, of, folder, dataset, seed, pooled, title):
    """`Prepared.contents`, `train`, `holdout`, `holdout_valid`, `holdout_groups`, `profile`."""
    parts = split(config, dataset)
    source, train = parts.source, parts.train
    contents, profile = parts.contents, profile_of(source, train)
    _note(title, checks.dark_images(source))
    is_cached = _is_kept(config) and not is_augmented(config)

    def features(source, rows, place, what):
        if is_cached and _is_shared(config, source):
            return _part(source, pooled, rows)
        return _kept(config, backbone, source, rows, of, folder / place, f"{title}: {what}")

    def valid_of(source, rows):
        if config.data.resize != "pad":
            return None

        def read(rows, size):
            return (b.valid for b in image_batches(config, backbone, source, rows, size))

        return np.concatenate(list(parallel.shared_out(read, rows, config.batch_size)))

    held_out = (None, None, None)
    if len(parts.held_out):
        where = parts.held_out_source, parts.held_out
        holdout = features(*where, "holdout", "held-out features")
        held_out = (holdout, valid_of(*where), parts.held_out_groups)
    if is_cached:
        maps = features(source, train, "train", "features")
        if len(parts.held_out):
            _warn_of_siblings(maps, parts, held_out[0], title)
        size = cache.n_bytes(len(train), maps)
        fits = cache.goes_on_device(size, config.train.cache)
        on_device = not parallel.any_process(not fits)
        if not parallel.on_cpu():
            how = "held by the device" if on_device else "sent to the device step by step"
            tqdm.write(f"{title}: in training, features are {how}")
        training = cached_features(maps, valid_of(source, train), on_device)
        return contents, training, *held_out, profile

    def stream(epoch, rows, size):
        seen = augmented(source, config.augment, seed, epoch) if is_augmented(config) else source
        return image_batches(config, backbone, seen, train[rows], size)

    size = config.train.batch_size
    extract = extractor_of(config, backbone, size)
    training = recomputed_features(len(train), stream, extract, size, valid_of(source, train))
    return contents, training, *held_out, profile


def _warn_of_siblings(maps: Features, parts: Split, holdout: Features, title: str) -> None:
    """Warns if held-out images seem to show parts that are trained on, see `siblings.find`."""
    same_source = parts.held_out_source is parts.source and parts.held_out_groups is None
    found = siblings.find(maps, holdout, same_source=same_source)
    if found is None:
        return
    held_out = parts.held_out_source.names[parts.held_out[found.held_out]]
    trained_on = parts.source.names[parts.train[found.trained_on]]
    tqdm.write(
        f"{title}: warning: {found.kind}, such as {held_out} and {trained_on}. If several images "
        "show the same part, stated false-alarm rates do not hold for new parts. Say which belong "
        "together with --config.data.groups (folder, a .csv file or a regular expression), or put "
        "images of other parts into calibration/good."
    )


def _note(title: str, message: str | None) -> None:
    """Prints what a check of the data found, if anything."""
    if message is not None:
        tqdm.write(f"{title}: {message}")


def _test(config, backbone, of, folder, source, pooled, title) -> Callable[..., Iterable[Batch]]:
    """See `Prepared.test`."""
    if source is None:
        return lambda indices=None: ()
    if not _is_kept(config):
        return lambda indices=None: feature_batches(config, backbone, source, indices)
    size = config.batch_size
    masks = valid = None
    has_masks = source.part_of is None and source[0].mask is not None
    if has_masks or config.data.resize == "pad":
        # Masks and padding are read at once: so a broken image, or a mask that does not fit, is
        # known before hours of training. Features would make it wait.
        def read(rows, size):
            for batch in image_batches(config, backbone, source, rows, size):
                yield batch.mask, batch.valid

        parts = tqdm(
            parallel.shared_out(read, np.arange(len(source)), size),
            total=-(-len(source) // size),
            desc=f"{title}: test images",
            unit="batch",
            leave=False,
            dynamic_ncols=True,
        )
        masks, valid = (
            None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True)
        )
        if has_masks:
            _note(title, checks.blank_masks(masks, source))
            _note(title, checks.inverted_masks(masks, source))
            _note(title, checks.cut_masks(source))

    @functools.cache
    def features():
        if _is_shared(config, source):
            return _part(source, pooled)
        what = f"{title}: test features"
        return _kept(config, backbone, source, None, of, folder / "test", what)

    def batches_of(indices=None):
        rows = np.arange(len(source)) if indices is None else np.asarray(indices)
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            mask, padding = (None if a is None else a[part] for a in (masks, valid))
            maps = tuple(m[part] for m in features())
            yield Batch(maps, mask, source.labels[part], part, padding)

    return batches_of
