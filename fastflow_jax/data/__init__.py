"""Data sets: `open_dataset(config.data)` returns a training source and a test source of images.

Each data set is a module of this package with a function `open_dataset(config)`. It is imported
on first use, so that a directory of images needs only Pillow and numpy.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastflow_jax.data.dataset import GOOD, Dataset, Example, Source, check_choice
from fastflow_jax.data.exclude import subset, without_excluded

if TYPE_CHECKING:
    from ml_collections import ConfigDict

__all__ = [
    "DATASETS",
    "GOOD",
    "Dataset",
    "Example",
    "Source",
    "categories",
    "module_of",
    "open_dataset",
    "opener",
    "share_images",
    "subset",
    "without_excluded",
]

_MODULES = {
    "aebad": "tfds.aebad",
    "btad": "tfds.btad",
    "cifar10": "tfds.cifar10",
    "dagm": "tfds.dagm",
    "elpv": "tfds.elpv",
    "folder": "folder",
    "kolektor_sdd": "tfds.kolektor_sdd",
    "kolektor_sdd2": "tfds.kolektor_sdd",
    "mpdd": "tfds.mpdd",
    "mvtec_ad": "tfds.mvtec_ad",
    "mvtec_ad_2": "tfds.mvtec_ad_2",
    "mvtec_loco": "tfds.mvtec_loco",
    "real_iad": "tfds.real_iad",
    "real_iad_sv": "tfds.real_iad",
    "synthetic": "synthetic",
    "visa": "tfds.visa",
}
DATASETS = tuple(_MODULES)  # names of the data sets, for `config.data.name`


def open_dataset(config: "ConfigDict") -> Dataset:
    """Opens the data set of `config.data`. Images are decoded later, one by one.

    Args:
        config: the fields
            name: one of DATASETS;
            category: part of the data set, or None if it has none; its module lists them;
            root: directory of the images or of the raw data, or None;
            manifest: list of the images of the data set "folder", see `manifest`, or None;
            dir: directory of prepared tfds data sets, or None for the environment variable
                TFDS_DATA_DIR and then the default of tfds;
            exclude: list of normal images to leave out, or None, see `exclude.without_excluded`.

    Raises:
        InputError: an unknown name or category, or missing or invalid data.
    """
    return _without_excluded(
        config, _field(config, "category"), _module(config).open_dataset(config)
    )


def share_images(config: "ConfigDict") -> bool:
    """Whether the categories of the data set are subsets of the same images, see `opener`.

    Args:
        config: `config.data`, with the name of the data set.
    """
    return hasattr(_module(config), "opener")


def opener(config: "ConfigDict") -> Callable[[str | None], Dataset]:
    """Returns a function from category to data set, for several categories of one set.

    Categories that are subsets of the same images share them, see `Source.part_of`. The function
    raises the errors of `open_dataset`.

    Args:
        config: `config.data`, with the name of the data set.

    Raises:
        InputError: an unknown name.
    """
    module = _module(config)
    shared = module.opener(config) if share_images(config) else None

    def open_category(category: str | None) -> Dataset:
        if shared is not None:
            return _without_excluded(config, category, shared(category))
        section = config.copy_and_resolve_references()
        section.category = category
        return _without_excluded(config, category, module.open_dataset(section))

    return open_category


def _without_excluded(config: "ConfigDict", category: str | None, dataset: Dataset) -> Dataset:
    others = [f"{each}/" for each in getattr(_module(config), "CATEGORIES", ()) if each != category]
    prefixes = () if category is None else (f"{category}/",)
    if len(categories(config)) == 1:
        prefixes += ("",)
    return without_excluded(dataset, config.exclude, prefixes=prefixes, others=others)


def categories(config: "ConfigDict") -> tuple[str | None, ...]:
    """Returns the selected categories: "bottle", "bottle,screw", or all if none is set.

    For a data set without categories this is (None,).

    Args:
        config: `config.data`, with the name of the data set.

    Raises:
        InputError: an unknown name or category.
    """
    known, selected = getattr(_module(config), "CATEGORIES", None), _field(config, "category")
    if known is None:
        return (selected,)
    if selected is None:
        return known
    names = dict.fromkeys(name.strip() for name in selected.split(","))
    return tuple(check_choice("data.category", name, known) for name in names)


def module_of(name: str | None) -> ModuleType:
    """Returns the module of a data set. Raises InputError for an unknown name.

    Args:
        name: name of the data set, one of `DATASETS`.
    """
    name = check_choice("data.name", name, DATASETS)
    return importlib.import_module(f"fastflow_jax.data.{_MODULES[name]}")


def _module(config: "ConfigDict") -> ModuleType:
    return module_of(_field(config, "name"))


def _field(config: Any, name: str) -> str | None:
    return config[name]  # the fields of a ConfigDict have no static type
