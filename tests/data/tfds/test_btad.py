"""BTAD on miniature trees with the official names: ok and ko, .bmp and .png."""

import shutil
import zipfile

import pytest
from PIL import Image

from fastflow_jax.data import open_dataset
from fastflow_jax.data.tfds import btad
from fastflow_jax.errors import InputError

# Extensions of the images and of the masks of each product.
KINDS = {"01": ("bmp", "png"), "02": ("png", "png"), "03": ("bmp", "bmp")}


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    monkeypatch.setattr(btad, "COUNTS", dict.fromkeys(btad.CATEGORIES, (2, 3)))


@pytest.fixture
def make_products(write_mask):
    def make(folder):
        for product, (kind, mask_kind) in KINDS.items():
            for path, value in (
                *((f"train/ok/000{i}.{kind}", 10 + i) for i in range(2)),
                (f"test/ok/0000.{kind}", 20),
                *((f"test/ko/000{i}.{kind}", 30 + i) for i in range(2)),
            ):
                path = folder / product / path
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 6), (value, 0, int(product))).save(path)
            for i in range(2):
                write_mask(folder / product / f"ground_truth/ko/000{i}.{mask_kind}", i + 1)
        return folder

    return make


@pytest.fixture
def raw(tmp_path):
    folder = tmp_path / "data/downloads/manual/btad"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def open_btad(data_config, tmp_path):
    return lambda category: open_dataset(
        data_config("btad", category=category, dir=str(tmp_path / "data"))
    )


@pytest.mark.parametrize("product", KINDS)
def test_names_labels_and_pixels(raw, make_products, open_btad, product):
    make_products(raw / "BTech_Dataset_transformed")
    dataset = open_btad(product)
    kind = KINDS[product][0]
    assert dataset.name == "btad"
    assert dataset.train.names == (f"ok/0000.{kind}", f"ok/0001.{kind}")
    assert dataset.train.labels.tolist() == [0, 0]
    assert dataset.test.names == (f"ko/0000.{kind}", f"ko/0001.{kind}", f"ok/0000.{kind}")
    assert dataset.test.defects == ("ko", "ko", "good")
    assert dataset.test.labels.tolist() == [1, 1, 0]
    examples = list(dataset.test)
    assert [example.image[0, 0].tolist() for example in examples] == [
        [value, 0, int(product)] for value in (30, 31, 20)
    ]
    assert [int(example.mask.sum()) for example in examples] == [1, 2, 0]


@pytest.mark.parametrize("name", ["data [1]", "a\\b", "a**b"])
def test_any_directory_name_works_for_prepared_data(name, make_products, data_config, tmp_path):
    folder = tmp_path / name
    make_products(folder / "downloads/manual/btad")
    (folder / "btad/01/incomplete.of_a_run_that_was_killed").mkdir(parents=True)
    for _ in range(2):  # prepared now, then read
        dataset = open_dataset(data_config("btad", category="01", dir=str(folder)))
        assert dataset.train[1].image[0, 0].tolist() == [11, 0, 1]
    assert [path.name for path in (folder / "btad/01").iterdir()] == ["1.0.0"]


def test_a_directory_that_is_not_utf8_is_named(tmp_path, data_config):
    config = data_config("btad", category="01", dir=str(tmp_path / "k_\udce4"))
    with pytest.raises(InputError, match=r"is not UTF-8.*Set data\.dir"):
        open_dataset(config)


def test_names_that_are_not_utf8_are_escaped(raw, make_products, open_btad):
    product = make_products(raw) / "01"
    (product / "test/ko/0001.bmp").rename(product / "test/ko/k_\udce4.bmp")
    (product / "ground_truth/ko/0001.png").rename(product / "ground_truth/ko/k_\udce4.png")
    test = open_btad("01").test
    assert test.names == ("ko/0000.bmp", "ko/k_\\udce4.bmp", "ok/0000.bmp")
    assert [int(example.mask.sum()) for example in test] == [1, 2, 0]


@pytest.mark.parametrize("name", ["raw [1]", "k_\udce4", "a\\b"])
def test_any_directory_name_works_for_raw_data(name, make_products, data_config, tmp_path):
    root = make_products(tmp_path / name)
    config = data_config("btad", category="01", root=str(root), dir=str(tmp_path / "data"))
    for _ in range(2):  # prepared now, then read
        assert open_dataset(config).train[1].image[0, 0].tolist() == [11, 0, 1]


@pytest.mark.parametrize("top", ["BTech_Dataset_transformed", "any name", None])
def test_the_archive(raw, make_products, open_btad, tmp_path, top):
    made = make_products(tmp_path / "made")
    with zipfile.ZipFile(raw / "btad.zip", "w") as packed:
        for path in sorted(made.rglob("*")):
            name = path.relative_to(made)
            packed.write(path, name if top is None else f"{top}/{name}")
        if top is not None:
            packed.writestr(f"__MACOSX/{top}/._01", b"?")
    assert [int(example.mask.sum()) for example in open_btad("03").test] == [1, 2, 0]
    assert len(open_btad("01").train) == 2


def test_a_damaged_archive(raw, make_products, open_btad):
    (raw / "btad.zip").write_bytes(b"PK\3\4 and so on")
    with pytest.raises(InputError, match=r"btad\.zip is damaged .*Download it again"):
        open_btad("01")


def test_an_archive_of_unknown_compression(raw, make_products, open_btad):
    make_products(raw)
    shutil.make_archive(raw / "btad", "zip", raw)
    shutil.rmtree(raw / "01")
    packed = (raw / "btad.zip").read_bytes()
    unknown = (9).to_bytes(2, "little")  # Deflate64, in the method field of both headers
    for mark, at in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        start = packed.find(mark)
        while start >= 0:
            packed = packed[: start + at] + unknown + packed[start + at + 2 :]
            start = packed.find(mark, start + 4)
    (raw / "btad.zip").write_bytes(packed)
    with pytest.raises(InputError, match=r"btad\.zip cannot be unpacked .*Unpack it by hand"):
        open_btad("01")


def test_a_missing_mask(raw, make_products, open_btad):
    make_products(raw)
    (raw / "01/ground_truth/ko/0001.png").unlink()
    with pytest.raises(InputError, match=rf"^{raw}/01/test/ko/0001\.bmp has no mask"):
        open_btad("01")


def test_unofficial_counts_are_a_warning(raw, make_products, open_btad, monkeypatch):
    monkeypatch.setitem(btad.COUNTS, "02", (399, 230))
    make_products(raw)
    with pytest.warns(
        UserWarning, match="2 training and 3 test images, but officially 399 and 230"
    ):
        open_btad("02")


def test_missing_data_is_reported_with_instructions(raw, open_btad):
    with pytest.raises(InputError) as error:
        open_btad("01")
    for part in (f"btad (01) is not in {raw}", "btad.zip", "1.2 GB", "licence", "uniud.it"):
        assert part in str(error.value)


def test_an_unknown_product(open_btad):
    with pytest.raises(InputError, match=r"data\.category is '1'\. Choose one of 01, 02, 03"):
        open_btad("1")
