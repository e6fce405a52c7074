"""CIFAR-10: its official forms in miniature, and the one-class protocol."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fastflow_jax.data import open_dataset
from fastflow_jax.data.tfds import cifar10
from fastflow_jax.data.tfds.cifar10 import CATEGORIES, one_class, open_classes
from fastflow_jax.errors import InputError

PER_BATCH = 20
RNG = np.random.default_rng(0)
BATCHES = {
    name: (
        RNG.integers(0, 256, (PER_BATCH, 32, 32, 3), np.uint8),
        [(7 * k + i) % 10 for i in range(PER_BATCH)],
    )
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"])
}
TRAIN_IMAGES = np.concatenate([BATCHES[f"data_batch_{i}"][0] for i in range(1, 6)])
TRAIN_LABELS = np.concatenate([BATCHES[f"data_batch_{i}"][1] for i in range(1, 6)])
TEST_IMAGES, TEST_LABELS = BATCHES["test_batch"]


def rows(images):
    return images.transpose(0, 3, 1, 2).tobytes()


def python_2_pickle(images, labels):
    """Pickle as of Python 2 and numpy 1: byte strings for text and arrays, old module names."""

    def text(data):
        return b"T" + struct.pack("<I", len(data)) + data

    def integer(value):
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNN"
    dtype += integer(-1) + integer(-1) + b"K\0tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR"
    array += b"(K\1(" + integer(len(images)) + integer(3072) + b"t" + dtype + b"\x89"
    array += text(rows(images)) + b"tb"
    numbers = b"](" + b"".join(integer(label) for label in labels) + b"e"
    fields = text(b"data") + array + text(b"labels") + numbers
    return b"\x80\2}(" + fields + text(b"batch_label") + text(b"testing batch 1 of 1") + b"u."


def python_files():
    return {name: python_2_pickle(*batch) for name, batch in BATCHES.items()}


def binary_files():
    return {
        f"{name}.bin": b"".join(
            bytes([label]) + rows(image[None]) for image, label in zip(images, labels, strict=True)
        )
        for name, (images, labels) in BATCHES.items()
    }


def put(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def pack(archive, top, files):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as packed:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    monkeypatch.setattr(cifar10, "COUNTS", (5 * PER_BATCH, PER_BATCH))


@pytest.fixture
def raw(tmp_path):
    return tmp_path / "data/downloads/manual/cifar10"


@pytest.fixture
def config(data_config, tmp_path):
    return data_config("cifar10", category="bird", dir=str(tmp_path / "data"))


def python_archive(raw):
    files = python_files() | {"readme.html": b"?", "batches.meta": b"?"}
    pack(raw / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)


def binary_archive(raw):
    pack(raw / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", binary_files())


def unpacked_python(raw):
    put(raw / "cifar-10-batches-py", python_files())


def unpacked_binary(raw):
    put(raw / "cifar-10-batches-bin", binary_files())


def bare_files(raw):
    put(raw, python_files())


FORMS = [python_archive, binary_archive, unpacked_python, unpacked_binary, bare_files]


@pytest.mark.parametrize("form", FORMS)
def test_the_official_forms(form, raw, config):
    form(raw)
    classes = open_classes(config)
    for source, images, labels in (
        (classes.train, TRAIN_IMAGES, TRAIN_LABELS),
        (classes.test, TEST_IMAGES, TEST_LABELS),
    ):
        assert source.defects == tuple(CATEGORIES[label] for label in labels)
        np.testing.assert_array_equal([example.image for example in source], images)
        assert {example.mask for example in source} == {None}
        assert len(set(source.names)) == len(images)
    assert classes.train.names[23] == f"{CATEGORIES[TRAIN_LABELS[23]]}/train_00023"


def test_one_class_is_normal(raw, config):
    python_archive(raw)
    dataset = open_dataset(config)
    assert dataset.name == "cifar10"
    np.testing.assert_array_equal(
        [example.image for example in dataset.train], TRAIN_IMAGES[TRAIN_LABELS == 2]
    )
    assert set(dataset.train.defects) == {"good"}
    assert dataset.train.labels.sum() == 0
    np.testing.assert_array_equal([example.image for example in dataset.test], TEST_IMAGES)
    np.testing.assert_array_equal(dataset.test.labels, np.array(TEST_LABELS) != 2)
    assert dataset.test[TEST_LABELS.index(4)].defect == "deer"
    assert dataset.test[TEST_LABELS.index(2)].defect == "good"
    assert dataset.provenance["category"] == "bird"
    assert dataset.provenance["train_images"] == len(dataset.train) == 10
    assert dataset.provenance["test_images"] == PER_BATCH


def test_all_classes_share_one_opening(raw, config):
    python_archive(raw)
    classes = open_classes(config)
    one_by_one = [one_class(classes, category) for category in CATEGORIES]
    assert sum(len(each.train) for each in one_by_one) == len(classes.train)
    assert sum(each.test.labels.sum() for each in one_by_one) == 9 * PER_BATCH


def test_a_copy_prepared_by_tfds_is_read(tmp_path, config):
    # As by the catalogue's builder: shuffled, and without the origin.
    class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            features = {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                "label": tfds.features.ClassLabel(names=list(CATEGORIES)),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples("train", TRAIN_IMAGES, TRAIN_LABELS),
                "test": self._generate_examples("test", TEST_IMAGES, TEST_LABELS),
            }

        def _generate_examples(self, split, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                name = f"{split}_{i:05}"
                yield name, {"id": name, "image": Image.fromarray(image), "label": int(label)}

    builder = Cifar10(data_dir=tmp_path / "data")
    builder.download_and_prepare(file_format="array_record")
    dataset = open_dataset(config)
    assert dataset.provenance["source"] == "elsewhere"
    np.testing.assert_array_equal([example.image for example in dataset.test], TEST_IMAGES)
    np.testing.assert_array_equal(
        [example.image for example in dataset.train], TRAIN_IMAGES[TRAIN_LABELS == 2]
    )


def test_a_copy_that_requires_tensorflow_is_refused(raw, config, tmp_path):
    python_archive(raw)
    open_classes(config)
    info = tmp_path / "data/cifar10/3.0.2/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"prepared as tfrecord.*Set data\.dir to another"):
        open_classes(config)


@pytest.fixture
def image_folder(tmp_path):
    for split, images, labels in (
        ("train", TRAIN_IMAGES, TRAIN_LABELS),
        ("test", TEST_IMAGES, TEST_LABELS),
    ):
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = tmp_path / "images" / split / CATEGORIES[label] / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return tmp_path / "images"


def test_directories_of_image_files(image_folder, data_config):
    dataset = open_dataset(data_config("cifar10", category="bird", root=str(image_folder)))
    np.testing.assert_array_equal(
        [example.image for example in dataset.train], TRAIN_IMAGES[TRAIN_LABELS == 2]
    )
    order = np.argsort(TEST_LABELS, kind="stable")
    np.testing.assert_array_equal([example.image for example in dataset.test], TEST_IMAGES[order])
    np.testing.assert_array_equal(dataset.test.labels, np.array(TEST_LABELS)[order] != 2)
    assert dataset.test.names[0] == f"airplane/{order[0]:04}.png"
    assert "re-encoded" in dataset.provenance["note"]


def test_directories_of_other_classes(image_folder, data_config):
    (image_folder / "test/bird").rename(image_folder / "test/birds")
    with pytest.raises(
        InputError, match=r"test must have one directory per class \(airplane, .*birds"
    ):
        open_dataset(data_config("cifar10", category="bird", root=str(image_folder)))


def test_unofficial_counts_are_a_warning(raw, config, monkeypatch):
    monkeypatch.setattr(cifar10, "COUNTS", (50_000, 10_000))
    python_archive(raw)
    with pytest.warns(UserWarning, match="100 training and 20 test images, but officially 50000"):
        open_dataset(config)


@pytest.mark.parametrize("exists", [True, False])
def test_missing_data_is_reported_with_instructions(raw, config, exists):
    if exists:
        raw.mkdir(parents=True)
    with pytest.raises(InputError) as error:
        open_dataset(config)
    for part in (
        f"cifar10 is not in {raw}",
        "cifar-10-python.tar.gz",
        "170 MB",
        "licence",
        "https://www.cs.toronto.edu/",
        "data.root",
    ):
        assert part in str(error.value)


def test_an_unknown_class(data_config):
    with pytest.raises(InputError, match=r"data\.category is 'plane'\. Choose one of airplane"):
        open_dataset(data_config("cifar10", category="plane"))


def missing_batch(raw):
    files = python_files()
    del files["data_batch_3"]
    put(raw, files)
    return r"has no data_batch_3\. Download it again"


def truncated_batch(raw):
    put(raw, python_files() | {"data_batch_3": python_files()["data_batch_3"][:-900]})
    return r"data_batch_3 of .* is damaged\. Download it again"


def truncated_binary_batch(raw):
    put(raw, binary_files() | {"data_batch_3.bin": binary_files()["data_batch_3.bin"][:-900]})
    return r"data_batch_3 of .* is damaged\. Download it again"


def truncated_archive(raw):
    python_archive(raw)
    path = raw / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-3000])
    return r"cifar-10-python\.tar\.gz is damaged .*Download it again"


def archive_with_a_wrong_checksum(raw):
    python_archive(raw)
    path = raw / "cifar-10-python.tar.gz"
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    return r"cifar-10-python\.tar\.gz is damaged .*Download it again"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_batch,
        truncated_batch,
        truncated_binary_batch,
        truncated_archive,
        archive_with_a_wrong_checksum,
    ],
)
def test_damaged_data_is_named_and_nothing_prepared(spoil, raw, config, tmp_path):
    says = spoil(raw)
    with pytest.raises(InputError, match=says):
        open_dataset(config)
    assert not list((tmp_path / "data").rglob("*.array_record*"))


def test_a_pickle_cannot_call_functions(raw, config, tmp_path):
    class Call:
        def __reduce__(self):
            return (tmp_path.joinpath("called").mkdir, ())

    put(raw, python_files() | {"data_batch_3": pickle.dumps(Call(), protocol=2)})
    with pytest.raises(InputError, match=r"data_batch_3 of .* is damaged"):
        open_dataset(config)
    assert not (tmp_path / "called").exists()
