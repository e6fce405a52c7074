"""ELPV: photographs of solar cells by electroluminescence, from the package `elpv-dataset`.

Deitsch et al., "Automatic classification of defective photovoltaic module cells in
electroluminescence images", Solar Energy 185 (2019). 2,624 grey photographs of 300 x 300 pixels,
each with the probability of a defect as experts saw it (0, .33, .67 or 1) and a cell type, which
is the category here. Licence CC BY-NC-SA 4.0; there are no masks.

The set has no split of its own. In the order of its list, every fifth good cell (probability 0)
is a test image and the others are training images; all cells of probability 1 are defective test
images; .33 and .67 are left out. Cells of one module may stand on both sides: the list does not
say which belong together.
"""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from fastflow_jax.data.dataset import GOOD, Dataset, Record, check_choice
from fastflow_jax.data.tfds import prepared
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

CATEGORIES = ("mono", "poly")  # monocrystalline, polycrystalline

_PACKAGE = "elpv-dataset"
_LIST = "labels.csv"
_DEFECTIVE = "defective"


class Elpv(tfds.core.GeneratorBasedBuilder):
    """`<manual_dir>/labels.csv` lists path, probability of a defect and type of each cell."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CATEGORIES]  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f"pip install {_PACKAGE}; manual_dir is the folder data of the package."
    )

    def _info(self) -> tfds.core.DatasetInfo:
        return prepared.dataset_info(
            self,
            masks=False,
            description=__doc__,
            homepage="https://github.com/zae-bayern/elpv-dataset",
            citation="doi:10.1016/j.solener.2019.02.067",
        )

    def _split_generators(self, dl_manager):
        splits = split(Path(dl_manager.manual_dir, _LIST), self.builder_config.name)
        return {name: self._generate_examples(records) for name, records in splits.items()}

    def _generate_examples(self, records):
        return prepared.examples(records, f"elpv/{self.builder_config.name}", masks=False)


def open_dataset(config: ConfigDict) -> Dataset:
    """Opens the cells of the type `config.category`, "mono" or "poly".

    `config.root` is the folder of labels.csv; unset, that of the installed package.

    Raises:
        InputError: no such type, the package is not installed, or its files are damaged.
    """
    check_choice("data.category", config.category, CATEGORIES)
    builder = prepared.prepare(Elpv, config.category, config, _find_raw)
    train, test = prepared.source(builder, "train"), prepared.source(builder, "test")
    provenance = prepared.provenance(builder) | {
        "category": config.category,
        "licence": "CC BY-NC-SA 4.0",
        "split": "in file order every fifth good cell (probability 0) is a test image, "
        "probability 1 is defective, .33 and .67 are left out",
    }
    return Dataset("elpv", train, test, provenance)


def split(path: Path, cell_type: str) -> dict[str, list[Record]]:
    """The training and test images of one cell type, from labels.csv.

    Raises:
        InputError: the list is missing or damaged.
    """
    cells = [(image, probability) for image, probability, kind in _read(path) if kind == cell_type]
    good = [image for image, probability in cells if probability == 0]
    defective = [image for image, probability in cells if probability == 1]
    if len(good) < 5 or not defective:
        raise InputError(f"{path} lists too few {cell_type} cells: {_REINSTALL}.")

    def records(defect, images):
        return [Record(image, None, defect, f"{defect}/{image.name}") for image in images]

    train = [image for i, image in enumerate(good) if i % 5 != 4]
    test = good[4::5]
    return {
        "train": records(GOOD, train),
        "test": records(GOOD, test) + records(_DEFECTIVE, defective),
    }


_REINSTALL = f"pip install --force-reinstall {_PACKAGE}"


def _read(path: Path) -> Iterator[tuple[Path, float, str]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): {_REINSTALL}.") from error
    for number, line in enumerate(lines, 1):
        try:
            image, probability, kind = line.split()
            yield path.parent / image, float(probability), kind
        except ValueError as error:
            raise InputError(f"{path} is damaged in line {number}: {_REINSTALL}.") from error


def _find_raw(config: ConfigDict) -> prepared.Raw:
    if config.root is not None:
        folder = expanded(config.root).resolve()
        if not (folder / _LIST).is_file():
            raise InputError(
                f"data.root {config.root} holds no {_LIST}: give the folder that does."
            )
        return prepared.Raw(folder, str(folder))
    try:
        package = importlib.metadata.distribution(_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"The ELPV images come with a package that is not installed: pip install {_PACKAGE} "
            "(91 MB, CC BY-NC-SA 4.0: not for commercial use)."
        ) from error
    folder = Path(package.locate_file("elpv_dataset/data"))
    return prepared.Raw(folder, f"{_PACKAGE} {package.version}")
