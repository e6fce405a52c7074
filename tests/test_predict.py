"""Prediction of files: lines, heat maps, anomaly maps, exit statuses and unreadable files."""

import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.errors import InputError
from fastflow_jax.files import lock
from fastflow_jax.predict import draw_prediction, find_images, predict

REPOSITORY = pathlib.Path(__file__).parent.parent


def photograph(seed):
    return np.random.default_rng(seed).integers(118, 138, (24, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a small detector."""
    c = default()
    c.backbone, c.image_size = "pixels", (16,)
    c.flow.steps, c.flow.hidden_ratio, c.map.bank = 1, 2.0, 20
    c.train.epochs, c.train.batch_size, c.data.holdout = 1, 8, 0.5
    c.batch_size = 8
    folder = tmp_path_factory.mktemp("run") / "grey"
    detector = Detector.fit([photograph(i) for i in range(16)], config=c, workdir=folder)
    detector.with_threshold(detector.held_out.scores.max() + 1).save()
    return folder


@pytest.fixture
def photos(tmp_path):
    """Two normal images, one in a sub-directory, an anomalous one, and a text file."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.fromarray(photograph(100)).save(folder / "a.png")
    Image.fromarray(photograph(101)).save(folder / "more" / "a.png")
    bad = photograph(102)
    bad[6:14, 10:20] = (250, 20, 20)
    Image.fromarray(bad).save(folder / "bad.jpg", quality=95)
    (folder / "notes.txt").write_text("not an image")
    return folder


def lines_of(output):
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [line["path"] for line in lines]
    return {pathlib.Path(line["path"]).name: line for line in lines}, rows


def test_a_directory_gives_a_line_and_a_heat_map_per_image(run, photos, tmp_path):
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
        assert picture.width > 512  # two panels
    # Heat maps next to the images are not scored.
    assert predict(run, str(photos), photos / "out", heatmaps=True) == 1
    assert predict(run, str(photos), photos / "out", heatmaps=True) == 1
    assert len(lines_of(photos / "out")[1]) == 3


def test_the_output_directory_may_begin_with_a_tilde(run, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    predict(run, str(photos), "~/out", heatmaps=False)
    assert (tmp_path / "out" / "predictions.csv").exists()


def test_a_broken_image_is_reported_and_the_others_are_scored(
    run, photos, tmp_path, capsys, caplog
):
    caplog.set_level("INFO")
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:100])
    assert predict(run, str(photos), tmp_path / "out", heatmaps=False) == 3
    lines, rows = lines_of(tmp_path / "out")
    assert len(rows) == 4
    assert "broken.png" in lines["broken.png"]["error"]
    assert lines["broken.png"]["score"] is None
    assert lines["bad.jpg"]["is_anomalous"] is True
    assert not list((tmp_path / "out").rglob("*.png"))
    assert "skipped" in caplog.text
    assert "1 of 3 images are anomalous, 1 unreadable, 1 other files" in capsys.readouterr().out
    assert "not images, not scored: notes.txt" in caplog.messages


def test_the_threshold_is_logged_and_written(run, photos, tmp_path, caplog):
    caplog.set_level("INFO")
    predict(run, str(photos), tmp_path / "out", heatmaps=False, rate=0.5)
    threshold = Detector.load(run).with_threshold(rate=0.5).image_threshold
    assert f"The threshold comes from {threshold.n} normal images" in caplog.text
    assert "false-alarm rate 50.0%, true rate between" in caplog.text
    stated = json.loads((tmp_path / "out/predictions.json").read_text())["threshold"]
    assert (stated["value"], stated["rate"]) == (threshold.value, 0.5)
    assert stated["interval"] == list(threshold.interval)


@pytest.mark.parametrize(("n", "brighter"), [(50, 60), (50, 0), (34, 60)])
def test_a_shift_is_logged_and_written(run, tmp_path, caplog, n, brighter):
    (tmp_path / "photos").mkdir()
    for i in range(n):
        Image.fromarray(photograph(i + 50) + np.uint8(brighter)).save(tmp_path / f"photos/{i}.png")
    (tmp_path / "photos/broken.png").write_bytes(b"")
    output = tmp_path / "out"

    def shift():
        predict(run, str(tmp_path / "photos"), output, heatmaps=False)
        return json.loads((output / "predictions.json").read_text())["shift"]

    found = shift()
    if n == 34:
        assert found is None
        assert "shifted" not in caplog.text
        return
    lines, _ = lines_of(output)
    far = [line["distance"] > 1 for line in lines.values() if line["error"] is None]
    assert (found["tested"], found["further"]) == (50, sum(far))
    assert (found["message"] is not None) == bool(brighter)
    assert ("The new images look shifted as a whole" in caplog.text) == bool(brighter)
    # Kept lines of an interrupted call count.
    for name in ("predictions.jsonl", "predictions.csv"):
        kept = (output / name).read_text().splitlines(keepends=True)[:20]
        (output / name).write_text("".join(kept))
    caplog.set_level("INFO")
    assert shift() == found
    assert "images were already scored" in caplog.text


def test_parts_are_named_by_the_rule_of_the_training(tmp_path):
    for i in range(48 + 180):
        folder = tmp_path / ("train" if i < 48 else f"new/lot_7/part_{i // 3}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(i)).save(folder / f"part_{i // 3}_{i % 3}.png")
    c = default()
    c.detector, c.backbone, c.image_size, c.data.groups = "knn", "pixels", (16,), r"part_(\d+)_"
    Detector.fit(tmp_path / "train", config=c, workdir=tmp_path / "run")
    predict(tmp_path / "run", str(tmp_path / "new"), tmp_path / "out", heatmaps=False)
    shift = json.loads((tmp_path / "out/predictions.json").read_text())["shift"]
    assert (shift["of"], shift["tested"]) == ("parts", 60)


def test_raw_maps_equal_the_anomaly_map(run, photos, tmp_path):
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


def test_rate_and_tile_are_passed_to_the_detector(run, photos, tmp_path):
    predict(run, str(photos), tmp_path / "out", rate=0.5, tile=True, heatmaps=False)
    lines, _ = lines_of(tmp_path / "out")
    held_out = np.sort(Detector.load(run).held_out.scores)
    assert lines["bad.jpg"]["threshold"] == pytest.approx(held_out[4], abs=1e-3)
    whole = Detector.load(run).predict(photos / "bad.jpg").score
    assert lines["bad.jpg"]["score"] != pytest.approx(whole)


def test_brackets_in_an_existing_directory_are_taken_literally(tmp_path, monkeypatch):
    folder = tmp_path / "part [2]"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).touch()
    monkeypatch.chdir(tmp_path)
    for pattern in (folder / "*.png", "part [2]/[abc].png", "part [[]2]/*.png"):
        found = find_images(str(pattern)).names
        assert list(found.values()) == ["a.png", "b.png", "c.png"]


def test_files_directories_and_patterns_are_found(photos, tmp_path):
    every = {str(photos / n): n for n in ("a.png", "bad.jpg", "more/a.png")}
    assert find_images(str(photos)).names == every
    assert find_images(str(photos / "a.png")).names == {str(photos / "a.png"): "a.png"}
    assert find_images(str(photos / "**" / "*.*g")).names == every
    assert find_images(str(photos / "**")).names == every
    assert list(find_images(str(photos / "b*")).names.values()) == ["bad.jpg"]
    assert list(find_images(str(photos / "m*")).names.values()) == ["a.png"]
    (tmp_path / "empty").mkdir()
    for pattern in ("nosuch.png", photos / "*.tif", photos / "*.txt", tmp_path / "empty"):
        with pytest.raises(
            InputError, match="not a file, and not a directory or pattern with images"
        ):
            find_images(str(pattern))


def test_links_are_followed_once(photos, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Image.fromarray(photograph(1)).save(elsewhere / "b.png")
    (photos / "line").symlink_to(elsewhere)
    (photos / "more" / "round").symlink_to(photos)
    found = find_images(str(photos)).names.values()
    assert sorted(found) == ["a.png", "bad.jpg", "line/b.png", "more/a.png"]


def test_a_name_that_is_not_utf8_is_written_unchanged(run, photos, tmp_path):
    name = os.fsdecode(b"schraube_\xe4.png")
    (photos / "a.png").rename(photos / name)
    assert predict(run, str(photos), tmp_path / "out") == 1
    assert os.fsencode(name) in (tmp_path / "out" / "predictions.csv").read_bytes()
    assert (tmp_path / "out" / "heatmaps" / f"{name}.png").is_file()


def test_a_heat_map_that_cannot_be_written_gives_status_3(run, photos, tmp_path, caplog):
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
    assert "cannot be written" in caplog.text


def test_an_image_deleted_after_scoring_gives_status_3(run, photos, tmp_path, monkeypatch):
    def gone(path, levels):
        raise InputError(f"{path} cannot be read: No such file or directory.")

    monkeypatch.setattr("fastflow_jax.predict.read_image", gone)
    assert predict(run, str(photos), tmp_path / "out") == 3
    lines, _ = lines_of(tmp_path / "out")
    assert all(line["score"] is not None for line in lines.values())
    assert all("cannot be read" in line["error"] for line in lines.values())


def test_heat_maps_next_to_the_images_are_not_scored(run, photos):
    assert predict(run, str(photos), photos) == 1
    assert predict(run, str(photos), photos) == 1
    assert len(lines_of(photos)[1]) == 3


def test_without_held_out_images_there_is_no_decision(run, photos, tmp_path, capsys):
    c = Detector.load(run).config.copy_and_resolve_references()
    c.data.holdout = 0.0
    Detector.fit([photograph(i) for i in range(4)], config=c, workdir=tmp_path / "run")
    assert predict(tmp_path / "run", str(photos), tmp_path / "out", heatmaps=False) == 4
    assert "3 images were scored without a decision" in capsys.readouterr().out
    assert {row["is_anomalous"] for row in lines_of(tmp_path / "out")[1]} == {""}


def test_an_unexpected_error_gives_status_2(run, photos, tmp_path, started, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no such thing")

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("fastflow_jax.predict.predict", fail)
    arguments = [f"--workdir={run}", f"--input={photos}", f"--output={tmp_path}/out"]
    assert started(["--mode=predict", *arguments]) == 2
    assert "no such thing" in capsys.readouterr().err


def test_the_exit_status_of_the_command(run, photos, tmp_path, environment):
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
    (photos / "broken.png").write_bytes(b"not an image")
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
def test_invalid_flags_give_one_message(arguments, message, started, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert started(["--mode=predict", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_invalid_arguments_raise_an_error(run, photos, tmp_path):
    with pytest.raises(InputError, match=r"nosuch/\*\.png is not a file, and not a directory"):
        predict(run, "nosuch/*.png", tmp_path / "out")
    with pytest.raises(InputError, match="nosuch is not a directory"):
        predict(tmp_path / "nosuch", str(photos), tmp_path / "out")
    with pytest.raises(InputError, match="between 0 and 1"):
        predict(run, str(photos), tmp_path / "out", rate=2.0)
    with pytest.raises(InputError, match="a file of that name exists"):
        predict(run, str(photos), photos / "a.png")


@pytest.fixture
def score_directory(run, tmp_path, capsys, caplog):
    """Scores a directory; returns exit status, lines by relative path, output and messages."""
    caplog.set_level("INFO")

    def score(directory, **options):
        status = predict(run, str(directory), tmp_path / "out", **{"heatmaps": False} | options)
        lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
        by_name = {
            os.path.relpath(line["path"], directory): line for line in map(json.loads, lines)
        }
        return status, by_name, capsys.readouterr().out, caplog.text

    return score


def test_every_skipped_file_is_named(photos, score_directory):
    bad = (photos / "bad.jpg").read_bytes()
    (photos / "bad.jpg").unlink()
    for name in ("frame_3", "b.jpg_large", "c.img"):
        (photos / name).write_bytes(bad)
    (photos / "notes").write_text("a part of another lot")
    (photos / "list.csv").write_text("a,b")
    status, lines, out, messages = score_directory(photos)
    assert status == 1
    assert sorted(lines) == ["a.png", "b.jpg_large", "c.img", "frame_3", "more/a.png"]
    assert "3 of 5 images are anomalous, 0 unreadable, 3 other files" in out
    assert "not images, not scored: list.csv, notes, notes.txt" in messages
    (photos / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (photos / "DSC_2.NEF").write_bytes(b"II*\0 of a camera")
    (photos / "link.png").symlink_to("/not/mounted.png")
    status, lines, out, messages = score_directory(photos)
    assert status == 3
    for name, remedy in (
        ("IMG_1.HEIC", "HEI[CF]|broken"),
        ("DSC_2.NEF", "Convert it"),
        ("link.png", "link to a missing file"),
    ):
        assert re.search(remedy, lines[name]["error"])
        assert name in messages


def test_all_images_of_a_directory_are_scored_from_python(run, photos, caplog):
    caplog.set_level("INFO", logger="fastflow_jax")
    detector = Detector.load(run)
    (photos / "frame_3").write_bytes((photos / "bad.jpg").read_bytes())
    assert sum(result.is_anomalous for result in detector.predict(photos)) == 2
    assert f"1 files of {photos} are not images: notes.txt" in caplog.messages
    (photos / "link.png").symlink_to("/not/mounted.png")
    with pytest.raises(InputError, match=r"link\.png is a link to a missing file"):
        detector.predict(photos)


def test_service_directories_and_results_are_not_scored(run, photos, score_directory):
    for name in ("@eaDir/a.png", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX", "@EADIR"):
        (photos / name).mkdir(parents=True)
        Image.fromarray(photograph(1)).save(photos / name / "thumbnail.jpg")
    Detector.load(run).save(photos / "saved")
    predict(run, str(photos / "a.png"), photos / "earlier", raw="png16")
    (photos / "a_run/heatmaps").mkdir(parents=True)
    (photos / "a_run/.lock").touch()
    (photos / "a_run/config.json").write_text("{}")
    Image.fromarray(photograph(1)).save(photos / "a_run/heatmaps/a.png")
    (photos / "heatmaps").mkdir()
    Image.fromarray(photograph(1)).save(photos / "heatmaps/mine.png")
    _, lines, *_ = score_directory(photos)
    assert sorted(lines) == ["a.png", "bad.jpg", "heatmaps/mine.png", "more/a.png"]
    assert sorted(find_images(str(photos / "**")).names.values()) == sorted(lines)
    _, lines, *_ = score_directory(photos / "earlier/heatmaps")
    assert list(lines) == ["a.png.png"]


def test_every_page_has_a_line_and_a_heat_map(photos, score_directory, tmp_path):
    good, bad = (Image.open(photos / name).convert("RGB") for name in ("a.png", "bad.jpg"))
    for name in ("a.png", "bad.jpg", "more/a.png"):
        (photos / name).unlink()
    good.save(photos / "stack.tif", save_all=True, append_images=[bad, good])
    status, lines, out, _ = score_directory(photos, heatmaps=True)
    assert status == 1
    assert [(name, line["is_anomalous"]) for name, line in lines.items()] == [
        ("stack.tif#1", False),
        ("stack.tif#2", True),
        ("stack.tif#3", False),
    ]
    assert "1 of 3 images are anomalous" in out
    assert lines["stack.tif#2"]["heatmap"] == "heatmaps/stack.tif#2.png"
    # The bright square of the second page is in its heat map alone.
    pictures = [Image.open(tmp_path / "out" / line["heatmap"]) for line in lines.values()]
    left = [np.asarray(picture.convert("RGB"), int)[:, :256] for picture in pictures]
    reds = [int((image[..., 0] - image[..., 1]).max()) for image in left]
    assert reds[1] > 150 > max(reds[0], reds[2])
    again, lines, *_ = score_directory(photos, heatmaps=True)
    assert (again, len(lines)) == (1, 3)


def write_video(path, images):
    """Encodes frames without loss."""
    av = pytest.importorskip("av", reason="videos need the extra video")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def test_every_frame_of_a_video_has_a_line_and_a_heat_map(run, photos, score_directory, tmp_path):
    bad = np.asarray(Image.open(photos / "bad.jpg").convert("RGB"))
    shutil.rmtree(photos)
    photos.mkdir()
    write_video(photos / "clip.mkv", [photograph(100), bad, photograph(101), bad])
    status, lines, out, _ = score_directory(photos, heatmaps=True)
    assert status == 1
    assert [(name, line["is_anomalous"]) for name, line in lines.items()] == [
        ("clip.mkv#1", False),
        ("clip.mkv#2", True),
        ("clip.mkv#3", False),
        ("clip.mkv#4", True),
    ]
    assert "2 of 4 images are anomalous" in out
    pictures = [Image.open(tmp_path / "out" / line["heatmap"]) for line in lines.values()]
    left = [np.asarray(picture.convert("RGB"), int)[:, :256] for picture in pictures]
    reds = [int((image[..., 0] - image[..., 1]).max()) for image in left]
    assert min(reds[1], reds[3]) > 150 > max(reds[0], reds[2])
    assert predict(run, str(photos), tmp_path / "every", heatmaps=False, every=2) == 0
    assert [*lines_of(tmp_path / "every")[0]] == ["clip.mkv#1", "clip.mkv#3"]
    with pytest.raises(InputError, match="--every must be at least 1, not 0"):
        predict(run, str(photos), tmp_path / "every", every=0)
    results = Detector.load(run).predict(photos / "clip.mkv", every=3)
    assert [result.name for result in results] == [f"{photos / 'clip.mkv'}#{i}" for i in (1, 4)]


def test_a_truncated_video_is_scored_up_to_its_end(run, tmp_path, caplog):
    write_video(tmp_path / "clip.avi", [photograph(i) for i in range(100, 112)])
    whole = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "clip.avi").write_bytes(whole[: len(whole) // 2])
    assert predict(run, str(tmp_path / "clip.avi"), tmp_path / "out", heatmaps=False) == 3
    lines, _ = lines_of(tmp_path / "out")
    assert "clip.avi ends after" in lines.pop("clip.avi")["error"]
    assert [*lines] == [f"clip.avi#{i + 1}" for i in range(len(lines))]
    assert lines
    assert all(line["score"] is not None for line in lines.values())
    assert "clip.avi ends after" in caplog.text


class Dialogue:
    """A call of `predict` in a thread, which reads paths from a pipe and answers to another."""

    def __init__(self, monkeypatch, run, **options):
        inputs, outputs = os.pipe(), os.pipe()
        self.paths, self.answers = os.fdopen(inputs[1], "w"), os.fdopen(outputs[0])
        stdin, stdout = os.fdopen(inputs[0]), os.fdopen(outputs[1], "w")
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(sys, "stdout", stdout)
        self.status = None

        def answer():
            with stdin, stdout:  # the reader of a call that fails gets an empty line
                self.status = predict(run, "-", **options)

        self.thread = threading.Thread(target=answer, daemon=True)
        self.thread.start()

    def ask(self, path):
        """Sends a path; returns its line, before the next path is sent."""
        self.paths.write(f"{path}\n")
        self.paths.flush()
        return json.loads(self.answers.readline())

    def end(self):
        """Returns the exit status; nothing but the answers is on stdout."""
        self.paths.close()
        self.thread.join(30)
        assert self.answers.read() == ""
        self.answers.close()
        return self.status


@pytest.mark.parametrize("engine", ["jax", "onnx"])
def test_paths_on_stdin_are_answered_one_by_one(run, photos, monkeypatch, tmp_path, engine):
    if engine == "onnx":
        pytest.importorskip("onnx", reason="the engine needs the extra onnx")
        pytest.importorskip("onnxruntime", reason="the engine needs the extra onnx")
    run = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    Image.new("RGB", (8, 8)).save(
        photos / "stack.tif", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
    )
    dialogue = Dialogue(monkeypatch, run, engine=engine)
    good = dialogue.ask(photos / "a.png")
    assert (good["path"], good["is_anomalous"]) == (str(photos / "a.png"), False)
    assert good["bytes"] == (photos / "a.png").stat().st_size
    assert good["heatmap"] is good["error"] is None
    for path, says in (
        (photos / "none.png", "No such file"),
        (photos / "notes.txt", "not an image"),
        (photos, "Is a directory"),
        ("s3://bucket/a.png", "not a local path"),
        ("a\0b", "not a path"),
    ):
        line = dialogue.ask(path)
        assert line["path"] == str(path)
        assert says in line["error"]
        assert line["score"] is None
    assert dialogue.ask(photos / "bad.jpg")["is_anomalous"] is True
    assert dialogue.ask(f"\n{photos / 'stack.tif'}")["path"].endswith("stack.tif#1")
    assert json.loads(dialogue.answers.readline())["path"].endswith("stack.tif#2")
    assert dialogue.end() == 3
    assert not [*tmp_path.rglob("heatmaps")]


@pytest.mark.parametrize(("names", "status"), [(["a.png"], 0), (["a.png", "bad.jpg"], 1), ([], 0)])
def test_the_exit_status_of_paths_on_stdin(run, photos, monkeypatch, names, status):
    dialogue = Dialogue(monkeypatch, run)
    for name in names:
        dialogue.ask(photos / name)
    assert dialogue.end() == status


def test_heat_maps_of_paths_on_stdin_are_drawn_if_there_is_an_output(
    run, photos, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    dialogue = Dialogue(monkeypatch, run, output=tmp_path / "out", raw="npy")
    line = dialogue.ask("photos/more/a.png")
    assert line["heatmap"] == "heatmaps/photos/more/a.png.png"
    other = dialogue.ask(photos / "more" / ".." / "a.png")
    assert other["heatmap"] == "heatmaps/photos/a.png.png"
    assert dialogue.end() == 0
    assert (tmp_path / "out" / line["heatmap"]).exists()
    assert np.load(tmp_path / "out" / line["raw_map"]).shape == (24, 32)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["heatmaps", "maps"]


def test_stdin_needs_an_output_for_maps(run):
    with pytest.raises(InputError, match="--raw=npy writes files"):
        predict(run, "-", raw="npy")
    with pytest.raises(InputError, match="--output is missing"):
        predict(run, "photos")


def test_an_interrupted_prediction_continues(run, photos, tmp_path, monkeypatch):
    for i in range(80):
        Image.fromarray(photograph(i)).save(photos / f"{i:02}.png")
    read, stop = [], Detector.stream

    def interrupted(self, names, **options):
        read.append(list(names))
        for i, result in enumerate(stop(self, names, **options)):
            if len(read) == 1 and i == 70:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(Detector, "stream", interrupted)
    arguments = (run, str(photos), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        predict(*arguments, heatmaps=False)
    before, _ = lines_of(tmp_path / "out")
    (photos / "00.png").write_bytes((photos / "01.png").read_bytes())
    assert predict(*arguments, heatmaps=False) == 1
    # 70 were scored, and 00.png has changed since: the second batch of 32 is kept, so that the
    # other images form the same batches again.
    kept = list(before)[32:64]
    assert [len(names) for names in read] == [83, 51]
    assert not set(read[1]) & {str(photos / name) for name in kept}
    lines, rows = lines_of(tmp_path / "out")
    assert len(rows) == 83
    assert all(lines[name] == before[name] for name in kept)
    assert lines["00.png"]["score"] != before["00.png"]["score"]
    # A finished call only reports; other options start again.
    assert predict(*arguments, heatmaps=False) == 1
    assert read[2] == []
    assert predict(*arguments, heatmaps=False, rate=0.5) == 1
    assert len(read[3]) == 83


def test_an_interrupted_prediction_ends_with_the_results_of_an_undisturbed_one(
    run, photos, tmp_path
):
    for i in range(40):
        Image.fromarray(photograph(i)).save(photos / f"{i:02}.png")
    for name in ("whole", "cut"):
        predict(run, str(photos), tmp_path / name, heatmaps=False)
    expected = (tmp_path / "cut/predictions.jsonl").read_bytes()
    settings = json.loads((tmp_path / "cut/predictions.json").read_text())
    settings.pop("shift")
    (tmp_path / "cut/predictions.json").write_text(json.dumps(settings))
    (tmp_path / "cut/predictions.jsonl").write_bytes(b"".join(expected.splitlines(True)[:35]))
    predict(run, str(photos), tmp_path / "cut", heatmaps=False)
    for name in ("predictions.jsonl", "predictions.csv", "predictions.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_output_in_use_is_refused(run, photos, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        lock(tmp_path / "out/.lock", on_wait=lambda: None),
        pytest.raises(InputError, match=r"out is in use by another process\. Wait for it, or pass"),
    ):
        predict(run, str(photos), tmp_path / "out", heatmaps=False)


def test_a_format_that_differs_from_training_is_reported_once(tmp_path, caplog):
    c = default()
    c.backbone, c.image_size, c.data.holdout, c.batch_size = "pixels", (16,), 0.5, 8
    c.flow.steps, c.flow.hidden_ratio, c.train.epochs = 1, 2.0, 1
    for i in range(8):
        (tmp_path / "good").mkdir(exist_ok=True)
        Image.fromarray(photograph(i)).save(tmp_path / f"good/{i}.png")
    detector = Detector.fit(tmp_path / "good", config=c, workdir=tmp_path / "run")
    detector.predict(tmp_path / "good")
    assert not caplog.messages
    for i in range(3):
        Image.fromarray(photograph(i)).save(tmp_path / f"{i}.jpg", quality=75)
    Detector.load(tmp_path / "run").predict([tmp_path / f"{i}.jpg" for i in range(3)])
    (message,) = caplog.messages
    assert re.search(
        r"0\.jpg differs .*: it is JPEG of quality 75, training images are PNG\.", message
    )


def test_an_image_that_changes_while_it_is_scored_gives_an_error(run, photos, score_directory):
    stream = Detector.stream

    def changing(self, names, **options):
        for result in stream(self, names, **options):
            if result.name.endswith("bad.jpg"):
                (photos / "bad.jpg").write_bytes((photos / "a.png").read_bytes())
            yield result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detector, "stream", changing)
        status, lines, _, messages = score_directory(photos)
    assert status == 3
    assert "the file changed while it was scored" in lines["bad.jpg"]["error"]
    assert "changed" in messages
    assert score_directory(photos)[0] == 0  # scored again


def test_the_engine_onnx_writes_the_same_lines(run, photos, tmp_path, monkeypatch):
    """The detector is exported once; the second call loads neither JAX nor the run's arrays."""
    pytest.importorskip("onnx", reason="the engine needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="the engine needs the extra onnx")
    run = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    assert predict(run, str(photos), tmp_path / "jax") == 1
    assert predict(run, str(photos), tmp_path / "onnx", engine="onnx") == 1
    expected, found = (lines_of(tmp_path / engine)[0] for engine in ("jax", "onnx"))
    assert found.keys() == expected.keys()
    for name, line in found.items():
        one, other = line, expected[name]
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
        assert one["distance"] is one["log_likelihood"] is None
        same = ("p_value", "is_anomalous", "threshold", "pixel_threshold", "heatmap", "height")
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
        assert one["anomalous_part"] == pytest.approx(other["anomalous_part"], abs=0.01)

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "load", None)
        assert predict(run, str(photos), tmp_path / "again", engine="onnx", rate=0.5) == 1
    assert lines_of(tmp_path / "again")[0]["bad.jpg"]["threshold"] < line["threshold"]

    detector = Detector.load(run)  # other thresholds, so the file is exported again
    detector.with_threshold(line["threshold"] + 1e6).save()
    assert predict(run, str(photos), tmp_path / "higher", engine="onnx") == 0


def test_one_image_is_predicted_by_onnx_runtime_without_jax(run, photos, environment, tmp_path):
    pytest.importorskip("onnx", reason="the engine needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="the engine needs the extra onnx")
    run = pathlib.Path(shutil.copytree(run, tmp_path / "run"))
    main = ["-m", "fastflow_jax.main", f"--workdir={run}"]
    export = [*main, "--mode=export", f"--output={run / 'detector.onnx'}"]
    command = [*main, "--mode=predict", "--engine=onnx", f"--input={photos / 'bad.jpg'}"]
    command.append(f"--output={tmp_path / 'out'}")
    how = {"capture_output": True, "text": True, "env": environment, "cwd": REPOSITORY}
    process = subprocess.run([sys.executable, *export], **how)
    assert process.returncode == 0, process.stderr
    assert re.search(r"detector\.onnx: compared on 0 held-out and 4 random images", process.stdout)
    process = subprocess.run([sys.executable, "-X", "importtime", *command], **how)
    assert process.returncode == 1, process.stderr
    assert "1 of 1 images are anomalous" in process.stdout
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "onnxruntime" in imported
    assert not imported & {"jax", "flax", "scipy", "sklearn", "tensorflow_datasets"}


def test_the_title_of_a_heat_map_has_score_threshold_and_decision(run, photos, monkeypatch):
    titles, module = [], sys.modules["fastflow_jax.predict"]
    monkeypatch.setattr(module, "draw_heatmap", lambda *_, title, **__: titles.append(title))
    detector = Detector.load(run)
    result = detector.predict(photos / "bad.jpg")
    draw_prediction(detector, result)
    value = detector.image_threshold.value
    assert titles[0].startswith(f"bad.jpg  score {result.score:.3f} (threshold {value:.3f})  p ")
    assert titles[0].endswith("  anomalous")
