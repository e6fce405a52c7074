"""Data sets: `open_dataset(config.data)` gives a training and a test source of images.

Each data set is a module of this package with a function `open_dataset(config)`; a module is
imported when its data set is asked for, so that a folder of images needs Pillow and numpy only.
"""

import importlib
from collections.abc import Callable
from types import ModuleType

from ml_collections import ConfigDict

from fastflow_jax.data.dataset import GOOD, Dataset, Example, Source, check_choice

__all__ = [
    "DATASETS",
    "GOOD",
    "Dataset",
    "Example",
    "Source",
    "categories",
    "open_dataset",
    "opener",
    "share_images",
]

_MODULES = {
    "btad": "tfds.btad",
    "cifar10": "tfds.cifar10",
    "elpv": "tfds.elpv",
    "folder": "folder",
    "mvtec_ad": "tfds.mvtec_ad",
    "synthetic": "synthetic",
}
DATASETS = tuple(_MODULES)


def open_dataset(config: ConfigDict) -> Dataset:
    """Opens the data set that `config.data` names; images are decoded later, one by one.

    Args:
        config: the fields
            name: one of DATASETS;
            category: str or None, the part of the set: its module lists them;
            root: str or None, the folder of images or of the raw data;
            dir: str or None, where prepared tfds sets live. Unset: the environment variable
                TFDS_DATA_DIR, else tfds's own default.

    Raises:
        InputError: a name or category that does not exist, missing or bad data.
    """
    return _module(config).open_dataset(config)


def share_images(config: ConfigDict) -> bool:
    """The categories of what `config` names are parts of the same images, see `opener`."""
    return hasattr(_module(config), "opener")


def opener(config: ConfigDict) -> Callable[[str | None], Dataset]:
    """A function from category to data set, for several categories of what `config` names.

    Categories that are parts of the same images share them, see `Source.part_of`. The function
    raises what `open_dataset` does.

    Raises:
        InputError: a name that does not exist.
    """
    module = _module(config)
    if share_images(config):
        return module.opener(config)

    def open_category(category: str | None) -> Dataset:
        section = config.copy_and_resolve_references()
        section.category = category
        return module.open_dataset(section)

    return open_category


def categories(config: ConfigDict) -> tuple[str | None, ...]:
    """The categories that `config.data` asks for: "bottle", "bottle,screw", or all that there are.

    (None,) for a data set without categories.

    Raises:
        InputError: as `open_dataset`.
    """
    known = getattr(_module(config), "CATEGORIES", None)
    if known is None:
        return (config.category,)
    if config.category is None:
        return known
    asked = tuple(dict.fromkeys(name.strip() for name in config.category.split(",")))
    for name in asked:
        check_choice("data.category", name, known)
    return asked


def _module(config: ConfigDict) -> ModuleType:
    check_choice("data.name", config.name, DATASETS)
    return importlib.import_module(f"fastflow_jax.data.{_MODULES[config.name]}")
