"""One model of several products: the training that they share."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from fastflow_jax import data
from fastflow_jax.backbones import Backbone
from fastflow_jax.detectors.base import method
from fastflow_jax.errors import InputError
from fastflow_jax.features import cache
from fastflow_jax.features.extract import image_means
from fastflow_jax.features.gate import Gate, find_products
from fastflow_jax.features.joined import joined, joined_held_out
from fastflow_jax.features.prepare import Prepared, preparer
from fastflow_jax.features.shift import Reference
from fastflow_jax.files import (
    PRODUCTS,
    create_folder,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
)
from fastflow_jax.runs.directory import check_same_data
from fastflow_jax.runs.saved import read_reference
from fastflow_jax.training.context import FitContext

_log = logging.getLogger(__name__)

SHARED = "one_model"  # directory of the shared training, in the run directory
_MEANS = "test_means.npz"


@dataclasses.dataclass(frozen=True)
class Membership:
    """The place of a product in one model."""

    index: int
    training: pathlib.Path | None  # the shared one; None if products share only the backbone


def of_several(config: ConfigDict, n: int) -> ConfigDict:
    """The configuration of one of n products of a model.

    The steps of a shared training grow with the square root of the number of products.

    Raises:
      InputError: there are fewer than two products.
    """
    if n < 2:
        raise InputError(
            f"One model needs at least two products, and there is {n}. Leave config.one_model out."
        )
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.products = n
        if method(c.detector).fit_shared is not None:
            c.train.steps = round(c.train.steps * n**0.5)
    return c


def discovered(
    config: ConfigDict,
    dataset: data.Dataset,
    folder: pathlib.Path,
    backbone: Backbone | None = None,
) -> dict[str, data.Dataset]:
    """Divides a data set of unnamed products into one per product.

    Test images belong to the product of the nearest training image.

    Args:
      config: filled.
      dataset: of all products.
      folder: directory for features, see `prepare.preparer`.
      backbone: see `prepare.preparer`.

    Returns:
      Data sets by name, "product_1" and so on; only one if no two products are distinct.
    """
    every = config.copy_and_resolve_references()
    with every.unlocked():
        every.data.holdout = 0.0
    prepare = preparer(every, folder, lambda category: dataset, backbone)
    prepared = prepare(every, None, config.seed)
    means = np.concatenate([image_means(*part) for part in prepared.train.in_batches(32)])
    groups, test = find_products(means), dataset.test
    n = int(groups.max()) + 1
    if test is not None:
        found = np.concatenate([image_means(b.features, b.valid) for b in prepared.test()])
        gate = Gate.of_means([means[groups == i] for i in range(n)]) if n > 1 else None
        of_test = gate(found).product if gate else np.zeros(len(test), int)
    named = {}
    for i in range(n):
        own = dataset.train.subset(np.flatnonzero(groups == i))
        own_test = None if test is None else test.subset(np.flatnonzero(of_test == i))
        named[f"product_{i + 1}"] = dataclasses.replace(dataset, train=own, test=own_test)
    _log.info("%d products were found in %d images of %s.", n, len(groups), dataset.name)
    return named


def fit_shared(
    config: ConfigDict, prepared: Mapping[str, Prepared], directory: pathlib.Path, seed: int
) -> pathlib.Path | None:
    """Trains the part that products share, or continues it.

    Args:
      config: of the products, see `of_several`.
      prepared: features of each product, in their order.
      directory: of the training.
      seed: of the training.

    Returns:
      The directory, or None if the detector has no such part.

    Raises:
      InputError: the images are not those that the training began with, features are not cached, or
        training diverged.
      Interrupted: SIGTERM or SIGINT was received; the same call continues the training.
    """
    train = method(config.detector).fit_shared
    if train is None:
        return None
    create_folder(directory)
    contents = [f"{name}: {each}" for name, p in prepared.items() for each in p.contents]
    weights = next(iter(prepared.values())).backbone.weights
    check_same_data(directory, contents, weights)
    members = [p.train for p in prepared.values()]
    maps = [m.cached for m in members if m.cached is not None]
    size = sum(cache.n_bytes(len(each[0]), each) for each in maps)
    on_device = cache.fits_on_device(size, config.train.cache)
    held_out = [(p.holdout, p.holdout_valid) for p in prepared.values()]
    holdout, holdout_valid = joined_held_out(held_out)
    context = FitContext(
        config=config,
        train=joined(members, on_device),
        directory=directory,
        seed=seed,
        holdout=holdout,
        holdout_valid=holdout_valid,
        label=f"{len(prepared)} products: train",
    )
    train(context, members)
    return directory


def write_means(directory: pathlib.Path, means: np.ndarray) -> None:
    """Writes the `image_means` [N, C] of the test images of a product, for `recognition`."""
    write_arrays(directory / _MEANS, {"means": means.astype(np.float32)})


def recognition(directories: Mapping[str, pathlib.Path]) -> dict[str, dict]:
    """How well the products of test images are recognised, see `Gate`.

    Args:
      directories: of the finished products, by name.

    Returns:
      Per product with test images, the shares of them that are "recognised", that are "confused"
      with other products, and that are "unknown".
    """
    gate = Gate.fit([needed(n, read_reference(place)) for n, place in directories.items()])
    found = {}
    for i, (name, place) in enumerate(directories.items()):
        if not (place / _MEANS).exists():
            continue
        product, is_known = gate(read_arrays(place / _MEANS)["means"])
        is_right = is_known & (product == i)
        shares = {"recognised": is_right, "confused": is_known & ~is_right, "unknown": ~is_known}
        found[name] = {of: float(share.mean()) for of, share in shares.items()}
    return found


def needed(name: str, reference: Reference | None) -> Reference:
    """The reference of a product; raises InputError if it has too few images for one."""
    if reference is None:
        raise InputError(
            f"{name} has too few different training images to be recognised. Add images, or leave "
            "it out of the model."
        )
    return reference


def write_products(folder: pathlib.Path, products: Mapping[str, str]) -> None:
    """Records the products of a model with their directories in `folder`."""
    write_json(folder / PRODUCTS, {"format": 1, "products": dict(products)})


def read_products(folder: pathlib.Path) -> dict[str, pathlib.Path] | None:
    """The directories of the products of a model, by name; None if `folder` has no such model.

    Raises:
      InputError: the file is damaged, or of another version.
    """
    about = read_json(folder / PRODUCTS)
    if about is None:
        return None
    known = about if isinstance(about, dict) else {}
    products = known.get("products")
    if known.get("format") != 1 or not isinstance(products, dict) or len(products) < 2:
        raise InputError(
            f"{folder / PRODUCTS} is damaged, or was written by a later version. Restore it, or "
            "install that version."
        )
    for name, place in products.items():
        parts = pathlib.PurePosixPath(place).parts if isinstance(place, str) else ()
        if not parts or ".." in parts or pathlib.PurePosixPath(place).is_absolute():
            raise InputError(
                f"{folder / PRODUCTS} names the directory {place!r} of {name}, which is not below "
                f"{folder}. Restore the file."
            )
    return {name: folder / place for name, place in products.items()}
