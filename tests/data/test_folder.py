"""Directories of images: reading, and one error message for each kind of invalid content."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.data import open_dataset
from fastflow_jax.data.pipeline import batches
from fastflow_jax.errors import InputError


@pytest.fixture
def tree(tmp_path, write_image, write_mask):
    """root/ with 3 training images, 2 good and 3 defective test images, and masks.

    Grey levels identify images; each mask has one more defective pixel than the one before.
    """
    root = tmp_path / "screws"
    for i in range(3):
        write_image(root / f"train/good/{i}.png", 10 + i)
    for i in range(2):
        write_image(root / f"test/good/{i}.bmp", 20 + i)
    write_image(root / "test/crack/a.png", 30)
    write_image(root / "test/crack/b.png", 31)
    write_image(root / "test/hole/a.png", 32)
    for i, name in enumerate(("crack/a", "crack/b", "hole/a")):
        write_mask(root / f"ground_truth/{name}_mask.png", i + 1)
    return root


@pytest.fixture
def open_folder(data_config):
    return lambda root: open_dataset(data_config("folder", root=str(root)))


@pytest.fixture
def message(open_folder):
    """Returns the error message of opening `root`."""

    def read(root):
        with pytest.raises(InputError) as error:
            open_folder(root)
        text = str(error.value)
        assert "\n" not in text
        return text

    return read


def test_names_labels_and_pixels(tree, open_folder):
    dataset = open_folder(tree)
    assert dataset.name == "folder"
    assert dataset.provenance == {
        "source": str(tree),
        "train_images": 3,
        "test_images": 5,
    }
    assert dataset.train.names == ("good/0.png", "good/1.png", "good/2.png")
    assert dataset.train.labels.tolist() == [0, 0, 0]
    assert [example.mask for example in dataset.train] == [None] * 3
    assert dataset.test.names == (
        *("crack/a.png", "crack/b.png"),
        *("good/0.bmp", "good/1.bmp"),
        "hole/a.png",
    )
    assert dataset.test.defects == ("crack", "crack", "good", "good", "hole")
    assert dataset.test.labels.tolist() == [1, 1, 0, 0, 1]
    examples = list(dataset.test)
    assert [example.name for example in examples] == list(dataset.test.names)
    assert [example.label for example in examples] == [1, 1, 0, 0, 1]
    assert [int(example.image[0, 0, 0]) for example in examples] == [30, 31, 20, 21, 32]
    assert [int(example.mask.sum()) for example in examples] == [1, 2, 0, 0, 3]
    for example in examples:
        assert example.image.shape == (6, 8, 3)
        assert example.mask.shape == (6, 8)
        assert example.mask.dtype == bool


def test_batches_of_a_directory(tree, open_folder):
    options = {"image_size": (4, 4), "mean": (0, 0, 0), "std": (1, 1, 1), "batch_size": 3}
    first, second = batches(open_folder(tree).test, **options)
    assert first.image.shape == (3, 4, 4, 3)
    assert second.mask.shape == (2, 4, 4)
    np.testing.assert_allclose(second.image[:, 0, 0, 0] * 255, [21, 32], rtol=1e-6)


def test_without_masks(tree, open_folder):
    shutil.rmtree(tree / "ground_truth")
    assert [example.mask for example in open_folder(tree).test] == [None] * 5


def test_without_test_images(tree, open_folder):
    shutil.rmtree(tree / "ground_truth")
    shutil.rmtree(tree / "test")
    dataset = open_folder(tree)
    assert dataset.test is None
    assert dataset.provenance["test_images"] == 0


def test_a_bare_directory_has_only_normal_images(tmp_path, write_image, open_folder):
    for name in ("b.JPG", "a.tif", "c.webp"):
        write_image(tmp_path / name, 7)
    dataset = open_folder(tmp_path)
    assert dataset.train.names == ("good/a.tif", "good/b.JPG", "good/c.webp")
    assert dataset.train.labels.tolist() == [0, 0, 0]
    assert dataset.test is None


def test_service_files_are_skipped(tree, open_folder):
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tree / "train/good" / name).write_bytes(b"?")
        (tree / "test" / name).write_bytes(b"?")
    (tree / ".ipynb_checkpoints").mkdir()
    (tree / "license.txt").write_text("of the data set")
    assert len(open_folder(tree).train) == 3


def test_good_images_may_have_an_empty_mask_directory(tree, open_folder):
    (tree / "ground_truth/good").mkdir()
    assert [int(example.mask.sum()) for example in open_folder(tree).test] == [1, 2, 0, 0, 3]


def test_another_file_size_changes_the_contents(tree, open_folder, write_image):
    before = open_folder(tree).train
    write_image(tree / "train/good/1.png", 11, size=(99, 99))
    after = open_folder(tree).train
    assert after.names == before.names
    assert [a == b for a, b in zip(after.contents, before.contents, strict=True)] == [1, 0, 1]


def test_rewriting_a_file_changes_its_version_only(tree, open_folder):
    before = open_folder(tree).train
    os.utime(tree / "train/good/1.png", (1, 1))
    after = open_folder(tree).train
    assert after.contents == before.contents
    assert [a == b for a, b in zip(after.versions, before.versions, strict=True)] == [1, 0, 1]


def test_an_unreadable_directory_is_named(tree, message, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    assert message(tree) == f"{tree} cannot be read: Permission denied. Check its permissions."
    monkeypatch.setattr(Path, "exists", lambda path: path == tree or denied(path))
    assert (
        message(tree)
        == f"{tree}/ground_truth cannot be read: Permission denied. Check its permissions."
    )


def test_links_are_followed(tree, tmp_path, open_folder):
    (tmp_path / "link").symlink_to(tree, target_is_directory=True)
    (tree / "train/good/3.png").symlink_to(tree / "train/good/0.png")
    assert len(open_folder(tmp_path / "link").train) == 4


def test_masks_of_any_format_and_of_good_images(tree, write_image, open_folder):
    (tree / "ground_truth/hole/a_mask.png").unlink()
    write_image(tree / "ground_truth/hole/a_mask.bmp", 255)
    write_image(tree / "ground_truth/good/0_mask.png", 0)
    examples = list(open_folder(tree).test)
    assert [int(example.mask.sum()) for example in examples] == [1, 2, 0, 0, 48]


def test_mask_sizes_follow_the_exif_orientation(tree, write_image, open_folder, message):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(tree / "test/hole/a.jpg", exif=exif)
    (tree / "test/hole/a.png").unlink()
    assert open_folder(tree).test[4].image.shape == (6, 8, 3)
    write_image(tree / "ground_truth/hole/a_mask.png", 255, size=(8, 6))
    assert "a_mask.png has 6 x 8 pixels, but its image" in message(tree)


def test_exif_after_the_pixels_of_a_png_is_found_by_decoding(tree, open_folder):
    path = tree / "test/hole/a.png"
    exif = Image.Exif()
    exif[274] = 6
    Image.open(path).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    tail = data.index(b"IEND") - 4
    path.write_bytes(data[:start] + data[end:tail] + data[start:end] + data[tail:])
    source = open_folder(tree).test
    with pytest.raises(InputError, match=r"a_mask\.png has 8 x 6 pixels, but its image .* 6 x 8"):
        source[4]


def test_a_missing_root(tmp_path, message):
    assert message(tmp_path / "nothing") == (
        f"data.root {tmp_path / 'nothing'} does not exist. Set it to the directory of your images."
    )


def test_a_root_that_is_a_file(tmp_path, message, write_image):
    path = write_image(tmp_path / "a.png")
    assert message(path).startswith(f"data.root {path} is not a directory")


def test_no_root(data_config):
    with pytest.raises(InputError, match=r"^data\.root is not set"):
        open_dataset(data_config("folder"))


def test_a_category(data_config, tree):
    with pytest.raises(InputError, match=r"^data\.category is 'bottle', but a directory has"):
        open_dataset(data_config("folder", root=str(tree), category="bottle"))


@pytest.mark.parametrize("inner", ["", "train/good", "test/crack", "ground_truth/crack"])
def test_an_empty_directory(tree, message, inner):
    shutil.rmtree(tree / inner)
    (tree / inner).mkdir()
    assert message(tree).startswith(f"{tree / inner} has no images")


@pytest.mark.parametrize("inner", ["train", "test", "ground_truth"])
def test_an_empty_split(tree, message, inner):
    shutil.rmtree(tree / inner)
    (tree / inner).mkdir()
    assert message(tree) == f"{tree / inner} is empty. Add images or remove it."


def test_images_without_a_class_directory(tree, message):
    for image in (tree / "train/good").iterdir():
        image.rename(tree / "train" / image.name)
    (tree / "train/good").rmdir()
    train = tree / "train"
    assert message(tree) == (
        f"{train} has images, but no directories of images. Move normal images to {train}/good."
    )


def test_directories_without_train(tree, message):
    shutil.rmtree(tree / "train")
    assert message(tree).startswith(f"{tree} has directories (ground_truth, test), but no train")


def test_defective_training_images(tree, message):
    shutil.copytree(tree / "test/crack", tree / "train/crack")
    assert message(tree) == (
        f"{tree / 'train'} must contain only normal images, in the directory good, but it has "
        "crack, good. Move the others to test."
    )


def broken_header(tree):
    (tree / "train/good/1.png").write_bytes(b"no image")
    return "train/good/1.png", "is not an image that Pillow can read"


def stray_file(tree):
    (tree / "test/crack/notes.txt").write_text("?")
    return "test/crack/notes.txt", "is not an image. Move it elsewhere"


def stray_file_next_to_directories(tree):
    (tree / "test/notes.txt").write_text("?")
    return "test/notes.txt", "is next to the directories of"


def stray_image_next_to_train(tree):
    shutil.copy(tree / "train/good/1.png", tree / "more.png")
    return "more.png", "is next to train"


def stray_directory(tree):
    (tree / "validation").mkdir()
    return "validation", "is unexpected"


def broken_link(tree):
    (tree / "train/good/9.png").symlink_to(tree / "gone.png")
    return "train/good/9.png", "is a link to a missing file"


def mask_of_another_size(tree):
    Image.new("L", (8, 7)).save(tree / "ground_truth/crack/b_mask.png")
    return "ground_truth/crack/b_mask.png", "has 8 x 7 pixels, but its image .* has 8 x 6"


def missing_mask(tree):
    (tree / "ground_truth/crack/b_mask.png").unlink()
    return (
        "test/crack/b.png",
        r"has no mask \(missing: 1 of 3\)\. Add it as .*/crack/b_mask\.png, or",
    )


def missing_masks(tree):
    shutil.rmtree(tree / "ground_truth/crack")
    return "test/crack/a.png", r"has no mask \(missing: 2 of 3\)"


def mask_without_image(tree):
    (tree / "test/crack/b.png").unlink()
    return "ground_truth/crack/b_mask.png", "is a mask without an image"


def misnamed_mask(tree):
    shutil.copy(tree / "ground_truth/hole/a_mask.png", tree / "ground_truth/hole/a.png")
    return "ground_truth/hole/a.png", r"Name it after an image in test/hole: <name>_mask\.png"


def mask_of_a_defect_without_images(tree):
    shutil.rmtree(tree / "test/hole")
    return "ground_truth/hole/a_mask.png", "is a mask without an image"


def masks_without_test(tree):
    shutil.rmtree(tree / "test")
    return "ground_truth/crack/a_mask.png", "is a mask without an image"


def two_images_with_one_stem(tree):
    Image.new("L", (8, 6)).save(tree / "test/crack/a.bmp")
    return "test/crack/a.bmp", "differ only in their extensions"


def two_masks_with_one_stem(tree):
    Image.new("L", (8, 6)).save(tree / "ground_truth/crack/a_mask.bmp")
    return "ground_truth/crack/a_mask.bmp", "differ only in their extensions"


@pytest.mark.parametrize(
    "spoil",
    [
        broken_header,
        stray_file,
        stray_file_next_to_directories,
        stray_image_next_to_train,
        stray_directory,
        broken_link,
        mask_of_another_size,
        missing_mask,
        missing_masks,
        mask_without_image,
        misnamed_mask,
        mask_of_a_defect_without_images,
        masks_without_test,
        two_images_with_one_stem,
        two_masks_with_one_stem,
    ],
)
def test_unexpected_content_is_named(tree, message, spoil):
    path, says = spoil(tree)
    text = message(tree)
    assert str(tree / path) in text
    assert re.search(says, text)


def test_a_too_large_image(tree, message, monkeypatch, write_image):
    path = write_image(tree / "train/good/large.png", size=(10, 10))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert message(tree).startswith(f"{path} is too large")


def test_a_truncated_image_is_named_when_it_is_decoded(tree, open_folder):
    path = tree / "train/good/1.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    source = open_folder(tree).train
    options = {"image_size": (4, 4), "mean": (0, 0, 0), "std": (1, 1, 1), "batch_size": 3}
    with pytest.raises(InputError, match=rf"^{re.escape(str(path))} is broken .*Replace or remove"):
        list(batches(source, **options))


def test_an_image_deleted_after_opening(tree, open_folder):
    source = open_folder(tree).train
    (tree / "train/good/1.png").unlink()
    with pytest.raises(InputError, match=r"1\.png cannot be read: No such file"):
        source[1]


def test_a_good_image_with_a_defect_in_its_mask(tree, open_folder, write_image):
    path = write_image(tree / "ground_truth/good/0_mask.png", 255)
    with pytest.raises(
        InputError, match=rf"^{re.escape(str(path))} marks a defect in a good image"
    ):
        list(open_folder(tree).test)


def test_images_may_be_in_sub_directories(tree, write_image, open_folder):
    write_image(tree / "train/good/camera_1/0.png", 50)
    write_image(tree / "train/good/camera_1/day_2/0.png", 51)
    write_image(tree / "test/crack/camera_1/a.png", 60)
    write_image(tree / "ground_truth/crack/camera_1/a_mask.png", 255)
    dataset = open_folder(tree)
    assert dataset.train.names[3:] == ("good/camera_1/0.png", "good/camera_1/day_2/0.png")
    assert [int(dataset.train[i].image.max()) for i in (3, 4)] == [50, 51]
    assert len(set(dataset.train.names)) == len(dataset.train) == 5
    assert dataset.test.names[:3] == ("crack/a.png", "crack/b.png", "crack/camera_1/a.png")
    assert dataset.test.defects[2] == "crack"
    assert [int(example.mask.sum()) for example in dataset.test][:3] == [1, 2, 48]


def test_masks_are_matched_within_sub_directories(tree, write_image, message):
    write_image(tree / "test/crack/camera_1/c.png", 60)
    assert "Add it as ground_truth/crack/camera_1/c_mask.png" in message(tree)
    write_image(tree / "ground_truth/crack/c_mask.png", 255)
    assert re.search(r"crack/c_mask\.png is a mask without an image", message(tree))


def test_a_directory_named_good_may_have_sub_directories(
    tmp_path, write_image, open_folder, message, data_config
):
    for name in ("part_1/a.png", "part_2/a.png"):
        write_image(tmp_path / "good" / name, 7)
    assert open_folder(tmp_path / "good").train.names == ("good/part_1/a.png", "good/part_2/a.png")
    (tmp_path / "good").rename(tmp_path / "screws")
    assert "It may have sub-directories if it is named good" in message(tmp_path / "screws")
    config = data_config("folder", root=str(tmp_path / "screws"), groups="folder")
    assert len(open_dataset(config).train) == 2


def test_calibration_images_are_read(tree, write_image, open_folder, message):
    write_image(tree / "calibration/good/a.png", 40)
    write_image(tree / "calibration/good/b.png", 41)
    dataset = open_folder(tree)
    assert dataset.calibration.names == ("good/a.png", "good/b.png")
    assert dataset.calibration[1].image.max() == 41
    assert dataset.provenance["calibration_images"] == 2
    write_image(tree / "calibration/crack/b.png", 41)
    assert message(tree).startswith(f"{tree / 'calibration'} must contain only normal images")


def test_service_directories_are_skipped_in_training(tree, write_image, open_folder):
    for where in ("train/good/@eaDir/0.png", "test/crack/.thumbnails", "__MACOSX/train/good"):
        write_image(tree / where / "thumbnail.jpg", 1)
    (tree / "#recycle").mkdir()
    (tree / "train/good/Icon\r").write_bytes(b"")
    dataset = open_folder(tree)
    assert (len(dataset.train), len(dataset.test)) == (3, 5)


def test_training_images_are_recognised_by_content(tree, open_folder):
    (tree / "train/good/0.png").rename(tree / "train/good/frame_0")
    assert open_folder(tree).train.names[-1] == "good/frame_0"


def test_every_page_of_a_file_is_an_example_with_its_mask(tree, open_folder, message):
    def stack(path, *values):
        pages = [Image.new("L", (8, 6), value) for value in values]
        path.parent.mkdir(parents=True, exist_ok=True)
        pages[0].save(path, save_all=True, append_images=pages[1:])

    stack(tree / "train/good/stack.tif", 70, 71)
    stack(tree / "test/crack/stack.tif", 80, 81)
    stack(tree / "ground_truth/crack/stack_mask.tif", 0, 255)
    dataset = open_folder(tree)
    assert dataset.train.names[3:] == ("good/stack.tif#1", "good/stack.tif#2")
    assert [int(dataset.train[i].image.max()) for i in (3, 4)] == [70, 71]
    examples = [e for e in dataset.test if e.name.startswith("crack/stack")]
    assert [(int(e.image.max()), int(e.mask.sum())) for e in examples] == [(80, 0), (81, 48)]
    stack(tree / "ground_truth/crack/stack_mask.tif", 255)
    assert "stack_mask.tif has 1 pages, but its image" in message(tree)
