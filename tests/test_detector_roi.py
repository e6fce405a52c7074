"""Detectors with a region of interest: what is outside neither trains nor scores nor counts."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from fastflow_jax import Detector
from fastflow_jax.config import default, fill
from fastflow_jax.data.dataset import Dataset, Regions, Source
from fastflow_jax.detectors.base import DETECTORS, recipe
from fastflow_jax.errors import InputError
from fastflow_jax.exported import Exported
from fastflow_jax.runs import experiment

SIDE, EDGE = 16, 6  # of images, and of the region: columns below EDGE
FAR = 12  # columns from here on are beyond the receptive field of locations in the region
OWN = {
    "fastflow": {"flow.steps": 1, "flow.hidden_ratio": 2.0, "map.bank": 200},
    "cflow": {"cflow.steps": 1, "cflow.encoding": 8},
    "knn": {"knn.points": 500},
    "patchcore": {"patchcore.dimension": 8, "patchcore.projection": 8},
    "vae": {"vae.width": 4},
    "gan": {"gan.width": 4},
}
TRAINED = {"train.epochs": 2, "train.batch_size": 8}


def tiny(kind="knn", **fields):
    """A configuration that trains in seconds, on pixels."""
    c = default()
    c.update(recipe(kind))
    c.backbone, c.image_size, c.batch_size, c.data.holdout = "pixels", (SIDE,), 8, 0.25
    c.length_power, c.map.sigma = 1.0, 0.0
    c.update_from_flattened_dict(OWN.get(kind, {}))
    if kind in ("fastflow", "cflow", "vae", "gan"):
        c.update_from_flattened_dict(TRAINED)
    c.update_from_flattened_dict(fields)
    return c


def photographs(n=16, seed=0):
    return np.random.default_rng(seed).integers(118, 138, (n, SIDE, SIDE, 3), np.uint8)


def changed_far(images, seed=5):
    """The images with other pixels far from the region."""
    images = images.copy()
    shape = images[:, :, FAR:].shape
    images[:, :, FAR:] = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return images


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Files of the region and of a mask that is white everywhere."""
    folder = tmp_path_factory.mktemp("masks")
    region = np.zeros((SIDE, SIDE), np.uint8)
    region[:, :EDGE] = 255
    Image.fromarray(region).save(folder / "region.png")
    Image.fromarray(np.full_like(region, 255)).save(folder / "all.png")
    return folder


@pytest.fixture(scope="module", params=DETECTORS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def restricted(kind, masks):
    config = tiny(kind, **{"data.roi": str(masks / "region.png")})
    return Detector.fit(photographs(), config=config)


def assert_same(found, expected):
    """Equal scores and maps, to rounding."""
    size = max(1e-2, np.abs(expected.anomaly_map).max())
    assert found.score == pytest.approx(expected.score, rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-3 * size)


def test_a_defect_outside_changes_nothing_and_one_inside_does(kind, restricted):
    image = photographs(1, seed=9)[0]
    outside, inside = image.copy(), image.copy()
    outside[4:12, FAR:] = (250, 20, 20)
    inside[4:12, 1:4] = (250, 20, 20)
    usual, far, near = restricted.predict([image, outside, inside])
    assert_same(far, usual)
    assert near.score > usual.score + 1e-3
    # Relative: of VAE and GAN only the map is certain to react in a short training.
    assert near.anomaly_map.max() > usual.anomaly_map.max()
    for found in (usual, far, near):
        assert found.region[:, :EDGE].all()
        assert not found.region[:, EDGE:].any()
        rest = found.anomaly_map[:, EDGE:]
        assert (rest == found.anomaly_map[:, :EDGE].min()).all()
        assert not found.mask[:, EDGE:].any()


def test_what_is_outside_neither_trains_nor_calibrates(kind, restricted, masks):
    config = tiny(kind, **{"data.roi": str(masks / "region.png")})
    other = Detector.fit(changed_far(photographs()), config=config)
    images = photographs(3, seed=9)
    for found, expected in zip(other.predict(images), restricted.predict(images), strict=True):
        assert_same(found, expected)
    for found, expected in (
        (other.image_threshold, restricted.image_threshold),
        (other.pixel_threshold, restricted.pixel_threshold),
    ):
        assert found.value == pytest.approx(expected.value, rel=1e-3, abs=1e-4)


def test_a_white_mask_is_no_mask(kind, masks):
    with_mask = Detector.fit(
        photographs(), config=tiny(kind, **{"data.roi": str(masks / "all.png")})
    )
    without = Detector.fit(photographs(), config=tiny(kind))
    images = photographs(3, seed=9)
    for found, expected in zip(with_mask.predict(images), without.predict(images), strict=True):
        assert_same(found, expected)
    assert with_mask.image_threshold.value == pytest.approx(
        without.image_threshold.value, rel=1e-3, abs=1e-4
    )


@pytest.fixture(scope="module")
def detector(masks, tmp_path_factory):
    config = tiny(**{"data.roi": str(masks / "region.png")})
    return Detector.fit(photographs(), config=config, workdir=tmp_path_factory.mktemp("run") / "r")


def spoilt():
    image = photographs(1, seed=9)[0]
    image[4:12, 1:4] = (250, 20, 20)
    image[2:6, FAR:] = (20, 250, 20)
    return image


def test_the_region_travels_with_the_detector(detector, tmp_path, masks):
    expected = detector.predict(spoilt())
    file = detector.save(tmp_path / "saved.zip")
    for path in (file, detector.folder):
        found = Detector.load(path).predict(spoilt())
        np.testing.assert_array_equal(found.anomaly_map, expected.anomaly_map)
        np.testing.assert_array_equal(found.region, expected.region)
    (detector.folder / "roi.npz").rename(tmp_path / "away.npz")
    with pytest.raises(InputError, match="lacks its region of interest"):
        Detector.load(detector.folder)
    (tmp_path / "away.npz").rename(detector.folder / "roi.npz")


def test_images_of_another_aspect_ratio_are_refused(detector):
    with pytest.raises(InputError, match="Both must have the same aspect ratio"):
        detector.predict(np.zeros((20, 30, 3), np.uint8))
    large = np.asarray(Image.fromarray(spoilt()).resize((64, 64), Image.Resampling.NEAREST))
    found = detector.predict(large)
    assert found.region[:, : 4 * EDGE].all()
    assert not found.mask[:, 4 * EDGE :].any()


def test_the_exported_detector_has_the_region(detector, tmp_path):
    pytest.importorskip("onnx", reason="the package onnx writes the file")
    pytest.importorskip("onnxruntime", reason="onnxruntime runs it")
    detector.export(tmp_path / "d.onnx")
    exported = Exported(tmp_path / "d.onnx")
    found, expected = exported.predict(spoilt()), detector.predict(spoilt())
    assert found.score == pytest.approx(expected.score, rel=1e-4)
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-4)
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.region, expected.region)
    raw = exported.run(spoilt()[None])
    assert raw["mask"][0, :, :EDGE].any()
    assert not raw["mask"][0, :, EDGE:].any()
    with pytest.raises(InputError, match="Leave tile out"):
        exported.predict(np.zeros((64, 64, 3), np.uint8), tile=True)


def test_tiles_have_the_region_of_their_image(detector):
    image = photographs(1, seed=9)[0].repeat(4, 0).repeat(4, 1)
    other = image.copy()
    other[:, 4 * FAR :] = (250, 20, 20)
    usual, found = detector.predict([image, other], tile=True)
    assert_same(found, usual)
    assert not found.region[:, 4 * EDGE :].any()


def test_a_detector_without_masks_takes_none(detector):
    with pytest.raises(InputError, match=r"takes none\. Leave roi out"):
        detector.predict(spoilt(), roi=np.ones((SIDE, SIDE), bool))


@pytest.fixture(scope="module")
def of_masks(tmp_path_factory):
    """Images with a region each, a detector of them, and the directory."""
    root = tmp_path_factory.mktemp("own")
    for i, image in enumerate(changed_far(photographs())):
        region = np.zeros((SIDE, SIDE), np.uint8)
        region[:, :EDGE] = 255
        if i % 2:
            image, region = image[:, ::-1], region[:, ::-1]
        for folder, array in (("images", image), ("masks", region)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{i}.png")
    config = tiny(**{"data.roi_dir": str(root / "masks")})
    return Detector.fit(root / "images", config=config, workdir=root / "run"), root


def test_each_image_has_its_mask(of_masks):
    fitted, root = of_masks
    results = fitted.predict(root / "images", roi=root / "masks")
    for i, found in enumerate(sorted(results, key=lambda r: int(r.name.split("/")[-1][:-4]))):
        expected = np.zeros((SIDE, SIDE), bool)
        expected[:, slice(SIDE - EDGE, None) if i % 2 else slice(EDGE)] = True
        np.testing.assert_array_equal(found.region, expected)
        assert found.score < 3  # the noise of the rest is far from normal
    one = fitted.predict(root / "images/3.png", roi=root / "masks/3.png")
    assert one.region[:, -EDGE:].all()
    array = np.asarray(Image.open(root / "images/3.png"))
    assert fitted.predict(array, roi=one.region).score == one.score
    assert fitted.predict(array, roi=~one.region).score > 3 * one.score


def test_missing_masks_are_refused_with_a_remedy(of_masks, tmp_path):
    fitted, root = of_masks
    with pytest.raises(InputError, match=r"needs one for each new image\. Pass them"):
        fitted.predict(root / "images/3.png")
    with pytest.raises(InputError, match=r"3\.png does not exist\. Put the mask"):
        fitted.predict(root / "images/3.png", roi=tmp_path)
    with pytest.raises(InputError, match="Each image of this detector has a mask"):
        fitted.export(tmp_path / "d.onnx")
    with pytest.raises(InputError, match="cannot be taught"):
        fitted.update(photographs(2))


def test_the_command_line_takes_masks(of_masks, started, tmp_path, capsys):
    _, root = of_masks
    words = ["--mode=predict", f"--workdir={root / 'run'}", f"--input={root / 'images'}"]
    words.append("--heatmaps")
    status = started([*words, f"--output={tmp_path / 'out'}", f"--roi={root / 'masks'}"])
    assert status in (0, 1)
    assert "of 16 images are anomalous" in capsys.readouterr().out
    assert started([*words, f"--output={tmp_path / 'none'}"]) == 2
    assert "to `fastflow-jax predict` as --roi" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def objects(n, seed=0, side=64):
    """A textured square at random places on a grey background."""
    rng = np.random.default_rng(seed)
    images = rng.integers(98, 108, (n, side, side, 3), np.uint8)
    for image in images:
        row, column = rng.integers(14, 22, 2)
        image[row : row + 30, column : column + 30] = rng.integers(170, 230, (30, 30, 3))
    return images


@pytest.fixture(scope="module")
def automatic(tmp_path_factory):
    config = tiny(image_size=(64,), **{"data.roi": "auto"})
    return Detector.fit(objects(24), config=config, workdir=tmp_path_factory.mktemp("auto") / "r")


def test_the_foreground_is_found_in_every_image(automatic, tmp_path):
    image = objects(1, seed=3)[0]
    dirty = image.copy()
    dirty[1:6, 1:20] = (250, 20, 20)  # on the background, far from the object
    usual, found = automatic.predict([image, dirty])
    bright = image.mean(-1) > 140
    assert (usual.region == bright).mean() > 0.9
    again = Detector.load(automatic.save(tmp_path / "saved.zip")).predict(dirty)
    np.testing.assert_array_equal(again.region, found.region)
    with pytest.raises(InputError, match="Leave tile out"):
        automatic.predict(image, tile=True)


def test_the_exported_detector_finds_the_foreground(automatic, tmp_path):
    pytest.importorskip("onnx", reason="the package onnx writes the file")
    pytest.importorskip("onnxruntime", reason="onnxruntime runs it")
    automatic.export(tmp_path / "d.onnx")
    image = objects(1, seed=3)[0]
    image[30:34, 30:34] = (20, 20, 250)
    found, expected = (d.predict(image) for d in (Exported(tmp_path / "d.onnx"), automatic))
    assert found.score == pytest.approx(expected.score, rel=1e-4)
    # Without the region, the exported map is resized with its surroundings.
    inside = expected.region
    np.testing.assert_allclose(found.anomaly_map[inside], expected.anomaly_map[inside], atol=1e-3)
    np.testing.assert_array_equal(found.mask, expected.mask)


def test_images_of_one_texture_count_as_a_whole(caplog):
    fitted = Detector.fit(photographs(24), config=tiny(**{"data.roi": "auto"}))
    assert "no foreground can be separated" in caplog.text
    assert fitted.predict(photographs(1)[0]).region is None


def test_taught_images_are_taught_in_their_region(detector):
    images = photographs(6, seed=11)
    images[:, :, 2:4] = (30, 30, 200)
    taught = detector.update(images)
    other = detector.update(changed_far(images))
    assert_same(taught.predict(spoilt()), other.predict(spoilt()))
    for found, expected in zip(
        other.scorer.variables.values(), taught.scorer.variables.values(), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert len(taught.scorer.variables["bank_0"]) > len(detector.scorer.variables["bank_0"])


def test_taught_images_are_taught_in_their_foreground(automatic):
    images = objects(6, seed=21)
    dirty = images.copy()
    dirty[:, 1:6, 1:20] = (20, 20, 20)  # on the background
    clean, found = (automatic.update(each).scorer.variables["bank_0"] for each in (images, dirty))
    assert len(clean) > len(automatic.scorer.variables["bank_0"])
    np.testing.assert_allclose(found, clean, rtol=1e-3)


@pytest.mark.parametrize("has_regions", [False, True])
def test_defects_outside_of_the_region_are_not_counted(masks, tmp_path, caplog, has_regions):
    images = photographs(20)
    tests = photographs(8, seed=4)
    defects = np.zeros((8, SIDE, SIDE), bool)
    for i in range(4):
        defects[i, 4:8, 1:4] = True
        defects[i, 4:12, FAR:] = True
    defects[3, :, :EDGE] = False  # only outside
    tests[defects] = (250, 20, 20)
    kinds = ("spot",) * 4 + ("good",) * 4
    train = Source(tuple(map(str, range(20))), ("good",) * 20, lambda i: (images[i], None))
    test = Source(tuple(map(str, range(8))), kinds, lambda i: (tests[i], defects[i]))
    if has_regions:
        sides = np.arange(SIDE) < EDGE, np.arange(SIDE) >= EDGE
        parts = np.array([[mask & side for side in sides] for mask in defects])

        def regions(i):
            used = parts[i].any((1, 2))
            return Regions(parts[i][used], np.ones(used.sum(), np.float32))

        test = dataclasses.replace(test, regions=regions)
    config = fill(
        tiny(heatmaps=1, report_pictures=4, **{"data.roi": str(masks / "region.png"), "audit": 0.0})
    )
    opened = Dataset("folder", train, test, {})
    results = run_on(opened, config, tmp_path / "run")
    part = results["categories"]["folder"]
    assert part["pixel_auroc"] > 0.99
    assert part["aupro"] > 0.95
    (size,) = {row["regions"] for row in results["sizes"]["folder/0"]}
    assert size == 3  # those inside, not those outside
    assert "1 of 4 defective test images have no defect in the region" in caplog.text
    assert results["protocol"]["roi"].endswith("region.png")


def run_on(dataset, config, workdir):
    """A run of `experiment` on a data set in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastflow_jax.data.opener", lambda section: lambda category: dataset)
        return experiment.run(config, workdir)
