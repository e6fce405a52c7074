"""ELPV: electroluminescence images of solar cells, from the package `elpv-dataset`.

Deitsch et al., "Automatic classification of defective photovoltaic module cells in
electroluminescence images", Solar Energy 185 (2019). 2,624 grey images of 300 x 300 pixels, each
with the probability of a defect according to experts (0, .33, .67 or 1) and a cell type, which is
the category here. Licence CC BY-NC-SA 4.0; there are no masks.

The set has no official split. In the order of its list, every fifth good cell (probability 0) is a
test image and the others are training images; all cells of probability 1 are defective test
images; .33 and .67 are not used. Cells of one module may be in both splits, because the list does
not name the modules.
"""

import functools
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from fastflow_jax.data.dataset import GOOD, DataConfig, Dataset, Record
from fastflow_jax.data.layout import Splits
from fastflow_jax.data.tfds import prepared
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

CATEGORIES = ("mono", "poly")  # monocrystalline, polycrystalline

_PACKAGE = "elpv-dataset"
_LIST = "labels.csv"
_REINSTALL = f"Run pip install --force-reinstall {_PACKAGE}"


class Elpv(prepared.Builder):
    """`<manual_dir>/labels.csv` lists path, probability of a defect and type of each cell."""

    BUILDER_CONFIGS = prepared.builder_configs(CATEGORIES)
    DESCRIPTION = __doc__ or ""
    HOMEPAGE = "https://github.com/zae-bayern/elpv-dataset"
    CITATION = "doi:10.1016/j.solener.2019.02.067"
    LICENCE = "CC BY-NC-SA 4.0"
    SIZE = "91 MB"
    IMAGES = "2,624 in all"
    SOURCE = f"package {_PACKAGE}"
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"pip install {_PACKAGE}; manual_dir is the directory data of the package."
    )

    @property
    def has_masks(self) -> bool:
        """Always False."""
        return False

    def splits(self, folder: Path) -> Splits:
        """Returns the files of a cell type."""
        return split(folder / _LIST, self.category)


def open_dataset(config: DataConfig) -> Dataset:
    """Opens the cells of the type `config.category`, "mono" or "poly".

    `config.root` is the directory of labels.csv, by default that of the installed package.

    Raises:
        InputError: an unknown type, a missing package, or damaged files.
    """
    dataset = prepared.open_category(Elpv, config, functools.partial(_find_raw, config))
    dataset.provenance["split"] = (
        "in file order every fifth good cell (probability 0) is a test image, "
        "probability 1 is defective, .33 and .67 are left out"
    )
    return dataset


def split(path: Path, cell_type: str) -> Splits:
    """Returns the images of one cell type. Raises an InputError if labels.csv is damaged."""
    cells = [(image, probability) for image, probability, kind in _read(path) if kind == cell_type]
    good = [image for image, probability in cells if probability == 0]
    defective = [image for image, probability in cells if probability == 1]
    if len(good) < 5 or not defective:
        raise InputError(f"{path} lists too few {cell_type} cells. {_REINSTALL}.")

    def records(defect: str, images: list[Path]) -> list[Record]:
        return [Record(image, (), defect, f"{defect}/{image.name}") for image in images]

    train = [image for i, image in enumerate(good) if i % 5 != 4]
    return {
        "train": records(GOOD, train),
        "test": records(GOOD, good[4::5]) + records("defective", defective),
    }


def _read(path: Path) -> Iterator[tuple[Path, float, str]]:
    """Yields image, probability of a defect and cell type of each line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}). {_REINSTALL}.") from error
    for number, line in enumerate(lines, 1):
        try:
            image, probability, kind = line.split()
            yield path.parent / image, float(probability), kind
        except ValueError as error:
            raise InputError(f"{path} is damaged in line {number}. {_REINSTALL}.") from error


def _find_raw(config: DataConfig) -> prepared.Raw:
    if config.root is not None:
        folder = expanded(config.root).resolve()
        if not (folder / _LIST).is_file():
            raise InputError(
                f"data.root {config.root} has no {_LIST}. Set it to the directory of {_LIST}."
            )
        return prepared.Raw(folder, str(folder))
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            "The ELPV images are in a package that is not installed. Run pip install "
            f"{_PACKAGE} ({Elpv.SIZE}, {Elpv.LICENCE}: not for commercial use)."
        ) from error
    folder = Path(str(package.locate_file("elpv_dataset/data")))
    return prepared.Raw(folder, f"{_PACKAGE} {package.version}")
