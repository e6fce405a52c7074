"""The benchmark of memory and time of each backbone continues its file of results."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import footprint

from fastflow_jax.backbones import BACKBONES


def test_backbones_are_chosen_by_their_size():
    small = footprint.backbones(largest=5)
    assert small == ["tf_efficientnet_lite0"]
    assert len(footprint.backbones(largest=1e6)) == sum(bool(b.tag) for b in BACKBONES.values())


@pytest.fixture
def measured(monkeypatch):
    """Names of the backbones that are measured; the figures are made up."""
    names = []

    def measure(name, rounds):
        names.append(name)
        sizes = {"jax": 600 << 20, "onnx": 200 << 20}
        return {"backbone": name, "seconds": {"jax": 0.3, "onnx": 0.2}, "bytes": sizes}

    monkeypatch.setattr(footprint, "measure", measure)
    return names


def test_backbones_in_the_file_are_not_measured_again(measured, tmp_path, monkeypatch, capsys):
    file = tmp_path / "footprint.json"
    for names in (["resnet18"], ["resnet18", "resnet34"]):
        words = ["footprint.py", "--backbones", *names, "--out", str(file)]
        monkeypatch.setattr(sys, "argv", words)
        footprint.main()
    assert measured == ["resnet18", "resnet34"]
    assert [row["backbone"] for row in json.loads(file.read_text())["rows"]] == measured
    said = capsys.readouterr().out
    assert "resnet34: jax 600 MiB, onnx 200 MiB" in said
    assert "ratio resnet34 1.5" in said
