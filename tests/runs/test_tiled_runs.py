"""Runs on tiles: whole images are scored, and all ways to predict agree with the evaluation."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.config import default, fill
from fastflow_jax.detectors.base import recipe
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import ranking
from fastflow_jax.runs import experiment


def texture(seed, size=(40, 70)):
    return np.random.default_rng(seed).integers(100, 150, (*size, 3), np.uint8)


def dotted(seed, size=(40, 70)):
    """A texture with a dot of 3x3 pixels, and its mask."""
    image, mask = texture(seed, size), np.zeros(size, bool)
    row, column = (np.random.default_rng(seed + 1).integers(2, side - 5) for side in size)
    mask[row : row + 3, column : column + 3] = True
    image[mask] = (250, 30, 30)
    return image, mask


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve normal images, four normal test images, and four with a dot."""
    root = tmp_path_factory.mktemp("photos")
    for part in ("train/good", "test/good", "test/dot", "ground_truth/dot"):
        (root / part).mkdir(parents=True)
    for i in range(12):
        Image.fromarray(texture(i)).save(root / f"train/good/{i:02}.png")
    for i in range(4):
        Image.fromarray(texture(50 + i)).save(root / f"test/good/{i}.png")
        image, mask = dotted(100 + i)
        Image.fromarray(image).save(root / f"test/dot/{i}.png")
        Image.fromarray(mask).save(root / f"ground_truth/dot/{i}_mask.png")
    return root


def tiled(root, detector="knn", **fields):
    c = default()
    c.update(recipe(detector))
    c.data.root, c.data.tile, c.data.holdout = str(root), 24, 0.34
    c.backbone, c.batch_size, c.heatmaps, c.audit = "pixels", 8, 2, 0.0
    c.update_from_flattened_dict(fields)
    return fill(c)


@pytest.fixture(scope="module", params=["knn", "spade"])
def finished(request, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / request.param
    return folder, experiment.run(tiled(photos, request.param), folder)


def test_images_are_cut_at_their_own_resolution(finished):
    folder, results = finished
    config = json.loads((folder / "config.json").read_text())
    assert config["image_size"] == [24, 24]
    protocol = results["protocol"]
    assert (protocol["tile"], protocol["masks"]) == (24, "at the size of the image")
    data = protocol["data"]["folder"]
    assert (data["trained_on"], data["held_out"]) == (8, 4)  # images, not tiles
    assert (data["test_good"], data["test_defective"]) == (4, 4)
    assert len(list((folder / "heatmaps").glob("*/*.png"))) == 2


def test_metrics_are_those_of_the_predictions_of_whole_images(finished, photos):
    folder, results = finished
    detector = Detector.load(folder)
    files = sorted((photos / "test").glob("*/*.png"))
    found = detector.predict(files)
    labels = np.array([file.parent.name == "dot" for file in files])
    maps = np.stack([each.anomaly_map for each in found])
    masks = np.stack(
        [
            np.asarray(Image.open(photos / f"ground_truth/dot/{file.stem}_mask.png")) > 0
            if bad
            else np.zeros((40, 70), bool)
            for file, bad in zip(files, labels, strict=True)
        ]
    )
    figures = results["categories"]["folder"]
    assert figures["image_auroc"] == 1
    assert figures["image_auroc"] == ranking.figures([e.score for e in found], labels).auroc
    assert figures["pixel_auroc"] == pytest.approx(ranking.figures(maps, masks).auroc, abs=1e-6)
    scores = {each["name"]: each["score"] for each in _scores(folder)}
    for file, each in zip(files, found, strict=True):
        name = f"{file.parent.name}/{file.name}"
        assert scores[name] == pytest.approx(each.score, rel=1e-3, abs=1e-3)


def _scores(folder):
    return json.loads((folder / "scores.json").read_text())["images"]


def test_thresholds_are_those_of_whole_images(finished):
    folder, _ = finished
    detector = Detector.load(folder)
    assert len(detector.held_out.scores) == detector.image_threshold.n == 4
    # Of fewer tiles the highest is lower: one tile of a normal image is not near its threshold.
    one = [detector.predict(texture(s, (24, 24))).score for s in range(200, 210)]
    whole = [detector.predict(texture(s)).score for s in range(200, 210)]
    assert np.mean(whole) > np.mean(one)


def test_an_image_of_any_size_is_tiled(finished):
    folder, _ = finished
    detector = Detector.load(folder)
    for size in ((24, 24), (20, 90), (100, 30), (10, 12)):
        found = detector.predict(dotted(7, size)[0])
        assert found.anomaly_map.shape == found.mask.shape == size
    assert detector.predict(texture(3), tile=True).score == detector.predict(texture(3)).score


def test_saved_and_exported_detectors_cut_images_as_in_training(photos, tmp_path):
    pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from fastflow_jax.exported import Exported

    fitted = Detector.fit(
        str(photos / "train/good"), config=tiled(photos, **{"data.aligned": True})
    )
    loaded = Detector.load(fitted.save(tmp_path / "saved.zip"))
    fitted.export(tmp_path / "m.onnx")
    exported = Exported(tmp_path / "m.onnx")
    image, _ = dotted(5)
    expected = fitted.predict(image)
    for other in (loaded, exported):
        assert other.tiling == fitted.tiling
        found = other.predict(image)
        assert found.score == pytest.approx(expected.score, rel=1e-4)
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-2)
        assert (found.is_anomalous, found.p_value) == (expected.is_anomalous, expected.p_value)
    with pytest.raises(InputError, match="tiles"):
        fitted.export(tmp_path / "n.onnx", any_size=True)


def test_images_like_those_of_training_are_not_reported_at_a_lower_resolution(photos, caplog):
    config = tiled(photos, **{"data.resolution": 35, "image_size": (16,), "data.tile": 16})
    detector = Detector.fit(str(photos / "train/good"), config=config)
    assert detector.predict(photos / "test/good/0.png").anomaly_map.shape == (40, 70)
    assert "differs from the training images" not in caplog.text
    detector.predict(texture(0, (80, 140)))
    assert "has 140 x 80 pixels, training images have 70 x 40" in caplog.text


def test_fastflow_trains_on_a_limited_number_of_tiles(photos, tmp_path):
    fields = {"flow.steps": 1, "flow.hidden_ratio": 2.0, "train.epochs": 1, "map.bank": 20}
    config = tiled(photos, "fastflow", **fields, **{"data.train_tiles": 10})
    results = experiment.run(config, tmp_path / "run")
    line = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(line)["step"] == -(-10 // config.train.batch_size)
    assert results["categories"]["folder"]["image_auroc"] == 1


def test_images_of_several_sizes_are_evaluated_together(photos, tmp_path):
    root = tmp_path / "photos"
    for part in ("train/good", "test/good", "test/dot", "ground_truth/dot"):
        (root / part).mkdir(parents=True)
    sizes = [(40, 70), (60, 30), (24, 100), (30, 24)]
    for i in range(12):
        Image.fromarray(texture(i, sizes[i % 4])).save(root / f"train/good/{i:02}.png")
    for i, size in enumerate(sizes):
        Image.fromarray(texture(50 + i, size)).save(root / f"test/good/{i}.png")
        image, mask = dotted(100 + i, size)
        Image.fromarray(image).save(root / f"test/dot/{i}.png")
        Image.fromarray(mask).save(root / f"ground_truth/dot/{i}_mask.png")
    figures = experiment.run(tiled(root), tmp_path / "run")["categories"]["folder"]
    detector = Detector.load(tmp_path / "run")
    values, labels = [], []
    for file in sorted((root / "test").glob("*/*.png")):
        values.append(detector.predict(file).anomaly_map.ravel())
        mask = root / f"ground_truth/dot/{file.stem}_mask.png"
        bad = file.parent.name == "dot"
        labels.append(
            np.asarray(Image.open(mask)).ravel() > 0 if bad else np.zeros(values[-1].size)
        )
    expected = ranking.figures(np.concatenate(values), np.concatenate(labels)).auroc
    assert figures["pixel_auroc"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="aligned needs images of one size"):
        experiment.run(tiled(root, **{"data.aligned": True}), tmp_path / "aligned")


@pytest.fixture(scope="module")
def framed(tmp_path_factory):
    """Images with noise of another strength in their left half, at the same place in all."""
    root = tmp_path_factory.mktemp("framed")
    (root / "train/good").mkdir(parents=True)
    (root / "test/good").mkdir(parents=True)
    (root / "test/dot").mkdir(parents=True)

    def image(seed):
        rng = np.random.default_rng(seed)
        whole = rng.integers(125, 131, (32, 96, 3), np.uint8)
        whole[:, :32] = rng.integers(60, 196, (32, 32, 3), np.uint8)
        return whole

    for i in range(24):
        Image.fromarray(image(i)).save(root / f"train/good/{i:02}.png")
    for i in range(12):
        Image.fromarray(image(100 + i)).save(root / f"test/good/{i}.png")
        bad = image(200 + i)
        bad[10:14, 70:74] += 12
        Image.fromarray(bad).save(root / f"test/dot/{i}.png")
    return root


def test_faint_defects_of_aligned_parts_are_found_next_to_a_noisy_place(framed, tmp_path):
    fields = {"data.tile": 32, "data.holdout": 0.34}
    auroc = {}
    for aligned in (False, True):
        config = tiled(framed, **fields, **{"data.aligned": aligned})
        found = experiment.run(config, tmp_path / str(aligned))
        auroc[aligned] = found["categories"]["folder"]["image_auroc"]
    assert auroc[True] > auroc[False] + 0.1
    assert auroc[True] > 0.9
    detector = Detector.load(tmp_path / "True")
    with pytest.raises(InputError, match=r"has 90 x 32 pixels.*the size of the training images"):
        detector.predict(texture(0, (32, 90)))
    with pytest.raises(InputError, match="cannot be taught"):
        detector.update(texture(0, (32, 96)))


def test_the_rate_of_aligned_tiles_holds_for_new_images(tmp_path):
    """Scores of held-out images come from statistics of the others, as those of new images do."""
    images = [texture(i, (24, 48)) for i in range(60)]
    config = tiled(pathlib.Path("unused"), **{"data.aligned": True, "data.holdout": 0.5})
    with config.unlocked():
        config.data.root = None
    detector = Detector.fit(images, config=config)
    new = detector.predict([texture(1000 + i, (24, 48)) for i in range(200)])
    flagged = np.mean([each.p_value <= 0.2 for each in new])
    assert flagged < 0.4  # 30 held-out images: 0.2 is within 0.08 to 0.36 in 19 of 20 draws


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.tile": None, "data.resolution": 100}, "data.resolution has no effect without"),
        ({"data.tile": None, "data.aligned": True}, "data.aligned has no effect without"),
        ({"data.folds": 5, "data.holdout": 0.0}, "data.folds is 5, which is not possible with"),
        ({"data.tile": 8}, "data.tile must be from 16"),
    ],
)
def test_fields_that_do_not_suit_tiles_are_refused(photos, fields, message):
    with pytest.raises(InputError, match=message):
        tiled(photos, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.holdout": 0.17}, "needs 4 held-out images, but there are 2"),
        ({"data.holdout": 0.0}, "needs 4 held-out images, but there are 0"),
        ({"data.groups": r"good/(\d)"}, "needs 4 held-out groups of images, but there are 1"),
    ],
)
def test_too_few_held_out_images_of_aligned_parts_are_refused(photos, fields, message, tmp_path):
    with pytest.raises(InputError, match=message):
        experiment.run(tiled(photos, **{"data.aligned": True}, **fields), tmp_path / "run")


def test_test_images_of_another_size_than_aligned_parts_are_refused_before_the_training(
    photos, tmp_path
):
    shutil.copytree(photos, tmp_path / "photos")
    Image.fromarray(texture(0, (40, 90))).save(tmp_path / "photos/test/good/wide.png")
    with pytest.raises(InputError, match="needs images of one size, but there are 70 x 40 and 90"):
        experiment.run(tiled(tmp_path / "photos", **{"data.aligned": True}), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("held_out.npz"))
