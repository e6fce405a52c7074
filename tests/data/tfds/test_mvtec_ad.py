"""MVTec AD on miniature trees: locations, preparation and error messages."""

import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from fastflow_jax.data import categories, open_dataset
from fastflow_jax.data.pipeline import batches
from fastflow_jax.data.tfds import manual, mvtec_ad
from fastflow_jax.errors import InputError

OFFICIAL = dict(mvtec_ad.COUNTS)
LOCK = ".unpacking"  # remains next to the unpacked directory


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    """Sets the official counts to 3 training images and 5 test images."""
    monkeypatch.setattr(mvtec_ad, "COUNTS", dict.fromkeys(mvtec_ad.CATEGORIES, (3, 5)))


@pytest.fixture
def make_category(write_mask):
    """make(folder) creates a category; grey levels identify images, masks differ in size."""

    def make(folder, mode="RGB"):
        def write(path, value):
            path = folder / path
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 6), value).convert(mode).save(path)

        for i in range(3):
            write(f"train/good/{i:03}.png", 10 + i)
        for i in range(2):
            write(f"test/good/{i:03}.png", 20 + i)
            write(f"test/broken/{i:03}.png", 30 + i)
        write("test/print/000.png", 40)
        for i, name in enumerate(("broken/000", "broken/001", "print/000")):
            write_mask(folder / f"ground_truth/{name}_mask.png", i + 1)
        (folder / "license.txt").write_text("CC BY-NC-SA 4.0")
        (folder / "readme.txt").write_text("cite")
        return folder

    return make


@pytest.fixture
def raw(tmp_path):
    """Directory for the archive or the directories of the categories."""
    folder = tmp_path / "data/downloads/manual/mvtec_ad"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def open_mvtec(data_config, tmp_path):
    return lambda **fields: open_dataset(
        data_config("mvtec_ad", **({"category": "bottle", "dir": str(tmp_path / "data")} | fields))
    )


def pack(archive, folders):
    """Creates an archive of these directories, under their own names."""
    with tarfile.open(archive, "w:xz") as packed:
        for folder in folders:
            packed.add(folder, folder.name)


def test_names_labels_and_pixels(raw, make_category, open_mvtec, tmp_path):
    make_category(raw / "bottle")
    dataset = open_mvtec()
    assert dataset.name == "mvtec_ad"
    assert dataset.provenance == {
        "source": str(raw),
        "prepared": str(tmp_path / "data/mvtec_ad/bottle/1.0.0"),
        "train_images": 3,
        "test_images": 5,
        "category": "bottle",
        "licence": "CC BY-NC-SA 4.0",
    }
    assert dataset.train.names == ("good/000.png", "good/001.png", "good/002.png")
    assert [example.mask for example in dataset.train] == [None] * 3
    assert dataset.test.names == (
        *("broken/000.png", "broken/001.png"),
        *("good/000.png", "good/001.png"),
        "print/000.png",
    )
    assert dataset.test.defects == ("broken", "broken", "good", "good", "print")
    assert dataset.test.labels.tolist() == [1, 1, 0, 0, 1]
    examples = list(dataset.test)
    assert [int(example.image[0, 0, 0]) for example in examples] == [30, 31, 20, 21, 40]
    assert [int(example.mask.sum()) for example in examples] == [1, 2, 0, 0, 3]
    assert {example.image.shape for example in examples} == {(6, 8, 3)}
    options = {"image_size": (12, 16), "mean": (0, 0, 0), "std": (1, 1, 1), "batch_size": 5}
    (batch,) = batches(dataset.test, **options)
    np.testing.assert_array_equal(batch.mask.sum(axis=(1, 2)), [4, 8, 0, 0, 12])


def test_grey_categories(raw, make_category, open_mvtec):
    make_category(raw / "grid", mode="L")
    examples = list(open_mvtec(category="grid").test)
    assert {example.image.shape for example in examples} == {(6, 8, 3)}
    assert [int(example.image[0, 0, 2]) for example in examples] == [30, 31, 20, 21, 40]


def test_unofficial_counts_are_a_warning(raw, make_category, open_mvtec, monkeypatch):
    monkeypatch.setitem(mvtec_ad.COUNTS, "bottle", (209, 83))
    make_category(raw / "bottle")
    for _ in range(2):  # before and after preparation
        with pytest.warns(
            UserWarning, match=r"3 training and 5 test images, but officially 209 and 83"
        ):
            open_mvtec()


def test_the_official_counts():
    # Bergmann et al. 2021, table 1: 3,629 training, 467 good and 1,258 defective test images.
    train, test = zip(*OFFICIAL.values(), strict=True)
    assert (sum(train), sum(test)) == (3629, 467 + 1258)


def test_the_categories(data_config):
    config = data_config("mvtec_ad", category="screw,bottle")
    assert categories(config) == ("screw", "bottle")
    assert len(categories(data_config("mvtec_ad"))) == 15


def unpacked(raw, make_category):
    make_category(raw / "bottle")


def one_level_deeper(raw, make_category):
    make_category(raw / "mvtec_anomaly_detection/bottle")


def linked_category(raw, make_category):
    make_category(raw.parent / "elsewhere/bottle")
    (raw / "bottle").symlink_to(raw.parent / "elsewhere/bottle")


def linked_folder(raw, make_category):
    make_category(raw.parent / "elsewhere/bottle")
    raw.rmdir()
    raw.symlink_to(raw.parent / "elsewhere")


def archive(raw, make_category):
    folders = [make_category(raw.parent / f"made/{name}") for name in ("bottle", "cable")]
    (raw.parent / "made/license.txt").write_text("CC BY-NC-SA 4.0")
    pack(raw / "mvtec_anomaly_detection.tar.xz", [*folders, raw.parent / "made/license.txt"])


def archive_with_a_folder_round_all(raw, make_category):
    make_category(raw.parent / "made/all/bottle")
    pack(raw / "mvtec_anomaly_detection.tar.xz", [raw.parent / "made/all"])


def archive_of_the_category(raw, make_category):
    pack(raw / "bottle.tar.xz", [make_category(raw.parent / "made/bottle")])


@pytest.mark.parametrize(
    "put",
    [
        unpacked,
        one_level_deeper,
        linked_category,
        linked_folder,
        archive,
        archive_with_a_folder_round_all,
        archive_of_the_category,
    ],
)
def test_where_it_is_found(put, raw, make_category, open_mvtec):
    put(raw, make_category)
    assert [int(example.mask.sum()) for example in open_mvtec().test] == [1, 2, 0, 0, 3]


def test_data_root(tmp_path, make_category, open_mvtec):
    root = tmp_path / "raw"
    make_category(root / "mvtec_anomaly_detection/bottle")
    assert open_mvtec(root=str(root)).provenance["source"] == str(root)
    assert len(open_mvtec(root=str(root)).train) == 3
    assert len(open_mvtec().train) == 3
    with pytest.raises(InputError, match=rf"was prepared from {root}, not from data\.root /else"):
        open_mvtec(root="/elsewhere")


def test_an_archive_is_unpacked_once(raw, make_category, open_mvtec, monkeypatch):
    archive(raw, make_category)
    open_mvtec()
    (raw / "mvtec_anomaly_detection.tar.xz").unlink()
    assert len(open_mvtec(category="cable").train) == 3
    assert sorted(path.name for path in raw.iterdir()) == [LOCK, "mvtec_anomaly_detection"]


def test_one_category_alone(raw, make_category, open_mvtec):
    make_category(raw / "bottle")
    open_mvtec()
    with pytest.raises(InputError, match=rf"^mvtec_ad \(cable\) is not in {raw}\. Download"):
        open_mvtec(category="cable")


@pytest.mark.parametrize("exists", [True, False])
def test_missing_data_is_reported_with_instructions(raw, open_mvtec, exists):
    if not exists:
        raw.rmdir()
    with pytest.raises(InputError) as error:
        open_mvtec()
    message = str(error.value)
    for part in (
        f"mvtec_ad (bottle) is not in {raw}",
        "mvtec_anomaly_detection.tar.xz",
        "5.3 GB",
        "CC BY-NC-SA 4.0",
        "not for commercial use",
        "https://www.mvtec.com/",
        "data.root",
    ):
        assert part in message


def test_an_unknown_category(open_mvtec):
    with pytest.raises(InputError, match=r"data\.category is 'bottles'.*bottle, cable, capsule"):
        open_mvtec(category="bottles")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) // 2] + b"damaged!" + data[len(data) // 2 + 8 :],
    ],
)
def test_a_damaged_archive(raw, make_category, open_mvtec, damage):
    archive(raw, make_category)
    path = raw / "mvtec_anomaly_detection.tar.xz"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    with pytest.raises(InputError, match=rf"^{path} is damaged .*Download it again"):
        open_mvtec()
    assert sorted(each.name for each in raw.iterdir()) == [LOCK, path.name]
    path.write_bytes(data)
    assert len(open_mvtec().train) == 3


def test_an_archive_truncated_anywhere(tmp_path):
    whole = tmp_path / "whole"
    for name in "abc":
        (whole / name).mkdir(parents=True)
        (whole / name / "noise").write_bytes(np.random.default_rng(0).bytes(900))
    path = tmp_path / "cut.tar.xz"
    pack(path, sorted(whole.iterdir()))
    data = path.read_bytes()
    for length in range(0, len(data), 4):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match="is damaged"):
            manual.unpack(path)
        assert not (tmp_path / "cut").exists()
    path.write_bytes(data)
    manual.unpack(path)
    assert sorted(each.name for each in (tmp_path / "cut").iterdir()) == ["a", "b", "c"]


def test_an_archive_cannot_write_elsewhere(raw, make_category, open_mvtec):
    with tarfile.open(raw / "mvtec_anomaly_detection.tar.xz", "w:xz") as packed:
        packed.add(make_category(raw.parent / "made/bottle"), "../../outside")
    with pytest.raises(InputError, match=r"\.tar\.xz is damaged .*outside"):
        open_mvtec()
    assert sorted(path.name for path in raw.parent.iterdir()) == ["made", "mvtec_ad"]
    assert sorted(path.name for path in raw.iterdir()) == [LOCK, "mvtec_anomaly_detection.tar.xz"]


def test_an_unpacked_directory_without_the_category(raw, make_category, open_mvtec):
    archive(raw, make_category)
    make_category(raw / "mvtec_anomaly_detection/cable")
    with pytest.raises(InputError, match=r"mvtec_anomaly_detection has no bottle\. Remove it"):
        open_mvtec()


def test_no_disk_space_to_unpack(raw, make_category, open_mvtec, monkeypatch):
    archive(raw, make_category)

    def extractall(self, path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", extractall)
    with pytest.raises(
        InputError, match=r"\.tar\.xz cannot be unpacked .*No space left.*data\.root"
    ):
        open_mvtec()
    assert sorted(each.name for each in raw.iterdir()) == [LOCK, "mvtec_anomaly_detection.tar.xz"]


def test_a_killed_unpacking_is_restarted(raw, make_category, open_mvtec):
    archive(raw, make_category)
    make_category(raw / ".unpacking-1234/content/bottle")
    shutil.rmtree(raw / ".unpacking-1234/content/bottle/test")
    assert len(open_mvtec().test) == 5
    assert not (raw / ".unpacking-1234").exists()


SLOWLY = """
import logging
import pathlib, sys, tarfile, time
from fastflow_jax.data.tfds import manual
logging.basicConfig(level="INFO", stream=sys.stdout)
archive, go = map(pathlib.Path, sys.argv[1:])
extractall = tarfile.TarFile.extractall
def slowly(self, path, **options):
    extractall(self, path, **options)
    print("extracted", flush=True)
    while not go.exists():
        time.sleep(0.01)
tarfile.TarFile.extractall = slowly
manual.unpack(archive)
"""


@pytest.mark.parametrize("second", ["screw.tar", "bottle.tar"])
def test_processes_unpack_one_after_the_other(tmp_path, second):
    """In one directory, where each process removes what a killed one left."""
    (tmp_path / "001.png").write_bytes(b"content")
    for name in ("bottle", "screw"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as packed:
            packed.add(tmp_path / "001.png", arcname=f"{name}/001.png")
    calls = []
    for name, says in (("bottle.tar", "extracted"), (second, "Waiting for another process")):
        command = [sys.executable, "-c", SLOWLY, tmp_path / name, tmp_path / "go"]
        calls.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert says in calls[-1].stdout.readline()
    (tmp_path / "go").touch()
    for call in calls:
        call.communicate(timeout=120)
        assert call.returncode == 0
    for name in {"bottle.tar", second}:
        assert (tmp_path / name.removesuffix(".tar") / "001.png").read_bytes() == b"content"
    assert not list(tmp_path.glob(".unpacking-*"))


def missing_mask(folder):
    (folder / "ground_truth/broken/001_mask.png").unlink()
    return "test/broken/001.png", "has no mask"


def mask_without_image(folder):
    (folder / "test/broken/001.png").unlink()
    return "ground_truth/broken/001_mask.png", "is a mask without an image"


def mask_of_another_size(folder):
    Image.new("L", (7, 6)).save(folder / "ground_truth/broken/001_mask.png")
    return "ground_truth/broken/001_mask.png", "has 7 x 6 pixels, but its image"


def stray_file(folder):
    (folder / "test/broken/notes.txt").write_text("?")
    return "test/broken/notes.txt", "is not an image"


def truncated_image(folder):
    path = folder / "train/good/001.png"
    path.write_bytes(path.read_bytes()[:-20])
    return "train/good/001.png", "is broken"


def truncated_mask(folder):
    path = folder / "ground_truth/broken/001_mask.png"
    path.write_bytes(path.read_bytes()[:-20])
    return "ground_truth/broken/001_mask.png", "is broken"


def duplicate_name(folder):
    Image.new("L", (8, 6)).save(folder / "test/broken/001.bmp")
    return "test/broken/001.bmp", "differ only in their extensions"


def no_masks(folder):
    shutil.rmtree(folder / "ground_truth")
    return "", "has no directory ground_truth"


def no_test_images(folder):
    shutil.rmtree(folder / "test")
    return "", "has no directory test"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_mask,
        mask_without_image,
        mask_of_another_size,
        stray_file,
        truncated_image,
        truncated_mask,
        duplicate_name,
        no_masks,
        no_test_images,
    ],
)
def test_invalid_content_is_named_and_nothing_is_prepared(
    spoil, raw, make_category, open_mvtec, tmp_path
):
    folder = make_category(raw / "bottle")
    path, says = spoil(folder)
    with pytest.raises(InputError) as error:
        open_mvtec()
    assert str(folder / path) in str(error.value)
    assert re.search(says, str(error.value))
    shutil.rmtree(folder)
    make_category(folder)
    assert [int(example.mask.sum()) for example in open_mvtec().test] == [1, 2, 0, 0, 3]


def test_tfds_reads_the_prepared_data(raw, make_category, open_mvtec, tmp_path):
    make_category(raw / "bottle")
    open_mvtec()
    source = tfds.data_source(
        "mvtec_ad/bottle",
        split="test",
        data_dir=tmp_path / "data",
        builder_kwargs={"file_format": "array_record"},
        download=False,
    )
    assert [int((example["mask"] > 0).sum()) for example in source] == [1, 2, 0, 0, 3]
    assert [example["label"] for example in source] == [1, 1, 0, 0, 1]
    assert {example["mask"].shape for example in source} == {(6, 8, 1)}
