"""The benchmark of several sets: resumption, the table, variants of detectors, messages."""

import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.base import recipe
from fastflow_jax.runs import experiment

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import many_sets
import tables

FIELDS = ["weights=random", "image_size=(32,)", "layers=('blocks.1',)"]


def write_set(folder, seed, masks=True):
    """A data set of 12 noisy images, and 5 normal and 6 spotted ones to test."""
    rng = np.random.default_rng(seed)

    def save(pixels, *place):
        file = folder.joinpath(*place)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)

    for i in range(23):
        image, mask = rng.integers(90, 150, (40, 40, 3)), np.zeros((40, 40))
        if i >= 17:
            y, x = rng.integers(0, 30, 2)
            mask[y : y + 8, x : x + 6] = 255
            image[mask > 0] += int(rng.integers(20, 90))
            if masks:
                save(mask, "ground_truth", "spot", f"{i}_mask.png")
        place = ("train", "good") if i < 12 else ("test", "good" if i < 17 else "spot")
        save(image, *place, f"{i}.png")
    return str(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [write_set(folder / "nuts", 0), write_set(folder / "bolts", 1, masks=False)]


def start(out, sets, *detectors, seeds=1, fields=FIELDS):
    arguments = ["--detectors", *detectors, "--seeds", str(seeds)]
    arguments += ["--sets", *sets] if sets else []
    return many_sets.main([*arguments, "--fields", *fields, "--resamples", "200", "--out", out])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, sets):
    """The file of a pass of two detectors with two seeds."""
    out = tmp_path_factory.mktemp("out") / "many.json"
    assert start(str(out), sets, "gaussian", "fine=gaussian:map.sigma=1.0", seeds=2) == 0
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the file and its counts."""
    for file in (finished, *finished.with_suffix(".counts").iterdir()):
        target = tmp_path / file.relative_to(finished.parent)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(file.read_bytes())
    return tmp_path / finished.name


@pytest.fixture
def trained(monkeypatch):
    """Labels and seeds of the trainings of a test."""
    calls, train = [], many_sets.train

    def record(config, seed, prepare, label):
        calls.append((label, seed))
        return train(config, seed, prepare, label)

    monkeypatch.setattr(many_sets, "train", record)
    return calls


def test_figures_equal_those_of_a_run(finished, sets, tmp_path):
    content = json.loads(finished.read_text())
    entries = {(e["set"], e["detector"], e["seed"]): e for e in content["trainings"]}
    assert len(entries) == 8
    c = default()
    c.update(recipe("gaussian") | {"layers_as": "fastflow", "weights": "random"})
    c.image_size, c.layers, c.seed, c.map.sigma = (32,), ("blocks.1",), 1, 1.0
    c.data.root, c.report = sets[0], False
    entry = entries["nuts", "fine", 1]
    whole = experiment.run(fill(c), tmp_path)["mean"]
    assert entry["figures"] == whole | {"seg_f1": None}  # without the threshold of held-out images
    assert entry["images"] == {"training": 12, "normal": 5, "defective": 6}
    assert entry["fit_seconds"] > 0
    assert entry["score_ms"] > 0
    assert entries["bolts", "fine", 1]["figures"]["pixel_auroc"] is None


def test_the_table_has_sets_means_and_ranks(finished):
    content = json.loads(finished.read_text())
    rows = {row["name"]: row for row in content["rows"]}

    def figure(name, detector, seed):
        keys = {"set": name, "detector": detector, "seed": seed}
        (entry,) = (e for e in content["trainings"] if e.items() >= keys.items())
        return entry["figures"]["image_auroc"]

    for detector in ("gaussian", "fine"):
        nuts, bolts = (
            np.array([figure(name, detector, seed) for seed in (0, 1)])
            for name in ("nuts", "bolts")
        )
        for title, values in (("nuts", nuts), ("mean", (nuts + bolts) / 2)):
            cell = rows[f"{title}: image AUROC"][detector]
            assert cell == pytest.approx([values.mean(), values.std(ddof=1)], abs=1e-4)
    assert sum(rows["mean rank: image AUROC"][d] for d in ("gaussian", "fine")) == 3
    assert "nuts: AUPRO .05" in rows
    assert not any(name.startswith(("bolts: pixel", "mean: pixel")) for name in rows)


def test_the_file_is_a_table_and_names_no_directory(finished):
    content = json.loads(finished.read_text())
    assert all(content[field] for field in tables.PROVENANCE)
    assert "--sets nuts bolts" in content["command"]
    assert str(finished.parents[1]) not in finished.read_text()
    text = tables.render("many", content | {"page": "docs/recipe.md"})
    assert "|  | gaussian | fine |" in text
    assert "| nuts: AUPRO .05 | ." in text


def test_differences_of_pairs_are_those_of_the_means(finished, capsys, sets):
    assert start(str(finished), sets, "gaussian", "fine=gaussian:map.sigma=1.0", seeds=2) == 0
    (pair,) = json.loads(finished.read_text())["pairs"]
    rows = {row["name"]: row for row in json.loads(finished.read_text())["rows"]}
    for metric, title in (("image_auroc", "mean: image AUROC"), ("aupro", "nuts: AUPRO")):
        step, low, high = pair[metric]
        assert step == pytest.approx(rows[title]["gaussian"][0] - rows[title]["fine"][0], abs=2e-4)
        assert low <= step <= high
    assert "| gaussian - fine | " in capsys.readouterr().out


def test_a_finished_pass_is_not_repeated_and_a_larger_one_is_continued(copy, trained, sets):
    before = json.loads(copy.read_text())
    assert start(str(copy), sets, "gaussian", "fine=gaussian:map.sigma=1.0", seeds=2) == 0
    assert trained == []
    assert json.loads(copy.read_text()) == before
    assert start(str(copy), sets[:1], "gaussian", "fine=gaussian:map.sigma=2.0", seeds=2) == 0
    assert trained == [("nuts, fine", 0), ("nuts, fine", 1)]
    after = json.loads(copy.read_text())
    assert len(after["trainings"]) == 8
    assert "--sets nuts" in after["command"]


@pytest.mark.parametrize("signal", [KeyboardInterrupt(), many_sets.Interrupted(15, "at epoch 1")])
def test_an_interrupted_pass_keeps_what_is_done(copy, sets, monkeypatch, signal, capsys):
    content = json.loads(copy.read_text())
    content["trainings"] = content["trainings"][:2]
    copy.write_text(json.dumps(content))
    train, calls = many_sets.train, []

    def interrupt(config, seed, prepare, label):
        if len(calls) == 2:
            raise signal
        calls.append(label)
        return train(config, seed, prepare, label)

    detectors = "gaussian", "fine=gaussian:map.sigma=1.0"
    with monkeypatch.context() as patch:
        patch.setattr(many_sets, "train", interrupt)
        assert start(str(copy), sets, *detectors, seeds=2) in (130, 143)
    assert "continues with the next training" in capsys.readouterr().err
    assert len(json.loads(copy.read_text())["trainings"]) == 4
    monkeypatch.setattr(many_sets, "train", lambda *_: calls.append(train(*_)) or calls[-1])
    assert start(str(copy), sets, *detectors, seeds=2) == 0
    assert len(calls) == 2 + 4


@pytest.mark.parametrize(
    ("detectors", "message"),
    [
        (["knnn"], "the detector is 'knnn'. Choose one of fastflow, knn"),
        (["a=knn:knn.avrage=True"], "knn.avrage is not a field of the configuration. Did you mean"),
        (["a=knn:map.bank=0"], "map.bank has no effect on knn"),
        (["a=knn:map.sigma=blue"], "map.sigma cannot be 'blue'. Pass a value"),
        (["a=knn:map.sigma"], "map.sigma has no value. Pass FIELD=VALUE"),
        (["knn:map.sigma=1"], "knn:map.sigma=1 is not a detector. Pass a name"),
        (["knn", "knn"], "Two of knn, knn have one name. Pass NAME=DETECTOR."),
    ],
)
def test_an_unusable_detector_gives_one_message(tmp_path, sets, detectors, message, capsys):
    assert start(str(tmp_path / "out.json"), sets, *detectors) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nowhere"], "nowhere is neither a directory nor a data set"),
        (["elpv/duo"], "duo"),
        ([], "There are no sets. Pass --sets or --archives."),
    ],
)
def test_an_unusable_set_gives_one_message(tmp_path, given, message, capsys):
    assert start(str(tmp_path / "out.json"), given, "knn") == 2
    assert message in capsys.readouterr().err


def test_sets_of_one_name_are_refused(tmp_path, sets):
    twin = write_set(tmp_path / "nuts", 2)
    with pytest.raises(many_sets.InputError, match="Two sets are named nuts"):
        many_sets.find_sets([*sets, twin])


def test_a_data_set_without_a_category_is_all_of_its_categories():
    assert list(many_sets.find_sets(["elpv"])) == ["elpv/mono", "elpv/poly"]
    (fields,) = many_sets.find_sets(["elpv/poly"]).values()
    assert fields == {"data.name": "elpv", "data.category": "poly"}


def test_all_detectors_use_the_feature_maps_of_fastflow():
    layers = {many_sets.configuration(d, {}).layers for d in ("fastflow", "patchcore", "spade")}
    assert layers == {fill(default()).layers}


def test_values_with_commas_belong_to_one_field():
    text = "mine=fastflow:layers=('a','b'),map.bank=0,backbone=resnet18"
    fields = {"layers": ("a", "b"), "map.bank": 0, "backbone": "resnet18"}
    assert many_sets.parse_detector(text) == ("mine", "fastflow", fields)
    assert many_sets.parse_detector("knn") == ("knn", "knn", {})


PROGRAM = """
import pathlib, sys
for name in sys.argv[2:]:
    folder = pathlib.Path(sys.argv[1], name)
    folder.mkdir()
    (folder / "made").touch()
"""


def test_sets_in_archives_are_prepared_once(tmp_path):
    (tmp_path / "cookie").mkdir()
    (tmp_path / "prepare.py").write_text(PROGRAM)
    folders = many_sets.unpack(tmp_path, tmp_path)
    assert [pathlib.Path(folder).name for folder in folders] == list(many_sets.ARCHIVES)
    made = {file.parent.name for file in tmp_path.glob("*/made")}
    assert made == {*many_sets.ARCHIVES} - {"cookie"}
    (tmp_path / "prepare.py").unlink()
    assert many_sets.unpack(tmp_path, tmp_path) == folders
    with pytest.raises(many_sets.InputError, match=r"cannot prepare capsule. Check --archives"):
        many_sets.unpack(tmp_path, tmp_path / "other")


def test_sets_are_named_on_which_the_first_detector_is_behind():
    noise = np.random.default_rng(0).normal(0, 1, 200)
    found = {}
    # (name, difference of the image AUROC, its deviation)
    for name, step, spread in (
        ("far", 0.04, 0.005),
        ("near", 0.004, 0.001),
        ("vague", 0.015, 0.02),
    ):
        found[name, "flow"] = {m: np.full(200, 0.8) for m in ("image_auroc", "pixel_auroc")}
        ahead = np.append(0.8 + step, 0.8 + step + spread * noise[1:])
        found[name, "knn"] = {"image_auroc": ahead, "pixel_auroc": np.full(200, 0.806)}
    rows = many_sets.behind_of(found, ["far", "near", "vague"], ["flow", "knn"])
    assert [(row["set"], row["metric"]) for row in rows] == [
        ("far", "image_auroc"),
        *((name, "pixel_auroc") for name in ("far", "near", "vague")),
    ]
    step, low, high = rows[0]["difference"]
    assert step == -0.04
    assert (low, high) == pytest.approx((-0.05, -0.03), abs=0.002)
