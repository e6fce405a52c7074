"""Polygons of LabelMe and COCO as masks."""

import json
import re

import numpy as np
import pytest

from fastflow_jax.data import open_dataset
from fastflow_jax.data.polygons import fill
from fastflow_jax.errors import InputError

SQUARE = [[2, 1], [5, 1], [5, 4], [2, 4]]  # pixels in columns 2 to 4 and rows 1 to 3


def test_a_square():
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:5] = True
    np.testing.assert_array_equal(fill(np.array(SQUARE, float), (6, 8)), mask)
    # A shift by less than half a pixel does not reach other centres.
    np.testing.assert_array_equal(fill(np.array(SQUARE) + 0.4, (6, 8)), mask)
    np.testing.assert_array_equal(fill(np.array(SQUARE[::-1], float), (6, 8)), mask)


def test_a_polygon_beyond_the_image_is_cut():
    polygon = np.array([[-5, -5], [20, -5], [20, 3], [-5, 3]], float)
    assert fill(polygon, (6, 8)).sum() == 3 * 8
    assert not fill(polygon + np.array([0, 20]), (6, 8)).any()


@pytest.mark.parametrize("seed", range(5))
def test_any_polygon_equals_the_even_odd_rule(seed):
    """Compared with matplotlib's test of the centres of pixels."""
    path = pytest.importorskip("matplotlib.path", reason="the test extra has matplotlib")
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 7))  # star-shaped, so that all rules agree
    radii = rng.uniform(3, 14, 7)
    polygon = np.stack([15 + radii * np.cos(angles), 12 + radii * np.sin(angles)], 1)
    columns, rows = np.meshgrid(np.arange(32) + 0.5, np.arange(24) + 0.5)
    centres = np.stack([columns, rows], -1).reshape(-1, 2)
    expected = path.Path(polygon).contains_points(centres).reshape(24, 32)
    np.testing.assert_array_equal(fill(polygon, (24, 32)), expected)


@pytest.fixture
def tree(tmp_path, write_image):
    """root/ with a training image, a good test image and two defective ones, without masks."""
    root = tmp_path / "screws"
    write_image(root / "train/good/0.png", 10)
    write_image(root / "test/good/0.png", 20)
    write_image(root / "test/crack/a.png", 30)
    write_image(root / "test/crack/b.png", 31)
    return root


@pytest.fixture
def pixels(data_config):
    """Numbers of defective pixels of the test images, or the error message."""

    def read(root):
        try:
            test = open_dataset(data_config("folder", root=str(root))).test
            return [int(example.mask.sum()) for example in test]
        except InputError as error:
            return str(error)

    return read


def labelme(*shapes, size=(6, 8)):
    height, width = size
    return {
        "version": "5.4.1",
        "shapes": [{"label": "crack", "points": p, "shape_type": kind} for kind, p in shapes],
        "imageHeight": height,
        "imageWidth": width,
    }


def save(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_labelme(tree, pixels, write_mask):
    crack = tree / "ground_truth/crack"
    write_mask(crack / "a_mask.png", 2)
    rectangle = ("rectangle", [[0, 0], [2, 1]])
    save(crack / "b.json", labelme(("polygon", SQUARE), rectangle))
    assert pixels(tree) == [2, 9 + 2, 0]
    # Two mask files of an image are united.
    (crack / "a_mask.png").unlink()
    write_mask(crack / "a_mask/0.png", 2)
    write_mask(crack / "a_mask/1.png", 3)
    save(crack / "a.json", labelme(rectangle, ("polygon", SQUARE)))
    assert pixels(tree) == [3 + 9, 9 + 2, 0]


COCO = {
    "images": [
        {"id": 7, "file_name": "crack/a.png", "width": 8, "height": 6},
        {"id": 8, "file_name": "b.png", "width": 8, "height": 6},
        {"id": 9, "file_name": "of another set.png", "width": 8, "height": 6},
    ],
    "annotations": [
        {"image_id": 7, "category_id": 1, "segmentation": [[2, 1, 5, 1, 5, 4, 2, 4]]},
        {"image_id": 7, "category_id": 1, "segmentation": [[0, 0, 1, 0, 1, 1, 0, 1]]},
        # 7 normal pixels, 2 defective ones, the others normal, by columns of 6 pixels.
        {"image_id": 8, "segmentation": {"size": [6, 8], "counts": [7, 2, 39]}},
    ],
    "categories": [{"id": 1, "name": "crack"}],
}


def test_coco(tree, pixels, data_config):
    save(tree / "ground_truth/annotations.json", COCO)
    assert pixels(tree) == [10, 2, 0]
    mask = open_dataset(data_config("folder", root=str(tree))).test[1].mask
    assert np.argwhere(mask).tolist() == [[1, 1], [2, 1]]


def without(annotation):
    rest = [each for i, each in enumerate(COCO["annotations"]) if i != annotation]
    return COCO | {"annotations": rest}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (without(2), r"crack/b\.png has no mask \(missing: 1 of 2\)"),
        (
            COCO | {"annotations": [*COCO["annotations"], {"image_id": 9, "segmentation": []}]},
            r"annotates of another set\.png, but no image has that name",
        ),
        (
            COCO | {"images": [*COCO["images"], {"id": 10, "file_name": "a.png"}]},
            r"annotations\.json has several entries for .*crack/a\.png",
        ),
        (
            COCO | {"images": [{**COCO["images"][0], "height": 7}, *COCO["images"][1:]]},
            r"states 8 x 7 pixels for .*crack/a\.png, which has 8 x 6",
        ),
        (
            COCO
            | {
                "annotations": [
                    *COCO["annotations"][:2],
                    {"image_id": 8, "segmentation": {"size": [6, 8], "counts": "abc"}},
                ]
            },
            r"has compressed run-length encodings\. Export polygons",
        ),
        ({"annotations": [{}]}, r"annotations\.json is damaged \(KeyError\('image_id'\)\)"),
        (labelme(("polygon", SQUARE)), r"annotations\.json is not a COCO file\. Move it"),
        ({"points": []}, r"is neither a LabelMe file \(shapes\) nor a COCO file"),
    ],
)
def test_invalid_coco_is_named(content, says, tree, pixels):
    save(tree / "ground_truth/annotations.json", content)
    message = pixels(tree)
    assert re.search(says, message)
    assert str(tree) in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (labelme(("circle", SQUARE[:2])), r"b\.json has a shape of the type circle\. Draw"),
        (labelme(("polygon", SQUARE), size=(8, 6)), r"b\.json states 6 x 8 pixels for .*b\.png"),
        ({"shapes": [{"label": "x"}]}, r"b\.json is damaged \(KeyError"),
    ],
)
def test_invalid_labelme_is_named(content, says, tree, pixels, write_mask):
    write_mask(tree / "ground_truth/crack/a_mask.png", 2)
    save(tree / "ground_truth/crack/b.json", content)
    assert re.search(says, pixels(tree))


def test_polygons_without_an_image(tree, pixels, write_mask):
    for name in ("a", "b"):
        write_mask(tree / f"ground_truth/crack/{name}_mask.png", 2)
    save(tree / "ground_truth/crack/c.json", labelme(("polygon", SQUARE)))
    assert re.search(r"crack/c\.json is a mask without an image\. Name it", pixels(tree))


def test_polygons_next_to_the_images_are_no_masks(tree, pixels):
    save(tree / "test/crack/a.json", labelme(("polygon", SQUARE)))
    assert re.search(r"test/crack/a\.json is not an image\. Move it", pixels(tree))


def test_polygons_in_a_list(tree, data_config):
    save(tree / "a.json", labelme(("polygon", SQUARE)))
    save(tree / "all.json", COCO)
    (tree / "list.csv").write_text(
        "path,split,label,mask\ntrain/good/0.png,train,good,\n"
        "test/crack/a.png,test,crack,a.json\ntest/crack/b.png,test,crack,all.json\n"
    )
    test = open_dataset(data_config("folder", manifest=str(tree / "list.csv"))).test
    assert [int(example.mask.sum()) for example in test] == [9, 2]
