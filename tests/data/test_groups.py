"""Groups of images that show the same part: by directory, by name, by table."""

import pytest

from fastflow_jax.data.groups import labels_of
from fastflow_jax.errors import InputError

NAMES = ("good/p1/a.png", "good/p1/b.png", "good/p2/a.png", "good/p10_2.png")


def test_each_image_is_a_group_by_default():
    assert labels_of(NAMES, None) is None


def test_a_directory_is_a_group():
    assert labels_of(NAMES, "folder") == ("good/p1", "good/p1", "good/p2", "good")
    with pytest.raises(InputError, match="all images are in one directory"):
        labels_of(("good/a.png", "good/b.png"), "folder")


def test_captured_text_is_a_group():
    assert labels_of(NAMES, r"p(\d+)") == ("1", "1", "2", "10")
    assert labels_of(NAMES[:2], r"(p)\d/(.)") == ("p/a", "p/b")
    assert labels_of(NAMES[:3], r"p(\d)(x)?") == ("1/", "1/", "2/")


def test_a_table_has_a_line_per_image(tmp_path):
    table = tmp_path / "parts.csv"
    table.write_text("path,group,more\ngood/p1/a.png,x,\np1/b.png,x,\np2/a.png,y,\np10_2.png,z,\n")
    assert labels_of(NAMES, str(table)) == ("x", "x", "y", "z")
    table.write_text("group,path\r\nx,good\\p1\\a.png\r\n")
    assert labels_of(NAMES[:1], str(table)) == ("x",)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("(", "is not a regular expression"),
        (r"p\d+", "captures nothing"),
        (r"q(\d+)", r"good/p1/a\.png does not match"),
        ("nosuch.csv", r"nosuch\.csv cannot be read"),
    ],
)
def test_invalid_rules_are_named(groups, message):
    with pytest.raises(InputError, match=message):
        labels_of(NAMES, groups)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a table with the columns path and group"),
        ("file,group\na.png,1\n", "must be a table with the columns path and group"),
        ("path,group\ngood/p1/a.png,1\n", r"has no line for good/p1/b\.png"),
        ("path,group\na.png,1\n", r"a line for a\.png, but 2 images have that name"),
        ("path,group\np2/a.png,1\np2/a.png,2\n", r"has two groups for 'p2/a\.png"),
        (b"path,group\n\xff\xfe,1\n", "cannot be read"),
    ],
)
def test_an_invalid_table_is_named(tmp_path, content, message):
    table = tmp_path / "parts.csv"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        labels_of(NAMES, str(table))
