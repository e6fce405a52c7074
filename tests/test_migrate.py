"""Run directories as saved detectors."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from fastflow_jax import Detector
from fastflow_jax.errors import InputError
from fastflow_jax.migrate import migrate

GOLDENS = pathlib.Path(__file__).parent / "goldens"
IMAGES = list(np.random.default_rng(1).integers(0, 256, (2, 20, 30, 3), np.uint8))


def scores(path):
    """Scores of some images, which must not change."""
    return [result.score for result in Detector.load(path).predict(IMAGES)]


@pytest.fixture
def run(tmp_path):
    """A run directory of an earlier version."""
    return pathlib.Path(shutil.copytree(GOLDENS / "run", tmp_path / "run"))


@pytest.mark.parametrize("name", ["new", "new.zip"])
def test_a_run_of_an_earlier_version_is_saved_in_format_1(name, run, tmp_path):
    known = scores(run)
    assert migrate(run, tmp_path / name) == [tmp_path / name]
    shutil.rmtree(run)
    assert scores(tmp_path / name) == known
    if name == "new":
        about = json.loads((tmp_path / "new/detector.json").read_text())
        assert about["format"] == 1
        files = {*about["files"], "detector.json"}
        assert {file.name for file in (tmp_path / "new").iterdir()} == files


def test_each_training_of_a_run_is_saved(run, tmp_path):
    several = tmp_path / "several"
    for name in ("screws", "nuts/seed_1"):
        shutil.copytree(run, several / name)
    with pytest.raises(InputError, match=r"has 2 trainings.*--output"):
        migrate(several, tmp_path / "new.zip")
    assert not (tmp_path / "new.zip").exists()
    written = migrate(several, tmp_path / "new")
    assert written == [tmp_path / "new/nuts/seed_1", tmp_path / "new/screws"]
    assert scores(written[0]) == scores(run)


def test_what_cannot_be_migrated_is_named(run, tmp_path):
    with pytest.raises(InputError, match="has no training to migrate"):
        migrate(GOLDENS / "durable/fastflow", tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/file").touch()
    with pytest.raises(InputError, match="has other files"):
        migrate(run, tmp_path / "new")
    assert scores(run)


def test_a_detector_that_scores_differently_is_an_error(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fastflow_jax.detector.Detector.save",
        lambda self, path: shutil.copytree(GOLDENS / "durable/fastflow", path),
    )
    with pytest.raises(InputError, match="does not score like the original"):
        migrate(run, tmp_path / "new")
