"""The VAE: its bound and score by formula, training, padding, loading."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fastflow_jax.config import default, fill
from fastflow_jax.detectors import convnets, vae
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import cached_features
from fastflow_jax.training.context import FitContext

SIZE = (10, 13)  # no multiple of 8


def images(n, seed=0):
    """Smooth images: a brightness that rises to one side, with little noise."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(-1, 1, SIZE[1])[None, None, :, None]
    shade = rng.uniform(0.3, 0.7, (n, 1, 1, 3))
    noise = 0.05 * rng.normal(size=(n, *SIZE, 3))
    return (ramp * shade + noise).astype(np.float32)


@pytest.fixture(scope="module")
def config():
    c = default()
    c.detector, c.backbone, c.image_size = "vae", "pixels", SIZE
    c.vae.width, c.vae.latent, c.vae.samples = 4, 5, 3
    c.train.epochs, c.train.batch_size, c.train.learning_rate = 15, 8, 5e-3
    c.batch_size = 8
    return fill(c)


@pytest.fixture(scope="module")
def fitted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    training = cached_features((images(64),))
    return vae.fit(FitContext(config, training, folder, 1, (images(8, 1),))), folder


@pytest.fixture(scope="module")
def untrained(config):
    variables = vae.objective(config).init(jax.random.key(0), (images(1),))
    return vae.VAEScorer(config, variables)


def test_unfold_inverts_fold():
    x = jax.random.normal(jax.random.key(0), (2, 5, 8, 3))
    folded = convnets.fold(x)
    assert folded.shape == (2, 3, 4, 12)
    np.testing.assert_array_equal(np.sort(folded[0, 0, 0]), np.sort(x[0, :2, :2].ravel()))
    np.testing.assert_array_equal(convnets.unfold(folded, (5, 8)), x)


def test_divergence_and_density_equal_their_definitions():
    rng = np.random.default_rng(0)
    mean, log_variance = rng.normal(size=(2, 1, 4))
    grid = np.linspace(-12, 12, 20001)
    expected = 0.0
    for m, v in zip(mean[0], log_variance[0], strict=True):
        q, p = stats.norm(m, np.exp(v / 2)), stats.norm()
        integrand = q.pdf(grid) * (q.logpdf(grid) - p.logpdf(grid))
        expected += integrand.sum() * (grid[1] - grid[0])
    np.testing.assert_allclose(vae.divergence(mean, log_variance), [expected], rtol=1e-4)
    x = rng.normal(size=(1, 4))
    np.testing.assert_allclose(
        vae.negative_log_density(x, mean, log_variance),
        -stats.norm.logpdf(x, mean, np.exp(log_variance / 2)),
        rtol=1e-5,
    )


def test_the_loss_equals_the_evidence_lower_bound(config, untrained):
    x = images(3)
    variables = untrained.variables
    noise = np.stack([jax.random.normal(k, (5,)) for k in jax.random.split(jax.random.key(3), 3)])
    loss = jax.jit(vae.objective(config).loss)(
        variables, (x,), None, jax.random.split(jax.random.key(3), 3)
    )
    mean, log_variance, x_mean, x_log_variance = jax.jit(vae._model(config).apply)(
        variables, x, noise[None]
    )
    log_p = stats.norm.logpdf(x, x_mean[0], np.exp(x_log_variance[0] / 2)).sum((1, 2, 3))
    bound = log_p - vae.divergence(mean, log_variance)
    np.testing.assert_allclose(loss, -bound / x[0].size, rtol=1e-4)


def test_the_score_is_the_reconstruction_probability(config, fitted):
    scorer, _ = fitted
    x = images(4, 2)
    scores, maps = scorer.score((x,))
    noise = vae._noise(config, 3)
    by_sample = []
    for z in noise:
        _, _, mean, log_variance = jax.jit(vae._model(config).apply)(
            scorer.variables, x, jnp.tile(z, (1, 4, 1))
        )
        by_sample.append(stats.norm.logpdf(x, mean[0], np.exp(log_variance[0] / 2)))
    expected = -np.mean(by_sample, axis=(0, -1))
    np.testing.assert_allclose(maps, expected, atol=1e-3)
    np.testing.assert_allclose(scores, expected.mean((1, 2)), atol=1e-3)
    alone, _ = scorer.score((x[2:3],))
    np.testing.assert_allclose(alone, scores[2:3], atol=1e-4)


def test_unusual_images_score_higher_after_training_only(fitted, untrained):
    normal, strange = images(8, 3), images(8, 4)[:, :, ::-1]
    scores, maps = fitted[0].score((np.concatenate([normal[:4], strange[:4]]),))
    assert scores[4:].min() > scores[:4].max() + 1
    patched = normal.copy()
    patched[:, 2:5, 2:5] = 1.0
    _, maps = fitted[0].score((patched,))
    assert maps[:, 2:5, 2:5].mean() > np.median(maps) + 1
    control, _ = untrained.score((np.concatenate([normal[:4], strange[:4]]),))
    assert not control[4:].min() > control[:4].max()


def test_padding_does_not_affect_scores_and_maps(config, fitted):
    x = images(4, 5)
    valid = np.ones((4, *SIZE), bool)
    valid[:, :, :3] = False
    spoilt = np.where(valid[..., None], x, 7.0).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    loss = jax.jit(vae.objective(config).loss)
    variables = fitted[0].variables
    np.testing.assert_allclose(
        loss(variables, (x,), valid, keys), loss(variables, (spoilt,), valid, keys), rtol=1e-5
    )
    one, other = (fitted[0].score((m,), valid) for m in (x, spoilt))
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    np.testing.assert_allclose(one[1], other[1], atol=1e-4)
    assert np.abs(fitted[0].score((spoilt,))[0] - one[0]).min() > 1


def test_a_loaded_scorer_gives_equal_scores(config, fitted):
    scorer, folder = fitted
    loaded = vae.load(config, [(*SIZE, 3)], vae.read(config, folder))
    x = (images(5, 6),)
    for one, other in zip(scorer.score(x), loaded.score(x), strict=True):
        np.testing.assert_array_equal(one, other)


def test_several_maps_are_refused(tmp_path):
    c = default()
    c.detector, c.layers = "vae", ("blocks.1", "blocks.2")
    with pytest.raises(InputError, match=r"vae reconstructs one map. Set config.layers to one of"):
        vae.fit(FitContext(fill(c), cached_features((images(2),)), tmp_path))
