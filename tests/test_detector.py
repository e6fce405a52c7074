"""`Detector`: fit, predict, thresholds, saving and loading, copies, and the inverse of the flow."""

import copy
import dataclasses
import doctest
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
import weakref

import jax
import numpy as np
import pytest
from PIL import Image, ImageSequence

import fastflow_jax.detector.detector
from fastflow_jax import Detector, data
from fastflow_jax.config import default, fill
from fastflow_jax.data import tiling
from fastflow_jax.data.transforms import normalise, resize
from fastflow_jax.detectors.base import DETECTORS, recipe
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation import thresholds
from fastflow_jax.features.split import split_holdout
from fastflow_jax.runs import experiment, saved


def tiny(kind="fastflow", **fields):
    """A configuration that trains in seconds, on pixels."""
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size = "pixels", (16,)
    c.batch_size, c.data.holdout = 8, 0.25
    own = {
        "fastflow": {"flow.steps": 2, "flow.hidden_ratio": 2.0, "map.bank": 200},
        "cflow": {"cflow.steps": 1, "cflow.encoding": 8},
        "vae": {"vae.width": 4},
        "gan": {"gan.width": 4},
    }
    if kind in own:
        c.update_from_flattened_dict(own[kind] | {"train.epochs": 2, "train.batch_size": 8})
    c.update_from_flattened_dict(fields)
    return c


def photographs(n=16, seed=0, size=(20, 30)):
    """Evenly grey, with a little noise, uint8 [n, H, W, 3]."""
    return np.random.default_rng(seed).integers(118, 138, (n, *size, 3), np.uint8)


def spoilt():
    image = photographs(1, seed=9)[0]
    image[6:16, 12:24] = (250, 20, 20)
    return image


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "grey"
    return Detector.fit(photographs(), config=tiny(), workdir=folder)


@pytest.fixture(scope="module")
def run_on_8(tmp_path_factory):
    """Run directory of a detector that was fitted on `photographs(8)`; tests change copies."""
    folder = tmp_path_factory.mktemp("of_8") / "run"
    Detector.fit(photographs(8), config=tiny(), workdir=folder)
    return folder


@pytest.fixture
def run_copy(run_on_8, tmp_path):
    return pathlib.Path(shutil.copytree(run_on_8, tmp_path / "run"))


@pytest.mark.parametrize("kind", DETECTORS)
def test_each_detector_finds_a_defect_after_fit_save_load_and_copy(kind, tmp_path):
    fitted = Detector.fit(photographs(), config=tiny(kind))
    assert_copies_predict_the_same(fitted)
    images = [spoilt(), *photographs(6, seed=8)]
    for path in ("saved", "saved.zip"):
        detector = Detector.load(fitted.save(tmp_path / path))
        for one, other in zip(fitted.predict(images), detector.predict(images), strict=True):
            assert_same(one, other)
            assert one.distance == other.distance
    bad, *good = detector.predict(images)
    assert bad.score > max(result.score for result in good)
    assert bad.is_anomalous
    assert bad.p_value == pytest.approx(1 / 5)  # the lowest there is, with four held out
    assert np.mean([result.p_value for result in good]) > 0.3
    assert bad.anomaly_map.shape == bad.mask.shape == (20, 30)
    inside = np.zeros((20, 30), bool)
    inside[6:16, 12:24] = True
    assert bad.anomaly_map[inside].mean() > bad.anomaly_map[~inside].mean()
    assert (bad.log_likelihood is not None) == (kind in ("fastflow", "cflow"))
    if bad.log_likelihood is not None:
        assert bad.log_likelihood < min(result.log_likelihood for result in good)
    if kind == "spade":
        with pytest.raises(InputError, match="spade is not a pure function"):
            detector.as_function()
    else:
        assert_the_function_predicts_the_same(detector)


def test_a_detector_is_fitted_and_saved_under_a_path_with_brackets(tmp_path, monkeypatch):
    folder = tmp_path / "v[2]"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    detector = Detector.fit(photographs(), config=tiny())
    score = detector.predict(spoilt()).score
    detector.save(folder / "saved")
    assert Detector.load(folder / "saved").predict(spoilt()).score == pytest.approx(score)


def test_predict_equals_the_scorer_on_the_resized_image(detector):
    image = spoilt()
    result = detector.predict(image)
    spec = detector.backbone.spec
    seen = normalise(resize(image, (16, 16)), spec.mean, spec.std)[None]
    (score,), (anomaly_map,) = detector.score(seen)
    assert result.score == pytest.approx(score, rel=1e-4)
    stretched = Image.fromarray(anomaly_map).resize((30, 20), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(result.anomaly_map, stretched, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(result.mask, result.anomaly_map > detector.pixel_threshold.value)


def test_single_images_lists_files_and_arrays_have_equal_scores(detector, tmp_path):
    images = [spoilt(), *photographs(3, seed=4), photographs(1, seed=5, size=(11, 50))[0]]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    alone = [detector.predict(image) for image in images]
    for many in (
        detector.predict(images),
        detector.predict(tmp_path),
        detector.predict(sorted(str(p) for p in tmp_path.glob("*.png"))),
        list(detector.stream(image for image in images)),
    ):
        for one, other in zip(alone, many, strict=True):
            assert one.score == pytest.approx(other.score, rel=1e-4)
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-4)
            np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-3)
    assert alone[-1].anomaly_map.shape == (11, 50)
    grey = detector.predict(np.asarray(images[1])[..., 0])
    assert grey.anomaly_map.shape == (20, 30)


def test_a_stream_reads_few_images_ahead(detector):
    read = []

    def images():
        for i in range(1000):
            read.append(i)
            yield photographs(1)[0]

    stream = detector.stream(images())
    next(stream)
    stream.close()
    assert len(read) < 60


def test_files_that_are_not_images_are_named_or_skipped(detector, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(spoilt()).save(tmp_path / "whole.png")
    with pytest.raises(InputError, match=r"broken\.png"):
        detector.predict(tmp_path)
    with pytest.raises(InputError, match=r"nosuch\.png"):
        detector.predict("nosuch.png")
    with pytest.raises(InputError, match=r"float64.*uint8"):
        detector.predict(spoilt() / 255)
    with pytest.raises(InputError, match=r"shape \(20, 30, 4\)"):
        detector.predict([np.zeros((20, 30, 4), np.uint8)])
    names = []
    results = list(detector.stream(tmp_path, on_error=lambda name, error: names.append(name)))
    assert [r.name for r in results] == [str(tmp_path / "whole.png")]
    assert names == [str(tmp_path / "broken.png")]


def test_large_images_are_tiled_on_request(detector):
    image = photographs(1, size=(50, 70))[0]
    image[20:24, 40:44] = (250, 20, 20)
    whole, tiled = detector.predict(image), detector.predict(image, tile=True)
    assert tiled.anomaly_map.shape == (50, 70)
    assert tiled.score > whole.score  # the defect is seen four times as large
    row, column = np.unravel_index(tiled.anomaly_map.argmax(), (50, 70))
    assert 18 <= row <= 26
    assert 38 <= column <= 46
    small = photographs(1, size=(10, 12))[0]
    assert detector.predict(small, tile=True).score == pytest.approx(detector.predict(small).score)


@pytest.mark.parametrize("brighter", [0, 60])
def test_a_shift_of_many_images_is_logged(detector, tmp_path, caplog, brighter):
    for i, image in enumerate(photographs(40, seed=5) + np.uint8(brighter)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    results = detector.predict(tmp_path)
    expected = "The new images look shifted as a whole: 40 of 40 images are further"
    assert (expected in caplog.text) == bool(brighter)
    distances = {result.name: result.distance for result in results}
    found = detector.find_shift(distances)
    assert (found.tested, found.message is not None) == (40, bool(brighter))
    assert found.further == sum(distance > 1 for distance in distances.values())
    caplog.clear()
    assert detector.find_shift(dict(list(distances.items())[:39])) is None
    detector.predict([tmp_path / f"{i}.png" for i in range(39)])
    assert "shifted" not in caplog.text


def test_distances_are_saved_and_do_not_depend_on_the_batch(detector, tmp_path):
    images = [*photographs(9, seed=6), spoilt()]
    expected = [result.distance for result in detector.predict(images)]
    assert expected[-1] > 2 * max(expected[:-1]) > 0
    alone = [detector.predict(image).distance for image in images]
    np.testing.assert_allclose(alone, expected, rtol=1e-4)
    saved = Detector.load(detector.save(tmp_path / "saved"))
    assert [result.distance for result in saved.predict(images)] == expected
    assert detector.predict(images[0], tile=True).distance is None


def test_distances_leave_out_padding():
    bright, others = photographs() + np.uint8(100), photographs(4, seed=7) + np.uint8(100)
    fitted = Detector.fit(bright, config=tiny(**{"data.resize": "pad"}))
    wide = np.concatenate([*others], axis=1)
    assert fitted.predict(wide).distance < 2


def test_a_tiled_image_has_the_scores_and_the_blended_maps_of_its_tiles(detector):
    image = photographs(1, size=(100, 130), seed=2)[0]
    where = tiling.places((100, 130), (16, 16))
    assert len(where) > 64, "several batches"
    alone = [detector.predict(image[place]) for place in where]
    blender = tiling.Blender((100, 130), where)
    for result, place in zip(alone, where, strict=True):
        blender.add(result.anomaly_map, place)
    # The batches go across images.
    small, tiled, again = detector.predict([image[:10, :12], image, image], tile=True)
    assert tiled.score == pytest.approx(max(r.score for r in alone), rel=1e-5)
    likelihood = np.mean([r.log_likelihood for r in alone])
    assert tiled.log_likelihood == pytest.approx(likelihood, rel=1e-5)
    np.testing.assert_allclose(tiled.anomaly_map, blender.result(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(again.anomaly_map, tiled.anomaly_map, rtol=1e-3, atol=1e-3)
    assert small.score == pytest.approx(detector.predict(image[:10, :12]).score, rel=1e-4)


def test_a_tiled_image_needs_memory_for_itself_and_one_batch(detector):
    image = photographs(1, size=(480, 480))[0]
    detector.predict(image[:100, :100], tile=True)  # compiles
    tracemalloc.start()
    result = detector.predict(image, tile=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    batch = 32 * 16 * 16 * 3 * 4
    assert peak < 2 * result.anomaly_map.nbytes + 8 * batch


def test_the_maps_of_large_images_are_freed_one_by_one(detector):
    images = [np.zeros((500, 500, 3), np.uint8)] * 32
    detector.predict(images[:1])
    stream, alive = detector.stream(images), []
    for result in stream:
        alive.append(weakref.ref(result.anomaly_map))
        del result
        assert sum(map_of() is not None for map_of in alive) <= 1


def test_with_threshold_changes_thresholds_and_save_stores_them(detector, tmp_path):
    # Four held-out images: the default is the lowest rate that they support.
    assert detector.image_threshold.rate == pytest.approx(1 / 5)
    loose = detector.with_threshold(rate=0.5, pixel_rate=0.2)
    held_out = detector.held_out.scores
    assert loose.image_threshold.value == pytest.approx(np.sort(held_out)[2], abs=1e-3)
    assert loose.pixel_threshold.value < detector.pixel_threshold.value
    with pytest.warns(UserWarning, match="cannot support"):
        detector.with_threshold(rate=0.01)
    labelled = thresholds.f1_optimal([1, 2, 3, 4], [0, 0, 1, 1])
    given = loose.with_threshold(labelled, pixel=7.5)
    given.save(tmp_path / "saved")
    loaded = Detector.load(tmp_path / "saved")
    assert loaded.image_threshold == labelled
    assert loaded.pixel_threshold.value == 7.5
    assert loaded.predict(spoilt()).score == detector.predict(spoilt()).score
    loose.save(tmp_path / "other")
    assert Detector.load(tmp_path / "other").image_threshold == loose.image_threshold
    with pytest.raises(InputError, match="has other files"):
        given.save(tmp_path / "saved")
    with pytest.raises(InputError, match="A threshold and a false-alarm rate were given for image"):
        detector.with_threshold(1.0, rate=0.1)


def test_an_f1_optimal_threshold_gives_equal_decisions_alone_and_in_a_batch(detector):
    """Each image in turn is the lowest of those labelled anomalous; other programs round apart.

    Neighbouring pixels may be equal up to rounding, so the highest pixel of each image is labelled.
    """
    images = [spoilt(), *photographs(31, seed=8)]
    batch, alone = detector.predict(images), [detector.predict(image) for image in images]
    scores = [r.score for r in batch]
    peaks = np.array([r.anomaly_map.max() for r in batch])
    assert [r.score for r in alone] != scores
    for lowest in batch:
        of_images = thresholds.f1_optimal(scores, np.array(scores) >= lowest.score)
        highest = lowest.anomaly_map.max()
        of_pixels = thresholds.f1_optimal(peaks, peaks >= highest)
        chosen = detector.with_threshold(of_images, pixel=of_pixels)
        for image, before, peak in zip(images, scores, peaks, strict=True):
            result = chosen.predict(image)
            assert result.is_anomalous == (before >= lowest.score)
            assert result.mask.any() == (peak >= highest)


def test_save_without_a_folder_stores_thresholds_in_place(run_copy):
    Detector.load(run_copy).with_threshold(12.5).save()
    assert Detector.load(run_copy).image_threshold.value == 12.5


def test_fit_in_a_finished_workdir_loads_it_with_saved_thresholds(run_copy, monkeypatch):
    Detector.load(run_copy).with_threshold(12.5).save()
    monkeypatch.delattr(fastflow_jax.detector.detector, "preparer")
    again = Detector.fit(photographs(8), config=tiny(), workdir=run_copy)
    assert again.image_threshold.value == 12.5
    with pytest.raises(InputError, match="training images are not those that"):
        Detector.fit(photographs(8, seed=1), config=tiny(), workdir=run_copy)


def test_a_held_out_image_is_scored_with_a_calibration_on_the_others(detector):
    """Of 4 held-out images each is a fold of its own."""
    held = photographs()[split_holdout(16, 0.25)[1]]
    as_new = [r.score for r in detector.predict(held)]
    assert not np.allclose(as_new, detector.held_out.scores, rtol=1e-3)
    features = detector.features(held)
    maps = detector.scorer.location_maps(features)
    without_first = detector.scorer.recalibrated(tuple(m[1:] for m in maps))
    (score,), _ = without_first.score(tuple(m[:1] for m in features))
    assert score == pytest.approx(detector.held_out.scores[0], rel=1e-3)


def assert_the_function_predicts_the_same(detector):
    images = photographs(3, size=detector.image_size, seed=5)
    images[0, 4:12, 4:12] = (250, 20, 20)
    found = jax.tree.map(np.asarray, jax.jit(detector.as_function())(images))
    assert found.keys() == {"score", "anomaly_map", "p_value", "is_anomalous", "mask"}
    assert found["is_anomalous"][0]
    assert found["mask"][0].any()
    for i, result in enumerate(detector.predict(list(images))):
        np.testing.assert_allclose(found["score"][i], result.score, rtol=1e-4)
        np.testing.assert_allclose(
            found["anomaly_map"][i], result.anomaly_map, rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(found["p_value"][i], result.p_value, rtol=1e-6)
        assert found["is_anomalous"][i] == result.is_anomalous
        assert (found["mask"][i] != result.mask).mean() < 0.01


def test_the_function_of_images_of_any_size_equals_predict(detector):
    image = np.asarray(Image.fromarray(spoilt()).resize((75, 50), Image.Resampling.BILINEAR))
    found = jax.jit(detector.as_function(any_size=True))(image[None])
    expected = detector.predict(image)
    np.testing.assert_allclose(found["score"][0], expected.score, rtol=0.02)
    assert found["anomaly_map"].shape == found["mask"].shape == (1, 50, 75)
    assert np.abs(found["anomaly_map"][0] - expected.anomaly_map).mean() < 0.02
    assert (found["mask"][0] != expected.mask).mean() < 0.01
    assert found["mask"].any()


def test_a_detector_of_padded_images_is_not_a_function_of_their_pixels():
    fitted = Detector.fit(photographs(8), config=tiny("knn", **{"data.resize": "pad"}))
    with pytest.raises(InputError, match="Images of this detector are padded"):
        fitted.as_function()


def unpickled(detector):
    return pickle.loads(pickle.dumps(detector))


def assert_copies_predict_the_same(detector):
    """By pickle and by deepcopy, before the first use and after it."""
    images = [spoilt(), *photographs(2, seed=8)]
    unused = [unpickled(detector), copy.deepcopy(detector)]
    expected = [*detector.predict(images), detector.predict(images[0])]
    for other in (*unused, unpickled(detector), copy.deepcopy(detector), unpickled(unused[0])):
        assert other.image_threshold == detector.image_threshold
        assert other.config == detector.config
        results = [*other.predict(images), other.predict(images[0])]
        for one, result in zip(expected, results, strict=True):
            assert_same(one, result)


def assert_same(one, other):
    """Equal to the last bit."""
    assert (one.score, one.p_value, one.is_anomalous) == (
        other.score,
        other.p_value,
        other.is_anomalous,
    )
    assert one.log_likelihood == other.log_likelihood
    np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    np.testing.assert_array_equal(one.mask, other.mask)


def test_compiled_programs_are_not_pickled(detector):
    fresh = Detector.load(detector.folder)
    size = len(pickle.dumps(fresh))
    fresh.predict(spoilt())
    assert len(pickle.dumps(fresh)) == size


def test_a_pickled_detector_samples(detector):
    other = unpickled(detector)
    for one, same in zip(detector.sample(2), other.sample(2), strict=True):
        np.testing.assert_array_equal(one, same)
    other.with_threshold(rate=0.5)


def test_a_detector_without_workdir_leaves_no_files_and_its_copies_can_be_saved(
    tmp_path, monkeypatch
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    detector = Detector.fit(photographs(8), config=tiny())
    assert not list(temporary.iterdir())
    expected = detector.predict(spoilt())
    for i, copied in enumerate((unpickled, copy.deepcopy, copy.copy)):
        detector = copied(detector)
        assert_same(Detector.load(detector.save(tmp_path / f"{i}")).predict(spoilt()), expected)
    with pytest.raises(InputError, match=r"was not loaded from a path\. Pass one"):
        detector.save()


def test_worker_processes_predict_the_same_and_save(run_copy, tmp_path):
    """A bound method takes the detector along; the directory is not needed."""
    detector = Detector.load(run_copy)
    shutil.rmtree(run_copy)
    images = [spoilt(), photographs(1, seed=8)[0]]
    expected = [detector.predict(image) for image in images]
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = pool.map(detector.predict, images)
        copied = pool.apply(detector.with_threshold(3.0).save, (tmp_path / "saved",))
    for one, other in zip(expected, found, strict=True):
        assert_same(one, other)
    loaded = Detector.load(copied)
    assert loaded.image_threshold.value == 3
    assert loaded.predict(images[0]).score == expected[0].score


def test_without_held_out_images_only_scores_are_available():
    config = tiny("patchcore", **{"data.holdout": 0.0})
    detector = Detector.fit(photographs(), config=config)
    result = detector.predict(spoilt())
    assert np.isfinite(result.score)
    assert result.p_value is result.is_anomalous is result.mask is None
    for call in (
        lambda: detector.with_threshold(rate=0.1),
        lambda: detector.with_threshold(pixel_rate=0.1),
    ):
        with pytest.raises(InputError, match="no held-out images"):
            call()
    with pytest.raises(InputError, match="detector patchcore has no latents"):
        detector.sample()


def test_latents_are_inverted_and_samples_have_the_statistics_of_features(detector):
    features = detector.features(photographs(9, seed=3))
    latents = detector.latents(features)
    assert not np.allclose(latents[0], features[0], atol=0.1)
    for one, other in zip(detector.invert(latents), features, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)
    sampled = detector.sample(40, seed=1)
    for one, other in zip(sampled, features, strict=True):
        assert one.shape == (40, *other.shape[1:])
        np.testing.assert_allclose(one.mean((0, 1, 2)), other.mean((0, 1, 2)), atol=0.1)
    for z in detector.latents(sampled):
        assert z.mean() == pytest.approx(0, abs=0.05)
        assert z.std() == pytest.approx(1, abs=0.05)
    (typical,) = detector.sample(1, temperature=0.0)
    np.testing.assert_allclose(detector.latents((typical,))[0], 0, atol=1e-4)


def test_fit_takes_a_directory_files_a_configuration_or_a_data_set(tmp_path):
    for i, image in enumerate(photographs(8)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    by_folder = Detector.fit(tmp_path, config=tiny())
    by_files = Detector.fit([str(p) for p in sorted(tmp_path.iterdir())], config=tiny())
    c = tiny()
    c.data.name, c.data.root = "folder", str(tmp_path)
    by_config = Detector.fit(fill(c))
    by_dataset = Detector.fit(data.open_dataset(c.data), config=tiny())
    scores = [d.predict(spoilt()).score for d in (by_folder, by_files, by_config, by_dataset)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "config", "message"),
    [
        ("nosuch/folder", None, "neither a directory nor a data set"),
        ([], None, "no images to train on"),
        (["nosuch.png"], None, "nosuch.png"),
        (photographs(2), "patchcoer", "patchcore"),
        (photographs(2), {"seeds": 2}, "one seed, one variant and one category"),
        ("synthetic/brick,gravel", {}, "one seed, one variant and one category"),
    ],
)
def test_fit_refuses_impossible_arguments(images, config, message):
    with pytest.raises(InputError, match=message):
        Detector.fit(images, config=tiny(**config) if isinstance(config, dict) else config)


def test_few_images_are_read_ahead_of_their_tiles(detector):
    read = []

    def images():
        for i in range(12):
            read.append(i)
            yield photographs(1, size=(120, 120))[0]  # of more tiles than a program takes at once

    stream = detector.stream(images(), tile=True)
    next(stream)
    assert len(read) <= 4
    stream.close()


def test_fit_refuses_a_workdir_that_was_trained_on_other_images(detector):
    with pytest.raises(InputError, match="training images are not those that"):
        Detector.fit(photographs(seed=1), config=tiny(), workdir=detector.folder)
    again = Detector.fit(photographs(), config=tiny(), workdir=detector.folder)
    assert again.predict(spoilt()).score == detector.predict(spoilt()).score


def test_fit_notices_that_files_were_replaced(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(8)]
    for file, image in zip(files, photographs(8), strict=True):
        Image.fromarray(image).save(file)
    Detector.fit(files, config=tiny(), workdir=tmp_path / "run")
    for file in files:  # all, as those that are held out do not count
        Image.fromarray(photographs(1, size=(22, 30))[0]).save(file)
    with pytest.raises(InputError, match="training images are not those that"):
        Detector.fit(files, config=tiny(), workdir=tmp_path / "run")


def test_each_part_of_a_run_can_be_loaded(tmp_path, monkeypatch):
    calls, score = [], saved.score_held_out
    monkeypatch.setattr(saved, "score_held_out", lambda *a: calls.append(a) or score(*a))
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, image in enumerate(photographs(8)):
        Image.fromarray(image).save(photos / f"{i}.png")
    c = tiny(seeds=2)
    c.data.name, c.data.root = "folder", str(photos)
    run = tmp_path / "run"
    turned = {"data": {"tamper": {"rotate": 9.0}}}  # test images alone
    c.variants = {"one": {}, "sum": {"score": {"form": "top_k"}}, "turned": turned}
    experiment.run(fill(c), run)
    assert len(calls) == 4  # "one" and "sum", two seeds each
    with pytest.raises(InputError, match="several trainings") as error:
        Detector.load(run)
    assert str(run / "sum" / "seed_1") in str(error.value)
    one, other = (Detector.load(run / v / "seed_1") for v in ("one", "sum"))
    assert other.config.score.form == "top_k"
    assert one.predict(spoilt()).score != other.predict(spoilt()).score
    same = Detector.load(run / "turned" / "seed_1")
    np.testing.assert_array_equal(same.held_out.scores, one.held_out.scores)
    assert same.image_threshold == one.image_threshold != other.image_threshold
    # The second variant has no training of its own, and is saved with the first one's.
    other.save(tmp_path / "saved")
    again = Detector.load(tmp_path / "saved")
    assert again.predict(spoilt()).score == other.predict(spoilt()).score


def test_load_refuses_a_directory_without_training(tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        Detector.load(tmp_path / "nosuch")
    with pytest.raises(InputError, match="no finished training"):
        Detector.load(tmp_path)


def test_the_example_runs():
    names = {"normal_images": list(photographs(24)), "image": spoilt(), "config": tiny()}
    (example,) = doctest.DocTestFinder(recurse=False).find(
        Detector, "Detector", module=fastflow_jax.detector.detector, extraglobs=names
    )
    assert doctest.DocTestRunner().run(example).failed == 0


def test_pillow_images_equal_their_files(detector, tmp_path):
    image = Image.fromarray(spoilt())
    palette = image.quantize(16)
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    palette.save(tmp_path / "palette.png")
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    image.convert("CMYK").save(tmp_path / "cmyk.tif")
    for name in ("palette.png", "turned.png", "cmyk.tif"):
        with Image.open(tmp_path / name) as opened:
            result = detector.predict(opened)
        expected = detector.predict(tmp_path / name)
        np.testing.assert_array_equal(result.anomaly_map, expected.anomaly_map)
    assert turned.size == image.size


@pytest.mark.parametrize("shape", [(20, 30, 1), (20, 30, 4), (3, 20, 30)])
def test_arrays_must_have_three_channels(detector, shape):
    with pytest.raises(InputError, match=rf"shape {re.escape(str(shape))}\. Pass \[H, W, 3\]"):
        detector.predict(np.zeros(shape, np.uint8))


def test_scores_and_thresholds_that_are_nan_are_refused(detector):
    with pytest.raises(InputError, match="image_threshold must be a number"):
        detector.with_threshold(float("nan"))
    broken = jax.tree.map(lambda x: x * np.nan, detector.scorer.variables["params"])
    variables = detector.scorer.variables | {"params": broken}
    scorer = dataclasses.replace(detector.scorer, variables=variables)
    with pytest.raises(InputError, match="image 0 scores nan"):
        dataclasses.replace(detector, scorer=scorer).predict(spoilt())


def test_load_refuses_a_directory_of_an_older_version(run_copy):
    about = json.loads((run_copy / "detector.json").read_text())
    del about["weights"]
    (run_copy / "detector.json").write_text(json.dumps(about))
    with pytest.raises(
        InputError, match=r"detector\.json was written by an older version, without weights"
    ):
        Detector.load(run_copy)


def test_load_refuses_weights_that_differ_from_those_of_the_training(run_copy):
    about = json.loads((run_copy / "detector.json").read_text())
    about["weights"] = {"source": "file", "file": "other.pth", "sha256": "12"}
    (run_copy / "detector.json").write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"was trained with other weights .*other\.pth"):
        Detector.load(run_copy)


def test_load_names_missing_and_damaged_files(run_on_8, tmp_path):
    def without(name, damage):
        copy = tmp_path / name
        shutil.copytree(run_on_8, copy)
        damage(copy)
        return copy

    def cut(file):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def empty(checkpoints):
        shutil.rmtree(checkpoints)
        checkpoints.mkdir()

    for name, damage, message in (
        ("scores", lambda f: (f / "held_out.npz").unlink(), r"lacks its held_out\.npz"),
        ("none", lambda f: shutil.rmtree(f / "checkpoints"), "lacks its checkpoints"),
        ("empty", lambda f: empty(f / "checkpoints"), "checkpoints cannot be read .*it is empty"),
        (
            "cut",
            lambda f: [cut(file) for file in (f / "checkpoints").rglob("*") if file.is_file()],
            "checkpoints cannot be read",
        ),
        (
            "list",
            lambda f: (f / "detector.json").write_text("[]"),
            r"detector\.json was written by an older",
        ),
    ):
        with pytest.raises(InputError, match=message) as error:
            Detector.load(without(name, damage))
        assert len(str(error.value)) < 600
    # A threshold that was given, not found by held-out images, needs none.
    given = without("given", lambda f: (f / "held_out.npz").unlink())
    about = json.loads((given / "detector.json").read_text())
    about["thresholds"] = {"image": about["thresholds"]["image"] | {"kind": "given"}, "pixel": None}
    (given / "detector.json").write_text(json.dumps(about))
    assert Detector.load(given).predict(spoilt()).p_value is None


def test_save_names_a_file_in_the_way_and_a_removed_directory(run_copy, tmp_path):
    detector = Detector.load(run_copy)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a file of that name exists"):
        detector.save(tmp_path / "file" / "below")
    shutil.rmtree(run_copy)
    with pytest.raises(InputError, match=r"run of this detector no longer exists\. Pass another"):
        detector.save()
    detector.save(run_copy)
    assert Detector.load(run_copy).image_threshold == detector.image_threshold


def test_urls_are_refused_as_paths(detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = "gs://bucket/x"
    for call in (
        lambda: Detector.fit(url, config=tiny()),
        lambda: Detector.fit([url], config=tiny()),
        lambda: Detector.fit(photographs(), config=tiny(), workdir=url),
        lambda: Detector.fit(photographs(), config=tiny(weights=url)),
        lambda: Detector.fit("elpv/mono", config=tiny(**{"data.dir": url})),
        lambda: Detector.load(url),
        lambda: detector.save(url),
        lambda: detector.predict(url),
        lambda: detector.predict([url]),
        lambda: detector.predict(pathlib.Path(url)),
        lambda: experiment.run(detector.config, url),
    ):
        with pytest.raises(InputError, match="is a URL, not a local path"):
            call()
    assert not list(tmp_path.iterdir())


def test_tildes_and_file_urls_are_expanded(detector, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "images").mkdir()
    for i, image in enumerate(photographs(8)):
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
    expected = detector.predict(tmp_path / "images/0.png").score
    for home in ("~", f"file://{tmp_path}"):
        result = detector.predict(f"{home}/images/0.png")
        assert result.name == str(tmp_path / "images/0.png")
        assert result.score == expected
        assert len(detector.predict(f"{home}/images")) == 8
        fitted = Detector.fit(f"{home}/images", config=tiny(), workdir=f"{home}/run")
        assert fitted.folder == tmp_path / "run"
        assert fitted.config.data.root == str(tmp_path / "images")
        assert Detector.load(f"{home}/run").folder == tmp_path / "run"


def test_sample_refuses_zero_images(detector):
    with pytest.raises(InputError, match="n must be at least 1, not 0"):
        detector.sample(0)


def test_a_damaged_file_of_held_out_scores_is_named(run_copy):
    (run_copy / "held_out.npz").write_bytes((run_copy / "held_out.npz").read_bytes()[:200])
    with pytest.raises(InputError, match=r"held_out\.npz is damaged"):
        Detector.load(run_copy)


def shots(n, times, seed=0):
    """Parts of different grey levels, each photographed several times in a row."""
    rng = np.random.default_rng(seed)
    level = rng.normal(128, 12, (n, 1, 1, 1)).repeat(times, 0)
    image = level + rng.normal(0, 1, (n * times, 20, 30, 3))
    return image.clip(0, 255).astype(np.uint8)


def test_several_shots_of_a_part_are_held_out_together(tmp_path, caplog):
    images, new = shots(30, 4), shots(300, 1, seed=1)
    config = tiny(**{"train.epochs": 1, "data.holdout": 0.3})
    Detector.fit(images, config=config)
    assert "many images are much closer to another one" in caplog.text
    grouped = Detector.fit(images, config=config, groups=np.arange(30).repeat(4))
    assert grouped.held_out.n_parts == 9
    assert len(grouped.held_out.scores) == 36
    loose = grouped.with_threshold(rate=0.2)
    flagged = np.mean([result.is_anomalous for result in loose.stream(new)])
    low, high = loose.image_threshold.interval
    assert low <= flagged <= high
    grouped.save(tmp_path / "saved")
    loaded = Detector.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.held_out.groups, grouped.held_out.groups)
    assert loaded.predict(new[0]).p_value == grouped.predict(new[0]).p_value


def test_groups_come_from_directories_a_regular_expression_or_a_table(tmp_path):
    for i, image in enumerate(shots(8, 2)):
        folder = tmp_path / f"good/part_{i // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    table = tmp_path / "parts.csv"
    table.write_text("path,group\n" + "".join(f"{i}.png,{i // 2}\n" for i in range(16)))
    found = [
        Detector.fit(tmp_path / "good", config=tiny(**{"data.groups": groups})).held_out.groups
        for groups in ("folder", r"part_(\d+)", str(table))
    ]
    assert [g.tolist() for g in found] == [[0, 0, 1, 1]] * 3


@pytest.mark.parametrize(
    ("fields", "options", "rows", "parts"),
    [
        ({}, {}, 6, 6 + 4),
        ({}, {"groups": np.arange(16) // 2}, 6, 3 + 2),
        ({}, {"calibrate": photographs(5, seed=3)}, 16, 5),
        ({"augment.flips": True}, {}, 12, 4),
        ({"train.cache": "none"}, {}, 6, 6 + 4),
        ({"augment.flips": True, "data.holdout": 0.0}, {}, None, None),
    ],
)
def test_the_reference_compares_training_images_with_others_like_new_ones(
    fields, options, rows, parts
):
    reference = Detector.fit(photographs(), config=tiny(**fields), **options).reference
    if rows is None:
        assert reference is None
    else:
        assert (len(reference.rows), reference.n_parts) == (rows, parts)


def test_calibration_images_replace_held_out_images(tmp_path):
    images, own = photographs(12), photographs(5, seed=3)
    detector = Detector.fit(images, config=tiny(), calibrate=own, workdir=tmp_path / "run")
    assert len(detector.held_out.scores) == 5
    for folder, many in (("train", images), ("calibration", own)):
        (tmp_path / folder / "good").mkdir(parents=True)
        for i, image in enumerate(many):
            Image.fromarray(image).save(tmp_path / folder / f"good/{i:02}.png")
    data_folder = tmp_path / "data"
    data_folder.mkdir()
    for folder in ("train", "calibration"):
        (tmp_path / folder).rename(data_folder / folder)
    other = Detector.fit(data_folder, config=tiny())
    np.testing.assert_allclose(other.held_out.scores, detector.held_out.scores, rtol=1e-4)
    # Other calibration images would need other thresholds.
    with pytest.raises(InputError, match="training images are not those that"):
        Detector.fit(images, config=tiny(), calibrate=own[:4], workdir=tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": [1, 2]}, "2 groups for 16 images"),
        ({"groups": ["a"] * 16}, "All training images belong to one group"),
        ({"calibrate": []}, "There are no images"),
        ({"calibrate": [np.zeros((4, 4))]}, "uint8"),
    ],
)
def test_groups_and_calibration_images_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Detector.fit(photographs(), config=tiny(), **options)


def test_groups_are_refused_for_a_directory(tmp_path):
    Image.fromarray(photographs(1)[0]).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"set config\.data\.groups"):
        Detector.fit(tmp_path, config=tiny(), groups=["a"])


def test_a_camera_may_reuse_its_array(detector):
    """The buffer that a generator hands out is refilled while images are read ahead."""
    frames = [*photographs(8, seed=4), spoilt(), *photographs(8, seed=5)]

    def camera(buffer):
        for frame in frames:
            buffer[:] = frame
            yield buffer

    expected = [result.score for result in detector.predict(frames)]
    buffer = np.empty_like(frames[0])
    for live in (False, True):
        found = [result.score for result in detector.stream(camera(buffer), live=live)]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    trained = Detector.fit(camera(buffer), config=tiny(**{"train.epochs": 1}))
    seen = Detector.fit(frames, config=tiny(**{"train.epochs": 1}))
    np.testing.assert_array_equal(trained.held_out.scores, seen.held_out.scores)


def test_live_images_are_scored_before_the_next_is_asked_for(detector):
    asked = []

    def camera():
        for frame in photographs(5, seed=4):
            asked.append(1)
            yield frame

    stream = detector.stream(camera(), live=True)
    for n in range(1, 6):
        next(stream)
        assert len(asked) == n


def test_images_before_an_error_are_scored(detector):
    def camera():
        yield from photographs(3, seed=4)
        raise RuntimeError("camera lost")

    results = []
    with pytest.raises(RuntimeError, match="camera lost"):
        results.extend(detector.stream(camera()))
    assert len(results) == 3


def test_frames_of_one_open_file_are_read_in_turn(detector, tmp_path):
    frames = [Image.fromarray(image) for image in [*photographs(3, seed=4), spoilt()]]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    expected = [result.score for result in detector.predict(tmp_path / "a.tif")]
    assert len(expected) == 4
    with Image.open(tmp_path / "a.tif") as file:
        found = [result.score for result in detector.stream(ImageSequence.Iterator(file))]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        with pytest.raises(InputError, match="the same open file as an earlier image"):
            detector.predict(list(ImageSequence.Iterator(file)))
    with Image.open(tmp_path / "a.tif") as file:
        one = detector.predict([file.copy()] * 3)
    np.testing.assert_allclose([result.score for result in one], expected[0], rtol=1e-4)


def test_one_lazily_opened_image_may_come_several_times(detector, tmp_path):
    Image.fromarray(photographs(1, size=(600, 800))[0]).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        results = detector.predict([image] * 8)  # one batch: others may round apart
    assert len({result.score for result in results}) == 1


def test_files_are_given_as_paths_contents_or_open_files(detector, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(spoilt()).save(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (entry,) = os.scandir(tmp_path)
    expected = detector.predict(path).score
    content = path.read_bytes()
    for one in (str(path), np.str_(path), os.fsencode(path).decode(), entry, "~/a.png", content):
        assert detector.predict(one).score == expected
    with path.open("rb") as file:
        for one in (io.BytesIO(content), bytearray(content), file):
            assert detector.predict(one).score == expected
    many = detector.predict([path, content, np.asarray(spoilt())])
    np.testing.assert_allclose([result.score for result in many], expected, rtol=1e-4)
    assert [result.name for result in many] == [str(path), "image 1", "image 2"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("", "An empty path was given"),
        ([""], "An empty path was given"),
        (None, r"cv2\.imread returns None"),
        ([None], r"image 0 is None"),
        ({"a": 1}, "dict is neither an image nor a list"),
        (3, "int is neither an image nor a list"),
        ([3], "image 0 is of type int"),
        ([("a.png", 1)], "image 0 is of type tuple"),
        (b"no image", "image 0 is not an image that Pillow can read"),
        (Image.new("RGB", (0, 0)), "image 0 has 0 x 0 pixels"),
    ],
)
def test_inputs_that_are_not_images_are_refused(detector, images, message):
    with pytest.raises(InputError, match=message):
        detector.predict(images)


def test_an_image_whose_file_is_closed_is_named(detector, tmp_path):
    Image.fromarray(spoilt()).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(InputError, match=r"image 0 is broken .*is its file closed"):
        detector.predict(image)


def test_equal_images_are_refused_in_training():
    images = list(photographs(6))
    with pytest.raises(InputError, match=r"image 1 and image 6 are equal\. Pass each image once"):
        Detector.fit([*images, images[1]], config=tiny())


def test_a_forked_process_raises_an_error():
    """In a process of its own: to fork one with JAX's threads is what hangs."""
    code = """
import os
import numpy as np
from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.errors import InputError

c = default()
c.backbone, c.image_size = "pixels", (16,)
c.train.epochs, c.flow.steps, c.flow.hidden_ratio, c.batch_size = 1, 1, 2.0, 8
images = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
detector = Detector.fit(images, config=c)
child = os.fork()
if child == 0:
    try:
        detector.predict(images[0])
    except InputError as error:
        os._exit(7 if "forked" in str(error) else 8)
    os._exit(9)
status = os.waitpid(child, 0)[1]
detector.predict(images[0])
raise SystemExit(os.waitstatus_to_exitcode(status))
"""
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], timeout=200, capture_output=True, check=False
    )
    assert process.returncode == 7, process.stderr.decode()
