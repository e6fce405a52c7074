"""The table of backbones is that of the package and of the files with figures."""

import json
import pathlib
import shutil
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import models

from fastflow_jax.backbones import create_backbone


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the files that the table is made of, and of the table."""
    for name in ("seeds", "cpu", "footprint", "models"):
        shutil.copy(models.RESULTS / f"{name}.json", tmp_path)
    monkeypatch.setattr(models, "RESULTS", tmp_path)
    return tmp_path


def rows(results):
    return {row["name"]: row for row in json.loads((results / "models.json").read_text())["rows"]}


def test_the_table_of_this_repository_is_up_to_date(capsys):
    assert models.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_figure_is_found_and_written(results, capsys):
    file = results / "seeds.json"
    seeds = json.loads(file.read_text())
    (mean,) = (row for row in seeds["rows"] if row["name"] == "mean")
    mean["image AUROC"] = [0.5, 0.25]
    file.write_text(json.dumps(seeds))
    assert models.main(["--check"]) == 1
    assert "Run python benchmarks/models.py" in capsys.readouterr().err
    assert models.main([]) == models.main(["--check"]) == 0
    measured = {name for name, row in rows(results).items() if "image_auroc" in row}
    assert measured == {"`tf_efficientnet_lite0`"}
    assert rows(results)["`tf_efficientnet_lite0`"]["image_auroc"] == [0.5, 0.25]


def test_memory_and_time_are_those_of_the_measured_backbones(results):
    file = results / "footprint.json"
    row = {"backbone": "resnet34", "seconds": {"jax": 0.3, "onnx": 0.2}}
    row["bytes"] = {"jax": 500 * 2**20, "onnx": 100 * 2**20}
    file.write_text(json.dumps({"rows": [row]}))
    assert models.main([]) == 0
    table = rows(results)
    names = ("onnx", "jax_memory", "onnx_memory")
    assert [table["`resnet34`"][name] for name in names] == ["1.5", "500", "100"]
    assert not set(names) & table["`resnet18`"].keys()


def test_rows_describe_the_backbones(results):
    table = rows(results)
    assert "`pixels`" not in table
    backbone = create_backbone("resnet18", weights="random", layers=["layer1", "layer4"])
    low, *_, high = table["`resnet18`"]["strides"].split(", ")
    assert (int(low), int(high)) == backbone.strides
    assert table["`resnet18`"]["parameters"] == "11.7"
    assert table["`resnet18`"]["licence"] == "BSD-3-Clause"
    assert table["`vit_small_patch16_dinov3`"]["licence"].startswith("DINOv3 License")
    assert "timm" not in table["`resnet34`"]  # was not measured
