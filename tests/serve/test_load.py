"""The benchmark of the server, on a tiny model."""

import json
import pathlib
import sys

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
pytest.importorskip("prometheus_client")
if not pathlib.Path("/proc/self/stat").exists():
    pytest.skip("worker processes are found in /proc", allow_module_level=True)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import run
import serving


def test_figures_of_a_load(file, png, tmp_path, monkeypatch, capsys):
    images, out = tmp_path / "images", tmp_path / "serving.json"
    images.mkdir()
    for level in (0, 255):
        (images / f"{level}.png").write_bytes(png(level))
    monkeypatch.setattr(serving, "CLIENTS", (1, 4))
    monkeypatch.setattr(serving, "KILLS", 1)
    monkeypatch.setattr(serving, "SECONDS_BETWEEN_KILLS", 0.3)
    paths = [str(file), "--images", str(images), "--onnx", str(file), "--out", str(out)]
    monkeypatch.setattr(
        sys, "argv", ["serving.py", *paths, "--rounds", "2", "--seconds", "0.2", "--cores", "0"]
    )
    serving.main()
    result = json.loads(out.read_text())
    assert [(row["engine"], row["clients"]) for row in result["measured"]] == [
        ("onnx", 1),
        ("jax", 1),
        ("onnx", 4),
        ("jax", 4),
    ]
    for row in result["measured"]:
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["requests"] > 0
        assert row["not_answered"] == 0
    assert result["killed_workers"]["workers_killed"] == 1
    assert result["killed_workers"]["lost"] == 0
    assert all(400 <= status < 500 for status, _ in result["bad_images"].values())
    found = run.parse_ratios(capsys.readouterr().out)
    first, second = result["measured"][:2]
    assert found["rate_1_clients"] == pytest.approx(
        first["images_per_second"] / second["images_per_second"], rel=1e-2
    )
