"""Data, backbone and features: made once, and shared by all runs that need the same."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from fastflow_jax import data, parallel, store
from fastflow_jax.backbones import Backbone, create_backbone
from fastflow_jax.config import to_plain
from fastflow_jax.data.changes import augmented, tampered
from fastflow_jax.data.pipeline import Batch, batches
from fastflow_jax.features import (
    Features,
    TrainingFeatures,
    cached_features,
    extractor,
    maps_of,
    recomputed_features,
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run starts from."""

    dataset: data.Dataset
    backbone: Backbone
    contents: list[str]  # of the images to train on, see `Source`; without those held out
    train: TrainingFeatures
    holdout: Features | None
    holdout_valid: np.ndarray | None  # bool [N, H, W], see `Batch.valid`
    # The test images, or those of given indices, in batches with features in the place of `image`.
    # These are computed when they are first asked for, and then kept as those of the training
    # images are; or computed again each time.
    test: Callable[..., Iterable[Batch]]


def split_holdout(n: int, part: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and indices held out: one, drawn, of each stretch of the file order.

    Stretches follow what drifts from the first file to the last; the draw follows what comes in
    turns, like several cameras, of which every so many-th file would be always the same. A fixed
    choice, the same for all seeds. At least one image is left on either side.
    """
    if part == 0 or n < 2:
        return np.arange(n), np.arange(0)
    edges = np.linspace(0, n, min(max(round(part * n), 1), n - 1) + 1).round().astype(int)
    held = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    return np.delete(np.arange(n), held), held


def trained_on(config, source: data.Source) -> list[str]:
    """The contents of those images that are not held out, see `data.Source`."""
    return [source.contents[i] for i in split_holdout(len(source), config.data.holdout)[0]]


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
    an interrupted run takes up what it had, see `store.keep`; the caller removes it in the end.

    The data are those that `open_category` gives, by default what `config.data` names.
    """
    folder = parallel.own_folder(folder)
    dataset = _keep_last(open_category or data.opener(config.data))
    backbone = _keep_last(_open_backbone)
    train_pool, test_pool = _keep_last(_kept), _keep_last(_kept)
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
        trained_on = (*key, config.data.holdout, _key(config.augment), drawn)
        arguments = (of | own, folder, images.train, seed, all_for_training, title)
        learnt = train(trained_on, config, net, *arguments)
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
        batch_size=batch_size or config.batch_size,
        indices=indices,
        resize_by=config.data.resize,
        mask_resize=config.data.mask_resize,
    )


def extractor_of(
    config, backbone: Backbone, size: int | None = None
) -> Callable[[np.ndarray], Features]:
    """`features.extractor` for a configuration; of up to `size` images, if not its own number."""
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
    return store.keep(
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
    return tuple(store.Rows(maps, places) for maps in pooled(whole))


def _train(config, backbone, of, folder, source, seed, pooled, title):
    """`Prepared.contents`, `train`, `holdout` and `holdout_valid`."""
    train, held_out = split_holdout(len(source), config.data.holdout)
    contents = trained_on(config, source)
    _tell_of_darkness(source, title)
    is_cached = _is_kept(config) and not is_augmented(config)

    def features(rows, place, what):
        if is_cached and _is_shared(config, source):
            return _part(source, pooled, rows)
        return _kept(config, backbone, source, rows, of, folder / place, f"{title}: {what}")

    def valid_of(rows):
        if config.data.resize != "pad":
            return None

        def read(rows, size):
            return (b.valid for b in image_batches(config, backbone, source, rows, size))

        return np.concatenate(list(parallel.shared_out(read, rows, config.batch_size)))

    holdout = holdout_valid = None
    if len(held_out):
        holdout = features(held_out, "holdout", "held-out features")
        holdout_valid = valid_of(held_out)
    if is_cached:
        maps = features(train, "train", "features")
        size = store.n_bytes(len(train), maps)
        fits = store.goes_on_device(size, config.train.cache)
        on_device = not parallel.any_process(not fits)
        if jax.default_backend() != "cpu":
            how = "held by the device" if on_device else "sent to the device step by step"
            tqdm.write(f"{title}: in training, features are {how}")
        return contents, cached_features(maps, valid_of(train), on_device), holdout, holdout_valid

    def stream(epoch, rows, size):
        seen = augmented(source, config.augment, seed, epoch) if is_augmented(config) else source
        return image_batches(config, backbone, seen, train[rows], size)

    size = config.train.batch_size
    extract = extractor_of(config, backbone, size)
    training = recomputed_features(len(train), stream, extract, size, valid_of(train))
    return contents, training, holdout, holdout_valid


def _tell_of_darkness(source: data.Source, title: str) -> None:
    """Of training images that all seem black, as a camera's 12 bits in files of 16 bits do."""
    brightest = 0
    for i in range(min(8, len(source))):
        brightest = max(brightest, int(source[i].image.max()))
        if brightest >= 32:  # mostly the first one's
            return
    tqdm.write(
        f"{title}: the first training images have no value above {brightest} of 255; if they "
        "are a camera's 10 or 12 bits in files of 16, multiply them by 64 or 16"
    )


def _tell_of_blank(masks: np.ndarray, source: data.Source, title: str) -> None:
    """Of defective images whose masks [N, H, W] mark nothing, as an export may have gone wrong."""
    blank = np.flatnonzero((source.labels == 1) & ~masks.any((1, 2)))
    if len(blank):
        side = "x".join(map(str, masks.shape[1:]))
        tqdm.write(
            f"{title}: at {side} the masks of {len(blank)} defective images mark nothing, such as "
            f"that of {source.names[blank[0]]}: all their pixels count as normal"
        )


def _note_cut_masks(source: data.Source, title: str) -> None:
    """Reports masks with a halo of grey levels, see `transforms.decode_mask`."""
    if source.cut_masks:
        tqdm.write(
            f"{title}: {len(source.cut_masks)} masks have grey levels around their defects, such "
            f"as {min(source.cut_masks)}. Only pixels from half of the highest level on (or from "
            "1/8 on if there are classes of lower levels) count as defective. Save masks without "
            "lossy compression or antialiasing to choose the edges yourself."
        )


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
            _tell_of_blank(masks, source, title)
            _note_cut_masks(source, title)

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
