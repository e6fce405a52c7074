"""One model of several products: fit, recognition, thresholds, saving and loading, prediction."""

import csv
import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

import fastflow_jax
from fastflow_jax import Detector
from fastflow_jax.config import default, fill
from fastflow_jax.detector import Products
from fastflow_jax.detectors.base import recipe
from fastflow_jax.errors import InputError

COLOURS = {"red": (180, 60, 60), "green": (60, 180, 60), "blue": (60, 60, 180)}


def tiny(kind="fastflow", **fields):
    """A configuration that trains in seconds, on pixels."""
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size, c.batch_size, c.data.holdout = "pixels", (16,), 8, 0.25
    if kind == "fastflow":
        c.flow.steps, c.flow.hidden_ratio, c.train.epochs, c.map.bank = 1, 2.0, 2, 200
    c.update_from_flattened_dict(fields)
    return c


def photographs(colour, n=16, seed=0):
    """Evenly coloured images with a little noise, uint8 [n, 20, 30, 3]."""
    noise = np.random.default_rng(seed).integers(-10, 10, (n, 20, 30, 3))
    return (np.array(COLOURS.get(colour, (230, 230, 230))) + noise).astype(np.uint8)


def spoilt(colour):
    image = photographs(colour, 1, seed=9)[0]
    image[6:12, 12:20] = 255 - image[6:12, 12:20]
    return image


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run directory of one model of two products; tests change copies."""
    folder = tmp_path_factory.mktemp("products") / "run"
    images = {name: photographs(name) for name in ("red", "green")}
    Detector.fit(images, config=tiny(), workdir=folder)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return Products.load(run)


def test_each_image_is_scored_by_the_detector_of_its_product(model):
    images = [spoilt("green"), *photographs("red", 3, seed=5), *photographs("green", 3, seed=6)]
    results = model.predict(images)
    assert [r.product for r in results] == ["green"] + ["red"] * 3 + ["green"] * 3
    assert all(r.is_known for r in results)
    bad, *good = results
    assert bad.is_anomalous
    assert bad.score > max(r.score for r in good)
    for name, own in (("green", [0, 4, 5, 6]), ("red", [1, 2, 3])):
        alone = model.detectors[name].predict([images[i] for i in own])
        for i, one in zip(own, alone, strict=True):
            assert results[i].score == pytest.approx(one.score, abs=0.05)
            assert results[i].p_value == one.p_value
            # Features are rounded to 16 bits between the two programs.
            np.testing.assert_allclose(results[i].anomaly_map, one.anomaly_map, atol=0.05)


def test_an_image_of_another_product_is_reported(model):
    unknown, known = model.predict([photographs("white", 1)[0], photographs("red", 1, seed=3)[0]])
    assert (unknown.is_known, known.is_known) == (False, True)


def test_a_given_product_is_not_recognised_again(model):
    image = photographs("red", 1, seed=3)[0]
    given = model.predict(image, product="green")
    assert given.product is None
    assert given.is_anomalous
    with pytest.raises(InputError, match=r"'pink' is unknown. Choose one of red, green"):
        model.predict(image, product="pink")


def test_tiles_need_the_name_of_the_product(model):
    with pytest.raises(InputError, match="Name the product"):
        model.predict(spoilt("red"), tile=True)
    model.predict(spoilt("red"), product="red", tile=True)


def test_products_share_the_parameters_of_the_flow_but_not_its_results(model):
    red, green = model.detectors.values()
    one, other = red.scorer.state_dict(), green.scorer.state_dict()
    shared = [name for name in one if name.startswith("params/")]
    assert shared
    for name in shared:
        np.testing.assert_array_equal(one[name], other[name])
    features = red.features(photographs("red", 1))
    assert np.abs(red.latents(features)[0] - green.latents(features)[0]).max() > 0.1
    (back,) = red.invert(red.latents(features))
    np.testing.assert_allclose(back, features[0], atol=0.01)


def test_latents_count_for_products_with_many_images_only():
    images = {"red": photographs("red", 80), "green": photographs("green", 12)}
    model = Detector.fit(images, config=tiny())
    weights = {n: d.scorer.calibration.weight.tolist() for n, d in model.detectors.items()}
    assert weights == {"red": [0, 1, 1], "green": [0, 1, 0]}


def test_steps_of_the_shared_training_grow_with_the_root_of_the_products(run):
    about = json.loads((run / "product_0/detector.json").read_text())
    assert about["config"]["train"]["steps"] == round(2**0.5 * default().train.steps)


def test_a_saved_model_predicts_the_same_and_stores_shared_arrays_once(model, tmp_path):
    images = [spoilt("green"), *photographs("red", 2, seed=5)]
    loaded = Products.load(model.save(tmp_path / "saved"))
    copied = pickle.loads(pickle.dumps(model))
    for other in (loaded, copied):
        for one, two in zip(model.predict(images), other.predict(images), strict=True):
            assert (one.product, one.p_value) == (two.product, two.p_value)
            assert one.score == pytest.approx(two.score, rel=1e-4, abs=1e-4)
    sizes = [(tmp_path / f"saved/product_{i}/scorer.safetensors").stat().st_size for i in range(2)]
    params = model.detectors["red"].scorer.state_dict()
    assert sizes[0] - sizes[1] >= sum(a.nbytes for n, a in params.items() if n[:6] == "params")
    with pytest.raises(InputError, match="exists"):
        model.save(tmp_path / "saved")


def test_a_finished_run_is_loaded_and_an_interrupted_one_is_continued(run, tmp_path, monkeypatch):
    images = {name: photographs(name) for name in ("red", "green")}
    again = Detector.fit(images, config=tiny(), workdir=run)
    assert isinstance(again, Products)
    broken = shutil.copytree(run, tmp_path / "run")
    (broken / "products.json").unlink()
    (broken / "product_1/detector.json").unlink()
    continued = Detector.fit(images, config=tiny(), workdir=broken)
    image = spoilt("green")
    assert continued.predict(image).score == pytest.approx(again.predict(image).score, rel=1e-4)
    others = {name: photographs(name, seed=1) for name in ("red", "green")}
    with pytest.raises(InputError, match="training images are not those"):
        Detector.fit(others, config=tiny(), workdir=run)


@pytest.mark.parametrize("kind", ["knn", "patchcore"])
def test_detectors_without_a_flow_share_the_backbone(kind):
    images = {name: photographs(name) for name in COLOURS}
    model = Detector.fit(images, config=tiny(kind))
    results = model.predict([spoilt(name) for name in COLOURS])
    assert [r.product for r in results] == [*COLOURS]
    assert all(r.is_anomalous for r in results)


def test_products_of_mixed_images_are_found():
    mixed = np.concatenate([photographs("red"), photographs("green"), photographs("blue")])
    c = tiny("knn")
    c.one_model = True
    model = Detector.fit(mixed, config=c)
    found = [model.predict(photographs(name, 1, seed=4)[0]).product for name in COLOURS]
    assert found == ["product_1", "product_2", "product_3"]
    with pytest.raises(InputError, match="at least two products, and there is 1"):
        Detector.fit(photographs("red"), config=c)


def test_few_held_out_images_are_pooled(caplog):
    images = {"red": photographs("red", 80), "green": photographs("green", 12)}
    model = Detector.fit(images, config=tiny("knn"))
    few, many = model.detectors["green"], model.detectors["red"]
    assert many.image_threshold.n == 20
    assert (few.image_threshold.n, few.image_threshold.rate) == (23, 0.05)
    assert few.held_out.n_parts == 23
    assert "green has 3 held-out images" in caplog.text
    assert few.predict(spoilt("green")).is_anomalous


def test_thresholds_of_a_chosen_rate_are_kept(tmp_path):
    images = {"red": photographs("red", 80), "green": photographs("green", 12)}
    model = Detector.fit(images, config=tiny("knn")).with_threshold(rate=0.2)
    loaded = Products.load(model.save(tmp_path / "saved"))
    for name, detector in loaded.detectors.items():
        assert detector.image_threshold == model.detectors[name].image_threshold


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"red": photographs("red")}, "at least two products, and there is 1"),
        ({"red": photographs("red"), 3: photographs("green")}, "must be a text, not 3"),
        ({"red": photographs("red"), "green": "no_such_folder"}, "no_such_folder"),
        ({"red": photographs("red"), "green": []}, "no images to train on"),
    ],
)
def test_unusable_products_are_refused(images, message):
    with pytest.raises(InputError, match=message):
        Detector.fit(images, config=tiny("knn"))


def test_a_damaged_list_of_products_is_named(run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "run")
    for content in (
        '{"format": 2}',
        '{"format": 1, "products": {"a": "/etc", "b": "x"}}',
        '{"format": 1, "products": {"a": "../a", "b": "x"}}',
    ):
        (broken / "products.json").write_text(content)
        with pytest.raises(InputError, match=r"products\.json"):
            Products.load(broken)
    with pytest.raises(InputError, match=r"Detector\.load"):
        Products.load(tmp_path)


def test_predict_command_reports_product_and_unknown_images(run, started, tmp_path):
    photos = tmp_path / "new"
    photos.mkdir()
    images = {
        "bad": spoilt("green"),
        "good": photographs("red", 1, seed=5)[0],
        "other": photographs("white", 1)[0],
    }
    for name, image in images.items():
        Image.fromarray(image).save(photos / f"{name}.png")
    words = ["--mode=predict", f"--workdir={run}", f"--input={photos}"]
    assert started([*words, f"--output={tmp_path / 'out'}"]) == 1
    with (tmp_path / "out/predictions.csv").open() as file:
        lines = {line["path"].rsplit("/", 1)[1]: line for line in csv.DictReader(file)}
    found = {name: (line["product"], line["is_known"]) for name, line in lines.items()}
    assert found["bad.png"] == ("green", "true")
    assert found["good.png"] == ("red", "true")
    assert found["other.png"][1] == "false"
    assert lines["bad.png"]["is_anomalous"] == "true"
    assert len(list((tmp_path / "out/heatmaps").glob("*.png"))) == 3
    started([*words, f"--output={tmp_path / 'named'}", "--product=red"])
    first = json.loads((tmp_path / "named/predictions.jsonl").read_text().splitlines()[0])
    assert first["product"] is None
    assert started([*words, f"--output={tmp_path / 'x'}", "--product=pink"]) == 2
    assert started([*words, f"--output={tmp_path / 'x'}", "--engine=onnx"]) == 2


def test_public_name():
    assert fastflow_jax.Products is Products


def test_a_product_is_exported_by_itself(model, tmp_path):
    pytest.importorskip("onnx", reason="exports need the extra onnx")
    pytest.importorskip("onnxruntime", reason="exports need the extra onnx")
    parity = model.detectors["green"].export(tmp_path / "green.onnx")
    assert parity.flips == 0
    with pytest.raises(InputError, match="of one product"):
        model.export(tmp_path / "all.onnx")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.tile": 24}, "config.data.tile is not possible for one model"),
        ({"data.roi": "auto"}, "config.data.roi is not possible for one model"),
        ({"data.roi_dir": "masks"}, "config.data.roi_dir is not possible for one model"),
        ({"data.folds": 5, "data.holdout": 0.0}, "config.data.folds would train"),
        ({"data.window": (1, 99)}, "set config.data.levels"),
    ],
)
def test_what_one_model_cannot_do_is_refused_with_and_without_one_model(fields, message):
    images = {name: photographs(name) for name in ("red", "green")}
    with pytest.raises(InputError, match=message):
        Detector.fit(images, config=tiny(**fields))
    with pytest.raises(InputError, match=message):
        fill(tiny(**fields, one_model=True))
