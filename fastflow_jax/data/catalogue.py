"""Catalogue of the data sets: what they are, and whether they are prepared on this machine."""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastflow_jax import data
from fastflow_jax.data.dataset import Source

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_log = logging.getLogger(__name__)


class Entry(NamedTuple):
    """One data set."""

    name: str  # value of `config.data.name`
    categories: int  # 0 for a set without categories
    images: str  # published numbers of training and test images, as text
    size: str  # of the download
    prepared: int  # number of categories, or 1 for a set without, that are prepared
    source: str  # of the files
    licence: str  # as its authors state it

    @property
    def state(self) -> str:
        """Whether the set is prepared: "yes", "no", or the number of categories."""
        total = max(1, self.categories)
        if self.prepared in (0, total):
            return "yes" if self.prepared else "no"
        return f"{self.prepared} of {total}"


def entries(folder: str | None = None) -> list[Entry]:
    """Returns the published and the synthetic data sets.

    Args:
      folder: directory of prepared data sets, by default that of `prepared.data_dir`.
    """
    return [
        _synthetic() if name == "synthetic" else _published(name, folder)
        for name in data.DATASETS
        if name != "folder"
    ]


def _synthetic() -> Entry:
    from fastflow_jax.data.synthetic import CATEGORIES

    installed = len(CATEGORIES) * (importlib.util.find_spec("skimage") is not None)
    return Entry(
        *("synthetic", len(CATEGORIES), "192 + 216", "not stated", installed),
        *("package scikit-image", "CC0"),
    )


def _published(name: str, folder: str | None) -> Entry:
    import tensorflow_datasets as tfds

    from fastflow_jax.data.tfds.prepared import data_dir

    module: Any = data.module_of(name)
    classes = [each for each in vars(module).values() if isinstance(each, type)]
    builders: list[Any] = [c for c in classes if issubclass(c, tfds.core.GeneratorBasedBuilder)]
    builder = next(each for each in builders if each.name == name)
    names = [each.name for each in builder.BUILDER_CONFIGS]
    root = data_dir(folder) / name
    versions = [root / each / str(builder.VERSION) for each in names or [""]]
    return Entry(
        name,
        len(getattr(module, "CATEGORIES", ())),
        builder.IMAGES or _sum(module.COUNTS),
        builder.SIZE,
        sum(path.is_dir() for path in versions),
        builder.SOURCE or builder.HOMEPAGE,
        builder.LICENCE,
    )


def _sum(counts: Any) -> str:
    """Numbers of training and test images of a set, from those of its categories."""
    pairs = counts.values() if isinstance(counts, dict) else [counts]
    sums = [None if None in numbers else sum(numbers) for numbers in zip(*pairs, strict=True)]
    return " + ".join("?" if number is None else f"{number:,}" for number in sums)


def listing() -> str:
    """Returns a table of `entries`."""
    from fastflow_jax.data.tfds.prepared import data_dir

    head = (
        *("data set", "categories", "training + test", "size", "prepared"),
        *("source", "licence"),
    )
    rows = [
        (e.name, str(e.categories or "-"), e.images, e.size, e.state, e.source, e.licence)
        for e in entries()
    ]
    return (
        f"{_aligned([head, *rows])}\n\n"
        "NC licences exclude commercial use. `fastflow-jax data NAME` prepares a data set; for one "
        "that is\ndownloaded by hand, it says where to put the files. Prepared data sets are in "
        f"{data_dir()}\n(--config.data.dir or $TFDS_DATA_DIR). Your own images: --config=folder."
    )


def prepare(config: "ConfigDict") -> int:
    """Prepares the selected categories, and prints and checks their numbers of images.

    Args:
      config: `config.data`.

    Returns:
      1 if a category does not have its published numbers of images, else 0.

    Raises:
      InputError: an unknown name or category, or missing or invalid data.
    """
    open_category, differs = data.opener(config), False
    rows: list[Sequence[str]] = [
        ("category", "training", "calibration", "test: normal", "defective")
    ]
    for category in data.categories(config):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = open_category(category)
        for warning in caught:
            _log.warning("%s", warning.message)
        differs |= bool(caught)
        test = dataset.test
        defective = None if test is None else int(test.labels.sum())
        normal = None if test is None or defective is None else len(test) - defective
        numbers = (len(dataset.train), _length(dataset.calibration), normal, defective)
        rows.append((category or "all", *("-" if n is None else f"{n:,}" for n in numbers)))
        where = dataset.provenance.get("prepared") or dataset.provenance["source"]
        _log.info("%s: %s", category or config.name, os.fspath(where))
    print(_aligned(rows))
    if config.holdout and any(row[2] == "-" for row in rows):
        part = f"{config.holdout:.0%} of the training images"
        _log.info("Without calibration images, %s are held out for thresholds.", part)
    return int(differs)


def _length(source: Source | None) -> int | None:
    return None if source is None else len(source)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
