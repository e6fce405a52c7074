"""Directories of images: the layout of MVTec AD, and any other tree.

    root/train/good/*                          normal images
    root/calibration/good/*                    normal images for thresholds, optional
    root/test/good/*, root/test/<defect>/*     test images
    root/ground_truth/<defect>/<name>_mask.*   masks of the defective images

Images may be in sub-directories of these; their masks are then in sub-directories of the same
names. Images and masks may have any format that Pillow reads; a file of several pages is several
images. Hidden files, service directories of file servers and archives (`@eaDir`, `#recycle`,
`__MACOSX`), results of earlier predictions and run directories are always skipped.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from fastflow_jax.data.dataset import GOOD, Record
from fastflow_jax.data.formats import Header, is_image, missing_target, read_header
from fastflow_jax.errors import InputError

_SERVICE_DIRECTORIES = frozenset(
    name.lower()
    for name in (
        *("@eaDir", "@Recycle", "@Recently-Snapshot", "#recycle", "#snapshot", "~snapshot"),
        *("$RECYCLE.BIN", "System Volume Information", "lost+found", "__MACOSX"),
    )
)
_SERVICE_FILES = frozenset(
    ("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini")
)
# Written by `predict` and by runs.
_PREDICTIONS = "predictions.jsonl"
_RESULT_DIRECTORIES = ("heatmaps", "maps")
_RESULT_FILES = (_PREDICTIONS, "predictions.csv", "predictions.json")
_RUN_FILES = ((".lock", "config.json"), ("detector.json",))  # all files of a tuple mark a run

Splits = dict[str, list[Record]]  # "train", "test", "calibration"; each sorted by path


def read_layout(
    root: Path,
    *,
    good: str = GOOD,
    mask_suffix: str = "_mask",
    complete: bool = False,
) -> Splits:
    """Reads all headers below `root` and checks that masks have the sizes of their images.

    Args:
        root: directory with `train` and, optionally, `test` and `ground_truth`.
        good: name of the directories of normal images.
        mask_suffix: suffix of the name of a mask, after the name of its image.
        complete: test images and masks are required, and `calibration` is not allowed.

    Returns:
        "train", "test" and, unless `complete`, "calibration". Missing splits are empty.

    Raises:
        InputError: a directory or file is missing, or is not part of the layout.
    """
    folders = _split_folders(root, good, complete)
    images = {name: list_subfolders(folders[name]) for name in folders if name != "ground_truth"}
    for split in ("train", "calibration"):
        if split in images and list(images[split]) != [good]:
            raise InputError(
                f"{folders[split]} must contain only normal images, in the directory {good}, but "
                f"it has {', '.join(images[split])}. Move the others to test."
            )
    headers = {path: read_header(path) for split in images.values() for path in _paths(split)}
    masks = {}
    if "ground_truth" in folders:
        ground_truth = list_subfolders(folders["ground_truth"], may_be_empty=good)
        masks = _match_masks(folders, images.get("test", {}), ground_truth, good, mask_suffix)
        for image, mask in masks.items():
            header, mask_header = headers[image], read_header(mask)
            check_sizes(image, header.size, mask, mask_header.size)
            if mask_header.pages != header.pages:
                raise InputError(
                    f"{mask} has {mask_header.pages} pages, but its image {image} has "
                    f"{header.pages}. Both must have the same number."
                )

    def records(split: str) -> list[Record]:
        return [
            record
            for name, paths in images.get(split, {}).items()
            for path in paths
            for record in pages(
                path,
                headers[path],
                path.relative_to(folders[split]).as_posix(),
                mask=masks.get(path),
                defect=GOOD if name == good else name,
            )
        ]

    splits = ("train", "test") if complete else ("train", "test", "calibration")
    return {split: records(split) for split in splits}


def _split_folders(root: Path, good: str, complete: bool) -> dict[str, Path]:
    """Directories in `root`, checked against the layout; see `read_layout`."""
    known = ("train", "test", "ground_truth", *(() if complete else ("calibration",)))
    folders, files = list_folder(root)
    for name, folder in folders.items():
        if name not in known:
            raise InputError(
                f"{folder} is unexpected: only {', '.join(known)} are read. Move it elsewhere."
            )
    for file in files.values():
        if is_image(file):
            raise InputError(f"{file} is next to train. Move it to train/{good} or elsewhere.")
    for name in known if complete else ("train",):
        if name not in folders:
            raise InputError(f"{root} has no directory {name}. Add it.")
    return folders


def pages(
    path: Path, header: Header, name: str, *, mask: Path | None = None, defect: str = GOOD
) -> list[Record]:
    """Returns the examples of an image file, one per page."""
    return [
        Record(path, mask, defect, page_name, page, header)
        for page, page_name in enumerate(page_names(name, header))
    ]


def page_names(name: str, header: Header) -> list[str]:
    """Returns the name itself for a file of one page, `<name>#1`, `<name>#2`, ... for several."""
    if header.pages == 1:
        return [name]
    return [f"{name}#{page + 1}" for page in range(header.pages)]


def page_of(name: str) -> tuple[Path, int]:
    """Returns the path and the page, counted from 0, of a name from `page_names`."""
    path, mark, number = name.rpartition("#")
    if mark and number.isdecimal() and not Path(name).exists():
        return Path(path), int(number) - 1
    return Path(name), 0


def list_subfolders(folder: Path, may_be_empty: str | None = None) -> dict[str, list[Path]]:
    """Returns the images in each directory of `folder`, by the name of the directory.

    Args:
        folder: contains only directories.
        may_be_empty: name of a directory that may have no images.

    Raises:
        InputError: there are no directories, or there are files next to them.
    """
    folders, files = list_folder(folder)
    for file in files.values():
        if not folders and is_image(file):
            raise InputError(
                f"{folder} has images, but no directories of images. Move normal images to "
                f"{folder}/good."
            )
        raise InputError(
            f"{file} is next to the directories of {folder}. Move it into one of them or elsewhere."
        )
    if not folders:
        raise InputError(f"{folder} is empty. Add images or remove it.")
    return {
        name: [] if name == may_be_empty and not any(list_folder(inner)) else list_images(inner)
        for name, inner in folders.items()
    }


def list_images(folder: Path) -> list[Path]:
    """Returns the images in `folder` and its sub-directories, sorted by path; opens none.

    Raises:
        InputError: there are no images, or there are files that are not images.
    """
    found, by_stem = [], {}
    for path in _files_below(folder):
        if path.is_symlink() and not path.exists():
            raise missing_target(path)
        if not is_image(path):
            raise InputError(f"{path} is not an image. Move it elsewhere.")
        twin = by_stem.setdefault(path.with_suffix(""), path)
        if twin is not path:
            raise InputError(
                f"{twin} and {path} differ only in their extensions. Rename or remove one."
            )
        found.append(path)
    if not found:
        raise no_images(folder)
    return found


class Found(NamedTuple):
    """Files of a directory, sorted by path."""

    images: list[Path]  # also broken files and links to missing files
    others: list[Path]  # text, tables, documents, archives


def find_images(folder: Path) -> Found:
    """Returns the files in `folder` and below it.

    Links are followed; a directory that several links lead to is read once.

    Raises:
        InputError: a directory cannot be read.
    """
    found = Found([], [])
    for path in _files_below(folder):
        (found.images if is_image(path) else found.others).append(path)
    return found


def is_left_out(path: Path, root: Path) -> bool:
    """Whether a file below `root` is always skipped, see the top of this module."""
    absolute = path.absolute()
    return any(map(_is_skipped, path.relative_to(root).parts)) or any(
        (folder.name in _RESULT_DIRECTORIES and (folder.parent / _PREDICTIONS).exists())
        or any(all((folder / name).exists() for name in names) for names in _RUN_FILES)
        for folder in (absolute, *absolute.parents)
    )


def _files_below(folder: Path) -> list[Path]:
    """Files in `folder` and below it that are not skipped, sorted by path."""

    def fail(error: OSError):
        raise _cannot_list(error) from error

    found, seen = [], set()
    for at, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(at)
        if real in seen or any(set(names) <= set(files) for names in _RUN_FILES):
            folders.clear()  # a link to a parent directory would never end
            continue
        seen.add(real)
        results = (_RESULT_DIRECTORIES, _RESULT_FILES) if _PREDICTIONS in files else ((), ())
        folders[:] = sorted(name for name in folders if not _is_skipped(name, results[0]))
        found += [Path(at, name) for name in files if not _is_skipped(name, results[1])]
    return sorted(found)


def _is_skipped(name: str, also: Collection[str] = ()) -> bool:
    lower = name.lower()
    service = lower in _SERVICE_DIRECTORIES or lower in _SERVICE_FILES
    return name.startswith(".") or service or name in also


def _cannot_list(error: OSError) -> InputError:
    return InputError(f"{error.filename} cannot be read: {error.strerror}.")


def no_images(folder: Path) -> InputError:
    """Returns the error for a directory without images."""
    return InputError(f"{folder} has no images. Put images there or pass another directory.")


def list_folder(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Returns the directories and the files in `folder` by name, sorted; links are followed."""
    try:
        found = [(path, path.exists()) for path in sorted(folder.iterdir())]
    except OSError as error:
        raise _cannot_list(error) from error
    folders, files = {}, {}
    for path, exists in found:
        if _is_skipped(path.name):
            continue
        if not exists:
            raise missing_target(path)
        (folders if path.is_dir() else files)[path.name] = path
    return folders, files


def _paths(images: dict[str, list[Path]]) -> list[Path]:
    return [path for paths in images.values() for path in paths]


def _match_masks(
    folders: dict[str, Path],
    images: dict[str, list[Path]],
    masks: dict[str, list[Path]],
    good: str,
    suffix: str,
) -> dict[Path, Path]:
    """The mask of each image; optional for good images."""
    by_mask = {
        path.relative_to(folders["test"]).with_name(path.stem + suffix): path
        for path in _paths(images)
    }
    matched = {}
    for mask in _paths(masks):
        image = by_mask.get(mask.relative_to(folders["ground_truth"]).with_suffix(""))
        if image is None:
            raise InputError(
                f"{mask} is a mask without an image. Name it after an image in "
                f"test/{mask.parent.relative_to(folders['ground_truth'])}: "
                f"<name>{suffix}{mask.suffix}."
            )
        matched[image] = mask
    defective = [path for name, paths in images.items() if name != good for path in paths]
    missing = [path for path in defective if path not in matched]
    if missing:
        first = missing[0].relative_to(folders["test"])
        raise InputError(
            f"{missing[0]} has no mask (missing: {len(missing)} of {len(defective)}). Add it as "
            f"ground_truth/{first.with_name(first.stem + suffix)}.png, or remove ground_truth to "
            "use no masks."
        )
    return matched


def check_sizes(image: Path, size: tuple[int, int], mask: Path, mask_size: tuple[int, int]) -> None:
    """Raises an InputError unless a mask has the (height, width) of its image."""
    if mask_size != size:
        raise InputError(
            f"{mask} has {mask_size[1]} x {mask_size[0]} pixels, but its image {image} has "
            f"{size[1]} x {size[0]}. Both must have the same size, as viewers show them."
        )
