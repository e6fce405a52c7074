"""The detector that is chosen for few images."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

import fastflow_jax.detector.detector
from fastflow_jax import Detector, data
from fastflow_jax.config import AUTO, default, fill
from fastflow_jax.data.arrays import as_dataset
from fastflow_jax.errors import InputError
from fastflow_jax.runs import few_images


def images(n, seed=0):
    return np.random.default_rng(seed).integers(118, 138, (n, 20, 30, 3), np.uint8)


def automatic(**fields):
    c = default()
    c.detector, c.backbone, c.image_size = AUTO, "pixels", (16,)
    c.update_from_flattened_dict(fields)
    return c


@pytest.fixture
def folder(tmp_path):
    good = tmp_path / "photos/train/good"
    good.mkdir(parents=True)
    for i, image in enumerate(images(5)):
        Image.fromarray(image).save(good / f"{i}.png")
    return tmp_path / "photos"


def test_the_number_of_images_decides():
    def chosen(n):
        c = few_images.resolve(automatic(), as_dataset(images(n)))
        return c.detector, c.data.holdout, c.data.folds

    assert chosen(few_images.ENOUGH - 1) == ("knn", 0, 16)
    assert chosen(few_images.ENOUGH) == ("fastflow", 0, 5)
    assert chosen(few_images.ENOUGH_TO_HOLD_OUT - 1) == ("fastflow", 0, 5)
    dataset = as_dataset(images(few_images.ENOUGH_TO_HOLD_OUT))
    enough, expected = fill(few_images.resolve(automatic(), dataset)), automatic()
    expected.detector = "fastflow"
    assert enough == fill(expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"data.holdout": 0.3},
        {"data.holdout": 0.0, "data.folds": 4},
        {"data.tile": 8},
        {"train.cache": "none"},
        {"augment.rotate": 10.0},
        {"one_model": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("n", [few_images.ENOUGH - 1, few_images.ENOUGH])
def test_images_are_held_out_as_configured(fields, n):
    given = automatic(**fields)
    chosen = few_images.resolve(given, as_dataset(images(n)))
    assert (chosen.data.holdout, chosen.data.folds) == (given.data.holdout, given.data.folds)


def test_a_flow_of_few_images_is_cross_fitted(caplog):
    config = automatic(**{"flow.steps": 1, "train.steps": 4, "map.bank": 50})
    with caplog.at_level("INFO", "fastflow_jax"):
        detector = Detector.fit(images(few_images.ENOUGH + 4), config=config)
    assert any("20 normal images: the detector is FastFlow, and none" in m for m in caplog.messages)
    assert (detector.config.detector, detector.held_out.n_parts) == ("fastflow", 20)
    assert detector.image_threshold.rate == 0.05
    bad = images(1, seed=9)[0]
    bad[6:16, 12:24] = (250, 20, 20)
    assert detector.predict(bad).is_anomalous
    taught = detector.update(images(4, seed=3))
    assert taught.predict(bad).is_anomalous


def test_a_named_detector_is_kept():
    config = automatic(detector="gaussian")
    assert few_images.resolve(config, as_dataset(images(2))) is config


def test_calibration_images_replace_cross_fitting():
    dataset = as_dataset(images(4))
    dataset = data.Dataset("images", dataset.train, None, {}, as_dataset(images(9, 1)).train)
    chosen = few_images.resolve(automatic(), dataset)
    assert (chosen.detector, chosen.data.folds) == ("knn", 0)


def test_folds_are_refused_with_calibration_images():
    config = automatic(detector="knn", **{"data.folds": 4, "data.holdout": 0.0})
    with pytest.raises(InputError, match=r"config.data.folds is 4, but there are calibration"):
        Detector.fit(images(4), config=config, calibrate=images(5, 1))


def test_a_data_set_of_several_categories_has_a_flow():
    chosen = few_images.resolve(automatic(**{"data.name": "synthetic"}))
    assert chosen.detector == "fastflow"


@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_the_threshold_is_that_of_the_number_of_images(n, caplog):
    detector = Detector.fit(images(n), config=automatic())
    (message,) = (m for m in caplog.messages if m.startswith(f"Only {n} normal image"))
    if n < 4:
        assert detector.image_threshold is None
        assert "There is no threshold: 4 images support a false-alarm rate of 20%." in message
    else:
        assert detector.image_threshold.rate == pytest.approx(1 / (n + 1))
        assert f"a false-alarm rate of {1 / (n + 1):.1%}" in message
        assert detector.image_threshold.value > detector.held_out.scores.max()
    result = detector.predict(images(1, seed=9)[0])
    assert (result.is_anomalous is None) == (n < 4)
    assert (result.p_value is None) == (n < 2)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_directory_and_its_defects(folder, started, capsys):
    (folder / "test/spot").mkdir(parents=True)
    bad = images(1, seed=9)[0]
    bad[6:16, 12:24] = (250, 20, 20)
    Image.fromarray(bad).save(folder / "test/spot/0.png")
    words = ["--config=configs/folder.py", f"--config.data.root={folder}"]
    words += [
        "--config.backbone=pixels",
        "--config.image_size=16",
        f"--workdir={folder.parent}/run",
    ]
    assert started(words) == 0
    log = capsys.readouterr().err
    assert "Only 5 normal images: the detector is k-NN" in log
    assert "The threshold comes from 5 training images: false-alarm rate 16.7%" in log
    detector = Detector.load(folder.parent / "run")
    assert detector.config.detector == "knn"
    assert detector.predict(bad).is_anomalous
    assert started(words) == 0  # the run is finished


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_a_field_of_the_flow_is_refused(folder, started, capsys):
    words = ["--config=configs/folder.py", f"--config.data.root={folder}"]
    assert started([*words, "--config.flow.steps=2", f"--workdir={folder.parent}/run"]) == 2
    assert "config.flow.steps has no effect on knn" in capsys.readouterr().err


def test_an_empty_directory_is_named(tmp_path):
    with pytest.raises(InputError, match="no images"):
        few_images.resolve(automatic(**{"data.root": str(tmp_path)}))


def test_folds_and_held_out_images_exclude_each_other():
    with pytest.raises(InputError, match=r"config.data.folds is 4 and config.data.holdout is 0.1"):
        fill(automatic(**{"data.folds": 4}))
    with pytest.raises(InputError, match=r"config.data.folds is 1"):
        fill(automatic(**{"data.folds": 1, "data.holdout": 0.0}))


@pytest.mark.parametrize("page", ["few_images", "labelled_defects"])
def test_the_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    for name, n, seed in (("first_eight", 8, 0), ("train/good", 12, 1), ("found_defects", 5, 2)):
        folder = tmp_path / "photos/screws" / name
        folder.mkdir(parents=True)
        for i, image in enumerate(images(n, seed)):
            Image.fromarray(image).save(folder / f"{i}.png")
    (tmp_path / "photos/new").mkdir()
    Image.fromarray(images(1, 3)[0]).save(tmp_path / "photos/new/017.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastflow_jax.detector.detector, "default", automatic)
    text = (pathlib.Path(__file__).parents[2] / f"docs/{page}.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(code, names)
    detector = names["detector"]
    assert detector.config.detector == "knn"
    if page == "few_images":
        assert detector.image_threshold.rate == pytest.approx(1 / 9)
