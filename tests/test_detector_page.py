"""The code of docs/detector.md runs as it stands, on small photographs and a small flow."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fastflow_jax.detector.detector
from fastflow_jax.config import default
from fastflow_jax.runs import few_images

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "detector.md"


def examples():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def small():
    c = default()
    c.backbone, c.image_size = "pixels", (16,)
    c.flow.steps, c.flow.hidden_ratio, c.map.bank = 1, 1.0, 20
    c.train.epochs, c.train.batch_size, c.data.holdout = 1, 8, 0.25
    c.batch_size = 8
    return c


def test_the_examples_run(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for folder, names in (
        ("photos/screws/train/good", [f"{i:03}.jpg" for i in range(24)]),
        ("photos/new", ["016.jpg", "017.jpg"]),
    ):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            pixels = rng.integers(118, 138, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastflow_jax.detector.detector, "default", small)
    monkeypatch.setattr(few_images, "ENOUGH", 24)
    bad = np.full((24, 32, 3), 250, np.uint8)
    labels = [0, 1]
    names = {"labelled": ["photos/new/016.jpg", bad], "labels": labels}
    blocks = examples()
    assert len(blocks) > 3
    for block in blocks:
        exec(block, names)
    assert names["chosen"].image_threshold.kind == "f1"
    decisions = [r.is_anomalous for r in names["chosen"].predict(names["labelled"])]
    assert decisions == [False, True]
    reloaded = fastflow_jax.Detector.load("runs/screws")
    assert reloaded.image_threshold == names["strict"].image_threshold
    for one, other in zip(names["again"], names["features"], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_the_script_with_worker_processes_runs(tmp_path, environment):
    images = np.random.default_rng(0).integers(118, 138, (12, 24, 32, 3), np.uint8)
    detector = fastflow_jax.Detector.fit(images, config=small(), workdir=tmp_path / "runs/screws")
    (tmp_path / "photos/new").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(images[i]).save(tmp_path / f"photos/new/{i}.jpg")
    (script,) = [block for block in examples() if "__main__" in block]
    (tmp_path / "workers.py").write_text(script)
    command = [sys.executable, "workers.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [detector.predict(tmp_path / f"photos/new/{i}.jpg").score for i in range(2)]
    assert json.loads(done.stdout) == pytest.approx(expected, rel=1e-4)
