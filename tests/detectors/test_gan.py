"""GANomaly: each player's own gradient, the losses by formula, training, padding, loading."""

import jax
import numpy as np
import pytest
from test_vae import SIZE, images

from fastflow_jax.config import default, fill
from fastflow_jax.detectors import gan
from fastflow_jax.detectors.convnets import Encoder
from fastflow_jax.features.extract import cached_features
from fastflow_jax.training.context import FitContext


@pytest.fixture(scope="module")
def config():
    c = default()
    c.detector, c.backbone, c.image_size = "gan", "pixels", SIZE
    c.gan.width, c.gan.latent = 4, 5
    c.train.epochs, c.train.batch_size, c.train.learning_rate = 15, 8, 5e-3
    c.batch_size = 8
    c.train.clip = 0.0
    return fill(c)


@pytest.fixture(scope="module")
def fitted(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan")
    training = cached_features((images(64),))
    return gan.fit(FitContext(config, training, folder, 1, (images(8, 1),))), folder


@pytest.fixture(scope="module")
def players(config):
    return gan.objective(config).init(jax.random.key(0), (images(1),))["params"]


ONES = np.ones((3, *SIZE, 1), np.float32)


def losses(config, generator, discriminator, x):
    """Those of both players, from equations 1 to 4 and the cross-entropy, in numpy."""
    z, fake, z_again = map(
        np.float64, jax.jit(gan._generator(config).apply)({"params": generator}, x, ONES[: len(x)])
    )
    apply = jax.jit(Encoder(config.gan.width, 1).apply)
    seen_real, real = apply({"params": discriminator}, x)
    seen_fake, of_fake = apply({"params": discriminator}, fake.astype(np.float32))
    adversarial = ((seen_real - seen_fake) ** 2).mean(1)
    contextual = np.abs(x - fake).mean((1, 2, 3))
    encoder = ((z - z_again) ** 2).mean(1)

    def sigmoid(logit):
        return 1 / (1 + np.exp(-np.float64(logit[:, 0])))

    cross_entropy = -(np.log(sigmoid(real)) + np.log(1 - sigmoid(of_fake))) / 2
    return adversarial + 50 * contextual + encoder, cross_entropy


def test_the_losses_equal_the_formulas_of_the_paper(config, players):
    x = images(3)
    variables = {"params": players}
    total = jax.jit(gan.objective(config).loss)(variables, (x,), None, None)
    of_generator, of_discriminator = losses(
        config, *(players[p] for p in ("generator", "discriminator")), x
    )
    np.testing.assert_allclose(total, of_generator + of_discriminator, rtol=1e-4)
    validation = jax.jit(gan.objective(config).validation)(variables, (x,), None)
    np.testing.assert_allclose(validation, of_generator, rtol=1e-4)


def test_each_network_gets_the_gradient_of_its_own_loss(config, players):
    x = images(3)

    def both(players):
        return gan.objective(config).loss({"params": players}, (x,), None, None).mean()

    def made_by(generator):
        return jax.jit(gan._generator(config).apply)({"params": generator}, x, ONES)

    def of_generator(generator):
        made = made_by(generator)
        return gan.generator_loss(config, players["discriminator"], x, ONES, *made).mean()

    def of_discriminator(discriminator):
        _, fake, _ = made_by(players["generator"])
        return gan.discriminator_loss(config, discriminator, x, fake).mean()

    gradient = jax.jit(jax.grad(both))(players)
    expected = {
        "generator": jax.jit(jax.grad(of_generator))(players["generator"]),
        "discriminator": jax.jit(jax.grad(of_discriminator))(players["discriminator"]),
    }
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_scores_and_maps_equal_the_formula_and_do_not_depend_on_other_images(config, fitted):
    scorer, _ = fitted
    x = images(3, 2)
    scores, maps = scorer.score((x,))
    z, fake, z_again = jax.jit(gan._generator(config).apply)(
        {"params": scorer.variables["params"]["generator"]}, x, ONES
    )
    np.testing.assert_allclose(scores, np.abs(z - z_again).mean(1), rtol=1e-4)
    np.testing.assert_allclose(maps, np.abs(x - fake).mean(-1), atol=1e-5)
    alone, _ = scorer.score((x[2:],))
    np.testing.assert_allclose(alone, scores[2:], rtol=1e-4)


def test_unusual_images_score_higher_after_training(fitted):
    normal, strange = images(8, 3), images(8, 4)[:, :, ::-1]
    scores, maps = fitted[0].score((np.concatenate([normal[:4], strange[:4]]),))
    assert scores[4:].mean() > 2 * scores[:4].mean()
    assert maps[4:].mean() > 2 * maps[:4].mean()


def test_padding_does_not_affect_scores_and_maps(config, fitted):
    x = images(4, 5)
    valid = np.ones((4, *SIZE), bool)
    valid[:, :, :3] = False
    spoilt = np.where(valid[..., None], x, 7.0).astype(np.float32)
    loss = jax.jit(gan.objective(config).loss)
    variables = fitted[0].variables
    np.testing.assert_allclose(
        loss(variables, (x,), valid, None), loss(variables, (spoilt,), valid, None), rtol=1e-5
    )
    one, other = (fitted[0].score((m,), valid) for m in (x, spoilt))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert np.abs(fitted[0].score((spoilt,))[0] / one[0] - 1).min() > 0.1


def test_a_loaded_scorer_gives_equal_scores(config, fitted):
    scorer, folder = fitted
    loaded = gan.load(config, [(*SIZE, 3)], gan.read(config, folder))
    x = (images(5, 6),)
    for one, other in zip(scorer.score(x), loaded.score(x), strict=True):
        np.testing.assert_array_equal(one, other)
