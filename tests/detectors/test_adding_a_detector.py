"""The example of docs/adding_a_detector.md is a detector like the others."""

import pathlib
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.config import default, fill
from fastflow_jax.detectors import base
from fastflow_jax.errors import InputError
from fastflow_jax.runs import experiment

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "adding_a_detector.md"


@pytest.fixture
def example(monkeypatch):
    """The registered example."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    module = types.ModuleType("mean_detector")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(base.DETECTORS, "mean", module.__name__)
    exec(code, module.__dict__)
    return module


def grey(n, seed=0):
    return np.random.default_rng(seed).integers(118, 138, (n, 20, 30, 3), np.uint8)


def config():
    c = default()
    c.detector, c.backbone, c.image_size, c.data.holdout = "mean", "pixels", (16,), 0.25
    return c


def test_the_example_finds_a_defect(example, tmp_path):
    detector = Detector.fit(grey(16), config=config(), workdir=tmp_path / "run")
    defective = grey(1, seed=1)[0]
    defective[6:16, 12:24] = (250, 20, 20)
    result = detector.predict(defective)
    assert result.is_anomalous
    assert not detector.predict(grey(1, seed=2)[0]).is_anomalous
    y, x = np.unravel_index(result.anomaly_map.argmax(), result.anomaly_map.shape)
    assert 6 <= y < 16
    assert 12 <= x < 24
    assert Detector.load(tmp_path / "run").predict(defective).score == result.score
    saved = Detector.load(detector.save(tmp_path / "saved.zip"))
    assert saved.predict(defective).score == result.score
    with pytest.raises(InputError, match="mean has no latents"):
        detector.sample()


def test_main_runs_and_reports_the_example(example, tmp_path):
    for name in ("train/good", "test/good", "test/spot"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i, image in enumerate(grey(6, seed=len(name))):
            if "spot" in name:
                image[6:16, 12:24] = (250, 20, 20)
            Image.fromarray(image).save(tmp_path / f"images/{name}/{i}.png")
    c = config()
    c.data.root = str(tmp_path / "images")
    results = experiment.run(fill(c), tmp_path / "run")
    assert results["mean"]["image_auroc"] == 1.0
    assert "<title>Mean on " in (tmp_path / "run/report.html").read_text()


def test_its_fields_belong_to_the_configuration(example):
    c = config()
    c.average.power = 2.0
    assert fill(c).average.power == 2.0
    c.detector = "fastflow"
    with pytest.raises(InputError, match=r"config\.average\.power has no effect on fastflow"):
        fill(c)
