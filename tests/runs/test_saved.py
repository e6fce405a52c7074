"""Weight files that have moved since a detector was trained with them."""

import hashlib
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.backbones import find_spec, porting
from fastflow_jax.config import default, fill
from fastflow_jax.errors import InputError
from fastflow_jax.predict import predict
from fastflow_jax.runs import durable, experiment

REPOSITORY = pathlib.Path(__file__).parents[2]
IMAGES = np.random.default_rng(0).integers(118, 138, (8, 32, 32, 3), np.uint8)


def write_weights(file, seed=0):
    """Writes a weight file for the first map of a ResNet18."""
    rng = np.random.default_rng(seed)
    spec = find_spec("resnet18")
    slots = porting.slots(spec.module(("layer1",)), spec.image_size)
    np.savez(
        file, **{name: 0.1 * rng.random(s.timm_shape, np.float32) for name, s in slots.items()}
    )


@pytest.fixture(scope="module")
def config():
    c = default()
    c.backbone, c.layers, c.image_size = "resnet18", ("layer1",), (32,)
    c.flow.steps, c.flow.hidden_ratio, c.map.bank = 1, 0.5, 20
    c.train.epochs, c.train.batch_size, c.data.holdout, c.batch_size = 1, 8, 0.25, 8
    return c


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A directory with a run, and with its weight file."""
    folder = tmp_path_factory.mktemp("trained")
    write_weights(folder / "mine.npz")
    config.weights = str(folder / "mine.npz")
    Detector.fit(IMAGES, config=config, workdir=folder / "run")
    return folder


@pytest.fixture
def moved(trained, tmp_path):
    """A copy of the run, in a directory of its own; the recorded weight file does not exist."""
    shutil.copytree(trained / "run", tmp_path / "copied/run")
    about = tmp_path / "copied/run/detector.json"
    text = about.read_text().replace(str(trained), "/no/such/folder")
    about.write_text(text)
    return tmp_path / "copied/run"


def score(detector):
    return detector.predict(IMAGES[0]).score


def test_a_moved_weight_file_can_be_passed(trained, moved, tmp_path, monkeypatch):
    shutil.copy(trained / "mine.npz", tmp_path / "renamed.bin")
    expected = score(Detector.load(trained / "run"))
    detector = Detector.load(moved, weights=tmp_path / "renamed.bin")
    assert score(detector) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert score(Detector.load(moved, weights="~/renamed.bin")) == expected
    detector.save(tmp_path / "saved")
    assert score(Detector.load(tmp_path / "saved")) == expected


@pytest.mark.parametrize("place", ["copied/run", "copied"])
def test_a_weight_file_is_found_in_and_next_to_the_run(place, trained, moved, tmp_path):
    shutil.copy(trained / "mine.npz", tmp_path / place)
    assert score(Detector.load(moved)) == score(Detector.load(trained / "run"))


def test_a_weight_file_is_found_next_to_a_run_of_several_trainings(config, tmp_path):
    (tmp_path / "images").mkdir()
    for i, image in enumerate(IMAGES):
        Image.fromarray(image).save(tmp_path / f"images/{i}.png")
    (tmp_path / "here").mkdir()
    write_weights(tmp_path / "mine.npz")
    changes = {"data.name": "folder", "data.root": str(tmp_path / "images"), "seeds": 2}
    several = config.copy_and_resolve_references()
    several.update_from_flattened_dict(changes | {"weights": str(tmp_path / "mine.npz")})
    experiment.run(fill(several), tmp_path / "here/run")
    expected = score(Detector.load(tmp_path / "here/run/seed_1"))
    for place in ("here/run/seed_1", "here/run", "here"):
        (tmp_path / "mine.npz").rename(tmp_path / place / "mine.npz")
        assert score(Detector.load(tmp_path / "here/run/seed_1")) == expected
        (tmp_path / place / "mine.npz").rename(tmp_path / "mine.npz")


def test_a_missing_weight_file_is_named_with_remedies(moved):
    # A file of the name with another content does not count.
    write_weights(moved / "mine.npz", seed=1)
    with pytest.raises(InputError) as error:
        Detector.load(moved)
    assert str(error.value) == (
        f"{moved} was trained with the weight file /no/such/folder/mine.npz, which does not exist. "
        f"Put it there or into {moved}, or pass its path: --weights=FILE of a command, or "
        "Detector.load(folder, weights=FILE)."
    )


def test_a_weight_file_with_another_hash_is_refused(trained, moved, tmp_path):
    write_weights(tmp_path / "other.npz", seed=1)
    other, right = (
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (tmp_path / "other.npz", trained / "mine.npz")
    )
    for folder in (moved, trained / "run"):
        with pytest.raises(InputError, match=f"its sha256 is {other}, not {right}"):
            Detector.load(folder, weights=tmp_path / "other.npz")
    for path in ("nosuch.npz", tmp_path):
        with pytest.raises(InputError, match=r"is not a file\. Pass the weight file"):
            Detector.load(moved, weights=path)


def test_a_weight_file_for_a_backbone_without_weights_is_refused(trained, tmp_path):
    c = default()
    c.backbone, c.image_size = "pixels", (16,)
    c.train.epochs, c.train.batch_size, c.data.holdout = 1, 8, 0
    folder = Detector.fit(IMAGES, config=c, workdir=tmp_path / "run").folder
    with pytest.raises(InputError, match=r"without a weight file\. Leave weights out"):
        Detector.load(folder, weights=trained / "mine.npz")


def test_predict_takes_a_weight_file(trained, moved, tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    image, output = str(tmp_path / "a.png"), tmp_path / "out"
    with pytest.raises(InputError, match="--weights=FILE of a command"):
        predict(moved, image, output)
    assert not output.exists()
    predict(moved, image, output, weights=trained / "mine.npz", heatmaps=False)
    line = json.loads((output / "predictions.jsonl").read_text())
    assert line["score"] == score(Detector.load(trained / "run"))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_weights_flag_of_predict(trained, moved, tmp_path, started, monkeypatch):
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    arguments = [f"--workdir={moved}", f"--input={tmp_path}/a.png", f"--output={tmp_path}/out"]
    arguments += ["--mode=predict", "--noheatmaps"]
    assert started(arguments) == 2
    assert started([*arguments, f"--weights={trained}/mine.npz"]) in (0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode=predict", "--config.weights=a.npz"], "For predictions, pass --weights=FILE"),
        (
            ["--mode=predict", "--config=configs/demo.py", "--config.weights=a.npz"],
            "pass a weight file that has moved as --weights=FILE",
        ),
        (["--config=configs/demo.py", "--weights=a.npz"], "Pass --config.weights=FILE instead"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_weights_flags_of_the_wrong_mode_are_refused(
    arguments, message, started, capsys, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    assert started(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda about: about["thresholds"]["image"].update(invented=1),
            "written by another version",
        ),
        (
            lambda about: about["thresholds"]["image"].update(value=None),
            "written by another version",
        ),
        (lambda about: about["thresholds"]["image"].pop("interval"), "written by another version"),
        (lambda about: about["config"].update(detector="oracle"), "not 'oracle'"),
    ],
)
def test_load_refuses_a_record_of_another_version(trained, tmp_path, change, message):
    shutil.copytree(trained / "run", tmp_path / "run")
    file = tmp_path / "run/detector.json"
    about = json.loads(file.read_text())
    change(about)
    file.write_text(json.dumps(about))
    with pytest.raises(InputError, match=message):
        Detector.load(tmp_path / "run", weights=trained / "mine.npz")


def test_a_run_of_an_earlier_version_loads_with_equal_scores(tmp_path):
    goldens = pathlib.Path(__file__).parents[1] / "goldens"
    shutil.copytree(goldens / "run", tmp_path / "run")
    images = np.random.default_rng(1).integers(118, 138, (6, 20, 30, 3), np.uint8)
    images[1::2, 6:16, 12:24] = (250, 20, 20)
    results = Detector.load(tmp_path / "run").predict(list(images))
    expected = json.loads((goldens / "run_scores.json").read_text())
    for result, known in zip(results, expected, strict=True):
        assert result.score == pytest.approx(known["score"], rel=1e-4)
        assert result.anomaly_map.mean() == pytest.approx(known["map_mean"], rel=1e-4, abs=1e-3)
        assert (result.p_value, result.is_anomalous) == (known["p_value"], known["is_anomalous"])
        assert result.distance is None


@pytest.fixture
def without_file(trained):
    """The weight file of the training is not in its place."""
    (trained / "mine.npz").rename(trained / "away")
    yield trained / "away"
    (trained / "away").rename(trained / "mine.npz")


@pytest.mark.parametrize("name", ["saved", "saved.zip"])
def test_a_saved_detector_contains_the_weights_of_its_backbone(name, trained, moved, tmp_path):
    shutil.copy(trained / "mine.npz", tmp_path / "copy.npz")
    detector = Detector.load(moved, weights=tmp_path / "copy.npz")
    (tmp_path / "copy.npz").unlink()
    for number in range(2):  # also when it is saved once more
        detector = Detector.load(detector.save(tmp_path / f"{number}_{name}"))
    assert score(detector) == score(Detector.load(trained / "run"))
    again = Detector.load(tmp_path / f"0_{name}", weights=trained / "mine.npz")
    assert score(again) == score(detector)


def test_weights_are_saved_on_request_or_if_they_are_small(
    trained, without_file, tmp_path, monkeypatch, caplog
):
    detector = Detector.load(trained / "run", weights=without_file)
    weights = [tmp_path / name / "backbone.safetensors" for name in ("no", "large", "yes", "small")]
    detector.save(tmp_path / "no", backbone=False)
    detector.save(tmp_path / "small")
    assert not caplog.records
    monkeypatch.setattr(durable, "_SMALL", 1000)
    detector.save(tmp_path / "large")
    assert re.search("does not contain the weights .*backbone=True", caplog.text)
    detector.save(tmp_path / "yes", backbone=True)
    assert [file.exists() for file in weights] == [False, False, True, True]
    assert score(Detector.load(tmp_path / "no")) == score(detector)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "no", tmp_path / "elsewhere/no")
    about = tmp_path / "elsewhere/no/detector.json"
    about.write_text(about.read_text().replace(str(without_file), "/no/such/folder/mine.npz"))
    with pytest.raises(InputError, match=r"/no/such/folder/mine\.npz, which does not exist"):
        Detector.load(tmp_path / "elsewhere/no")
    shutil.copy(without_file, tmp_path / "elsewhere/mine.npz")
    assert score(Detector.load(tmp_path / "elsewhere/no")) == score(detector)
