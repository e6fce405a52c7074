"""Whole runs on painted textures: the run folder, several seeds, and who may write there."""

import fcntl
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import data
from fastflow_jax.config import default, fill
from fastflow_jax.detector import Products
from fastflow_jax.detectors.base import recipe
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.evaluate import METRICS
from fastflow_jax.features.split import split_holdout
from fastflow_jax.files import read_lines
from fastflow_jax.runs import experiment
from fastflow_jax.runs.directory import check_same_data, claim


def tiny(**fields):
    """A configuration that runs in seconds: one map of small images, random weights."""
    pytest.importorskip("skimage", reason="the textures come with scikit-image")
    c = default()
    c.data.name, c.data.category = "synthetic", "brick"
    c.weights, c.image_size, c.layers = "random", (64,), ("blocks.2",)
    c.train.epochs, c.heatmaps, c.report_pictures = 1, 4, 4
    if fields.get("detector", "fastflow") == "fastflow":
        c.flow.steps, c.flow.kernels, c.flow.hidden_ratio = 1, (3,), 0.5
        c.map.bank = 20
    c.update_from_flattened_dict(fields)
    return fill(c)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "brick"
    return folder, experiment.run(tiny(), folder)


def test_a_finished_run_has_all_its_files(finished):
    folder, results = finished
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    expected = {"config.json", "checkpoints", "metrics.jsonl", "results.json", "heatmaps"}
    expected |= {"scores.json", "strips", "report.html"}
    assert expected <= names
    assert json.loads((folder / "results.json").read_text()) == results
    assert json.loads((folder / "config.json").read_text())["layers"] == ["blocks.2"]
    assert len(list((folder / "heatmaps").glob("*/*.png"))) == 4
    assert len(list((folder / "strips").glob("*.webp"))) == 4
    learnt = json.loads((folder / "learns_from.json").read_text())["images"]
    data = results["protocol"]["data"]["brick"]
    assert len(learnt) == data["trained_on"] == data["train_images"] - data["held_out"]


def test_the_report_has_the_thresholds_of_the_detector(finished):
    folder, _ = finished
    thresholds = json.loads((folder / "detector.json").read_text())["thresholds"]
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["mask_threshold"] == thresholds["pixel"]["value"]
    slider = re.search(r'id="slider".*? value="(.*?)"', (folder / "report.html").read_text())
    assert float(slider[1]) == pytest.approx(thresholds["image"]["value"])


def test_results_state_protocol_and_data(finished):
    _, results = finished
    assert set(results["categories"]) == {"brick"}
    assert results["categories"]["brick"] == results["mean"]
    figures = results["mean"]
    assert {m for m in METRICS if figures[m] is None} == {"spro_05"}  # the set has no regions
    assert all(0 <= figures[m] <= 1 for m in METRICS if figures[m] is not None)
    rows = results["kinds"]["brick/0"]
    assert sum(row["images"] for row in rows if row["kind"]) == rows[-1]["images"]
    assert rows[-1]["image_auroc"]["value"] == pytest.approx(figures["image_auroc"])
    assert rows[-1]["aupimo"] == pytest.approx(figures["aupimo"])
    assert sum(size["regions"] for size in results["sizes"]["brick/0"]) > 0
    assert results["std"] is None
    assert results["best_on_test"] is None
    protocol = results["protocol"]
    assert protocol["epoch"] == "last"
    assert protocol["weights"]["source"] == "random"
    assert protocol["seeds"] == [0]
    assert set(results["seconds"]["brick/0"]) == {"features", "train", "evaluate", "audit"}
    assert "jax" in results["versions"]


def test_a_finished_run_is_not_repeated(finished, caplog):
    caplog.set_level("INFO")
    folder, results = finished
    before = (folder / "results.json").stat().st_mtime_ns
    assert experiment.run(tiny(), folder) == results
    assert "finished" in caplog.text
    assert (folder / "results.json").stat().st_mtime_ns == before


def test_a_run_that_an_earlier_version_began_is_finished_without_newer_metrics(finished, tmp_path):
    folder, results = finished
    shutil.copytree(folder, tmp_path / "old")
    (tmp_path / "old" / "results.json").unlink()
    file = tmp_path / "old" / "part.json"
    part = json.loads(file.read_text())
    del part["figures"]["aupro_05"]
    file.write_text(json.dumps(part))
    assert experiment.run(tiny(), tmp_path / "old")["mean"] == results["mean"] | {"aupro_05": None}


def test_a_removed_report_is_written_again_without_scoring(finished, monkeypatch):
    folder, _ = finished
    before = (folder / "report.html").read_text()
    (folder / "report.html").unlink()
    monkeypatch.delattr(experiment, "_run_part")
    experiment.run(tiny(), folder)
    assert (folder / "report.html").read_text() == before


def test_other_columns_of_a_finished_run_need_no_training(finished, monkeypatch):
    folder, results = finished
    monkeypatch.delattr(experiment, "_run_part")
    again = experiment.run(tiny(metrics=("seg_f1,aupimo",)), folder)
    assert again["protocol"]["metrics"] == ["seg_f1", "aupimo"]
    assert again["mean"] == results["mean"]
    with pytest.raises(InputError, match=r"config.metrics has 'f1'"):
        experiment.run(tiny(metrics=("f1",)), folder)


def test_other_settings_are_refused(finished):
    folder, _ = finished
    with pytest.raises(InputError, match=r"flow\.clamp: 2\.0 in the run, 1\.0 now"):
        experiment.run(tiny(**{"flow.clamp": 1.0}), folder)


def test_a_workdir_in_use_is_refused(finished):
    folder, _ = finished
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use by another process"):
            experiment.run(tiny(), folder)


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds") / "run"
    return folder, experiment.run(tiny(seeds=2, evaluate_every=1), folder)


def test_several_seeds_and_evaluations_between_epochs(two_seeds):
    folder, results = two_seeds
    rows = [results["seeds"][seed]["brick"] for seed in ("0", "1")]
    scores = [row["image_auroc"] for row in rows]
    assert results["mean"]["image_auroc"] == pytest.approx(np.mean(scores))
    assert results["std"]["image_auroc"] == pytest.approx(np.std(scores, ddof=1))
    # One epoch: the best epoch is the last. Held-out images, and a threshold, come after training.
    without = {"seg_f1": None}
    assert results["best_on_test"]["brick"] == pytest.approx(results["mean"] | without)
    lines = (folder / "seed_1" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["test"] == pytest.approx(results["seeds"]["1"]["brick"] | without)


def test_each_seed_has_its_own_random_backbone(two_seeds):
    folder, _ = two_seeds
    parts = [json.loads((folder / f"seed_{seed}" / "part.json").read_text()) for seed in (0, 1)]
    assert [part["weights"]["seed"] for part in parts] == [0, 1]


def test_uncached_features_train_the_same(finished, tmp_path):
    _, cached = finished
    results = experiment.run(tiny(**{"train.cache": "none"}), tmp_path / "run")
    for metric in METRICS:
        tolerance = {"abs": 2e-2 if metric == "aupimo" else 1e-4}  # of few pixels
        assert results["mean"][metric] == pytest.approx(cached["mean"][metric], **tolerance)


@pytest.mark.parametrize("home", ["device", "disk"])
def test_training_does_not_depend_on_the_location_of_the_cache(finished, tmp_path, home):
    folder, in_memory = finished
    results = experiment.run(tiny(**{"train.cache": home}), tmp_path / "run")
    assert results["categories"] == in_memory["categories"]
    one, other = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (folder, tmp_path / "run")
    )
    assert [line | {"seconds": 0} for line in one] == [line | {"seconds": 0} for line in other]
    assert not (tmp_path / "run" / "features").exists()  # the room on disk is given back


def test_normal_test_images_alone_have_no_metrics(tmp_path):
    """A bare folder of photographs trains, and has no figures."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(photographs / f"{i}.jpg")
    config = tiny(**{"data.name": "folder", "data.category": None, "data.root": str(photographs)})
    results = experiment.run(config, tmp_path / "run")
    assert set(results["mean"].values()) == {None}


def test_defective_test_images_alone_have_no_image_metrics(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(5):
        for folder in ("train/good", "test/scratch"):
            (tmp_path / "photographs" / folder).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photographs" / folder / f"{i}.png")
    root = str(tmp_path / "photographs")
    fields = {"data.name": "folder", "data.category": None, "data.root": root}
    results = experiment.run(tiny(**fields, evaluate_every=1), tmp_path / "run")
    assert set(results["mean"].values()) == {None}
    assert set(results["best_on_test"]["folder"].values()) == {None}
    assert "F1" not in (tmp_path / "run" / "table.csv").read_text()


@pytest.mark.parametrize(
    ("brighter", "options"),
    [(0, {}), (60, {}), (60, {"train.cache": "none"}), (60, {"data.resize": "pad"})],
)
def test_a_shift_of_all_test_images_is_reported(tmp_path, caplog, brighter, options):
    rng = np.random.default_rng(0)
    for folder, n, offset in (("train/good", 60, 0), ("test/good", 40, brighter)):
        (tmp_path / "photographs" / folder).mkdir(parents=True)
        for i in range(n):
            tone = rng.integers(40, 120, (1, 1, 3)) + offset  # of the whole image
            pixels = (tone + rng.integers(0, 40, (32, 32, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photographs" / folder / f"{i}.png")
    root = str(tmp_path / "photographs")
    fields = {"data.name": "folder", "data.category": None, "data.root": root}
    fields |= {"backbone": "pixels", "layers": None, "image_size": (16,), "map.bank": 0}
    results = experiment.run(tiny(**fields | options), tmp_path / "run")
    shift = json.loads((tmp_path / "run" / "part.json").read_text())["shift"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert (shift["of"], shift["tested"]) == ("images", 40)
    assert results["shift"] == {"folder/0": shift}
    for text in (caplog.text, report, shift["message"] or ""):
        assert ("The new images look shifted as a whole" in text) == bool(brighter)


def test_missing_data_is_reported_before_missing_weights(tmp_path):
    config = tiny(**{"data.name": "folder", "data.category": None, "weights": "no/such/file.pth"})
    config.unlock()
    config.data.root = str(tmp_path / "missing")
    with pytest.raises(InputError, match="missing"):
        experiment.run(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("n", "part", "held"),
    [
        (10, 0.1, 1),
        (11, 0.25, 3),
        (3, 0.1, 1),
        (2, 0.5, 1),
        (1000, 0.4, 400),
        (10, 0.0, 0),
        (1, 0.1, 0),
    ],
)
def test_the_held_out_images_have_the_configured_share(n, part, held):
    train, holdout = split_holdout(n, part)
    assert len(holdout) == held
    assert sorted([*train, *holdout]) == list(range(n))
    assert split_holdout(n, part)[1].tolist() == holdout.tolist()


@pytest.mark.parametrize("period", [2, 5, 10])
def test_periodic_images_are_held_out_in_proportion(period):
    held = np.bincount(split_holdout(1000, 0.1)[1] % period, minlength=period)
    # Of 100 draws: five deviations of a binomial.
    share = 1 / period
    assert np.abs(held - 100 * share).max() < 5 * np.sqrt(100 * share * (1 - share))


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5])
def test_images_of_one_group_are_on_the_same_side(part):
    groups = [f"part {i}" for i in np.random.default_rng(0).integers(0, 30, 200)]
    train, holdout = split_holdout(200, part, groups)
    assert sorted([*train, *holdout]) == list(range(200))
    of_train, of_holdout = ({groups[i] for i in rows} for rows in (train, holdout))
    assert not of_train & of_holdout
    assert len(of_holdout) == round(part * 30)


def test_groups_of_one_image_equal_no_groups():
    alone = [str(i) for i in range(57)]
    for rows, expected in zip(split_holdout(57, 0.2, alone), split_holdout(57, 0.2), strict=True):
        np.testing.assert_array_equal(rows, expected)


def test_a_single_group_cannot_be_held_out():
    with pytest.raises(InputError, match="All training images belong to one group"):
        split_holdout(5, 0.1, ["a"] * 5)
    assert len(split_holdout(5, 0.0, ["a"] * 5)[0]) == 5


def test_held_out_images_cover_the_whole_sequence():
    held, _ = np.histogram(split_holdout(1000, 0.1)[1], bins=10, range=(0, 1000))
    assert held.tolist() == [10] * 10


def test_a_killed_run_of_several_categories_and_seeds_is_continued(
    tmp_path, killed_in_the_third_part
):
    fields = {"data.category": "gravel,brick", "seeds": 2}
    undisturbed = experiment.run(tiny(**fields), tmp_path / "one")
    assert list(undisturbed["categories"]) == ["gravel", "brick"]
    scores = {
        (seed, name): row["pixel_auroc"]
        for seed, rows in undisturbed["seeds"].items()
        for name, row in rows.items()
    }
    assert undisturbed["mean"]["pixel_auroc"] == pytest.approx(np.mean(list(scores.values())))
    by_seed = [np.mean([scores[s, name] for name in ("gravel", "brick")]) for s in ("0", "1")]
    assert undisturbed["std"]["pixel_auroc"] == pytest.approx(np.std(by_seed, ddof=1))

    with killed_in_the_third_part():
        experiment.run(tiny(**fields), tmp_path / "two")
    first = (tmp_path / "two" / "gravel" / "seed_0" / "part.json").stat().st_mtime_ns
    resumed = experiment.run(tiny(**fields), tmp_path / "two")
    assert (tmp_path / "two" / "gravel" / "seed_0" / "part.json").stat().st_mtime_ns == first
    for key in ("categories", "mean", "std", "seeds"):
        assert resumed[key] == undisturbed[key]


@pytest.mark.parametrize(
    "fields",
    [
        # Each seed draws another bank.
        {"data.category": "brick,gravel", "seeds": 3, "train.epochs": 2, "evaluate_every": 1}
        | {"map.bank": 20},
        {"detector": "vae", "seeds": 2, "vae.width": 2, "vae.latent": 4, "vae.samples": 2},
    ],
    ids=["fastflow", "vae"],
)
def test_seeds_trained_at_once_give_the_files_and_results_of_single_runs(tmp_path, fields, capsys):
    # The features are the pixels, which are the same for all seeds.
    fields |= {"backbone": "pixels", "layers": None, "weights": None, "image_size": (8,)}
    fields |= {"heatmaps": 0, "report": False}
    one = experiment.run(tiny(**fields), tmp_path / "one by one")
    other = experiment.run(tiny(**fields, **{"train.seeds_at_once": 2}), tmp_path / "at once")
    assert "train, 2 seeds" in capsys.readouterr().err
    for key in ("seeds", "mean", "std", "best_on_test"):
        assert leaves(other[key]) == pytest.approx(leaves(one[key]), abs=1e-4), key
    files, others = (
        {path.relative_to(folder) for path in folder.rglob("*") if "state" not in path.parts}
        for folder in (tmp_path / "one by one", tmp_path / "at once")
    )
    assert files == others
    for file in (tmp_path / "one by one").rglob("metrics.jsonl"):
        same = tmp_path / "at once" / file.relative_to(tmp_path / "one by one")
        lines, others = (f.read_text().splitlines() for f in (file, same))
        for line, other_line in zip(lines, others, strict=True):
            line, other_line = (json.loads(x) | {"seconds": 0} for x in (line, other_line))
            assert leaves(other_line) == pytest.approx(leaves(line), rel=1e-4, abs=1e-4)
        # Each has its share of the time, and the first what was compiled.
        took = json.loads((same.parent / "seconds.json").read_text())["train"]
        assert took > sum(json.loads(line)["seconds"] for line in others) - 0.01


def leaves(tree, path=""):
    """{"a": {"b": 1, "c": None}} -> {".a.b": 1}."""
    if not isinstance(tree, dict):
        return {} if tree is None else {path: tree}
    return {k: v for name in tree for k, v in leaves(tree[name], f"{path}.{name}").items()}


def test_settings_may_change_until_training_begins(tmp_path):
    with pytest.raises(InputError):
        experiment.run(tiny(weights="no/such/file.pth"), tmp_path / "run")
    results = experiment.run(tiny(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["weights"] == "random"
    assert results["protocol"]["weights"]["source"] == "random"


def test_changed_training_images_and_weights_are_refused(tmp_path):
    check_same_data(tmp_path, ["a.png", "b.png"], {"sha256": "12", "file": "one.pth"})
    check_same_data(tmp_path, ["a.png", "b.png"], {"sha256": "12", "file": "elsewhere.pth"})
    with pytest.raises(InputError, match="training images are not those that"):
        check_same_data(tmp_path, ["a.png"], {"sha256": "12"})
    with pytest.raises(InputError, match="backbone's weights are not those that"):
        check_same_data(tmp_path, ["a.png", "b.png"], {"sha256": "34"})
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="older version"):
        check_same_data(tmp_path / "old", ["a.png"], {"sha256": "12"})


def test_run_directories_are_utf_8_in_every_locale(tmp_path):
    code = "import pathlib, sys; from fastflow_jax.files import write_text as w; "
    code += "w(pathlib.Path(sys.argv[1]), chr(215))"
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "table.md")]
    subprocess.run(command, check=True, env=os.environ | plain)
    assert (tmp_path / "table.md").read_bytes() == "\u00d7".encode()


def test_a_workdir_among_the_images_is_refused_before_it_is_created(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    config = tiny(**{"data.name": "folder", "data.category": None, "data.root": str(tmp_path)})
    for workdir in (tmp_path, tmp_path / "run", tmp_path / "runs" / "one"):
        with pytest.raises(InputError, match=r"among the images\. Pass a --workdir elsewhere"):
            experiment.run(config, workdir)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["config.json", "part.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name):
    (tmp_path / "run" / "brick").mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / name).write_text('{"cut')
    with pytest.raises(InputError, match=rf"{name} is damaged .*new directory"):
        experiment.run(tiny(), tmp_path / "run")


@pytest.mark.parametrize("config", [None, '{"my": "project"}', "[]"])
def test_a_workdir_with_other_files_is_refused(tmp_path, config):
    mine = tmp_path / "features" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("dear to me")
    if config:
        (tmp_path / "config.json").write_text(config)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"has other files\. Pass a --workdir of its own"):
        experiment.run(tiny(), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    assert not config or (tmp_path / "config.json").read_text() == config


def test_a_run_directory_may_have_no_lock_and_hidden_files(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    assert experiment.run(tiny(), tmp_path / "copy")["mean"]
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").touch()
    with claim(tmp_path / "new", tiny()):
        assert (tmp_path / "new" / "config.json").exists()


def test_metrics_are_read_despite_a_truncated_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "lo')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"epoch": 1, "loss": 2.0}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_a_file_in_the_way_of_the_workdir_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    for workdir in (tmp_path / "run", tmp_path / "run" / "below"):
        with pytest.raises(InputError, match="a file of that name exists"):
            experiment.run(tiny(), workdir)


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("configs/folder.py", "folder-resnet18"),
        ("configs/mvtec.py:bottle,screw", "mvtec-bottle+screw-resnet18"),
        ("configs/ablations.py:tampered/elpv/mono", "ablations-tampered-elpv-mono-resnet18"),
    ],
)
def test_the_default_workdir_has_the_name_of_the_experiment(file, folder):
    c = default()
    c.backbone = "resnet18"
    assert experiment.default_workdir(file, c) == pathlib.Path("runs") / folder


def test_one_model_of_all_categories_is_continued_and_loaded(tmp_path, killed_in_the_third_part):
    c = tiny(**{"one_model": True, "data.category": "brick,gravel,grass"})
    with killed_in_the_third_part():
        experiment.run(c, tmp_path / "run")
    results = experiment.run(c, tmp_path / "run")
    assert list(results["categories"]) == ["brick", "gravel", "grass"]
    shares = results["products"]
    assert list(shares) == ["brick", "gravel", "grass"]
    for share in shares.values():
        assert sum(share.values()) == pytest.approx(1)
        assert share["recognised"] > 0.5  # features of random weights
    model = Products.load(tmp_path / "run")
    image = data.opener(c.data)("grass").test[0].image
    scores = {name: model.predict(image, product=name).score for name in shares}
    assert min(scores, key=scores.__getitem__) == "grass"
    assert experiment.run(c, tmp_path / "run") == results
    undisturbed = experiment.run(c, tmp_path / "other")
    assert undisturbed["categories"] == results["categories"]


def test_one_model_finds_the_products_of_a_directory(tmp_path):
    rng = np.random.default_rng(0)
    colours = {"red": (180, 60, 60), "blue": (60, 60, 180)}
    for part, n in (("train/good", 20), ("test/good", 3), ("test/hole", 3)):
        for name, colour in colours.items():
            for i in range(n):
                image = np.array(colour) + rng.integers(-10, 10, (16, 16, 3))
                image[4:9, 4:9] = 0 if part.endswith("hole") else image[4:9, 4:9]
                file = tmp_path / "mixed" / part / f"{name}_{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.astype(np.uint8)).save(file)
    c = default()
    c.update(recipe("knn"))
    c.backbone, c.image_size, c.one_model = "pixels", (16,), True
    c.data.root, c.heatmaps, c.report = str(tmp_path / "mixed"), 0, False
    results = experiment.run(fill(c), tmp_path / "run")
    assert list(results["categories"]) == ["product_1", "product_2"]
    assert results["mean"]["image_auroc"] == 1
    assert results["products"]["product_1"] == {"recognised": 1, "confused": 0, "unknown": 0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.category": "brick,gravel", "seeds": 2}, "needs config.seeds=1"),
        ({"data.category": "brick,gravel", "evaluate_every": 1}, "needs config.evaluate_every=0"),
    ],
)
def test_one_model_refuses_what_it_cannot_do(fields, message):
    with pytest.raises(InputError, match=message):
        tiny(one_model=True, **fields)
