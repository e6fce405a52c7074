"""CIFAR-10, one class against the rest: one class is normal, all others are defects.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009). 60,000 colour images of
32 x 32 pixels in ten classes. The one-class protocol trains on the 5,000 training images of the
normal class and tests on all 10,000 test images.

Three forms are read: the official archives (python or binary version, packed or unpacked), prepared
as in the tfds catalogue; a prepared copy of that set, in array_record; and directories of image
files, train/<class>/* and test/<class>/*, read in place.
"""

import functools
import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from fastflow_jax.data.dataset import (
    GOOD,
    DataConfig,
    Dataset,
    Source,
    check_choice,
    check_counts,
)
from fastflow_jax.data.layout import list_subfolders
from fastflow_jax.data.tfds import manual, prepared
from fastflow_jax.data.transforms import decode_image, read_file
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

CATEGORIES = (  # in the order of the official labels
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
COUNTS = (50_000, 10_000)  # training images, test images

_HOMEPAGE, _SIZE = "https://www.cs.toronto.edu/~kriz/cifar.html", "170 MB"
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_DOWNLOAD = (
    f"Download {_ARCHIVES[0]} ({_SIZE}; no licence is named, cite Krizhevsky 2009) from the "
    f"University of Toronto, {_HOMEPAGE}, and put it there; or set data.root to its directory, or "
    "to directories of image files, train/<class>/* and test/<class>/*."
)


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The set of the tfds catalogue, by name and version, prepared without TensorFlow.

    `<manual_dir>` contains an official archive or its content.
    """

    VERSION = tfds.core.Version("3.0.2")
    HOMEPAGE, SIZE = _HOMEPAGE, _SIZE
    LICENCE, IMAGES, SOURCE = "none named by its authors", "", ""
    MANUAL_DOWNLOAD_INSTRUCTIONS = _DOWNLOAD

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(names=list(CATEGORIES)),
        }
        return prepared.dataset_info(self, features, __doc__ or "", _HOMEPAGE)

    def _split_generators(self, dl_manager):
        found = _find_batches(Path(dl_manager.manual_dir))
        assert found is not None  # checked by `_find_raw`
        batches = _read_batches(found)
        return {
            split: self._generate_examples(split, [batches[name] for name in names])
            for split, names in _BATCHES.items()
        }

    def _generate_examples(self, split, batches):
        images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        title = f"preparing cifar10 ({split})"
        for i, image in enumerate(tqdm(images, desc=title, unit="image", delay=1)):
            pillow = Image.fromarray(image)  # tfds would encode an array with TensorFlow
            yield i, {"id": f"{split}_{i:05}", "image": pillow, "label": int(labels[i])}


def open_dataset(config: DataConfig) -> Dataset:
    """Opens CIFAR-10 with the class `config.category` as the normal one.

    The official archive is in `config.root` or in `downloads/manual/cifar10` of the data directory;
    or `config.root` has directories of image files.

    Raises:
        InputError: an unknown class, or missing or invalid data.
    """
    category = check_choice("data.category", config.category, CATEGORIES)
    return one_class(open_classes(config), category)


def opener(config: DataConfig) -> Callable[[str], Dataset]:
    """Returns a function from class to data set. All classes share images that are opened once."""
    classes = functools.cache(functools.partial(open_classes, config))
    return lambda category: one_class(classes(), category)


def open_classes(config: DataConfig) -> Dataset:
    """Opens all images, with their classes as defects. Raises the errors of `open_dataset`."""
    root = None if config.root is None else expanded(config.root)
    if root is not None and (root / "train").is_dir() and (root / "test").is_dir():
        train, test = _source_of_files(root / "train"), _source_of_files(root / "test")
        provenance = {
            "source": str(root.resolve()),
            "train_images": len(train),
            "test_images": len(test),
            "note": "read from image files, which may have been re-encoded: "
            "not the official pixels, bit for bit",
        }
    else:
        builder = prepared.prepare(Cifar10, None, config, functools.partial(_find_raw, config))
        train, test = _source(builder, "train"), _source(builder, "test")
        provenance = prepared.provenance(builder)
    check_counts("cifar10", (len(train), len(test)), COUNTS)
    return Dataset("cifar10", train, test, provenance)


def one_class(classes: Dataset, category: str) -> Dataset:
    """Returns the data set with one normal class, from `open_classes`.

    The training images are those of the class, the test images are all, in the order of `classes`.
    """
    train, test = classes.train, classes.test
    assert test is not None
    chosen = np.flatnonzero([name == category for name in train.defects])
    return Dataset(
        "cifar10",
        Source(
            tuple(train.names[i] for i in chosen),
            (GOOD,) * len(chosen),
            lambda index: train.load(chosen[index]),
            part_of=(train, chosen),
        ),
        Source(
            test.names,
            tuple(GOOD if name == category else name for name in test.defects),
            test.load,
            part_of=(test, slice(None)),
        ),
        classes.provenance | {"category": category, "train_images": len(chosen)},
    )


def _source_of_files(folder: Path) -> Source:
    by_class = list_subfolders(folder)
    if set(by_class) != set(CATEGORIES):
        raise InputError(
            f"{folder} must have one directory per class ({', '.join(CATEGORIES)}), but it has "
            f"{', '.join(by_class)}. Rename or remove the others."
        )
    files = [(name, path) for name in CATEGORIES for path in by_class[name]]

    def load(index: int) -> tuple[np.ndarray, None]:
        path = files[index][1]
        return decode_image(read_file(path), str(path)), None

    names = tuple(f"{name}/{path.name}" for name, path in files)
    return Source(names, tuple(name for name, _ in files), load)


def _source(builder: tfds.core.DatasetBuilder, split: str) -> Source:
    data, rest = prepared.read(builder, split)
    order = sorted(
        range(len(rest)), key=lambda i: rest[i]["id"]
    )  # copies prepared by tfds itself are shuffled
    classes = tuple(CATEGORIES[rest[i]["label"]] for i in order)
    names = tuple(f"{classes[k]}/{rest[i]['id'].decode()}" for k, i in enumerate(order))

    def load(index: int) -> tuple[np.ndarray, None]:
        return decode_image(data[order[index]]["image"], f"cifar10: {names[index]}"), None

    return Source(names, classes, load)


def _find_raw(config: DataConfig) -> prepared.Raw:
    folder = manual.manual_dir(config)
    if _find_batches(folder) is None:
        raise InputError(f"cifar10 is not in {folder}. {_DOWNLOAD}")
    return prepared.Raw(folder, str(folder))


def _find_batches(folder: Path) -> Path | None:
    """An official archive in `folder`, or the directory with its content."""
    for inner in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        if (inner / "test_batch").is_file() or (inner / "test_batch.bin").is_file():
            return inner
    return next((folder / name for name in _ARCHIVES if (folder / name).is_file()), None)


def _read_batches(source: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images, uint8 [N, 32, 32, 3], and labels, int64 [N], by name of the batch."""
    if source.is_dir():
        files = {path.name: read_file(path) for path in source.iterdir() if path.is_file()}
    else:
        with manual.open_archive(source) as archive:
            assert isinstance(archive, tarfile.TarFile)
            files = {
                Path(member.name).name: file.read()
                for member in archive
                if member.isfile() and (file := archive.extractfile(member))
            }
    batches = {}
    for name in (name for names in _BATCHES.values() for name in names):
        if name in files:
            parse, data = _parse_python, files[name]
        elif f"{name}.bin" in files:
            parse, data = _parse_binary, files[f"{name}.bin"]
        else:
            raise InputError(f"{source} has no {name}. Download it again.")
        try:
            images, labels = parse(data)
            images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            batches[name] = images, np.asarray(labels, np.int64).reshape(len(images))
        except Exception as error:  # unpickling raises many types
            raise InputError(f"{name} of {source} is damaged. Download it again.") from error
    return batches


def _parse_binary(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + 3072)
    return rows[:, 1:], rows[:, 0]


def _parse_python(data: bytes) -> tuple[np.ndarray, Sequence[int]]:
    batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    return batch[b"data"], batch[b"labels"]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that loads only numbers, text and arrays."""

    _ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module, name):
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed") from None
