"""Groups of images that show the same part and are held out together."""

import collections
import csv
import re
from collections.abc import Sequence
from pathlib import Path

from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded

BY_DIRECTORY = "folder"


def labels_of(names: Sequence[str], groups: str | None) -> tuple[str, ...] | None:
    r"""Returns the label of each image's group.

    Args:
        names: names of images, such as "good/part_017/3.png", see `Source.names`.
        groups: rule for the groups:
            "folder": images in the same directory are a group;
            a path that ends in .csv: a table with the columns `path` and `group`, where a path is
            a name or the end of one;
            a regular expression with at least one capturing group, such as `(part_\d+)`: images
            with the same captured text are a group;
            None: each image is a group.

    Returns:
        A label per image, or None if `groups` is None.

    Raises:
        InputError: an image without a group, or an invalid table or expression.
    """
    if groups is None:
        return None
    if groups == BY_DIRECTORY:
        labels = tuple(name.rpartition("/")[0] for name in names)
        if len(set(labels)) == 1:
            raise InputError(
                "data.groups is 'folder', but all images are in one directory. Put the images of "
                "each part into a separate sub-directory, or set a regular expression."
            )
        return labels
    if groups.lower().endswith(".csv"):
        return _from_table(names, expanded(groups))
    return _from_names(names, groups)


def _from_names(names: Sequence[str], pattern: str) -> tuple[str, ...]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        problem = f"is not a regular expression ({error}). Correct it."
        raise InputError(f"data.groups {pattern!r} {problem}") from error
    if not expression.groups:
        raise InputError(
            f"data.groups {pattern!r} captures nothing. Put the part's label in parentheses, such "
            "as '(part_\\d+)'."
        )
    labels = []
    for name in names:
        match = expression.search(name)
        if match is None:
            raise InputError(
                f"{name} does not match data.groups {pattern!r}. Use an expression that matches "
                "every training image."
            )
        labels.append("/".join(part or "" for part in match.groups()))
    return tuple(labels)


def _from_table(names: Sequence[str], file: Path) -> tuple[str, ...]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"data.groups {file} cannot be read: {error}. Write it again, as CSV in UTF-8."
        ) from error
    if not rows or not {"path", "group"} <= rows[0].keys():
        raise InputError(f"data.groups {file} must be a table with the columns path and group.")
    labels = {}
    for row in rows:
        path = (row["path"] or "").replace("\\", "/")
        if labels.setdefault(path, row["group"]) != row["group"]:
            raise InputError(f"data.groups {file} has two groups for {path!r}. Keep one of them.")

    def label(name: str) -> str:
        parts = name.split("/")
        for i in range(len(parts)):  # the longest match first
            if (found := labels.get("/".join(parts[i:]))) is not None:
                return found
        raise InputError(f"data.groups {file} has no line for {name}. Add one.")

    _refuse_ambiguous(names, labels, file)
    return tuple(map(label, names))


def _refuse_ambiguous(names: Sequence[str], labels: dict[str, str], file: Path) -> None:
    """Raises an InputError for a file name in the table that several images share."""
    count = collections.Counter(name.rpartition("/")[2] for name in names)
    for path in labels:
        if count[path] > 1:
            raise InputError(
                f"data.groups {file} has a line for {path}, but {count[path]} images have that "
                "name. Use their paths."
            )
