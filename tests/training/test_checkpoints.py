"""Checkpoints under any path, and their check after each save."""

import os
import pathlib
import shutil
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from fastflow_jax import parallel
from fastflow_jax.errors import InputError
from fastflow_jax.training.checkpoints import Checkpoints

STATE = {"x": jnp.arange(3.0), "layer": {"w": jnp.ones((2, 2))}}
NAMES = ["v[2]", "[!a]", "a\\b", "a**b", "what?", "kratzer_\udce4", "plain"]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The directory for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_can_be_saved_under_any_path(name, tmp_path, temporary):
    folder = tmp_path / name / "checkpoints"
    for step in (1, 2):
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(step, {**STATE, "x": STATE["x"] + step})
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 2
        restored = checkpoints.restore(2, STATE)
    np.testing.assert_array_equal(restored["x"], STATE["x"] + 2)
    np.testing.assert_array_equal(restored["layer"]["w"], STATE["layer"]["w"])
    assert [path.name for path in folder.iterdir()] == ["2"]  # the older one is deleted
    assert {path.name for path in tmp_path.iterdir()} == {name, "temporary"}
    assert not list(temporary.iterdir())


def test_checkpoints_under_a_relative_path(tmp_path, temporary, monkeypatch):
    (tmp_path / "old [1]").mkdir()
    monkeypatch.chdir(tmp_path / "old [1]")
    with Checkpoints(pathlib.Path("run")) as checkpoints:
        checkpoints.save(1, STATE)
    with Checkpoints(pathlib.Path("run")) as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(1, STATE)["x"], STATE["x"])


def test_the_temporary_directory_may_have_brackets(tmp_path, monkeypatch):
    (tmp_path / "tmp[0]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp[0]"))
    with Checkpoints(tmp_path / "tmp[0]" / "run") as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore(1, STATE)["x"], STATE["x"])


def test_a_missing_temporary_directory_is_an_error(tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(InputError, match=r"v\[2\].*cannot write under.* set TMPDIR"):
        Checkpoints(tmp_path / "v[2]")


@pytest.mark.parametrize("check", [Checkpoints.wait, lambda c: c.save(2, STATE), lambda c: None])
def test_a_checkpoint_that_cannot_be_read_back_is_an_error(check, tmp_path, monkeypatch):
    # Orbax then merges nothing, and only logs a warning.
    monkeypatch.setattr(epath.gpath.PosixGPath, "glob", lambda path, pattern: iter(()))

    def save():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, STATE)
            check(checkpoints)

    with pytest.raises(InputError, match=r"1 was written but .*manifest.* choose another"):
        save()
    assert os.listdir(tmp_path) == ["1"]


def test_a_checkpoint_that_lost_an_array_is_an_error(tmp_path, monkeypatch):
    rename = epath.gpath.PosixGPath.rename

    def lose_data(path, target):
        shutil.rmtree(path / "state/d", ignore_errors=True)
        return rename(path, target)

    def save():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {"x": STATE["x"]})

    monkeypatch.setattr(epath.gpath.PosixGPath, "rename", lose_data)
    with pytest.raises(InputError, match=r"1 was written but cannot be read back .*--workdir"):
        save()


def test_a_state_on_all_devices_is_saved_without_compiling(tmp_path, compilations):
    x = np.arange(56, dtype=np.float32).reshape(8, 7)
    state = {"replicated": parallel.on_devices(x), "split": parallel.split(x + 1)}
    with Checkpoints(tmp_path / "run") as checkpoints, compilations() as compiled:
        checkpoints.save(1, state)
        checkpoints.wait()
        restored = checkpoints.restore(1, state)
    assert compiled == []
    np.testing.assert_array_equal(restored["replicated"], x)
    np.testing.assert_array_equal(restored["split"], x + 1)


def synchronised(monkeypatch):
    """Names of files in the order in which they are synchronised from now on."""
    names, sync = [], os.fsync

    def record(descriptor):
        names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return names


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="/proc names open files")
def test_a_checkpoint_is_on_the_disk_before_the_earlier_one_is_deleted(tmp_path, monkeypatch):
    remove, existed = shutil.rmtree, []
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, STATE)
        checkpoints.wait()
        names = synchronised(monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(
                shutil, "rmtree", lambda path, **how: (existed.extend(names), remove(path, **how))
            )
            checkpoints.save(2, STATE)
            checkpoints.wait()
    assert os.listdir(tmp_path) == ["2"]
    files = {str(path) for path in [tmp_path, *(tmp_path / "2").rglob("*")]}
    assert files <= set(existed)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
def test_a_checkpoint_that_lost_power_is_replaced_by_the_one_before(name, tmp_path, caplog):
    for step in (1, 2):
        with Checkpoints(tmp_path / str(step)) as checkpoints:
            checkpoints.save(step, {**STATE, "x": STATE["x"] + step})
    os.rename(tmp_path / "2/2", tmp_path / "1/2")
    os.truncate(tmp_path / "1/2" / name, 0)
    with Checkpoints(tmp_path / "1", continues=True) as checkpoints:
        assert checkpoints.latest == 1
        np.testing.assert_array_equal(checkpoints.restore(1, STATE)["x"], STATE["x"] + 1)
    assert f"{tmp_path}/1/2 is incomplete, as after a power failure. It is deleted" in caplog.text
