"""CFLOW: the paper's formulas, invertible flows, fibers, and scores that stand alone."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fastflow_jax.backbones import BACKBONES
from fastflow_jax.config import default, fill
from fastflow_jax.detectors import cflow
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import cached_features
from fastflow_jax.training.context import FitContext

SIZE = (32, 48)
RNG = np.random.default_rng(0)
FEATURES = tuple(
    (3 * RNG.normal(size=(11, h, w, c)) + 1).astype(np.float32)
    for h, w, c in ((8, 12, 6), (4, 6, 9))
)


@pytest.fixture(scope="module")
def config():
    c = default()
    c.detector, c.image_size, c.layers = "cflow", SIZE, ("blocks.2", "blocks.4")
    c.cflow.steps, c.cflow.encoding, c.cflow.fiber = 2, 8, 20
    c.train.epochs, c.train.batch_size, c.train.learning_rate = 10, 4, 1e-2
    c.batch_size = 4
    return fill(c)


@pytest.fixture(scope="module")
def fitted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cflow")
    training = cached_features(tuple(m[:8] for m in FEATURES))
    holdout = tuple(m[8:] for m in FEATURES)
    return cflow.fit(FitContext(config, training, folder, 1, holdout)), folder


def log_p_of(variables, config, features):
    """Log-likelihood per channel by the change of variables, in float64."""
    conditions = [
        np.broadcast_to(
            cflow.position_encoding(*m.shape[1:3], config.cflow.encoding), (*m.shape[:3], 8)
        )
        for m in features
    ]
    model = cflow.CFlow(config.cflow.steps, config.cflow.clamp)
    maps = []
    for z, log_det in jax.jit(model.apply)(variables, features, conditions):
        z, log_det = np.float64(z), np.float64(log_det)
        log_p = (-0.5 * z**2 - 0.5 * np.log(2 * np.pi)).sum(-1) + log_det
        maps.append(log_p / z.shape[-1])
    return maps


def test_positions_are_encoded_as_published():
    encoding = cflow.position_encoding(3, 5, 128)
    assert encoding.shape == (3, 5, 128)
    for row, column in ((0, 0), (2, 4), (1, 3)):
        for i in (0, 1, 31):
            frequency = 10000 ** (-2 * i / 64)
            expected = [f(p * frequency) for p in (column, row) for f in (np.sin, np.cos)]
            got = encoding[row, column, [2 * i, 2 * i + 1, 64 + 2 * i, 65 + 2 * i]]
            np.testing.assert_allclose(got, expected, atol=1e-6)
    assert len(np.unique(encoding.reshape(15, -1), axis=0)) == 15


def test_a_conditional_flow_inverts_and_its_log_det_is_that_of_the_jacobian():
    flow = cflow.ConditionalFlow(steps=2)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 3, 2, 5))
    condition = jax.random.normal(keys[1], (2, 3, 2, 4))
    variables = jax.jit(flow.init)(keys[2], x, condition)
    noise = iter(jax.random.split(jax.random.key(1), 100))
    variables["params"] = jax.tree.map(  # fresh couplings are near the identity
        lambda p: p + 0.5 * jax.random.normal(next(noise), p.shape), variables["params"]
    )
    z, log_det = jax.jit(flow.apply)(variables, x, condition)
    assert np.abs(z - x).max() > 0.1
    back, inverse_log_det = jax.jit(partial(flow.apply, inverse=True))(variables, z, condition)
    np.testing.assert_allclose(back, x, atol=1e-4)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-4)

    def of_vector(vector):
        return flow.apply(variables, vector[None, None, None], condition[:1, :1, :1])[0][0, 0, 0]

    _, expected = jnp.linalg.slogdet(jax.jit(jax.jacrev(of_vector))(x[0, 0, 0]))
    np.testing.assert_allclose(log_det[0, 0, 0], expected, atol=1e-4)
    elsewhere, _ = jax.jit(flow.apply)(variables, x, condition + 1)
    assert np.abs(elsewhere - z).max() > 1e-2, "the position matters"


def test_the_loss_equals_the_formula_of_the_paper(config, fitted):
    scorer, _ = fitted
    whole = config.copy_and_resolve_references()
    whole.cflow.fiber = 10**6  # all locations
    keys = jax.random.split(jax.random.key(0), 11)
    loss = jax.jit(cflow.objective(whole).loss)(scorer.variables, FEATURES, None, keys)
    expected = sum(
        np.log1p(np.exp(-log_p)).mean((1, 2))
        for log_p in log_p_of(scorer.variables, config, FEATURES)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_a_fiber_is_drawn_evenly_and_never_from_padding():
    keys = jax.random.split(jax.random.key(0), 2000)
    seen = np.ones((2000, 6), bool)
    seen[:, 4:] = False
    rows, counts = cflow._draw(keys, seen, 3)
    assert counts.all()
    assert rows.max() == 3
    assert all(len(set(row)) == 3 for row in np.asarray(rows))
    shares = np.bincount(np.asarray(rows).ravel(), minlength=4) / rows.size
    np.testing.assert_allclose(shares, 0.25, atol=0.02)
    rows, counts = cflow._draw(keys, seen, 5)
    np.testing.assert_array_equal(counts.sum(1), 4)


def test_training_lowers_the_loss_and_finds_the_highest_likelihoods(config, fitted):
    scorer, folder = fitted
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    variables, maxima = scorer.arrays()
    training = log_p_of(variables, config, tuple(m[:8] for m in FEATURES))
    np.testing.assert_allclose(maxima, [m.max() for m in training], rtol=1e-4)


def test_scores_equal_the_formula_and_do_not_depend_on_other_images(config, fitted):
    scorer, _ = fitted
    variables, maxima = scorer.arrays()
    test = tuple(m[7:] for m in FEATURES)
    scores, maps = scorer.score(test)
    expected = -sum(
        jax.image.resize(jnp.exp(m - highest), (4, *SIZE), "bilinear")
        for m, highest in zip(log_p_of(variables, config, test), maxima, strict=True)
    )
    blurred = [gaussian_filter(m, config.map.sigma * min(SIZE) / 224) for m in expected]
    np.testing.assert_allclose(maps, blurred, atol=1e-4)
    np.testing.assert_allclose(scores, maps.max((1, 2)), atol=1e-6)
    alone, _ = scorer.score(tuple(m[2:3] for m in test))
    np.testing.assert_allclose(alone, scores[2:3], atol=1e-5)


def test_features_farther_from_normal_score_higher(config, fitted):
    scorer, _ = fitted
    for size in (15.0, 1e6):
        spoilt = tuple(m[:4].copy() for m in FEATURES)
        for m in spoilt:
            m[:, : m.shape[1] // 2] += size
        scores, maps = scorer.score(spoilt)
        assert np.isfinite([maps.min(), maps.max(), *scores]).all()
        assert maps[:, :12].mean() > maps[:, 20:].mean()


def test_padding_does_not_affect_scores_and_maps(config, fitted):
    scorer, _ = fitted
    valid = np.zeros((8, *SIZE), bool)
    valid[:, 8:24] = True
    spoilt = tuple(m[:8].copy() for m in FEATURES)
    for m in spoilt:
        m[:, : m.shape[1] // 4] += 19.0
        m[:, -(m.shape[1] // 4) :] -= 17.0
    plain = tuple(m[:8] for m in FEATURES)
    keys = jax.random.split(jax.random.key(0), 8)
    loss = jax.jit(cflow.objective(config).loss)
    variables = scorer.variables
    np.testing.assert_allclose(
        loss(variables, spoilt, valid, keys), loss(variables, plain, valid, keys), rtol=1e-5
    )
    assert (
        np.abs(loss(variables, spoilt, None, keys) - loss(variables, plain, None, keys)).max() > 0.1
    )
    highest = [cflow.maxima(config, variables, cached_features(m, valid)) for m in (plain, spoilt)]
    np.testing.assert_allclose(highest[0], highest[1], rtol=1e-5)
    for one, other in zip(
        scorer.score(tuple(m[:4] for m in spoilt), valid[:4]),
        scorer.score(tuple(m[:4] for m in plain), valid[:4]),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_loaded_scorer_gives_equal_scores(config, fitted):
    scorer, folder = fitted
    loaded = cflow.load(config, [m.shape[1:] for m in FEATURES], cflow.read(config, folder))
    test = tuple(m[8:] for m in FEATURES)
    for one, other in zip(scorer.score(test), loaded.score(test), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("backbone", ["wide_resnet50_2", "tf_efficientnet_lite0"])
def test_maps_of_three_strides_are_used(backbone):
    spec = BACKBONES[backbone]
    layers = cflow.layers(None, spec)
    assert [spec.maps[layer][1] for layer in layers] == [8, 16, 32]
    names = list(spec.maps)
    for layer in layers:
        after = names[names.index(layer) + 1 :]
        assert all(spec.maps[name][1] != spec.maps[layer][1] for name in after), "the deepest"
    if backbone == "wide_resnet50_2":
        assert layers == ("layer2", "layer3", "layer4")


@pytest.mark.parametrize("backbone", ["cait_m48_448", "deit_base_distilled_patch16_384"])
def test_a_transformer_has_one_map(backbone):
    assert cflow.layers(None, BACKBONES[backbone]) == BACKBONES[backbone].layers


def test_an_impossible_encoding_is_refused():
    c = default()
    c.cflow.encoding = 6
    with pytest.raises(InputError, match=r"config.cflow.encoding must be a multiple of 4, not 6"):
        fill(c)
