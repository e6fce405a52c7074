"""Locks of directories, and file systems without locks."""

import errno
import fcntl
import os
import tarfile

import pytest

from fastflow_jax.config import default, fill
from fastflow_jax.data.tfds import manual
from fastflow_jax.errors import InputError
from fastflow_jax.files import lock
from fastflow_jax.runs.directory import claim

NO_LOCKS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL, 524]


def fail():
    raise InputError("it is in use")


@pytest.fixture
def break_flock(monkeypatch):
    """Makes every flock of this process fail with an error number."""

    def make(number):
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return make


@pytest.fixture
def archive(tmp_path):
    (tmp_path / "001.png").write_bytes(b"content")
    with tarfile.open(tmp_path / "bottle.tar", "w") as packed:
        packed.add(tmp_path / "001.png", arcname="bottle/001.png")
    return tmp_path / "bottle.tar"


def test_a_lock_is_held_until_the_context_ends(tmp_path, caplog):
    file = tmp_path / ".lock"
    with lock(file, on_wait=fail) as is_held:
        assert is_held
        with pytest.raises(InputError, match="in use"), lock(file, on_wait=fail):
            pass
    with lock(file, on_wait=fail) as is_held:
        assert is_held
    assert caplog.messages == []


def test_a_lock_is_waited_for(tmp_path):
    file = tmp_path / ".lock"
    other = file.open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    with lock(file, on_wait=other.close) as is_held:
        assert is_held


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_a_run_continues_with_one_warning(number, break_flock, tmp_path, caplog):
    break_flock(number)
    config = fill(default())
    for _ in range(2):
        with claim(tmp_path / "run", config):
            assert (tmp_path / "run/config.json").exists()
    warning = f"{tmp_path}/run cannot be locked ({os.strerror(number)}). Do not let two "
    assert caplog.messages == [f"{warning}processes use it at the same time."]


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_an_archive_is_unpacked(number, break_flock, archive, caplog):
    break_flock(number)
    of_another = archive.parent / ".unpacking-1234"
    of_another.mkdir()
    manual.unpack(archive)
    assert (archive.parent / "bottle/001.png").read_bytes() == b"content"
    assert of_another.exists()  # another process may be using it
    assert f"{archive.parent} cannot be locked" in caplog.text


def test_without_locks_another_process_may_unpack_first(break_flock, archive, monkeypatch):
    break_flock(errno.ENOLCK)
    extractall = tarfile.TarFile.extractall

    def extract_twice(self, path, **options):
        extractall(self, path, **options)
        extractall(self, archive.parent, **options)

    monkeypatch.setattr(tarfile.TarFile, "extractall", extract_twice)
    manual.unpack(archive)
    assert (archive.parent / "bottle/001.png").read_bytes() == b"content"
    assert not list(archive.parent.glob(".unpacking-*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_a_file_system_without_locks(number, break_flock, archive, caplog):
    break_flock(number)
    with (
        pytest.raises(OSError, match=os.strerror(number)),
        lock(archive.parent / ".lock", on_wait=fail),
    ):
        pass
    with pytest.raises(InputError, match=r"bottle\.tar cannot be unpacked .*Free disk space there"):
        manual.unpack(archive)
    assert caplog.messages == []
