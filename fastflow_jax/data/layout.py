"""Directories of images: the layout of MVTec AD, and any other tree.

    root/train/good/*                          normal images
    root/calibration/good/*                    normal images for thresholds, optional
    root/test/good/*, root/test/<defect>/*     test images
    root/ground_truth/<defect>/<name>_mask.*   masks of the defective images

Images may be in sub-directories of these; their masks are then in sub-directories of the same
names. An image may have several masks, `<name>_mask/*`, and masks may be polygons, see `polygons`.
Images and masks may have any format that Pillow reads; a file of several pages is several images.
Hidden files, service directories of file servers and archives (`@eaDir`, `#recycle`, `__MACOSX`),
results of earlier predictions and run directories are always skipped.
"""

import dataclasses
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from fastflow_jax.data import masks
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


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of the directories and masks of a data set; by default those at the top."""

    good: str = GOOD  # directories of normal images
    mask_suffix: str = "_mask"  # of the name of a mask, after the name of its image
    calibration: str | None = "calibration"  # None: not allowed
    test: str = "test"
    ground_truth: str = "ground_truth"  # may be in `test`
    ignored: tuple[str, ...] = ()  # other directories that are allowed
    is_complete: bool = False  # all of these directories are required


class Item(NamedTuple):
    """Image file of a data set with its labels."""

    image: Path
    name: str  # unique in its source
    defect: str = GOOD
    masks: tuple[Path, ...] = ()


def read_layout(root: Path, layout: Layout | None = None) -> Splits:
    """Reads all headers below `root` and checks that masks have the sizes of their images.

    Args:
        root: directory with `train` and, optionally, `test` and `ground_truth`.
        layout: names of the directories; None for the default.

    Returns:
        "train", "test" and, unless `layout.calibration` is None, "calibration". Missing splits are
        empty.

    Raises:
        InputError: a directory or file is missing, or is not part of the layout.
    """
    layout = layout or Layout()
    folders = _split_folders(root, layout)
    inner = folders.get("ground_truth")
    images = {
        name: list_subfolders(folder, skip=inner)
        for name, folder in folders.items()
        if name != "ground_truth"
    }
    for split in ("train", "calibration"):
        if split in images and list(images[split]) != [layout.good]:
            raise InputError(
                f"{folders[split]} must contain only normal images, in the directory "
                f"{layout.good}, but it has {', '.join(images[split])}. Move the others to test."
            )
    test = images.get("test", {})
    found = {}
    if inner is not None:
        defective = [path for name, paths in test.items() if name != layout.good for path in paths]
        found = masks.match(
            _paths(test),
            defective,
            list_masks(inner, layout.good),
            layout.mask_suffix,
            folders.get("test", root / layout.test),
            inner,
        )

    def items(split: str) -> list[Item]:
        return [
            Item(
                path,
                path.relative_to(folders[split]).as_posix(),
                GOOD if name == layout.good else name,
                found.get(path, ()),
            )
            for name, paths in images.get(split, {}).items()
            for path in paths
        ]

    splits = ("train", "test") + (("calibration",) if layout.calibration else ())
    return {split: to_records(items(split)) for split in splits}


def to_records(items: Iterable[Item]) -> list[Record]:
    """Reads the headers of images and masks; one record for each page of an image.

    Raises:
        InputError: an unreadable file, a mask of another size or number of pages than its image, or
            a name that occurs twice.
    """
    records: list[Record] = []
    seen: dict[str, Path] = {}
    for item in items:
        if item.name in seen:
            raise InputError(
                f"{item.image} and {seen[item.name]} have the same name, {item.name}. Rename or "
                "remove one; list each image once."
            )
        seen[item.name] = item.image
        header = read_header(item.image)
        for mask in item.masks:
            masks.check_header(mask, item.image, header)
        records += pages(item.image, header, item.name, masks=item.masks, defect=item.defect)
    return records


def _split_folders(root: Path, layout: Layout) -> dict[str, Path]:
    """Directories of the splits in `root` that exist, checked against the layout."""
    names = {"train": "train", "test": layout.test, "ground_truth": layout.ground_truth}
    if layout.calibration is not None:
        names["calibration"] = layout.calibration
    known = list(dict.fromkeys(name.partition("/")[0] for name in names.values()))
    folders, files = list_folder(root)
    for name, folder in folders.items():
        if name not in (*known, *layout.ignored):
            raise InputError(
                f"{folder} is unexpected: only {', '.join(known)} are read. Move it elsewhere."
            )
    for file in files.values():
        if is_image(file):
            raise InputError(
                f"{file} is next to train. Move it to train/{layout.good} or elsewhere."
            )
    for name in names.values() if layout.is_complete else ("train",):
        if not (root / name).is_dir():
            raise InputError(f"{root} has no directory {name}. Add it.")
    return {split: root / name for split, name in names.items() if (root / name).is_dir()}


def pages(
    path: Path, header: Header, name: str, *, masks: tuple[Path, ...] = (), defect: str = GOOD
) -> list[Record]:
    """Returns the examples of an image file, one per page."""
    return [
        Record(path, masks, defect, page_name, page, header)
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


def list_subfolders(folder: Path, *, skip: Path | None = None) -> dict[str, list[Path]]:
    """Returns the images in each directory of `folder`, by the name of the directory.

    Args:
        folder: contains only directories.
        skip: one of these directories that is left out.

    Raises:
        InputError: there are no directories, or there are files next to them.
    """
    folders, files = list_folder(folder)
    folders = {name: inner for name, inner in folders.items() if inner != skip}
    for file in files.values():
        if not folders and is_image(file):
            raise InputError(
                f"{folder} has images, but no directories of images. Move normal images to "
                f"{folder}/good."
            )
        raise _next_to_directories(file, folder)
    if not folders:
        raise _empty(folder)
    return {name: list_images(inner) for name, inner in folders.items()}


def _next_to_directories(file: Path, folder: Path) -> InputError:
    return InputError(
        f"{file} is next to the directories of {folder}. Move it into one of them or elsewhere."
    )


def _empty(folder: Path) -> InputError:
    return InputError(f"{folder} is empty. Add images or remove it.")


def list_masks(folder: Path, good: str) -> list[Path]:
    """Returns the mask files in the directories of `folder`; JSON files next to them are COCO.

    Args:
        folder: contains a directory for each kind of defect, or a file of COCO annotations.
        good: name of a directory that may have no masks.

    Raises:
        InputError: as in `list_subfolders`.
    """
    folders, files = list_folder(folder)
    annotations = [file for file in files.values() if file.suffix.lower() == masks.POLYGONS]
    for file in files.values():
        if file not in annotations:
            raise _next_to_directories(file, folder)
    if not folders and not annotations:
        raise _empty(folder)
    return annotations + [
        path
        for name, inner in folders.items()
        if name != good or any(list_folder(inner))
        for path in list_images(inner, also=(masks.POLYGONS,))
    ]


def list_images(folder: Path, *, also: tuple[str, ...] = (), skip: str | None = None) -> list[Path]:
    """Returns the images in `folder` and its sub-directories, sorted by path; opens none.

    Args:
        folder: the directory.
        also: extensions of files that are not images but are returned too.
        skip: name of a file or directory in `folder` that is left out.

    Raises:
        InputError: there are no images, or there are files that are not images.
    """
    found, by_stem = [], {}
    for path in _files_below(folder):
        if path.relative_to(folder).parts[0] == skip:
            continue
        if path.is_symlink() and not path.exists():
            raise missing_target(path)
        if not is_image(path) and path.suffix.lower() not in also:
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


def pair(files: Iterable[Path], suffix: str) -> dict[Path, Path | None]:
    """Returns the mask of each image, or None, among files of images and masks.

    Args:
        files: of different names without extension.
        suffix: of the name of a mask, after the name of its image.

    Raises:
        InputError: a mask without an image.
    """
    by_stem = {path.stem: path for path in files}
    pairs: dict[Path, Path | None] = {
        path: None for stem, path in by_stem.items() if not stem.endswith(suffix)
    }
    for stem, path in by_stem.items():
        if stem.endswith(suffix):
            image = by_stem.get(stem.removesuffix(suffix))
            if image is None:
                raise InputError(f"{path} is a mask without an image. Remove it.")
            pairs[image] = path
    return pairs


def check_listed(found: Iterable[Path], listed: Iterable[Path], where: Path) -> None:
    """Raises an InputError unless the files of a directory are those of a list.

    Args:
        found: files of the directory.
        listed: files of the list.
        where: path of the list.
    """
    found, listed = set(found), set(listed)
    if missing := sorted(listed - found):
        raise InputError(f"{missing[0]} is in {where}, but does not exist. Restore it.")
    if extra := sorted(found - listed):
        raise InputError(f"{extra[0]} is not in {where}. Move it elsewhere.")


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
    return InputError(f"{error.filename} cannot be read: {error.strerror}. Check its permissions.")


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
