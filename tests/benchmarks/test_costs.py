"""Costs of scoring, measured on a training of seconds."""

import os
import pathlib
import sys

import numpy as np
import pytest

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.base import method
from fastflow_jax.features.extract import cached_features
from fastflow_jax.training.context import FitContext

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import costs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    c = default()
    c.backbone, c.image_size = "pixels", (16,)
    c.flow.steps, c.flow.hidden_ratio, c.train.epochs, c.train.batch_size = 1, 2.0, 1, 4
    c.batch_size = 4
    config, folder = fill(c), tmp_path_factory.mktemp("training")
    images = np.random.default_rng(0).standard_normal((8, 16, 16, 3), np.float32)
    train, holdout = cached_features((images[:6],)), (images[6:],)
    method(config.detector).fit(FitContext(config, train, folder, seed=3, holdout=holdout))
    for file in ("heatmaps/picture.png", "strips/0.webp", "scores.json"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(bytes(1 << 20))
    return config, folder


def test_figures_of_a_training(trained, monkeypatch):
    monkeypatch.setattr(costs, "_SECONDS", 0.1)
    config, folder = trained
    figures = costs.measure(config, folder, 3)
    assert set(figures) == set(costs.FIGURES)
    assert all(figures[f"detector_ms_batch_{b}"] > 0 for b in costs.BATCHES)
    assert 50 < figures["memory_mib"] < 4096
    sizes = [
        os.path.getsize(os.path.join(path, name))
        for path, _, names in os.walk(folder)
        for name in names
        if not path.endswith(("heatmaps", "strips")) and name != "scores.json"
    ]
    assert figures["disk_mib"] == pytest.approx(sum(sizes) / 2**20)
    assert figures["disk_mib"] < 1  # without the pictures


def test_a_training_that_cannot_be_loaded_is_named_and_not_measured(trained, tmp_path, capsys):
    config, _ = trained
    assert costs.measure(config, tmp_path, 3) is None
    assert f"Scoring could not be measured in {tmp_path}" in capsys.readouterr().out
