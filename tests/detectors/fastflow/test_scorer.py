"""Calibration by held-out normal features, and scores of images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, uniform_filter

from fastflow_jax.backbones import create_backbone
from fastflow_jax.config import default, fill
from fastflow_jax.detector import Detector
from fastflow_jax.detectors.calibration import Calibration, calibrate_on, fuse
from fastflow_jax.detectors.fastflow.model import location_energies
from fastflow_jax.detectors.fastflow.scorer import (
    FastFlowScorer,
    calibrated,
    fit,
    flow_model,
    load,
    read,
    with_banks,
)
from fastflow_jax.detectors.maps import window_maxima
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import cached_features, compress
from fastflow_jax.files import write_arrays
from fastflow_jax.training.context import FitContext


@pytest.fixture(scope="module")
def setup():
    c = default()
    c.weights, c.image_size, c.layers = "random", (32, 48), ("blocks.0", "blocks.1")
    c.flow.steps, c.train.batch_size = 1, 4
    c.batch_size = 4
    c.flow.zero_init = False
    config = fill(c)
    backbone = create_backbone(config.backbone, weights="random", layers=config.layers)
    model = flow_model(config)
    images = np.random.default_rng(0).normal(size=(11, 32, 48, 3)).astype(np.float32)
    features = tuple(np.asarray(compress(m, config.length_power)) for m in backbone(images))
    variables = jax.jit(model.init)(jax.random.key(0), tuple(m[:1] for m in features))
    return config, backbone, model, variables, images, features


def location_maps(setup, config):
    _, _, model, variables, _, features = setup
    latents = jax.jit(model.apply)(variables, features)
    return [
        location_energies(z, ld, form=config.map.form, log_det_weight=config.map.log_det)
        for z, ld in latents
    ]


def inside_shares(size, side):
    """Share of the neighbourhood of each location that is inside a map of this size."""
    return uniform_filter(np.pad(np.ones(size), side), side)[side:-side, side:-side]


def test_calibrated_maps_and_windows_have_mean_0_and_deviation_1(setup):
    config, _, _, variables, _, features = setup
    calibration = calibrated(config, variables, features).calibration
    maps = location_maps(setup, config)
    for m, mean, std in zip(maps, calibration.scale_mean, calibration.scale_std, strict=True):
        standard = (np.asarray(m) - mean) / std
        assert standard.mean() == pytest.approx(0, abs=1e-3)
        assert standard.std() == pytest.approx(1, abs=1e-3)
    for m, mean, std in zip(maps, calibration.window_mean, calibration.peak_std, strict=True):
        standard = (window_maxima(m) - mean) / std
        assert standard.mean() == pytest.approx(0, abs=1e-3)
        assert standard[:, 0].std() == pytest.approx(1, abs=1e-3)


def test_without_held_out_images_scores_are_not_calibrated(setup):
    config, _, _model, variables, _, _ = setup
    calibration = calibrated(config, variables, None).calibration
    maps = location_maps(setup, config)
    resized = [jax.image.resize(m, (11, 32, 48), "bilinear") for m in maps]
    np.testing.assert_allclose(
        fuse(maps, calibration, (32, 48)), (resized[0] + resized[1]) / 2, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("n", [1, 2])
def test_scores_are_finite_and_balanced_with_few_held_out_images(setup, n):
    config, _, _, variables, _, features = setup
    calibration = calibrated(config, variables, tuple(m[:n] for m in features)).calibration
    spread = calibration.peak_std / calibration.scale_std
    assert np.all(np.isfinite(spread))
    assert spread.min() >= 0.09 * spread.mean() > 0
    assert np.all(calibration.scale_std > 0)


def test_a_deviation_of_rounding_errors_is_not_used(setup):
    """As of distances from a bank that holds copies of the held-out images."""
    rounding = 1e-8 * np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32)
    calibration = calibrate_on(setup[0], (rounding,), np.ones(1))
    assert calibration.scale_std.tolist() == [1.0]
    assert calibration.peak_std.tolist() == [1.0]


def test_no_map_dominates_because_few_images_agree(setup):
    config = setup[0]
    apart = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    agreed = apart.copy()
    agreed[:, 4, 4] = 9.0  # the highest location of every image
    calibration = calibrate_on(config, (apart, agreed), np.ones(2))
    spread = calibration.peak_std / calibration.scale_std
    assert spread[1] == pytest.approx(0.1 * (spread[0] / 2), rel=1e-4)


def test_p_values_are_valid_with_two_held_out_images(setup):
    """Cross-fitted, both of two scores are below a new one in a third of the cases."""
    config, _, _model, *_ = setup
    rng = np.random.default_rng(0)

    def draw(n):  # six maps of images that differ as a whole
        of_image = 0.15 * rng.normal(size=(n, 1, 1))
        maps = [
            1 + of_image + 0.15 * rng.normal(size=(n, 1, 1)) + 0.5 * rng.normal(size=(n, 8, 8))
            for _ in range(6)
        ]
        return tuple(m.astype(np.float32) for m in maps)

    above = []
    for _ in range(60):
        held, new = draw(2), draw(32)
        scorer = FastFlowScorer(config, {}, calibrate_on(config, held, np.ones(6)))
        scores = [
            scorer.recalibrated(tuple(m[1 - i :][:1] for m in held)).score_maps(
                tuple(m[i:][:1] for m in held)
            )[0]
            for i in range(2)
        ]
        above.append((scorer.score_maps(new)[0] > max(scores)).mean())
    assert np.mean(above) == pytest.approx(1 / 3, abs=0.06)  # two deviations


@pytest.mark.parametrize("form", ["windows", "top_k"])
def test_scores_equal_their_definition(setup, form):
    config, backbone, _model, variables, images, features = setup
    config = config.copy_and_resolve_references()
    config.score.form = form
    calibration = calibrated(config, variables, features).calibration
    detector = Detector(config, backbone, FastFlowScorer(config, variables, calibration))
    scores, anomaly_maps = [
        np.concatenate(parts)
        for parts in zip(*map(detector.score, np.split(images, [4, 8])), strict=True)
    ]
    maps = location_maps(setup, config)
    standard = [
        (m - mean) / std
        for m, mean, std in zip(maps, calibration.scale_mean, calibration.scale_std, strict=True)
    ]
    squeezed = [np.arcsinh(m) * inside_shares(m.shape[1:], 5) for m in standard]
    squeezed = [jax.image.resize(m, (11, 32, 48), "bilinear") for m in squeezed]
    blurred = [gaussian_filter(m, 4 * 32 / 224) for m in (squeezed[0] + squeezed[1]) / 2]
    np.testing.assert_allclose(anomaly_maps, blurred, atol=2e-3)
    if form == "top_k":
        expected = anomaly_maps.max((1, 2))  # top_k is 0: the maximum
    else:
        windows = np.stack([window_maxima(m).mean(-1) for m in maps], axis=-1)
        expected = ((windows - calibration.window_mean) / calibration.peak_std).mean(-1)
    np.testing.assert_allclose(scores, expected, atol=5e-3)


@pytest.mark.parametrize("kind", ["pmap", "jit"])
def test_weights_are_sent_to_the_devices_once(setup, monkeypatch, kind):
    config, backbone, _model, variables, images, features = setup
    config = config.copy_and_resolve_references()
    config.parallel = kind
    calibration = calibrated(config, variables, features).calibration
    detector = Detector(config, backbone, FastFlowScorer(config, variables, calibration))
    detector.score(images[:4])
    sent, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *to: sent.append(np.shape(x)) or put(x, *to))
    detector.score(images[4:8])
    weights = jax.tree.leaves((backbone.variables, variables))
    assert not {np.shape(leaf) for leaf in weights} & set(sent)


def test_compressed_maps_keep_small_values_and_the_order_of_large_ones():
    m = np.array([0.01, -0.02, 3.0, 500.0, 5000.0]).reshape(1, 1, 5)
    (found,) = fuse((m,), Calibration([0.0], [1.0], 0.0, 1.0, 1.0), (1, 5), compress=True)
    np.testing.assert_allclose(found[0, :2], [0.01, -0.02], rtol=1e-3)
    np.testing.assert_allclose(found[0, 4] - found[0, 3], np.log(10), rtol=1e-3)


def test_locations_at_the_border_weigh_as_much_as_their_neighbourhood_inside_the_image():
    ones = np.ones((1, 6, 7), np.float32)
    plain = Calibration([1.0], [2.0], 0.0, 1.0, 1.0)
    (found,) = fuse((2 * ones + 1,), plain, (6, 7), border=5)
    np.testing.assert_allclose(found, inside_shares((6, 7), 5), rtol=1e-5)
    np.testing.assert_allclose(fuse((2 * ones + 1,), plain, (6, 7), border=1), ones, rtol=1e-5)


def test_maps_have_weights_in_the_anomaly_map():
    maps = tuple(np.full((1, 2, 2), value, np.float32) for value in (1, 2, 6))
    plain = Calibration(np.zeros(3), np.ones(3), np.zeros(3), np.ones(3), np.ones(3))
    np.testing.assert_allclose(fuse(maps, plain, (2, 2)), 3)
    np.testing.assert_allclose(fuse(maps, plain, (2, 2), weights=(1, 2, 0.5)), 8 / 3.5, rtol=1e-6)


def test_distances_of_features_weigh_twice_and_coarse_maps_half():
    c = default()
    c.weights, c.image_size, c.batch_size = "random", (64, 96), 4
    c.layers, c.flow.steps, c.flow.zero_init = ("blocks.4", "blocks.5"), 1, False
    config = fill(c)
    rng = np.random.default_rng(0)
    shapes = (8, 4, 6, 112), (8, 2, 3, 192)
    features = tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)
    variables = flow_model(config).init(jax.random.key(0), features)
    variables = with_banks(config, variables, cached_features(features), seed=0)
    scorer = calibrated(config, variables, features)
    maps = scorer.location_maps(features)
    weights = [1, 2, 1, 0.5, 1, 0.5]  # the strides are 16 and 32
    assert scorer.map_weights(config, 6) == weights
    how = config.map.sigma, config.map.compress, config.map.border
    expected = fuse(maps, scorer.calibration, (64, 96), *how, weights)
    np.testing.assert_allclose(scorer.score(features)[1], expected, atol=1e-4)
    np.testing.assert_allclose(scorer.score_maps(maps)[1], expected, atol=1e-4)
    equal = fuse(maps, scorer.calibration, (64, 96), *how)
    assert np.abs(equal - expected).max() > 0.01


def test_features_unlike_normal_ones_score_higher(setup):
    config, backbone, _model, variables, images, features = setup
    calibration = calibrated(config, variables, features).calibration
    detector = Detector(config, backbone, FastFlowScorer(config, variables, calibration))
    spoilt = images[:4].copy()
    spoilt[:, 8:24, 16:32] += 6.0
    before, _ = detector.score(images[:4])
    after, anomaly_map = detector.score(spoilt)
    assert np.all(after > before)
    inside = np.zeros((32, 48), bool)
    inside[8:24, 16:32] = True
    assert anomaly_map[:, inside].mean() > anomaly_map[:, ~inside].mean()
    assert anomaly_map.dtype == jnp.float32


def test_banks_add_two_maps_to_each_scale(setup):
    config, _, model, variables, _, features = setup
    config = config.copy_and_resolve_references()
    config.map.bank = 20
    banked = with_banks(config, variables, cached_features(features), seed=0)
    calibration = calibrated(config, banked, features).calibration
    scorer = FastFlowScorer(config, banked, calibration)
    tested = tuple(m[:4] for m in features)
    found = scorer.location_maps(tested)
    latents = jax.jit(model.apply)(variables, tested)
    assert len(found) == len(calibration.scale_mean) == 3 * len(latents)
    for i, (z, log_det) in enumerate(latents):
        z, log_det = np.asarray(z, np.float64), np.asarray(log_det)
        statistics = variables["statistics"][f"norm_{i}"]
        x = (np.float64(tested[i]) - statistics["mean"]) @ np.float64(statistics["whitening"])
        expected = [(z**2).sum(-1) / 2 - 0.1 * log_det]
        for kind, vectors in (("features", x), ("latents", z)):
            bank = banked["bank"][f"{kind}_{i}"].astype(float)
            assert len(bank) == 20
            expected.append(((vectors[..., None, :] - bank) ** 2).sum(-1).min(-1) / 2)
        for one, other in zip(found[3 * i : 3 * i + 3], expected, strict=True):
            np.testing.assert_allclose(one, other / z.shape[-1], atol=2e-4, rtol=1e-4)


def test_the_image_score_depends_on_banks_and_the_anomaly_map_on_all_maps(setup):
    config, _, _model, variables, _, features = setup
    banked = with_banks(config, variables, cached_features(features), seed=0)
    scorer = calibrated(config, banked, features)
    maps = scorer.location_maps(tuple(m[:4] for m in features))
    scores, anomaly_map = scorer.score_maps(maps)
    of_flow = tuple(m + 5 * (i % 3 == 0) for i, m in enumerate(maps))
    of_bank = tuple(m + 5 * (i == 1) for i, m in enumerate(maps))
    again, higher = scorer.score_maps(of_flow)
    np.testing.assert_allclose(again, scores, rtol=1e-5)
    assert np.all(higher > anomaly_map)
    assert np.all(scorer.score_maps(of_bank)[0] > scores + 0.1)


def test_without_held_out_images_banks_still_score(setup):
    config, _, _model, variables, _, features = setup
    banked = with_banks(config, variables, cached_features(features), seed=0)
    scorer = calibrated(config, banked, None)
    scores, maps = scorer.score(tuple(m[:4] + 3 for m in features))
    plain, _ = scorer.score(tuple(m[:4] for m in features))
    assert np.all(np.isfinite(maps))
    assert np.all(scores > plain)
    unbanked = calibrated(config, variables, None)
    without, _ = unbanked.score(tuple(m[:4] for m in features))
    assert np.all(np.abs(plain - without) > 1e-3)


def padded(images, noise):
    """Images [B, 32, 48, 3] with their upper and lower quarters taken for padding."""
    valid = np.zeros(images.shape[:3], bool)
    valid[:, 8:24] = True
    noise = noise * np.random.default_rng(1).normal(size=images.shape)
    return np.where(valid[..., None], images, noise).astype(np.float32), valid


@pytest.mark.parametrize("bank", [0, 30])
@pytest.mark.parametrize("form", ["windows", "top_k"])
def test_padding_does_not_affect_scores_and_maps(setup, form, bank):
    config, _, _model, _, images, features = setup
    config = config.copy_and_resolve_references()
    config.score.form, config.map.bank = form, bank
    config.flow.kernels = (1,)  # a flow whose locations do not depend on their neighbours
    pointwise = flow_model(config)
    _, valid = padded(images, 0)
    # Features change in padding only, at either scale: rows 2 to 5 of 8 lie inside, 4 to 11 of 16.
    spoilt = tuple(m.copy() for m in features)
    for m in spoilt:
        quarter = m.shape[1] // 4
        m[:, :quarter] += 9.0
        m[:, -quarter:] -= 7.0
    results = []
    for maps in (features, spoilt):
        params = jax.jit(pointwise.init)(jax.random.key(0), tuple(m[:1] for m in maps))
        params = with_banks(config, params, cached_features(maps, valid), 0)
        calibration = calibrated(config, params, maps, valid).calibration
        scorer = FastFlowScorer(config, params, calibration)
        results.append(scorer.score(tuple(m[:4] for m in maps), valid[:4]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    scores, _ = scorer.score(tuple(m[:4] for m in spoilt))
    assert np.abs(scores - results[0][0]).min() > 0.1


def test_images_and_their_features_have_equal_scores(setup):
    config, backbone, _model, variables, images, features = setup
    calibration = calibrated(config, variables, features).calibration
    detector = Detector(config, backbone, FastFlowScorer(config, variables, calibration))
    images, valid = padded(images[:4], 1)
    maps = tuple(np.asarray(compress(m, config.length_power)) for m in backbone(images))
    for one, other in zip(
        detector.score(images, valid), detector.scorer.score(maps, valid), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=5e-3)


def test_a_loaded_scorer_gives_equal_scores(setup, tmp_path):
    config, _, _, _, _, features = setup
    config = config.copy_and_resolve_references()
    config.train.epochs = 1
    training = cached_features(tuple(m[:8] for m in features))
    holdout = tuple(m[8:] for m in features)
    fitted = fit(FitContext(config, training, tmp_path, 1, holdout))
    loaded = load(config, training.shapes, read(config, tmp_path))
    for one, other in zip(fitted.score(holdout), loaded.score(holdout), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_training_of_another_version_is_refused(setup, tmp_path):
    config = setup[0].copy_and_resolve_references()
    config.train.epochs = 1
    training = cached_features(tuple(m[:4] for m in setup[5]))
    fit(FitContext(config, training, tmp_path, 1))
    file = next(tmp_path.glob("calibration_*.npz"))
    write_arrays(file, {"window_std": np.ones(3)})  # as an earlier version left it
    with pytest.raises(InputError, match="another version"):
        read(config, tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"calibration_.* is missing"):
        read(config, tmp_path)


@pytest.mark.parametrize("form", ["windows", "top_k"])
def test_a_second_seed_compiles_nothing(tmp_path, form, compilations):
    c = default()
    c.image_size, c.layers = (12, 8), ("blocks.1", "blocks.2")
    c.flow.steps, c.flow.kernels, c.flow.hidden_ratio = 1, (1,), 0.5
    c.train.epochs, c.train.batch_size, c.score.form = 2, 4, form
    c.batch_size = 4
    config = fill(c)
    rng = np.random.default_rng(0)
    features = tuple(rng.normal(size=(9, *s)).astype(np.float32) for s in [(6, 4, 4), (3, 2, 6)])
    training = cached_features(tuple(m[3:] for m in features))
    holdout = tuple(m[:3] for m in features)

    def run(seed):
        folder = tmp_path / str(seed)
        folder.mkdir()
        scorer = fit(FitContext(config, training, folder, seed, holdout))
        return scorer.score(tuple(m[:4] for m in features))[0]

    with compilations() as first:
        one = run(0)
    with compilations() as second:
        two = run(1)
    assert first
    assert second == []
    assert not np.allclose(one, two)
