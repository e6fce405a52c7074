"""Paths that begin with ~, URLs, unreadable paths, and atomic writes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastflow_jax import files
from fastflow_jax.errors import InputError
from fastflow_jax.files import expanded, make_folder


def test_a_file_whose_name_begins_with_a_tilde_is_preferred_to_a_home_directory(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expanded("~/a.png") == Path("/home/somebody/a.png")
    assert expanded("no/such/file") == Path("no/such/file")
    Path("~b.png").touch()
    assert expanded("~b.png") == Path("~b.png")


def test_a_home_directory_of_an_unknown_user_is_an_error():
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
def test_a_url_is_an_error(url, tmp_path, monkeypatch):
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
def test_a_file_url_becomes_a_path(url, path):
    assert expanded(url) == Path(path)


@pytest.mark.parametrize("path", ["a:b/c", "c://x", "a b://c", "run/gs://b", "elpv:/mono"])
def test_a_path_that_resembles_a_url_is_kept(path):
    assert expanded(path) == Path(path)


def test_a_local_directory_with_a_colon_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data:", "run").mkdir(parents=True)
    assert expanded(Path("data:/run")) == Path("data:/run")


def test_an_unreadable_path_is_an_error(monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(InputError, match=r"^a\.png cannot be read: Permission denied"):
        expanded("a.png")


def test_a_path_that_cannot_be_a_directory_is_an_error(tmp_path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot be a directory: a file of that name exists"):
            make_folder(path)
    with pytest.raises(InputError, match=r"cannot be a directory: .*name too long"):
        make_folder(tmp_path / ("x" * 300))


def test_a_full_disk_keeps_its_own_error(tmp_path, monkeypatch):
    def full(self, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        make_folder(tmp_path / "a")


@pytest.mark.parametrize("write", ["text", "json", "arrays"])
def test_a_file_is_synchronised_before_it_replaces_another(tmp_path, monkeypatch, write):
    """A power failure must not leave an incomplete file."""
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


def test_the_least_recently_used_files_are_deleted_first(tmp_path):
    for name, modified, used in (("old", 1, 1), ("used", 2, 9), ("new", 8, 8)):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (used, modified))
    (tmp_path / "directory").mkdir()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    files.delete_oldest(tmp_path, 300)
    assert len(list(tmp_path.iterdir())) == 5
    files.delete_oldest(tmp_path, 200)
    assert {path.name for path in tmp_path.iterdir()} == {"used", "new", "directory", "broken"}
    files.delete_oldest(tmp_path, 199)
    assert {path.name for path in tmp_path.iterdir()} == {"used", "directory", "broken"}


def test_files_that_cannot_be_deleted_are_left(tmp_path, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a").write_bytes(bytes(100))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", denied)
        files.delete_oldest(tmp_path, 0)
    files.delete_oldest(tmp_path / "nowhere", 0)
    assert (tmp_path / "a").exists()


def test_a_file_that_two_processes_write_is_always_whole(tmp_path):
    """Threads stand for processes: each opens and locks the temporary file itself."""
    file, contents, seen = tmp_path / "detector.onnx", ["1" * 10**6, "2" * 10**6], set()

    def write(content):
        for _ in range(10):
            with files.replacing(file, "w") as opened:
                opened.write(content)
            seen.add(file.read_text())

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, contents))
    assert seen == set(contents)
    assert os.listdir(tmp_path) == ["detector.onnx"]


def test_what_a_killed_process_has_left_is_replaced(tmp_path):
    (tmp_path / "a.tmp").write_text("a long beginning")
    files.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new"
    (tmp_path / ".saving_1").mkdir()
    (tmp_path / ".saving_1/a").touch()
    files.delete_staged(tmp_path)
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_staged_path_appears_when_it_is_complete(is_folder, tmp_path):
    def fill(path):
        if is_folder:
            path.mkdir()
        (path / "a" if is_folder else path).write_text("new")

    with files.staged(tmp_path / "target") as path:
        fill(path)
        assert not (tmp_path / "target").exists()
    assert os.listdir(tmp_path) == ["target"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine").touch()
    with pytest.raises(OSError, match=r"[Dd]irectory"), files.staged(tmp_path / "other") as path:
        fill(path)

    def fail():
        with files.staged(tmp_path / "third") as path:
            fill(path)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sorted(os.listdir(tmp_path)) == ["other", "target"]
    assert os.listdir(tmp_path / "other") == ["mine"]


def test_a_staged_file_replaces_the_target_of_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/target").write_text("old")
    (tmp_path / "link").symlink_to("folder/target")
    with files.staged(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "folder/target").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_failed_replacement_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "a.json").write_text("old")

    def fail():
        with files.replacing(tmp_path / "a.json", "w") as opened:
            opened.write("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
