"""Teaching new normal images: `Detector.update`, versions of a run, and `--mode=update`."""

import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import fastflow_jax.runs.versions
from fastflow_jax import Detector
from fastflow_jax.config import default
from fastflow_jax.detectors.base import DETECTORS, recipe
from fastflow_jax.errors import InputError

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "durable"
TEACHABLE = ("fastflow", "knn", "patchcore", "spade")


def tiny(kind, **fields):
    """A configuration that trains in seconds, on pixels."""
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size, c.batch_size = "pixels", (16,), 8
    c.data.holdout = 0.5
    if kind == "fastflow":
        fields = {"flow.steps": 1, "flow.hidden_ratio": 1.0, "map.bank": 400, **fields}
        fields = {"train.epochs": 1, "train.batch_size": 8, **fields}
    if kind == "patchcore":
        fields = {"patchcore.dimension": 8, "patchcore.projection": 4, **fields}
    c.update_from_flattened_dict(fields)
    return c


def photographs(n, seed=0, light=0):
    """Evenly grey, with a little noise, uint8 [n, 20, 20, 3]; `light` makes them brighter."""
    return np.random.default_rng(seed).integers(118 + light, 138 + light, (n, 20, 20, 3), np.uint8)


def spoilt(seed=9, light=0):
    image = photographs(1, seed, light)[0]
    image[6:14, 6:14] = (250, 20, 20)
    return image


def flagged(detector, images):
    return np.mean([result.is_anomalous for result in detector.stream(images)])


@pytest.fixture(scope="module")
def fitted():
    """A function that fits a detector once."""
    known = {}

    def of(kind):
        if kind not in known:
            known[kind] = Detector.fit(photographs(40), config=tiny(kind))
        return known[kind]

    return of


@pytest.mark.parametrize("kind", TEACHABLE)
def test_taught_images_and_others_of_their_kind_are_normal(kind, fitted, tmp_path):
    before = fitted(kind)
    brighter, others = photographs(20, 1, light=40), photographs(40, 2, light=40)
    old = photographs(40, 3)
    assert flagged(before, others) == flagged(before, brighter) == 1
    after = before.update(brighter)
    assert flagged(after, brighter) == 0
    assert flagged(after, others) <= 0.15  # stated: .05, of 40 images
    assert flagged(after, old) <= flagged(before, old) <= 0.15
    assert flagged(after, [spoilt(), spoilt(8, light=40)]) == 1
    for one, other in zip(before.stream(old), after.stream(old), strict=True):
        assert other.score <= one.score + 1e-4 * max(1, abs(one.score))
        assert other.p_value >= one.p_value
    assert after.image_threshold.rate == before.image_threshold.rate == 0.05
    images = [*others[:7], spoilt()]
    results = after.predict(images)
    again = Detector.load(after.save(tmp_path / "saved.zip")).predict(images)
    for one, other in zip(results, again, strict=True):
        assert (one.p_value, one.is_anomalous) == (other.p_value, other.is_anomalous)
        assert one.score == pytest.approx(other.score, rel=1e-4)


def test_a_taught_image_that_was_flagged_is_normal(fitted):
    before, image = fitted("knn"), spoilt()
    assert flagged(before, [image]) == 1
    after = before.update(image)
    assert flagged(after, [image]) == 0
    assert after.image_threshold == before.image_threshold
    assert after.held_out is before.held_out
    blue = image.copy()
    blue[6:14, 6:14] = (20, 20, 250)
    assert flagged(after, [blue]) == 1


@pytest.mark.parametrize("kind", sorted(DETECTORS.keys() - {*TEACHABLE}))
def test_detectors_without_stored_images_refuse(kind):
    detector = Detector.load(GOLDENS / f"{kind}.zip")
    with pytest.raises(InputError, match=f"The detector {kind} stores no normal images.*knn"):
        detector.update(photographs(2, 1))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("fastflow", {"map.bank": 0}, "no memory banks.*map.bank above 0"),
        ("patchcore", {"patchcore.reweight": 3}, "scores may rise.*patchcore.reweight=0"),
        ("knn", {"knn.points": 1}, "more than 3 times the 1 rows"),
    ],
)
def test_settings_that_cannot_be_taught_are_named(kind, fields, message):
    detector = Detector.fit(photographs(8), config=tiny(kind, **fields))
    with pytest.raises(InputError, match=message):
        detector.update(photographs(5, 1, light=40))


def test_bad_input_is_refused(fitted, tmp_path):
    detector, image = fitted("knn"), photographs(1)[0]
    for images, message in [
        ([], "no images to teach"),
        (tmp_path, "no images"),
        ([image, "missing.png"], "missing.png"),
        ([image, np.zeros((4, 4))], "image 1 is an array of float64"),
        ([image, image], "image 0 and image 1 are equal"),
        (np.random.default_rng(0).integers(0, 255, (1001, 4, 4, 3), np.uint8), "more than 1000"),
    ]:
        with pytest.raises(InputError, match=message):
            detector.update(images)
    with pytest.raises(InputError, match="2 groups for 1 images"):
        detector.update([image], groups=[1, 2])


def test_copies_of_an_image_are_left_out(fitted, tmp_path, caplog):
    image = Image.fromarray(photographs(1, 1)[0])
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)
    after = fitted("knn").update(tmp_path)
    assert "1 of 2 images are copies" in caplog.text
    assert after.held_out.kinds is None


def test_images_of_another_size_are_named_once(fitted, caplog):
    wide = np.random.default_rng(5).integers(118, 138, (30, 20, 90, 3), np.uint8)
    after = fitted("knn").update(wide)
    assert "image 0 differs from the training images: it has 90 x 20 pixels" in caplog.text
    caplog.clear()
    after.predict([*wide[:2], *photographs(2)])
    assert "differs" not in caplog.text


def test_defective_looking_images_are_named(fitted, caplog):
    after = fitted("knn").update([*photographs(20, 1), spoilt(), *photographs(20, 2)])
    (warning,) = [r.message for r in caplog.records if "may be defective" in r.message]
    assert warning.startswith("1 images may be defective")
    assert ": image 20. Look at" in warning
    assert flagged(after, [spoilt()]) == 0  # it is taught nevertheless


def test_few_images_state_the_rate_that_they_support(fitted, caplog):
    detector = fitted("knn")
    after = detector.update(photographs(9, 1, light=40))
    assert "9 images cannot support a false-alarm rate of 0.05" in caplog.text
    assert "it is 0.1 on average. Teach at least 19" in caplog.text
    assert not after.image_threshold.supported
    assert after.image_threshold.value >= detector.image_threshold.value
    caplog.clear()
    detector.update(photographs(1, 1, light=40))
    assert "One image or part says nothing on others" in caplog.text


def test_a_threshold_stays_if_it_must_or_has_no_rate(fitted, caplog):
    detector, brighter = fitted("knn"), photographs(30, 1, light=40)
    kept = detector.update(brighter, keep_threshold=True)
    assert kept.image_threshold == detector.image_threshold
    assert kept.held_out is detector.held_out
    assert flagged(kept, brighter) == 0
    given = detector.with_threshold(detector.image_threshold.value * 1.5)
    after = given.update(brighter)
    assert after.image_threshold == given.image_threshold
    assert "not chosen by a false-alarm rate" in caplog.text


def test_images_of_a_part_do_not_vouch_for_each_other(fitted):
    """Noise of one level each: those of a part are nearly equal, and parts differ."""
    rng = np.random.default_rng(0)
    parts = rng.integers(60, 200, (1, 10, 20, 20, 3))
    images = np.uint8(parts + rng.integers(-1, 2, (4, 10, 20, 20, 3))).reshape(-1, 20, 20, 3)
    groups = np.tile(np.arange(10), 4)
    detector = fitted("knn")
    known, unknown = (
        detector.update(images, groups=g).held_out.scores[20:] for g in (groups, None)
    )
    assert np.median(known) > 1.5 * np.median(unknown)


def test_taught_images_no_longer_look_shifted(fitted):
    detector = fitted("knn")
    others = photographs(60, 2, light=40)

    def shift(detector):
        return detector.find_shift({r.name: r.distance for r in detector.stream(others)})

    assert shift(detector).message
    assert shift(detector.update(photographs(40, 1, light=40))).message is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "grey"
    Detector.fit(photographs(40), config=tiny("knn"), workdir=folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A run directory; tests change it."""
    return pathlib.Path(shutil.copytree(trained, tmp_path / "runs" / "grey"))


@pytest.fixture
def photos(tmp_path):
    """Brighter images in a directory."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(photographs(20, 1, light=40)):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def update(run, photos, started):
    """Runs --mode=update with flags, by default with the images."""

    def call(*flags):
        flags = flags or (f"--input={photos}",)
        return started(["--mode=update", f"--workdir={run}", *flags])

    return call


def score_of(run):
    return Detector.load(run).predict(photographs(1, 2, light=40)[0]).score


def test_versions_are_added_and_taken_back(run, update, photos, capsys):
    scores = [score_of(run)]
    for number in (2, 3):
        Image.fromarray(photographs(1, number, light=40)[0]).save(photos / "another.png")
        assert update() == 0
        assert f"version {number} now" in capsys.readouterr().out
        scores.append(score_of(run))
    assert scores[1] < scores[0] / 2
    Detector.load(run).with_threshold(7.0).save()
    assert Detector.load(run).image_threshold.value == 7
    assert score_of(run) == scores[2]
    assert update("--undo") == 0
    assert "version 2 again" in capsys.readouterr().out
    assert score_of(run) == scores[1]
    assert Detector.load(run).image_threshold.value != 7
    assert update() == 0  # its number is new
    assert sorted(path.name for path in (run / "versions").iterdir()) == ["2", "3", "4"]
    for number in ("2", "1, that of the training,"):
        assert update("--undo") == 0
        assert f"version {number} again" in capsys.readouterr().out
    assert score_of(run) == scores[0]
    assert update("--undo") == 2
    assert "no update to take back" in capsys.readouterr().err


def test_a_killed_update_leaves_the_earlier_version(run, update, monkeypatch):
    before = score_of(run)
    with monkeypatch.context() as patch:
        patch.setattr(fastflow_jax.runs.versions, "write_description", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            update()
    assert score_of(run) == before
    assert update() == 0
    assert score_of(run) < before
    assert [path.name for path in (run / "versions").iterdir()] == ["2"]


def test_the_same_images_are_not_taught_twice(run, update, photos, capsys):
    assert update() == 0
    taught = score_of(run)
    assert update() == 0
    assert "already taught" in capsys.readouterr().out
    assert [path.name for path in (run / "versions").iterdir()] == ["2"]
    assert score_of(run) == taught
    assert update(f"--input={photos}", "--keep_threshold") == 0
    assert update("--undo") == 0
    assert "version 2 again" in capsys.readouterr().out


def test_a_damaged_version_is_named_and_can_be_taken_back(run, update, capsys):
    before = score_of(run)
    assert update() == 0
    file = run / "versions" / "2" / "detector.json"
    file.write_text(file.read_text().replace("knn", "knm"))
    with pytest.raises(InputError, match=r"has changed. Restore it.*fastflow-jax update --undo"):
        Detector.load(run)
    assert update("--undo") == 0
    assert score_of(run) == before


def test_only_run_directories_have_versions(run, update, started, photos, capsys):
    saved = Detector.load(run).save(run.parent / "saved")
    flags = ["--mode=update", f"--input={photos}"]
    for path, message in [
        (saved, "is a saved detector, which has no versions"),
        (run.parent, "has several trainings"),
        (run.parent / "none", "is not a directory"),
    ]:
        assert started([*flags, f"--workdir={path}"]) == 2
        assert message in capsys.readouterr().err
    assert update() == 0
    with pytest.raises(InputError) as error:
        Detector.load(run.parent)
    assert str(run) in str(error.value)
    assert "versions" not in str(error.value)
    assert update("--undo", f"--input={photos}") == 2
    assert update("--output=x") == 2


def test_a_run_in_use_is_refused(run, update, capsys):
    with fastflow_jax.runs.versions.changing(run):
        assert update() == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_heat_maps_show_images_that_may_be_defective(update, photos, tmp_path, caplog):
    (photos / "more").mkdir()
    Image.fromarray(spoilt(light=40)).save(photos / "more" / "odd.png")
    with caplog.at_level(logging.INFO):
        assert update(f"--input={photos}", f"--output={tmp_path / 'out'}") == 0
    found = [path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("out/**/*.*")]
    assert found == ["heatmaps/more/odd.png.png"]


def test_an_exported_detector_is_exported_again(run, update):
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package, reason="ONNX export needs the extra onnx")
    from fastflow_jax.predict import EXPORTED, export_once

    image = photographs(1, 2, light=40)[0]
    export_once(run)
    for flags in ((), ("--undo",)):
        assert update(*flags) == 0
        from fastflow_jax.exported import Exported

        exported = Exported(run / EXPORTED)
        one, other = exported.predict(image), Detector.load(run).predict(image)
        assert one.score == pytest.approx(other.score, rel=1e-3)
        assert one.p_value == pytest.approx(other.p_value)
        assert exported.with_threshold(rate=0.3).image_threshold.value == pytest.approx(
            Detector.load(run).with_threshold(rate=0.3).image_threshold.value
        )
    assert json.loads((run / "detector.json").read_text()).get("taught") is None


@pytest.fixture(scope="module")
def tunable(tmp_path_factory):
    """A run of FastFlow, in a directory with its images."""
    folder = tmp_path_factory.mktemp("tunable")
    (folder / "good").mkdir()
    for i, image in enumerate(photographs(16)):
        Image.fromarray(image).save(folder / "good" / f"{i:02}.png")
    config = tiny("fastflow", **{"data.holdout": 0.25, "train.epochs": 5})
    Detector.fit(folder / "good", config=config, workdir=folder / "run")
    return folder


def test_fine_tuning_continues_the_training_with_new_images(tunable, photos, started, capsys):
    run, image = tunable / "run", photographs(1, 2, light=40)[0]
    before = Detector.load(run)
    command = ["--mode=update", f"--workdir={run}", f"--input={photos}", "--finetune"]
    assert started(command) == 0
    assert "20 images are taught" in capsys.readouterr().out
    after = Detector.load(run)
    result = after.predict(image)
    assert not result.is_anomalous
    assert result.log_likelihood > before.predict(image).log_likelihood
    assert after.image_threshold.rate == before.image_threshold.rate
    assert (after.held_out.kinds == 1).sum() == 10  # those that the flows were not trained on
    assert after.config.to_dict() == before.config.to_dict()
    assert flagged(after, sorted(photos.iterdir())) == 0
    scale = [d.scorer.variables["params"]["flow_0"] for d in (before, after)]
    one, other = (np.concatenate([x.ravel() for x in leaves(tree)]) for tree in scale)
    # Three steps of Adam at a tenth of the rate, from there: ten of the training went further.
    assert 0 < np.abs(one - other).max() < 0.5 * after.config.train.learning_rate
    assert started(command) == 0
    assert "are already taught" in capsys.readouterr().out
    min(photos.iterdir()).unlink()
    assert started(command) == 2
    assert "was updated before" in capsys.readouterr().err
    (tunable / "good" / "00.png").unlink()
    assert started(["--mode=update", f"--workdir={run}", "--undo"]) == 0
    assert started(command) == 2
    assert "training images are not those" in capsys.readouterr().err


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_fine_tuning_needs_fastflow_and_its_images(run, update, photos, tmp_path, capsys):
    assert update(f"--input={photos}", "--finetune") == 2
    assert "The detector knn cannot be fine-tuned. Leave --finetune out" in capsys.readouterr().err
