"""Features are computed once for all runs that share them."""

import io
import json
import weakref

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from fastflow_jax.config import default, fill
from fastflow_jax.data.tfds import cifar10
from fastflow_jax.errors import InputError
from fastflow_jax.features import prepare
from fastflow_jax.features.extract import extractor
from fastflow_jax.features.prepare import feature_fingerprint, image_batches, preparer
from fastflow_jax.runs import experiment

PER_CLASS = {"train": 4, "test": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A small CIFAR-10, as directories of image files."""
    root, rng = tmp_path_factory.mktemp("cifar10"), np.random.default_rng(0)
    for split, n in PER_CLASS.items():
        for name in cifar10.CATEGORIES:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def miniature(monkeypatch):
    counts = (10 * PER_CLASS["train"], 10 * PER_CLASS["test"])
    monkeypatch.setattr(cifar10, "COUNTS", counts)


@pytest.fixture
def tiny(images):
    def make(**fields):
        c = default()
        c.data.name, c.data.root = "cifar10", str(images)
        c.weights, c.image_size, c.layers = "random", (32,), ("blocks.2",)
        c.flow.steps, c.flow.kernels, c.flow.hidden_ratio = 1, (3,), 0.5
        c.map.bank = 20
        c.train.epochs, c.train.batch_size = 1, 8
        c.batch_size = 8
        c.heatmaps, c.report = 0, False
        c.data.holdout = 0.25
        c.update_from_flattened_dict(fields)
        return fill(c)

    return make


@pytest.fixture
def seen(monkeypatch):
    """Number of images in each call of the extractor."""
    counted = []

    def counting(*arguments):
        extract = extractor(*arguments)

        def call(images):
            counted.append(len(images))
            return extract(images)

        return call

    monkeypatch.setattr(prepare, "extractor", counting)
    return counted


def test_categories_share_the_features_of_their_images(tiny, seen, tmp_path):
    config = tiny()
    get = preparer(config, tmp_path)
    for name in ("bird", "ship"):
        prepared = get(config, name, 0)
        dataset = prepared.dataset
        direct = extractor(prepared.backbone, config.length_power, "pmap", 8, "float16")
        train, test = (
            np.concatenate(
                [direct(b.image)[0] for b in image_batches(config, prepared.backbone, s)]
            )
            for s in (dataset.train, dataset.test)
        )
        np.testing.assert_allclose(prepared.train.cached[0], train[:3], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(prepared.holdout[0], train[3:], rtol=1e-5, atol=1e-5)
        batches = list(prepared.test())
        for given, expected in (
            (np.concatenate([b.features[0] for b in batches]), test),
            (np.concatenate([b.label for b in batches]), dataset.test.labels),
            (np.concatenate([b.index for b in batches]), np.arange(20)),
        ):
            np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)
        assert {b.mask for b in batches} == {None}
    assert sum(seen) == 40 + 20


def test_a_run_computes_features_once_per_image_and_backbone(tiny, seen, tmp_path):
    results = experiment.run(
        tiny(**{"data.category": "bird,cat", "seeds": 2, "heatmaps": 3}), tmp_path / "run"
    )
    assert sum(seen) == 2 * 60  # random weights: each seed has a backbone of its own
    assert list(results["categories"]) == ["bird", "cat"]
    assert list(results["seeds"]) == ["0", "1"]
    assert [list(rows) for rows in results["seeds"].values()] == [["bird", "cat"]] * 2


@pytest.mark.parametrize("resize", ["square", "pad"])  # features of all categories, or of one
def test_a_run_that_is_killed_while_computing_features_reuses_complete_ones(
    tiny, seen, tmp_path, monkeypatch, resize
):
    fields = {"data.category": "bird", "data.resize": resize, "batch_size": 2}
    undisturbed = experiment.run(tiny(**fields), tmp_path / "one")
    total = sum(seen)
    seen.clear()
    config, images = tiny(**fields, **{"train.cache": "disk"}), prepare.image_batches

    def dying(*arguments):
        for batch in images(*arguments):
            if sum(seen) == total - 4:  # within the test images
                raise RuntimeError("killed")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "image_batches", dying)
        with pytest.raises(RuntimeError, match="killed"):
            experiment.run(config, tmp_path / "two")
    assert (tmp_path / "two" / "features").exists()
    resumed = experiment.run(config, tmp_path / "two")
    assert sum(seen) == total
    assert resumed["categories"] == undisturbed["categories"]
    assert not (tmp_path / "two" / "features").exists()


def test_tampered_test_images_are_computed_once_for_all_categories(tiny, seen, tmp_path):
    config = tiny(**{"data.category": "bird,cat"})
    with config.unlocked():
        config.variants = ConfigDict({"plain": {}, "turned": {"data": {"tamper": {"rotate": 9.0}}}})
    results = experiment.run(fill(config), tmp_path / "run")
    assert sum(seen) == 40 + 20 + 20
    one, other = (results["variants"][name]["categories"] for name in ("plain", "turned"))
    assert one["bird"] != other["bird"]


@pytest.mark.parametrize("size", [(32,), (32, 48)])
def test_padding_masks_are_read_for_images_that_categories_share(tiny, size, tmp_path):
    config = tiny(image_size=size, **{"data.resize": "pad"})
    prepared = preparer(config, tmp_path)(config, "bird", 0)
    for valid in (prepared.holdout_valid, next(iter(prepared.test())).valid):
        assert valid.shape[1:] == config.image_size
        assert valid.mean() == pytest.approx(32 / config.image_size[1])


def test_without_a_cache_features_are_computed_again(tiny, seen, tmp_path):
    config = tiny(**{"train.cache": "none"})
    prepared = preparer(config, tmp_path)(config, "bird", 0)
    assert prepared.train.cached is None
    seen.clear()
    for _ in range(2):
        assert sum(len(batch.label) for batch in prepared.test()) == 20
    assert sum(seen) == 2 * 20


def test_features_of_test_images_are_computed_after_training(tiny, seen, tmp_path):
    config = tiny(**{"data.resize": "pad"})  # one category, with padding masks
    prepared = preparer(config, tmp_path)(config, "bird", 0)
    assert sum(seen) == PER_CLASS["train"]
    for _ in range(2):
        assert sum(len(batch.label) for batch in prepared.test()) == 20
    assert sum(seen) == PER_CLASS["train"] + 20


def test_a_broken_test_image_is_an_error_before_any_feature_is_computed(seen, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), np.uint8)
    files = ["train/good/0.png", "train/good/1.png", "test/good/0.png", "test/scratch/1.png"]
    for name, image in zip([*files, "ground_truth/scratch/1_mask.png"], pixels, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    broken = tmp_path / files[-1]
    broken.write_bytes(broken.read_bytes()[:-900])
    c = default()
    c.data.name, c.data.root = "folder", str(tmp_path)
    c.weights, c.image_size, c.layers = "random", (32,), ("blocks.2",)
    config = fill(c)
    with pytest.raises(InputError, match=r"1\.png is broken"):
        preparer(config, tmp_path / "features")(config, None, 0)
    assert not seen


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_test_images_can_be_selected_in_any_order(tiny, tmp_path, cache):
    config = tiny(**{"train.cache": cache, "data.resize": "pad", "image_size": (32, 48)})
    prepared = preparer(config, tmp_path)(config, "bird", 0)
    (some,), whole = prepared.test([17, 3]), list(prepared.test())
    assert some.index.tolist() == [17, 3]
    assert some.label.tolist() == prepared.dataset.test.labels[[17, 3]].tolist()
    assert some.valid.shape == (2, 32, 48)
    for row, i in enumerate((17, 3)):
        batch = whole[i // 8]
        np.testing.assert_allclose(
            some.features[0][row], batch.features[0][i % 8], rtol=1e-3, atol=1e-3
        )


def test_heat_maps_are_drawn_without_masks(tiny, tmp_path):
    cifar10_run = tiny(**{"data.category": "frog", "heatmaps": 3})
    experiment.run(cifar10_run, tmp_path / "run")
    assert len(list((tmp_path / "run/heatmaps").glob("*/*.png"))) == 3
    note = json.loads((tmp_path / "run/results.json").read_text())["protocol"]["data"]["frog"]
    assert "re-encoded" in note["note"]


def test_the_fingerprint_depends_on_the_settings_of_features(tiny):
    one = tiny()
    changes = {
        "image_size": (48,),
        "layers": ("blocks.1",),
        "length_power": 0.25,
        "feature_dtype": "float32",
        "data.resize": "pad",
    }
    for field, value in changes.items():
        assert feature_fingerprint(tiny(**{field: value}), 0) != feature_fingerprint(one, 0)
    assert feature_fingerprint(one, 0) != feature_fingerprint(one, 1)
    trained = tiny(weights="tf_efficientnet_lite0.in1k")
    assert feature_fingerprint(trained, 0) == feature_fingerprint(trained, 1)
    for field, value in {"flow.steps": 2, "score.form": "top_k", "seed": 3}.items():
        assert feature_fingerprint(tiny(**{field: value}), 0) == feature_fingerprint(one, 0)


COPIES = {"augment.rotate": 20.0, "augment.copies": 2}


def test_features_of_copies_follow_those_of_the_images(tiny, seen, tmp_path):
    plain, config = tiny(), tiny(**COPIES)
    images = preparer(plain, tmp_path)(plain, "bird", 0)
    get = preparer(config, tmp_path)
    prepared = get(config, "bird", 0)
    assert sum(seen) == 40 + 3 * 3 + 2 * 1  # a held-out image unchanged, to find siblings, and once
    assert (prepared.n_trained_on, prepared.train.n) == (3, 9)
    assert prepared.groups.tolist() == 3 * [0, 1, 2]
    whole = prepared.train.cached[0]
    np.testing.assert_allclose(whole[:3], images.train.cached[0], rtol=1e-3, atol=1e-3)
    assert len(np.unique(whole.reshape(9, -1), axis=0)) == 9
    assert prepared.contents == images.contents
    assert prepared.holdout[0].shape == images.holdout[0].shape
    assert (prepared.holdout[0] != np.asarray(images.holdout[0])).any()


@pytest.mark.parametrize("change", [{"augment.rotate": 5.0}, {"augment.flips": True}])
def test_copies_on_disk_are_computed_again_for_other_changes(tiny, seen, tmp_path, change):
    def count(**fields):
        seen.clear()
        config = tiny(**{"train.cache": "disk"} | COPIES | fields)
        preparer(config, tmp_path)(config, "bird", 0)
        return sum(seen)

    assert [count(), count(), count(**change)] == [11, 0, 11]


def test_without_a_cache_copies_do_not_change(tiny, tmp_path):
    config = tiny(**COPIES, **{"train.cache": "none"})
    train = preparer(config, tmp_path)(config, "bird", 0).train
    assert train.cached is None
    first, second = (next(train.stream(epoch, np.arange(8)[None]))[0] for epoch in (0, 1))
    np.testing.assert_array_equal(first, second)


def test_all_seeds_share_the_features_of_copies(screws, tmp_path):
    c, folder = default(), screws / "train/good"
    c.data.root, c.backbone, c.image_size = str(folder), "pixels", (16,)
    c.augment.flips, c.augment.copies = True, 2
    get = preparer(fill(c), tmp_path / "features")
    assert get(fill(c), None, 0).train is get(fill(c), None, 1).train


def test_copies_are_no_siblings(tiny, tmp_path, caplog):
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (40, 20, 20, 3))):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i:02}.png")
    fields = {"data.name": "folder", "data.root": str(tmp_path)}
    config = tiny(**fields, **{"augment.colour": 0.01, "augment.copies": 2})
    preparer(config, tmp_path / ".features")(config, None, 0)
    assert not [message for message in caplog.messages if "calibration/good" in message]


def test_keep_last_frees_a_value_before_it_makes_the_next():
    made = []

    def make(n):
        assert all(each() is None for each in made)
        array = np.zeros(n)
        made.append(weakref.ref(array))
        return array

    last = prepare.KeepLast()
    assert last.get("a", lambda: make(1)) is last.get("a", lambda: make(1))
    last.get("b", lambda: make(2))
    assert len(made) == 2


@pytest.fixture
def screws(tmp_path):
    """A directory of 32x32 images, two of them defective and without masks."""
    root = tmp_path / "screws"
    names = ("train/good/0", "train/good/1", "test/good/0", "test/crack/0", "test/crack/1")
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (90, 90, 90 + i)).save(root / f"{name}.png")
    (root / "ground_truth/crack").mkdir(parents=True)
    return root


def test_blank_masks_of_defective_images_are_reported(screws, tmp_path, caplog):
    for i in range(2):
        mask = np.zeros((32, 32), np.uint8)
        mask[:8, :8] = 255 * i
        Image.fromarray(mask).save(screws / f"ground_truth/crack/{i}_mask.png")
    c = default()
    c.data.root, c.backbone, c.image_size = str(screws), "pixels", (16,)
    preparer(fill(c), tmp_path / "features")(fill(c), None, 0)
    (message,) = (m for m in caplog.messages if "are empty" in m)
    assert "at 16x16 the masks of 1 defective images" in message
    assert "crack/0.png" in message


def test_masks_with_a_halo_are_reported_once(screws, tmp_path, caplog):
    mask = np.zeros((32, 32), np.uint8)
    mask[5:19, 6:25] = 255
    for name in ("0", "1"):
        jpeg = io.BytesIO()
        Image.fromarray(mask).save(jpeg, "JPEG")
        Image.open(jpeg).save(screws / f"ground_truth/crack/{name}_mask.png")
    c = default()
    c.data.root, c.backbone, c.image_size = str(screws), "pixels", (32,)
    prepared = preparer(fill(c), tmp_path / "features")(fill(c), None, 0)
    (batch,) = prepared.test()
    marked = (mask > 0).sum()
    assert batch.mask.sum((1, 2)).tolist() == [marked, marked, 0]
    reported = [line for line in caplog.messages if "grey levels" in line]
    assert len(reported) == 1
    assert "2 masks" in reported[0]
    assert "crack/0_mask.png" in reported[0]


# Uncompressed files with as many pixels have as many bytes: only their times differ.
@pytest.mark.parametrize(("kind", "side"), [("png", 40), ("bmp", 20)])
def test_features_on_disk_are_computed_again_for_changed_files(tmp_path, kind, side):
    for i in range(4):
        Image.new("RGB", (20, 20), (90, 90, 90 + i)).save(tmp_path / f"{i}.{kind}")
    c = default()
    c.data.root, c.backbone, c.image_size = str(tmp_path), "pixels", (16,)
    c.train.cache = "disk"

    def brightness():
        prepared = preparer(fill(c), tmp_path / ".features")(fill(c), None, 0)
        return float(np.mean(next(prepared.train.in_batches(4))[0][0]))

    dark = brightness()
    for i in range(4):
        Image.new("RGB", (side, side), (250, 250, 250 - i)).save(tmp_path / f"{i}.{kind}")
    assert brightness() > dark + 0.5


def test_dark_images_of_a_camera_with_fewer_bits_than_its_files_are_reported(tmp_path, caplog):
    root = tmp_path / "screws"
    root.mkdir()
    for i, value in enumerate((4095, 2000)):
        Image.fromarray(np.full((32, 32), value, np.uint16)).save(root / f"{i}.png")
    c = default()
    c.data.root, c.backbone, c.image_size = str(root), "pixels", (16,)
    preparer(fill(c), tmp_path / "features")(fill(c), None, 0)
    assert "no value above 15 of 255" in caplog.text
    caplog.clear()
    Image.fromarray(np.full((32, 32), 65535, np.uint16)).save(root / "0.png")
    preparer(fill(c), tmp_path / "features")(fill(c), None, 0)
    assert "of 255" not in caplog.text
