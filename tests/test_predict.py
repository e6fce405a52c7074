"""The command line on files: lines, pictures, raw maps, exit codes, and what cannot be read."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.errors import InputError
from fastflow_jax.predict import find_images, predict

REPOSITORY = pathlib.Path(__file__).parent.parent


def photograph(seed):
    return np.random.default_rng(seed).integers(118, 138, (24, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of seconds."""
    c = default()
    c.backbone, c.image_size = "pixels", (16,)
    c.flow.steps, c.flow.hidden_ratio = 1, 2.0
    c.train.epochs, c.train.batch_size, c.data.holdout = 1, 8, 0.5
    c.batch_size = 8
    folder = tmp_path_factory.mktemp("run") / "grey"
    detector = Detector.fit([photograph(i) for i in range(16)], config=c, workdir=folder)
    detector.with_threshold(detector.held_out.scores.max() + 1).save()
    return folder


@pytest.fixture
def photos(tmp_path):
    """Two normal images, one of them in a folder, an anomalous one, and what is no image."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(photograph(100)).save(folder / "a.png")
    Image.fromarray(photograph(101)).save(folder / "more" / "a.png")
    bad = photograph(102)
    bad[6:14, 10:20] = (250, 20, 20)
    Image.fromarray(bad).save(folder / "bad.jpg", quality=95)
    (folder / "notes.txt").write_text("no image")
    return folder


def lines_of(output):
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [line["path"] for line in lines]
    return {pathlib.Path(line["path"]).name: line for line in lines}, rows


def test_a_folder_gives_a_line_and_a_picture_an_image(run, photos, tmp_path):
    output = tmp_path / "out"
    assert predict(run, str(photos), output) == 1
    lines, rows = lines_of(output)
    assert len(rows) == 3
    bad = lines["bad.jpg"]
    assert bad["is_anomalous"] is True
    assert {row["is_anomalous"] for row in rows} == {"true", "false"}
    assert bad["p_value"] == pytest.approx(1 / 9)
    assert bad["score"] > bad["threshold"] > lines["a.png"]["score"]
    assert (bad["height"], bad["width"]) == (24, 32)
    assert 0 < bad["anomalous_part"] < 1
    pictures = sorted(p.relative_to(output).as_posix() for p in output.rglob("*.png"))
    assert pictures == [f"heatmaps/{n}.png" for n in ("a.png", "bad.jpg", "more/a.png")]
    assert bad["heatmap"] == "heatmaps/bad.jpg.png"
    with Image.open(output / bad["heatmap"]) as picture:
        assert picture.width > 512  # the photograph and its heat
    # Results among the images are not taken for images.
    assert predict(run, str(photos), photos / "out", heatmaps=True) == 1
    assert predict(run, str(photos), photos / "out", heatmaps=True) == 1
    assert len(lines_of(photos / "out")[1]) == 3


def test_results_may_lie_in_a_home(run, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    predict(run, str(photos), "~/out", heatmaps=False)
    assert (tmp_path / "out" / "predictions.csv").exists()


def test_a_broken_image_is_told_and_the_rest_is_done(run, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:100])
    assert predict(run, str(photos), tmp_path / "out", heatmaps=False) == 3
    lines, rows = lines_of(tmp_path / "out")
    assert len(rows) == 4
    assert "broken.png" in lines["broken.png"]["error"]
    assert lines["broken.png"]["score"] is None
    assert lines["bad.jpg"]["is_anomalous"] is True
    assert not list((tmp_path / "out").rglob("*.png"))
    said = capsys.readouterr()
    assert "skipped" in said.err
    assert "1 of 3 images are anomalous, 1 unreadable" in said.out


def test_raw_maps_hold_the_map(run, photos, tmp_path):
    expected = Detector.load(run).predict(photos / "bad.jpg").anomaly_map
    output = tmp_path / "npy"
    predict(run, str(photos / "bad.jpg"), output, raw="npy", heatmaps=False)
    lines, _ = lines_of(output)
    np.testing.assert_array_equal(np.load(output / lines["bad.jpg"]["raw_map"]), expected)
    output = tmp_path / "png"
    predict(run, str(photos / "bad.jpg"), output, raw="png16", heatmaps=False)
    (line,) = lines_of(output)[0].values()
    levels = np.asarray(Image.open(output / line["raw_map"])).astype(np.float64)
    assert levels.max() == 65535
    values = line["raw_zero"] + levels / 65535 * (line["raw_full"] - line["raw_zero"])
    np.testing.assert_allclose(values, expected, atol=np.ptp(expected) / 65535)


def test_another_rate_and_tiles(run, photos, tmp_path):
    predict(run, str(photos), tmp_path / "out", rate=0.5, tile=True, heatmaps=False)
    lines, _ = lines_of(tmp_path / "out")
    held_out = np.sort(Detector.load(run).held_out.scores)
    assert lines["bad.jpg"]["threshold"] == pytest.approx(held_out[4])
    whole = Detector.load(run).predict(photos / "bad.jpg").score
    assert lines["bad.jpg"]["score"] != pytest.approx(whole)


def test_brackets_in_a_folder_of_a_pattern_are_no_pattern(tmp_path, monkeypatch):
    folder = tmp_path / "part [2]"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).touch()
    monkeypatch.chdir(tmp_path)
    for pattern in (folder / "*.png", "part [2]/[abc].png", "part [[]2]/*.png"):
        found = find_images(str(pattern), besides=tmp_path / "nowhere")
        assert list(found.values()) == ["a.png", "b.png", "c.png"]


def test_files_folders_and_patterns_are_found(photos, tmp_path):
    nowhere = tmp_path / "nowhere"
    every = {str(photos / n): n for n in ("a.png", "bad.jpg", "more/a.png")}
    assert find_images(str(photos), besides=nowhere) == every
    assert find_images(str(photos / "a.png"), besides=nowhere) == {str(photos / "a.png"): "a.png"}
    assert find_images(str(photos / "**" / "*.*g"), besides=nowhere) == every
    assert list(find_images(str(photos / "b*"), besides=nowhere).values()) == ["bad.jpg"]
    for pattern in ("nosuch.png", str(photos / "*.tif"), str(tmp_path / "*.tif")):
        with pytest.raises(InputError, match="no file, no folder"):
            find_images(pattern, besides=nowhere)


def test_links_are_followed_to_their_end(photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(photograph(1)).save(elsewhere / "b.png")
    (photos / "line").symlink_to(elsewhere)
    (photos / "more" / "round").symlink_to(photos)
    found = find_images(str(photos), besides=tmp_path / "nowhere").values()
    assert sorted(found) == ["a.png", "bad.jpg", "line/b.png", "more/a.png"]


def test_a_name_that_is_no_text_is_written_as_it_is(run, photos, tmp_path):
    name = os.fsdecode(b"schraube_\xe4.png")
    (photos / "a.png").rename(photos / name)
    assert predict(run, str(photos), tmp_path / "out") == 1
    assert os.fsencode(name) in (tmp_path / "out" / "predictions.csv").read_bytes()
    assert (tmp_path / "out" / "heatmaps" / f"{name}.png").is_file()


def test_a_picture_that_cannot_be_written_stops_nothing(run, photos, tmp_path, capsys):
    (photos / "a.png").rename(photos / f"{'x' * 250}.png")
    (photos / "bad.jpg.png").mkdir()
    Image.fromarray(photograph(3)).save(photos / "bad.jpg.png" / "c.png")
    assert predict(run, str(photos), tmp_path / "out") == 3
    lines, rows = lines_of(tmp_path / "out")
    assert len(rows) == 4
    assert all(line["score"] is not None for line in lines.values())
    assert "cannot be written" in lines[f"{'x' * 250}.png"]["error"]
    assert lines[f"{'x' * 250}.png"]["heatmap"] is None
    failed = [name for name, line in lines.items() if line["error"]]
    assert len(failed) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_image_that_vanishes_after_it_was_scored_stops_nothing(
    run, photos, tmp_path, monkeypatch
):
    def gone(path):
        raise InputError(f"{path} cannot be read: No such file or directory.")

    monkeypatch.setattr("fastflow_jax.predict.read_image", gone)
    assert predict(run, str(photos), tmp_path / "out") == 3
    lines, _ = lines_of(tmp_path / "out")
    assert all(line["score"] is not None for line in lines.values())
    assert all("cannot be read" in line["error"] for line in lines.values())


def test_pictures_beside_the_images_are_no_images(run, photos):
    assert predict(run, str(photos), photos) == 1
    assert predict(run, str(photos), photos) == 1
    assert len(lines_of(photos)[1]) == 3


def test_without_held_out_images_nothing_is_decided(run, photos, tmp_path, capsys):
    c = Detector.load(run).config.copy_and_resolve_references()
    c.data.holdout = 0.0
    Detector.fit([photograph(i) for i in range(4)], config=c, workdir=tmp_path / "run")
    assert predict(tmp_path / "run", str(photos), tmp_path / "out", heatmaps=False) == 4
    assert "none of 3 images is called anomalous" in capsys.readouterr().out
    assert {row["is_anomalous"] for row in lines_of(tmp_path / "out")[1]} == {""}


def test_a_failure_does_not_pass_for_a_decision(
    run, photos, tmp_path, started, capsys, monkeypatch
):
    def fail(*arguments, **options):
        raise RuntimeError("no such thing")

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("fastflow_jax.predict.predict", fail)
    arguments = [f"--workdir={run}", f"--input={photos}", f"--output={tmp_path}/out"]
    assert started(["--mode=predict", *arguments]) == 2
    assert "no such thing" in capsys.readouterr().err


def test_the_exit_status_says_what_was_found(run, photos, tmp_path, environment):
    def call(pictures):
        arguments = [f"--workdir={run}", f"--output={tmp_path}/out", "--noheatmaps"]
        return subprocess.run(
            [
                *(sys.executable, "-m", "fastflow_jax.main", "--mode=predict"),
                *(*arguments, f"--input={pictures}"),
            ],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    process = call(photos / "more")
    assert process.returncode == 0, process.stderr
    (photos / "broken.png").write_bytes(b"no image")
    process = call(photos)
    assert process.returncode == 3
    assert "broken.png" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=nosuch", "--input=photos"], "needs --output"),
        (["--config=configs/demo.py", "--workdir=nosuch"], "Leave --config out"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_bad_flags_end_in_one_message(arguments, message, started, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert started(["--mode=predict", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_what_cannot_be_done_is_said(run, photos, tmp_path):
    with pytest.raises(InputError, match=r"nosuch/\*\.png is no file, no folder"):
        predict(run, "nosuch/*.png", tmp_path / "out")
    with pytest.raises(InputError, match="nosuch is no folder"):
        predict(tmp_path / "nosuch", str(photos), tmp_path / "out")
    with pytest.raises(InputError, match="between 0 and 1"):
        predict(run, str(photos), tmp_path / "out", rate=2.0)
    with pytest.raises(InputError, match="a file is in the way"):
        predict(run, str(photos), photos / "a.png")
