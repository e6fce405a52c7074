"""The layout of folders that MVTec AD has brought into use.

    root/train/good/*                          normal images
    root/test/good/*, root/test/<defect>/*     test images
    root/ground_truth/<defect>/<name>_mask.*   masks of the defective ones

Images and masks may have any format and extension that Pillow reads. Hidden files, `Thumbs.db`
and `desktop.ini` are passed over, and so are files beside `train` that are no images (data sets
keep their licence there). Anything else that does not belong is an error, as it may be a slip.
"""

import functools
import os
from pathlib import Path

from PIL import Image

from fastflow_jax.data.dataset import GOOD, Record
from fastflow_jax.data.transforms import image_size
from fastflow_jax.errors import InputError

_PASSED_OVER = ("thumbs.db", "desktop.ini")


def read_layout(
    root: Path, *, good: str = GOOD, mask_suffix: str = "_mask", complete: bool = False
) -> tuple[list[Record], list[Record]]:
    """The training and the test images under `root`, each sorted by folder and name.

    All headers are read, and the sizes of masks compared with those of their images.

    Args:
        root: holds `train` and perhaps `test` and `ground_truth`.
        good: the name of the folders of normal images.
        mask_suffix: what the name of a mask has more than that of its image.
        complete: test images and masks must be there.

    Raises:
        InputError: something is missing, or there that does not belong.
    """
    folders, files = list_folder(root)
    for name, folder in folders.items():
        if name not in ("train", "test", "ground_truth"):
            raise InputError(
                f"{folder} is unexpected: beside train only test and ground_truth are read. "
                "Move it elsewhere."
            )
    for file in files.values():
        if _is_image(file):
            raise InputError(f"{file} lies beside train: move it into train/{good} or elsewhere.")
    for name in ("train", "test", "ground_truth") if complete else ("train",):
        if name not in folders:
            raise InputError(f"{root} holds no {name}: put it there.")

    train = list_subfolders(folders["train"])
    if list(train) != [good]:
        raise InputError(
            f"{folders['train']} must hold the one folder {good}, as training images are normal; "
            f"it holds {', '.join(train)}."
        )
    test = list_subfolders(folders["test"]) if "test" in folders else {}
    for images in (train, test):
        for path in _paths(images):
            image_size(path)
    masks = {}
    if "ground_truth" in folders:
        ground_truth = list_subfolders(folders["ground_truth"], may_be_empty=good)
        masks = _match_masks(test, ground_truth, good, mask_suffix)

    def records(images: dict[str, list[Path]]) -> list[Record]:
        return [
            Record(path, masks.get(path), GOOD if name == good else name, f"{name}/{path.name}")
            for name, paths in images.items()
            for path in paths
        ]

    return records(train), records(test)


def list_subfolders(folder: Path, may_be_empty: str | None = None) -> dict[str, list[Path]]:
    """The images in each folder in `folder`, by the folder's name.

    Args:
        folder: that holds nothing else.
        may_be_empty: name of a folder that may hold none.

    Raises:
        InputError: there are no folders, or something else is there.
    """
    folders, files = list_folder(folder)
    for file in files.values():
        if not folders and _is_image(file):
            raise InputError(
                f"{folder} holds images, and no folders of images: those of normal things go into "
                f"{folder}/good."
            )
        raise InputError(
            f"{file} lies beside the folders of {folder}: move it into one of them or elsewhere."
        )
    if not folders:
        raise InputError(f"{folder} is empty: fill it or remove it.")
    return {
        name: [] if name == may_be_empty and not any(list_folder(inner)) else list_images(inner)
        for name, inner in folders.items()
    }


def list_images(folder: Path) -> list[Path]:
    """The images right in `folder`, sorted by name; they are not opened.

    Raises:
        InputError: there are none, or something else is there.
    """
    folders, files = list_folder(folder)
    for inner in folders.values():
        raise InputError(
            f"{inner} is a folder among images: move it out of {folder}, or its images into it."
        )
    if not files:
        raise InputError(f"{folder} holds no images: put some there or give another folder.")
    by_stem = {}
    for file in files.values():
        if not _is_image(file):
            raise InputError(f"{file} is not an image that Pillow knows: move it elsewhere.")
        twin = by_stem.setdefault(file.stem, file)
        if twin is not file:
            raise InputError(
                f"{twin} and {file} have the same name but for the extension: rename or remove one."
            )
    return list(files.values())


def images_below(folder: Path) -> list[Path]:
    """The images in `folder` and in the folders below it, sorted by path; they are not opened.

    Links are followed; a folder that several lead to counts once. Hidden files and folders and what
    is no image are passed over.

    Raises:
        InputError: there are none, or a folder cannot be read.
    """

    def fail(error: OSError):
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error

    paths, seen = [], set()
    for at, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        if os.path.realpath(at) in seen:  # a link to a folder that it lies in would have no end
            folders.clear()
            continue
        seen.add(os.path.realpath(at))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        within = (Path(at, name) for name in files if not name.startswith("."))
        paths += [path for path in within if _is_image(path) and path.is_file()]
    paths.sort()
    if not paths:
        raise InputError(f"{folder} holds no images: put some there or give another folder.")
    return paths


def list_folder(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The folders and the files in `folder` by name, sorted; links are followed."""
    try:
        found = [(path, path.exists()) for path in sorted(folder.iterdir())]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.") from error
    folders, files = {}, {}
    for path, is_there in found:
        if path.name.startswith(".") or path.name.lower() in _PASSED_OVER:
            continue
        if not is_there:
            raise InputError(f"{path} is a link to nothing: mend or remove it.")
        (folders if path.is_dir() else files)[path.name] = path
    return folders, files


@functools.cache
def _readable_extensions() -> frozenset[str]:
    extensions = Image.registered_extensions()  # of formats to read or to write
    return frozenset(extension for extension, kind in extensions.items() if kind in Image.OPEN)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _readable_extensions()


def _paths(images: dict[str, list[Path]]) -> list[Path]:
    return [path for paths in images.values() for path in paths]


def _match_masks(
    images: dict[str, list[Path]], masks: dict[str, list[Path]], good: str, suffix: str
) -> dict[Path, Path]:
    """The mask of each image; good images may do without."""
    matched = {}
    for name, paths in masks.items():
        by_mask_stem = {path.stem + suffix: path for path in images.get(name, ())}
        for mask in paths:
            image = by_mask_stem.get(mask.stem)
            if image is None:
                raise InputError(
                    f"{mask} is a mask without an image: it must be named after one in "
                    f"test/{name}, <name>{suffix}{mask.suffix}."
                )
            check_sizes(image, image_size(image), mask, image_size(mask))
            matched[image] = mask
    defective = [path for name, paths in images.items() if name != good for path in paths]
    lacking = [path for path in defective if path not in matched]
    if lacking:
        first = lacking[0]
        raise InputError(
            f"{first} has no mask (missing: {len(lacking)} of {len(defective)}): add it as "
            f"ground_truth/{first.parent.name}/{first.stem}{suffix}.png, "
            "or remove ground_truth to do without masks."
        )
    return matched


def check_sizes(image: Path, size: tuple[int, int], mask: Path, mask_size: tuple[int, int]) -> None:
    """Raises an InputError unless a mask has the (height, width) of its image."""
    if mask_size != size:
        raise InputError(
            f"{mask} is {mask_size[1]} x {mask_size[0]} pixels, but its image {image} is "
            f"{size[1]} x {size[0]}: both must have one size, as viewers show them."
        )
