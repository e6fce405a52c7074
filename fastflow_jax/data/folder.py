"""A folder of one's own images, read where it lies.

    root/train/good/*                          normal images
    root/test/good/*, root/test/<defect>/*     test images, if there are any
    root/ground_truth/<defect>/<name>_mask.*   their masks, if there are any

or a bare folder of images, all of them normal. Images may have any format and extension that
Pillow reads; the mask of `test/crack/7.jpg` is `ground_truth/crack/7_mask.png`, or of another
format. Hidden files, `Thumbs.db` and `desktop.ini` are passed over, and so are files beside
`train` that are no images (data sets keep their licence there). Anything else that does not
belong is an error, as it may be a slip: all folders and headers are looked through at once.
"""

import functools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from fastflow_jax.data.dataset import GOOD, Dataset, Source
from fastflow_jax.data.transforms import decode_image, decode_mask, image_size
from fastflow_jax.errors import InputError

_PASSED_OVER = ("thumbs.db", "desktop.ini")
_MASK_SUFFIX = "_mask"

Size = tuple[int, int]  # height, width
Images = dict[str, dict[Path, Size]]  # by defect


def open_dataset(config: ConfigDict) -> Dataset:
    """Opens the folder `config.root`; there are no categories.

    Raises:
        InputError: the folder is missing or empty, or something in it is not as it should be.
    """
    if config.root is None:
        raise InputError("data.root is not set: give the folder of your images.")
    if config.category is not None:
        raise InputError(
            f"data.category is {config.category!r}, but a folder has no categories: "
            "give the folder of one category as data.root."
        )
    root = Path(config.root).expanduser()
    if not root.is_dir():
        problem = "is not a folder" if root.exists() else "does not exist"
        raise InputError(f"data.root {root} {problem}: give the folder of your images.")
    folders, files = _list(root)
    if "train" in folders:
        train, test = _open_splits(folders, files)
    elif folders:
        raise InputError(
            f"{root} holds folders ({', '.join(folders)}) but no train: lay your images out as "
            "train/good, test/good, test/<defect> and ground_truth/<defect>, "
            "or give a folder of images alone, all of them normal."
        )
    else:
        train, test = _source({GOOD: _images(root)}, {}), None
    provenance = {
        "source": str(root.resolve()),
        "train_images": len(train),
        "test_images": 0 if test is None else len(test),
    }
    return Dataset("folder", train, test, provenance)


def _open_splits(folders: dict[str, Path], files: dict[str, Path]) -> tuple[Source, Source | None]:
    for name, folder in folders.items():
        if name not in ("train", "test", "ground_truth"):
            raise InputError(
                f"{folder} is unexpected: beside train only test and ground_truth are read. "
                "Move it elsewhere."
            )
    for file in files.values():
        if _is_image(file):
            raise InputError(f"{file} lies beside train: move it into train/good or elsewhere.")
    train = _images_by_defect(folders["train"])
    if list(train) != [GOOD]:
        raise InputError(
            f"{folders['train']} must hold the one folder {GOOD}, as training images are normal; "
            f"it holds {', '.join(train)}."
        )
    test = _images_by_defect(folders["test"]) if "test" in folders else {}
    masks = {}
    if "ground_truth" in folders:
        masks = _match_masks(test, _images_by_defect(folders["ground_truth"]))
    return _source(train, {}), _source(test, masks) if test else None


def _images_by_defect(split: Path) -> Images:
    folders, files = _list(split)
    for file in files.values():
        raise InputError(
            f"{file} lies beside the folders of {split}: move it into one of them or elsewhere."
        )
    if not folders:
        raise InputError(f"{split} is empty: fill it or remove it.")
    return {name: _images(folder) for name, folder in folders.items()}


def _images(folder: Path) -> dict[Path, Size]:
    """The images right in `folder`, sorted by name, with the sizes their headers say."""
    folders, files = _list(folder)
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
    return {file: image_size(file) for file in files.values()}


def _list(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The folders and the files in `folder` by name, sorted; links are followed."""
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error
    folders, files = {}, {}
    for path in paths:
        if path.name.startswith(".") or path.name.lower() in _PASSED_OVER:
            continue
        if not path.exists():
            raise InputError(f"{path} is a link to nothing: mend or remove it.")
        (folders if path.is_dir() else files)[path.name] = path
    return folders, files


@functools.cache
def _readable_extensions() -> frozenset[str]:
    extensions = Image.registered_extensions()  # of formats to read or to write
    return frozenset(extension for extension, kind in extensions.items() if kind in Image.OPEN)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _readable_extensions()


def _match_masks(images: Images, masks: Images) -> dict[Path, Path]:
    """The mask of each image; good images may do without.

    Raises:
        InputError: a mask without an image, an image without a mask, or sizes that differ.
    """
    matched = {}
    for defect, files in masks.items():
        by_mask_stem = {path.stem + _MASK_SUFFIX: path for path in images.get(defect, ())}
        for mask, mask_size in files.items():
            image = by_mask_stem.get(mask.stem)
            if image is None:
                raise InputError(
                    f"{mask} is a mask without an image: it must be named after one in "
                    f"test/{defect}, <name>{_MASK_SUFFIX}{mask.suffix}."
                )
            _check_sizes(image, images[defect][image], mask, mask_size)
            matched[image] = mask
    lacking = [
        path
        for defect, files in images.items()
        for path in files
        if defect != GOOD and path not in matched
    ]
    if lacking:
        others = f" (nor have {len(lacking) - 1} others)" if len(lacking) > 1 else ""
        raise InputError(
            f"{lacking[0]} has no mask{others}: add it as "
            f"ground_truth/{lacking[0].parent.name}/{lacking[0].stem}{_MASK_SUFFIX}.png, "
            "or remove ground_truth to do without masks."
        )
    return matched


def _check_sizes(image: Path, size: Size, mask: Path, mask_size: Size) -> None:
    if mask_size != size:
        raise InputError(
            f"{mask} is {mask_size[1]} x {mask_size[0]} pixels, but its image {image} is "
            f"{size[1]} x {size[0]}: both must have one size, as viewers show them."
        )


def _source(images: Images, masks: dict[Path, Path]) -> Source:
    paths = [path for files in images.values() for path in files]
    defects = tuple(defect for defect, files in images.items() for _ in files)
    names = tuple(f"{defect}/{path.name}" for defect, path in zip(defects, paths, strict=True))

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        path = paths[index]
        image = decode_image(_read(path), str(path))
        if not masks:
            return image, None
        if path not in masks:
            return image, np.zeros(image.shape[:2], bool)
        mask_path = masks[path]
        mask = decode_mask(_read(mask_path), str(mask_path))
        _check_sizes(path, image.shape[:2], mask_path, mask.shape)
        if defects[index] == GOOD and mask.any():
            raise InputError(f"{mask_path} marks a defect in an image of test/{GOOD}: remove it.")
        return image, mask

    return Source(names, defects, load)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
