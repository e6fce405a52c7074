"""Batch scoring: results do not depend on engine, shards or interruptions; bad input is named."""

import importlib.util
import io
import json
import logging
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow", reason="batch scoring needs the extra batch")
pq = pytest.importorskip("pyarrow.parquet", reason="batch scoring needs the extra batch")

from fastflow_jax import InputError  # noqa: E402
from fastflow_jax.batch import Options, run  # noqa: E402
from fastflow_jax.batch.items import Item  # noqa: E402
from fastflow_jax.batch.scorer import SCHEMA, Scorer  # noqa: E402
from fastflow_jax.data.profile import Profile  # noqa: E402
from fastflow_jax.exported import Exported  # noqa: E402

LEVELS = {"a.png": 40, "b.png": 90, "c.png": 200, "sub/d.png": 10, "sub/e.png": 255}


@pytest.fixture(scope="module")
def model(export, tmp_path_factory):
    return export(tmp_path_factory.mktemp("model") / "tiny.onnx")


@pytest.fixture
def folder(tmp_path):
    """Images of one grey level each, two of them anomalous."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, level in LEVELS.items():
        Image.new("L", (12, 10), level).save(folder / name)
    return folder


@pytest.fixture
def output(tmp_path):
    return tmp_path / "output"


def rows_of(output):
    """All rows of an output directory, by path; a path has one row."""
    rows = pq.read_table(sorted(output.glob("*.parquet"))).to_pylist() if output.exists() else []
    found = {row["path"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def parts(output):
    return {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}


def levels(output, folder):
    """Grey levels by relative path, computed back from the scores."""
    return {
        os.path.relpath(path, folder): row["score"] and round(255 * row["score"])
        for path, row in rows_of(output).items()
    }


def test_rows_are_the_predictions(model, folder, output, capsys):
    assert run(model, str(folder), output) == 1
    assert "2 of 5 images are anomalous, 0 unreadable" in capsys.readouterr().out
    rows = rows_of(output)
    for expected in Exported(model).predict(folder):
        row = rows.pop(expected.name)
        for field in ("score", "p_value", "is_anomalous"):
            assert row[field] == getattr(expected, field)
        assert row["anomalous_part"] == expected.mask.mean()
        assert (row["height"], row["width"]) == expected.anomaly_map.shape == (10, 12)
        assert (row["threshold"], row["fingerprint"], row["error"]) == (0.5, "0", None)
        stat = os.stat(expected.name)
        assert (row["bytes"], row["modified_ns"]) == (stat.st_size, stat.st_mtime_ns)
    assert not rows


def test_workers_of_other_engines_score_contents_and_files(model, folder):
    scorer = pickle.loads(pickle.dumps(Scorer(model, Options(maps="npy"))))
    content = (folder / "b.png").read_bytes()
    items = [Item("in memory", content), Item(str(folder / "a.png")), Item("broken", b"no image")]
    table = scorer(pickle.loads(pickle.dumps(items)))
    assert table.schema == SCHEMA
    rows = table.to_pylist()
    assert [row["path"] for row in rows] == [item.path for item in items]
    assert [row["score"] and round(255 * row["score"]) for row in rows] == [90, 40, None]
    assert [row["bytes"] for row in rows][::2] == [len(content), 8]
    assert "broken" in rows[2]["error"]
    assert scorer([]).num_rows == 0


def test_differences_from_the_training_images_are_logged_once(export, folder, tmp_path, caplog):
    profile = Profile((), (99, 99), (99, 99), None, (), coloured=False)  # of other sizes
    scorer = Scorer(export(tmp_path / "profile.onnx", training_images=profile))
    for name in LEVELS:
        scorer([Item(str(folder / name))])
    assert caplog.text.count("differs from the training images") == 1


def test_a_saved_detector_has_the_scores_of_its_export(folder, output, tmp_path):
    pytest.importorskip("onnx", reason="exported detectors need the extra onnx")
    from fastflow_jax import Detector
    from fastflow_jax.config import default
    from fastflow_jax.detectors.base import recipe

    c = default()
    c.update(recipe("knn"))
    c.backbone, c.image_size, c.batch_size, c.data.holdout = "pixels", (8,), 8, 0.25
    normal = np.random.default_rng(0).integers(30, 100, (8, 12, 10, 3), np.uint8)
    detector = Detector.fit(list(normal), config=c)
    detector.save(tmp_path / "run.zip")
    detector.export(tmp_path / "knn.onnx")
    run(tmp_path / "run.zip", str(folder), output)
    run(tmp_path / "knn.onnx", str(folder), tmp_path / "other")
    rows, others = rows_of(output), rows_of(tmp_path / "other")
    assert rows.keys() == others.keys()
    for path, row in rows.items():
        assert row["score"] == pytest.approx(others[path]["score"], rel=1e-4)
        assert row["is_anomalous"] is others[path]["is_anomalous"]
        assert row["fingerprint"] == others[path]["fingerprint"]


def test_shards_have_every_image_once(model, tmp_path, output):
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(90):
        Image.new("L", (4, 4), 2 * i).save(folder / f"{i:03}.bmp")
    sizes = []
    for i in range(1, 4):
        before = len(rows_of(output))
        run(model, str(folder), output, shard=f"{i}/3")
        sizes.append(len(rows_of(output)) - before)
    assert levels(output, folder) == {f"{i:03}.bmp": 2 * i for i in range(90)}
    assert min(sizes) > 15
    known = parts(output)
    assert run(model, str(folder), output, shard="1/2") in (0, 1)  # nothing is missing
    assert parts(output) == known


def test_maps_are_stored(model, folder, output, tmp_path):
    gradient = np.arange(120, dtype=np.uint8).reshape(10, 12)
    Image.fromarray(gradient).save(folder / "a.png")
    expected = Exported(model).predict(folder / "a.png").anomaly_map
    run(model, str(folder / "a.png"), output, options=Options(maps="npy"))
    (row,) = rows_of(output).values()
    np.testing.assert_array_equal(np.load(io.BytesIO(row["anomaly_map"])), expected)
    run(model, str(folder / "a.png"), tmp_path / "png", options=Options(maps="png16"))
    (row,) = rows_of(tmp_path / "png").values()
    grey = np.asarray(Image.open(io.BytesIO(row["anomaly_map"]))) / 65535
    found = row["map_zero"] + (row["map_full"] - row["map_zero"]) * grey
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_only_what_is_missing_is_scored_again(model, folder, output, caplog):
    caplog.set_level(logging.INFO, "fastflow_jax")
    run(model, str(folder), output)
    known = parts(output)
    assert run(model, str(folder), output) == 1
    assert parts(output) == known
    assert "5 images already have results" in caplog.text
    Image.new("L", (12, 10), 70).save(folder / "new.png")
    Image.new("L", (30, 30), 60).save(folder / "c.png")
    assert run(model, str(folder), output) == 1
    assert levels(output, folder) == LEVELS | {"new.png": 70, "c.png": 60}
    counts = {part: pq.read_metadata(output / part).num_rows for part in parts(output)}
    assert sorted(counts.values()) == [2, 4]


def test_unreadable_images_have_rows_and_are_tried_again(model, folder, output, caplog):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:40])
    (folder / "link.png").symlink_to("nowhere.png")
    assert run(model, str(folder), output) == 3
    assert levels(output, folder) == LEVELS | {"a.png": None, "link.png": None}
    row = rows_of(output)[str(folder / "a.png")]
    assert "a.png" in row["error"]
    assert row["error"] in caplog.text
    assert row["is_anomalous"] is row["height"] is None
    (folder / "link.png").unlink()
    Image.new("L", (12, 10), 41).save(folder / "a.png")
    Image.new("L", (12, 10), 43).save(folder / "nowhere.png")
    (folder / "link.png").symlink_to("nowhere.png")
    assert run(model, str(folder), output) == 1
    expected = {"a.png": 41, "link.png": 43, "nowhere.png": 43}
    assert levels(output, folder) == LEVELS | expected


def test_pages_are_rows(model, folder, output):
    pages = [Image.new("L", (6, 6), level) for level in (20, 30, 40)]
    pages[0].save(folder / "a#1.tif", save_all=True, append_images=pages[1:])
    for _ in range(2):
        run(model, str(folder / "a#1.tif"), output)
        rows = pq.read_table(sorted(output.glob("*.parquet"))).to_pylist()
        assert [(row["page"], row["pages"]) for row in rows] == [(1, 3), (2, 3), (3, 3)]
        assert [round(255 * row["score"]) for row in rows] == [20, 30, 40]
        assert {row["path"] for row in rows} == {str(folder / "a#1.tif")}


def test_names_of_any_bytes_are_escaped(model, folder, output):
    name = os.fsencode(folder) + b"/\xff.png"
    try:
        os.rename(folder / "a.png", name)
    except OSError:
        pytest.skip("the file system needs valid names")
    for _ in range(2):
        assert run(model, str(folder), output) == 1
        assert levels(output, folder)["\\udcff.png"] == 40


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet", "binary.parquet", "pattern"])
def test_manifests_are_read(kind, model, folder, output):
    names = [*LEVELS, "a.png"]  # one of them twice
    file = folder / f"list.{kind}"
    if kind == "txt":
        file.write_text("\n".join(names) + "\n\n")
    elif kind == "csv":
        file.write_text("\ufeffn,path\n" + "".join(f'1,"{name}"\n' for name in names))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps({"path": name}) + "\n" for name in names))
    elif kind == "parquet":
        table = pa.table({"path": pa.array(names).dictionary_encode()})
        pq.write_table(table, file, row_group_size=2)
    elif kind == "binary.parquet":
        file.mkdir()
        names = [str(folder / name) for name in LEVELS]
        for part, several in (("0", names[:3]), ("1", names[3:])):
            contents = [pathlib.Path(name).read_bytes() for name in several]
            table = pa.table({"path": pa.array(contents, pa.binary())})
            pq.write_table(table, file / f"{part}.parquet", row_group_size=2)
    else:
        file = folder / "**/*.png"
    for shard in ("1/2", "2/2", "1/1"):
        run(model, str(file), output, shard=shard)
    found = levels(output, folder)
    if kind == "binary.parquet":
        expected = dict(zip(["0:0", "0:1", "0:2", "1:0", "1:1"], LEVELS.values(), strict=True))
        found = {name[20:].replace(".parquet", ""): level for name, level in found.items()}
        assert found == expected
    else:
        assert found == LEVELS


def test_contents_of_parquet_files_that_are_no_images_have_rows(model, folder, output):
    good = (folder / "a.png").read_bytes()
    table = pa.table({"image": pa.array([good, b"", None, b"no image"], pa.large_binary())})
    pq.write_table(table, folder / "images.parquet")
    assert run(model, str(folder / "images.parquet"), output, column="image") == 3
    rows = rows_of(output)
    errors = [rows[f"{folder}/images.parquet:{i}"]["error"] for i in range(4)]
    assert errors[0] is None
    assert all(f"images.parquet:{i}" in errors[i] for i in range(1, 4))


def test_another_detector_or_option_is_refused(export, model, folder, output, tmp_path):
    run(model, str(folder), output)
    known = parts(output)
    other = export(tmp_path / "other.onnx", offset=1.0)
    with pytest.raises(InputError, match=r"has results with another fingerprint\. Pass another"):
        run(other, str(folder), output)
    with pytest.raises(InputError, match=r"another rate and maps"):
        run(model, str(folder), output, options=Options(rate=0.25, maps="npy"))
    assert parts(output) == known
    run(model, str(folder), output, options=Options(threads=2))


def test_results_of_two_processes_for_one_image_are_replaced(model, folder, output):
    run(model, str(folder), output)
    (part,) = parts(output)
    (output / part.replace("00001-of-00001", "00001-of-00002")).write_bytes(
        (output / part).read_bytes()
    )
    run(model, str(folder), output)
    assert levels(output, folder) == LEVELS


def test_a_damaged_file_is_named(model, folder, output):
    run(model, str(folder), output)
    (part,) = parts(output)
    (output / part).write_bytes((output / part).read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{part} cannot be read .* Delete it"):
        run(model, str(folder), output)
    (output / part).unlink()
    run(model, str(folder), output)
    assert levels(output, folder) == LEVELS


SLOW = """
import sys, time
from fastflow_jax import batch, exported
from fastflow_jax.batch import items
from fastflow_jax.main import handle_signals
handle_signals()
items.CHUNK = 2
score = exported.Exported.run
def slow(self, *arguments):
    time.sleep(0.1)
    return score(self, *arguments)
exported.Exported.run = slow
try:
    sys.exit(batch.run(*sys.argv[1:], part_rows=4))
except KeyboardInterrupt:
    sys.exit(99)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_call_is_continued(number, model, tmp_path, output):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        Image.new("L", (4, 4), i).save(folder / f"{i:02}.bmp")
    command = [sys.executable, "-c", SLOW, model, folder, output]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not parts(output):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)
    with pytest.raises(InputError, match="Another process writes shard 1/1"):
        run(model, str(folder), output)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (99 if number == signal.SIGTERM else -signal.SIGKILL)
    known = parts(output)
    assert 4 <= len(rows_of(output)) < 40
    (output / "shard-00001-of-00001-part-000077.tmp").touch()
    assert run(model, str(folder), output) == 0
    assert levels(output, folder) == {f"{i:02}.bmp": i for i in range(40)}
    assert known.items() <= parts(output).items()
    assert not list(output.glob("*.tmp"))


def test_an_interrupt_writes_the_rows_that_are_done(model, folder, output, monkeypatch):
    from fastflow_jax.batch import scorer

    score, calls = scorer.Scorer.__call__, []

    def interrupted(self, items):
        calls.append(items)
        if len(calls) == 2:
            raise KeyboardInterrupt(signal.SIGINT)
        return score(self, items)

    monkeypatch.setattr(scorer.Scorer, "__call__", interrupted)
    monkeypatch.setattr("fastflow_jax.batch.items.CHUNK", 3)
    with pytest.raises(KeyboardInterrupt):
        run(model, str(folder), output)
    assert len(rows_of(output)) == 3
    assert run(model, str(folder), output) == 1
    assert levels(output, folder) == LEVELS


@pytest.mark.parametrize("shard", ["0/0", "0/3", "17/16", "3", "a/b", "1/-1"])
def test_impossible_shards_are_refused(shard, model, folder, output):
    with pytest.raises(InputError, match=r"does not exist\. Pass a number"):
        run(model, str(folder), output, shard=shard)
    assert not output.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "", "list.txt has no images"),
        ("list.csv", "path,n\n", "list.csv has no images"),
        ("list.csv", "file,n\na.png,1\n", "no column 'path'. Pass one of .* --column: file, n"),
        ("list.csv", "", "no column 'path'"),
        ("list.csv", "path,n\n,1\n", "Row 0 of .*list.csv has no path"),
        ("list.jsonl", '{"file": "a.png"}\n', "no column 'path'.* file"),
        ("list.jsonl", '{"path": 3}\n', "Row 0 of .*list.jsonl has no path"),
        ("list.jsonl", "{no\n", r"list.jsonl is damaged \(.*\)\. Write it again"),
        ("list.jsonl", '"a.png"\n', "list.jsonl is damaged .* is not an object"),
        ("list.parquet", "no Parquet file", "list.parquet is damaged"),
        ("list.txt", "gs://bucket/a.png\n", "is a URL, not a local path"),
    ],
)
def test_bad_manifests_are_named(name, content, message, model, folder, output):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=message):
        run(model, str(folder / name), output)
    assert not output.exists()


def test_bad_arguments_are_named(model, folder, output, tmp_path):
    pq.write_table(pa.table({"path": [1.5], "n": [2]}), folder / "list.parquet")
    with pytest.raises(InputError, match=r"'path' of .*list.parquet has the type double"):
        run(model, str(folder / "list.parquet"), output)
    with pytest.raises(InputError, match=r"no column 'image'.*--column: path, n"):
        run(model, str(folder / "list.parquet"), output, column="image")
    with pytest.raises(InputError, match=r"none\.csv was not found"):
        run(model, str(folder / "none.csv"), output)
    with pytest.raises(InputError, match="not a directory or pattern with images"):
        run(model, str(tmp_path / "nowhere"), output)
    with pytest.raises(InputError, match=r"tiny\.mp3 was not found"):
        run(tmp_path / "tiny.mp3", str(folder), output)
    with pytest.raises(InputError, match=r"'jpeg' are unknown\. Choose from npy, png16"):
        run(model, str(folder), output, options=Options(maps="jpeg"))
    with pytest.raises(InputError, match="-1 Ray workers"):
        run(model, str(folder), output, ray=-1)
    with pytest.raises(InputError, match="cannot be a directory: a file of that name exists"):
        run(model, str(folder), folder / "a.png")


@pytest.mark.parametrize(("package", "extra"), [("pyarrow", "batch"), ("ray", "ray")])
def test_a_missing_package_is_named(package, extra, model, folder, output, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package}\. Run pip install .*\[{extra}\]"):
        run(model, str(folder), output, ray=1)


def test_workers_load_neither_jax_nor_scipy(model, folder, output):
    code = f"""
import sys
from fastflow_jax import batch
batch.run({str(model)!r}, {str(folder)!r}, {str(output)!r})
print(sorted({{"jax", "scipy", "flax", "sklearn", "matplotlib"}} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"


@pytest.mark.filterwarnings("ignore")  # of Ray
def test_ray_has_the_same_results(model, folder, output, tmp_path):
    pytest.importorskip("ray.data", reason="Ray workers need the extra ray")
    (folder / "a.png").write_bytes(b"no image")
    assert run(model, str(folder), output) == 3
    assert run(model, str(folder), tmp_path / "ray", ray=2) == 3
    assert rows_of(tmp_path / "ray") == rows_of(output)
    contents = [(folder / name).read_bytes() for name in ("b.png", "c.png", "sub/d.png")]
    table = pa.table({"image": pa.array(contents, pa.binary())})
    pq.write_table(table, folder / "images.parquet", row_group_size=2)
    run(model, str(folder / "images.parquet"), tmp_path / "cells", column="image", ray=1)
    found = [round(255 * row["score"]) for _, row in sorted(rows_of(tmp_path / "cells").items())]
    assert found == [90, 200, 10]


@pytest.mark.filterwarnings("ignore")  # of Ray
def test_relative_paths_are_found_by_a_session_of_another_directory(
    model, folder, output, monkeypatch
):
    ray = pytest.importorskip("ray", reason="Ray workers need the extra ray")
    monkeypatch.chdir(model.parent)
    ray.init(log_to_driver=False, include_dashboard=False)
    try:
        monkeypatch.chdir(folder.parent)
        assert run(model, folder.name, output, ray=2) == 1
    finally:
        ray.shutdown()
    assert rows_of(output).keys() == {f"images/{name}" for name in LEVELS}


@pytest.mark.filterwarnings("ignore")  # of Ray and Beam
def test_the_code_of_the_page_runs(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(model, "screws.onnx")
    os.mkdir("photos")
    for i in range(60):
        Image.new("L", (4, 4), 4 * i).save(f"photos/{i}.png")
    paths = [os.path.join("photos", name) for name in os.listdir("photos")]
    pathlib.Path("list.txt").write_text("\n".join(paths))
    pq.write_table(pa.table({"path": paths}), "list.parquet")
    page = pathlib.Path(__file__).parent.parent / "docs/batch.md"
    names = {"__name__": "batch"}
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M):
        if all(map(importlib.util.find_spec, re.findall(r"^import (ray|apache_beam)", code, re.M))):
            exec(compile(code, page.name, "exec"), names)
    assert names["status"] == 1
    assert names["table"].num_rows > 0
    assert all(int(path[7:-4]) >= 32 for path in names["table"]["path"].to_pylist())


def test_the_command_line_scores_a_shard(model, folder, output, started, capsys):
    command = ["--mode=batch", f"--model={model}", f"--input={folder}", f"--output={output}"]
    assert {started([*command, f"--shard={i}/2", "--raw=npy"]) for i in (1, 2)} <= {0, 1}
    assert levels(output, folder) == LEVELS
    assert all(row["anomaly_map"] for row in rows_of(output).values())
    for flags, message in (
        (["--shard=3/2"], "error: The shard '3/2' does not exist"),
        (["--raw=npy", f"--model={model}"], "error: The command batch has one detector"),
    ):
        assert started([*command, *flags]) == 2
        assert message in capsys.readouterr().err
    assert started(command[:1] + command[2:]) == 2
    assert "error: The command batch needs --workdir" in capsys.readouterr().err
