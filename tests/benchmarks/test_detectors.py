"""The benchmark of detectors: feature maps, stand-ins for training, ratios."""

import json
import pathlib
import sys

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import detectors
import run


@pytest.mark.parametrize(
    ("backbone", "steps", "kernels"),
    [
        ("resnet18", 8, (3,)),
        ("wide_resnet50_2", 8, (3, 1)),
        ("cait_m48_448", 20, (3, 1)),
    ],
)
def test_all_use_the_maps_of_the_published_form(backbone, steps, kernels):
    configs = detectors.configurations(backbone, 2)
    reference = configs[detectors.PUBLISHED]
    assert (reference.flow.steps, reference.flow.kernels) == (steps, kernels)
    assert (configs["fastflow"].flow.steps, configs["fastflow"].flow.norm) == (4, "whiten")
    same = {name: c for name, c in configs.items() if not name.endswith("_own_maps")}
    assert same.keys() == {detectors.PUBLISHED, "fastflow", "patchcore", "spade", "cflow"}
    assert {c.layers for c in same.values()} == {reference.layers}
    assert {(c.batch_size, c.image_size) for c in configs.values()} == {(2, reference.image_size)}
    own = {name.removesuffix("_own_maps") for name in configs.keys() - same.keys()}
    assert own == ({"fastflow"} if backbone == "cait_m48_448" else {*detectors.DETECTORS})


def test_maps_and_banks_have_their_real_sizes():
    configs = detectors.configurations("wide_resnet50_2", 1)
    shapes = [m.shape for m in detectors.random_maps(configs["patchcore"], 1)]
    assert shapes == [(1, 64, 64, 256), (1, 32, 32, 512), (1, 16, 16, 1024)]
    assert detectors.scorer_of(configs["patchcore"], 0).bank.shape == (10_000, 1024)
    (cait,) = detectors.random_maps(detectors.configurations("cait_m48_448", 1)["spade"], 1)
    assert cait.shape == (1, 28, 28, 768)


def test_each_detector_scores_and_its_ratios_are_to_fastflow(monkeypatch, tmp_path, capsys):
    called = []

    def seconds(call):  # one for the backbone, and for each detector one more than the last
        called.append(call())
        return float(len(called))

    file = tmp_path / "detectors.json"
    arguments = ["--backbones", "pixels", "--side", "8", "--stored", "6", "--batches", "2"]
    monkeypatch.setattr(detectors, "median_seconds", seconds)
    monkeypatch.setattr(sys, "argv", ["detectors.py", *arguments, "--out", str(file)])
    detectors.main()
    (maps,), *scored = called
    assert maps.shape == (2, 8, 8, 3)
    assert len(scored) == 5
    for scores, anomaly_maps in scored:
        assert scores.shape == (2,)
        assert anomaly_maps.shape == (2, 8, 8)
        assert np.isfinite(scores).all()
        assert np.isfinite(anomaly_maps).all()
    rows = json.loads(file.read_text())["rows"]
    assert [r["detector"] for r in rows] == [detectors.PUBLISHED, *detectors.DETECTORS]
    assert [r["detector_ms"] for r in rows] == [1000, 1500, 2000, 2500, 3000]  # an image
    assert {r["backbone_ms"] for r in rows} == {500}
    printed = capsys.readouterr().out
    assert "| pixels | spade | image | 2 | 500.0 | 2500.0 | 3000.0 |" in printed
    assert sum(line.startswith("|") for line in printed.splitlines()) == 2 + len(rows)
    assert run.parse_ratios(printed) == {
        "patchcore_pixels_batch2": pytest.approx(2.5 / 1.5, rel=1e-2),
        "patchcore_pixels_batch2_alone": 2,
        "spade_pixels_batch2": 2,
        "spade_pixels_batch2_alone": 2.5,
        "cflow_pixels_batch2": pytest.approx(3.5 / 1.5, rel=1e-2),
        "cflow_pixels_batch2_alone": 3,
    }


def test_ratios_of_single_images_have_no_batch_in_their_names():
    row = {"backbone": "resnet18", "batch": 1, "backbone_ms": 10, "detector_ms": 10}
    ours = row | {"detector": detectors.PUBLISHED}
    theirs = row | {"detector": "spade", "detector_ms": 30}
    assert detectors.compared(theirs, ours) == {"spade_resnet18": 2, "spade_resnet18_alone": 3}
