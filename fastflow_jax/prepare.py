"""Data, backbone and features: made once, and shared by all runs that need the same."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax import data, parallel
from fastflow_jax.backbones import Backbone, create_backbone
from fastflow_jax.config import to_plain
from fastflow_jax.data.changes import augmented, tampered
from fastflow_jax.data.pipeline import Batch, batches
from fastflow_jax.features import (
    Features,
    TrainingFeatures,
    cache,
    cached_features,
    extractor,
    recomputed_features,
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run starts from."""

    dataset: data.Dataset
    backbone: Backbone
    train: TrainingFeatures
    holdout: Features | None
    holdout_valid: np.ndarray | None  # bool [N, H, W], see `Batch.valid`
    # The test images in batches, with their features in the place of `image`. They lie in memory,
    # or are computed again each time where features are not to be cached.
    test: Callable[[], Iterable[Batch]]


def split_holdout(n: int, part: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out: every so many-th image, in file order.

    A fixed choice, the same for all seeds. At least one image is left on either side.
    """
    if part == 0 or n < 2:
        return np.arange(n), np.arange(0)
    every = min(round(1 / part), n)
    held = np.arange(n) % every == every - 1
    return np.flatnonzero(~held), np.flatnonzero(held)


def is_augmented(config) -> bool:
    """Training images change from epoch to epoch."""
    return any(config.augment.values())


def seen_by(config, seed: int) -> str:
    """All that the features of an image hang on, but the image: runs with equal keys share them.

    Each seed of the control has an untrained backbone of its own.
    """
    plain = to_plain(config)
    key = [plain[f] for f in ("backbone", "layers", "weights", "image_size", "length_power")]
    return json.dumps([*key, config.data.resize, seed if config.weights == "random" else None])


def preparer(config) -> Callable[[Any, str | None, int], Prepared]:
    """`(configuration, category, seed) -> Prepared`, for all runs on the data of `config`.

    Of each kind of thing the last one made is kept, and serves the calls that follow as long as
    they need the same. Features of images that categories share are computed once for all of them,
    see `data.Source.part_of`.
    """
    dataset = _keep_last(data.opener(config.data))
    backbone = _keep_last(_open_backbone)
    train_pool, test_pool = _keep_last(_features), _keep_last(_features)
    train, test = _keep_last(_train), _keep_last(_test)

    def prepare(config, category: str | None, seed: int) -> Prepared:
        # The data before the weights: it is what lacks most often.
        # One process alone prepares what others may share with it.
        parallel.on_main(lambda: dataset(category, category) and None)
        images = dataset(category, category)
        if images.test:
            images = dataclasses.replace(images, test=tampered(images.test, config.data.tamper))
        seen, tamper = seen_by(config, seed), _key(config.data.tamper)
        net = backbone(seen, config, seed)
        title = category or images.name

        def all_for_training(source):
            return train_pool(seen, config, net, source, None, f"{images.name}: features")

        def all_for_test(source):
            title = f"{images.name}: test features"
            return test_pool((seen, tamper), config, net, source, None, title)

        key = (seen, category, config.train.cache)
        drawn = seed if is_augmented(config) else None
        trained_on = (*key, config.data.holdout, _key(config.augment), drawn)
        learnt = train(trained_on, config, net, images.train, seed, all_for_training, title)
        tested_on = (*key, tamper, config.data.mask_resize)
        tested = test(tested_on, config, net, images.test, all_for_test, title)
        return Prepared(images, net, *learnt, tested)

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
        batch_size=batch_size or config.train.batch_size,
        indices=indices,
        resize_by=config.data.resize,
        mask_resize=config.data.mask_resize,
    )


def feature_batches(
    config, backbone: Backbone, source: data.Source, indices=None
) -> Iterator[Batch]:
    """`image_batches` with features in the place of images; each process computes its share."""
    extract = _extractor(config, backbone)

    def read(rows, size):
        for batch in image_batches(config, backbone, source, rows, size):
            yield batch._replace(image=extract(batch.image))

    rows = np.arange(len(source)) if indices is None else np.asarray(indices)
    return parallel.shared_out(read, rows, config.train.batch_size)


def _keep_last(function: Callable) -> Callable:
    """`(key, *arguments) -> function(*arguments)`, kept until another key is asked for."""
    kept = {}

    def call(key, *arguments):
        if key not in kept:
            kept.clear()  # before the next is made: two might not fit into memory
            kept[key] = function(*arguments)
        return kept[key]

    return call


def _key(section: ConfigDict) -> str:
    return json.dumps(to_plain(section))


def _open_backbone(config, seed: int) -> Backbone:
    return create_backbone(config.backbone, weights=config.weights, layers=config.layers, seed=seed)


def _extractor(config, backbone: Backbone) -> Callable[[np.ndarray], Features]:
    return extractor(backbone, config.length_power, config.parallel, config.train.batch_size)


def _features(
    config, backbone: Backbone, source: data.Source, rows: np.ndarray | None, title: str
) -> Features:
    """The features of the images at `rows`, or of all."""
    n = len(source) if rows is None else len(rows)
    return cache(feature_batches(config, backbone, source, rows), n, progress=title)


def _is_shared(config, source: data.Source) -> bool:
    """Features are computed for all that the source is a part of; padding is not kept with them."""
    return source.part_of is not None and config.data.resize != "pad"


def _train(config, backbone, source, seed, pooled, title):
    """`Prepared.train`, `Prepared.holdout` and `Prepared.holdout_valid`."""
    train, held_out = split_holdout(len(source), config.data.holdout)
    is_cached = config.train.cache and not is_augmented(config)

    def features(rows, what):
        if not (is_cached and _is_shared(config, source)):
            return _features(config, backbone, source, rows, f"{title}: {what}")
        whole, places = source.part_of
        return tuple(maps[places][rows] for maps in pooled(whole))

    def valid_of(rows):
        if config.data.resize != "pad":
            return None

        def read(rows, size):
            return (b.valid for b in image_batches(config, backbone, source, rows, size))

        return np.concatenate(list(parallel.shared_out(read, rows, config.train.batch_size)))

    holdout = holdout_valid = None
    if len(held_out):
        holdout, holdout_valid = features(held_out, "held-out features"), valid_of(held_out)
    if is_cached:
        training = cached_features(features(train, "features"), valid_of(train))
        return training, holdout, holdout_valid

    def stream(epoch, rows, size):
        seen = augmented(source, config.augment, seed, epoch) if is_augmented(config) else source
        return image_batches(config, backbone, seen, train[rows], size)

    extract, size = _extractor(config, backbone), config.train.batch_size
    training = recomputed_features(len(train), stream, extract, size, valid_of(train))
    return training, holdout, holdout_valid


def _test(config, backbone, source, pooled, title) -> Callable[[], Iterable[Batch]]:
    """See `Prepared.test`."""
    if source is None:
        return tuple
    if config.train.cache and _is_shared(config, source):
        whole, places = source.part_of
        kept = _cut(source, tuple(maps[places] for maps in pooled(whole)), config.train.batch_size)
        return lambda: kept

    def stream():
        return feature_batches(config, backbone, source)

    if not config.train.cache:
        return stream
    kept = []
    bar = {"desc": f"{title}: test features", "unit": "img", "leave": False, "dynamic_ncols": True}
    with tqdm(total=len(source), **bar) as progress:
        for batch in stream():
            kept.append(batch)
            progress.update(len(batch.index))
    return lambda: kept


def _cut(source: data.Source, features: Features, size: int) -> list[Batch]:
    """Batches of a source without masks, from the features of all its images."""
    rows = [np.arange(i, min(i + size, len(source))) for i in range(0, len(source), size)]
    return [
        Batch(tuple(maps[r[0] : r[-1] + 1] for maps in features), None, source.labels[r], r)
        for r in rows
    ]
