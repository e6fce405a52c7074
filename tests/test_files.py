"""Names that begin with ~, URLs, what cannot be looked at, and files that are whole or absent."""

import os
from pathlib import Path

import numpy as np
import pytest

from fastflow_jax import files
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded, make_folder


def test_a_file_of_that_name_comes_before_a_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expanded("~/a.png") == Path("/home/somebody/a.png")
    assert expanded("no/such/file") == Path("no/such/file")
    Path("~b.png").touch()
    assert expanded("~b.png") == Path("~b.png")


def test_a_home_of_nobody_is_told():
    with pytest.raises(InputError, match=r"~nobody\.of\.that\.name/a\.png does not exist"):
        expanded("~nobody.of.that.name/a.png")


@pytest.mark.parametrize(
    "url",
    [
        *("gs://bucket/run", "s3://bucket", "https://host/a.png", "hf://datasets/x", "GS://b/run"),
        *("abfs+x.y-z://a", "file://host/run", "file://"),
        Path("gs://bucket/run"),
    ],
)
def test_a_url_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"is a URL, not a local path\. Mount the bucket .*copy"):
        expanded(url)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///data/run", "/data/run"),
        ("file://localhost/data/run", "/data/run"),
        ("FILE:///data/%C3%A4%20b%E4", "/data/ä b\udce4"),
        ("file:///data/a?b#c*", "/data/a?b#c*"),
        (Path("file:///data/run"), "/data/run"),
        ("file:///~/run", "/~/run"),
    ],
)
def test_a_file_url_is_the_path_that_it_names(url, path):
    assert expanded(url) == Path(path)


@pytest.mark.parametrize("path", ["a:b/c", "c://x", "a b://c", "run/gs://b", "elpv:/mono"])
def test_what_only_resembles_a_url_is_a_path(path):
    assert expanded(path) == Path(path)


def test_a_local_folder_with_a_colon_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data:", "run").mkdir(parents=True)
    assert expanded(Path("data:/run")) == Path("data:/run")


def test_what_may_not_be_looked_at_is_told(monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(InputError, match=r"^a\.png cannot be read: Permission denied"):
        expanded("a.png")


def test_what_can_be_no_folder_is_told(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")  # it is there
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be a folder: a file is in the way"):
            make_folder(path)
    with pytest.raises(InputError, match=r"cannot be a folder: .*name too long"):
        make_folder(tmp_path / ("x" * 300))


def test_a_full_disk_is_another_matter(tmp_path, monkeypatch):
    def full(self, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        make_folder(tmp_path / "a")


@pytest.mark.parametrize("write", ["text", "json", "arrays"])
def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch, write):
    """A power failure must not leave a name without its content."""
    file, synced = tmp_path / "results.json", []
    file.write_text("old")
    sync = os.fsync

    def recorded(descriptor):
        synced.append((os.fstat(descriptor).st_size, file.read_bytes() == b"old"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    {
        "text": lambda: files.write_text(file, "new content"),
        "json": lambda: files.write_json(file, {"new": "content"}),
        "arrays": lambda: files.write_arrays(file, {"new": np.arange(9)}),
    }[write]()
    (size, was_old), *directory = synced
    assert was_old
    assert size == file.stat().st_size
    assert len(directory) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
