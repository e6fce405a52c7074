"""Lists of images: what is read, and one error message for each kind of invalid content."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.config import default, fill
from fastflow_jax.data import open_dataset
from fastflow_jax.errors import InputError

ROWS = [
    ("a/1.png", "train", "good", ""),
    ("b/1.png", "train", "good", ""),
    ("b/2.png", "calibration", "good", ""),
    ("a/2.png", "test", "good", ""),
    ("a/3.png", "test", "crack", "masks/3.png"),
    ("c/4.png", "test", "hole", "masks/4a.png; masks/4b.png"),
]


@pytest.fixture
def tree(tmp_path, write_image, write_mask):
    """Directory of the images and masks of ROWS; grey levels identify images."""
    for i, (path, *_) in enumerate(ROWS):
        write_image(tmp_path / path, 10 + i)
    write_mask(tmp_path / "masks/3.png", 2)
    write_mask(tmp_path / "masks/4a.png", 3)
    mask = np.zeros((6, 8), np.uint8)
    mask[5, 4:] = 1  # levels 0 and 1
    Image.fromarray(mask).save(tmp_path / "masks/4b.png")
    return tmp_path


def write_csv(path, rows=ROWS, header=("path", "split", "label", "mask")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_json(path, rows=ROWS):
    entries = [
        {"path": image, "split": split, "label": label}
        | ({"mask": [name.strip() for name in mask.split(";")]} if mask else {})
        for image, split, label, mask in rows
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def open_list(data_config):
    def open_list(path, root=None):
        root = None if root is None else str(root)
        return open_dataset(data_config("folder", manifest=str(path), root=root))

    return open_list


@pytest.fixture
def message(open_list):
    def read(path, root=None):
        with pytest.raises(InputError) as error:
            open_list(path, root)
        assert "\n" not in str(error.value)
        return str(error.value)

    return read


@pytest.mark.parametrize("write", [write_csv, write_json])
@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_names_labels_and_masks(write, is_elsewhere, tree, open_list, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere") if is_elsewhere else tree
    path = write(folder / f"list.{write.__name__.removeprefix('write_')}")
    dataset = open_list(path, tree if is_elsewhere else None)
    assert dataset.train.names == ("a/1.png", "b/1.png")
    assert dataset.calibration.names == ("b/2.png",)
    assert dataset.test.names == ("a/2.png", "a/3.png", "c/4.png")
    assert dataset.test.defects == ("good", "crack", "hole")
    assert [int(example.image.max()) for example in dataset.test] == [13, 14, 15]
    assert [int(example.mask.sum()) for example in dataset.test] == [0, 2, 3 + 4]
    assert dataset.provenance == {
        "source": str(path),
        "train_images": 2,
        "test_images": 3,
        "calibration_images": 1,
    }


def test_without_masks(tree, open_list):
    rows = [row[:3] for row in ROWS]
    dataset = open_list(write_csv(tree / "list.csv", rows, ("path", "split", "label")))
    assert [example.mask for example in dataset.test] == [None] * 3


def test_training_images_alone(tree, open_list):
    assert open_list(write_csv(tree / "list.csv", ROWS[:2])).test is None


def changed(row, **fields):
    values = dict(zip(("path", "split", "label", "mask"), ROWS[row], strict=True)) | fields
    return [*ROWS[:row], tuple(values.values()), *ROWS[row + 1 :]]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (changed(0, path="a/9.png"), r"list\.csv, line 2: .*a/9\.png does not exist\. Correct"),
        (changed(4, mask="masks/9.png"), r"line 6: .*masks/9\.png does not exist"),
        (changed(1, split="val"), r"line 3: split is 'val'\. Choose one of train, test, calib"),
        (changed(1, label=""), r"line 3 has no label\. Each image needs path, split, label"),
        (changed(1, label="crack"), r"line 3: b/1\.png is crack, but train must contain only"),
        (changed(2, label="crack"), r"line 4: b/2\.png is crack, but calibration must contain"),
        (changed(4, mask=""), r"a/3\.png has no mask in .*list\.csv \(missing: 1 of 2\)"),
        ([*ROWS, ROWS[0]], r"a/1\.png and .*a/1\.png have the same name, a/1\.png"),
        (ROWS[2:], r"list\.csv has no images of the split train"),
    ],
)
def test_invalid_rows_are_named(rows, says, tree, message):
    if rows[-1] is rows[0]:
        rows = [*rows[:-1], (rows[0][0], "train", *rows[0][2:])]
    assert re.search(says, message(write_csv(tree / "list.csv", rows)))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("list.csv", None, r"list\.csv cannot be read \(.*No such file"),
        ("list.json", "[{", r"list\.json cannot be read"),
        ("list.json", '{"path": "a"}', r"must be a list of objects"),
        ("list.json", '[{"path": "a/1.png"}]', r"list\.json, entry 1 has no split"),
        ("list.csv", "image,split,label\na/1.png,train,good\n", r"line 2 has no path"),
    ],
)
def test_damaged_lists_are_named(name, content, says, tree, message):
    if content is not None:
        (tree / name).write_text(content)
    assert re.search(says, message(tree / name))


def test_a_mask_of_another_size(tree, message, write_image):
    write_image(tree / "masks/3.png", 255, size=(7, 8))
    text = message(write_csv(tree / "list.csv"))
    assert f"{tree}/masks/3.png has 8 x 7 pixels, but its image {tree}/a/3.png has 8 x 6" in text


def test_a_truncated_image(tree, message):
    (tree / "a/1.png").write_bytes(b"?")
    assert message(write_csv(tree / "list.csv")).startswith(f"{tree}/a/1.png is not an image")


def test_a_list_is_for_the_data_set_folder():
    config = default()
    config.data.name, config.data.manifest = "btad", "list.csv"
    with pytest.raises(InputError, match=r"^config\.data\.manifest has no effect on btad\."):
        fill(config)
    config.data.name = "folder"
    assert fill(config).data.manifest.endswith("/list.csv")
