"""The model against anomalib's FastflowModel and numpy."""

import pathlib
import runpy
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.ndimage import gaussian_filter

from fastflow_jax.config import default, fill
from fastflow_jax.detectors.fastflow.model import (
    FastFlow,
    FeatureNorm,
    invert,
    location_energies,
    negative_log_likelihood,
    of_product,
    random_windows,
)
from fastflow_jax.detectors.fastflow.scorer import calibrated, flow_model, objective
from fastflow_jax.detectors.maps import resize_map, top_mean, window_maxima
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import channel_statistics, compress, inside
from fastflow_jax.flows import Flow
from fastflow_jax.training.step import TrainState, create_optimizer, train_step

GOLDENS = pathlib.Path(__file__).parents[2] / "goldens"
sys.path.insert(0, str(GOLDENS))
import make_anomalib as anomalib  # noqa: E402


@pytest.fixture(scope="module")
def published():
    """`configs/reference.py` at the golden file's size."""
    path = pathlib.Path(__file__).parents[3] / "configs/reference.py"
    config = runpy.run_path(str(path))["get_config"]()
    config.image_size, config.flow.steps = (anomalib.IMAGE,), anomalib.STEPS
    return fill(config)


@pytest.fixture(scope="module")
def reference(published):
    """The reference's form with the golden file's parameters."""
    model = flow_model(published)
    params, permutations = {}, {}
    for i, scale in enumerate(anomalib.parameters()):
        params[f"norm_{i}"] = {"LayerNorm_0": scale["norm"]}
        params[f"flow_{i}"], permutations[f"flow_{i}"] = {}, {}
        for j, step in enumerate(scale["steps"]):
            subnet = {
                name: {part: step[f"{name}_{part}"] for part in ("kernel", "bias")}
                for name in ("conv_in", "conv_out")
            }
            affine = {"scale": step["scale"], "offset": step["offset"]}
            params[f"flow_{i}"][f"step_{j}"] = {"coupling": {"subnet": subnet}, "affine": affine}
            permutations[f"flow_{i}"][f"step_{j}"] = {"permute": {"index": step["index"]}}
    to_jax = partial(jax.tree.map, jnp.asarray)
    with np.load(GOLDENS / "anomalib.npz") as golden:
        return model, to_jax(params), {"permutations": to_jax(permutations)}, dict(golden)


def test_map_and_score_equal_anomalib(published, reference):
    _model, params, constants, golden = reference
    variables = {"params": params, **constants}
    scorer = calibrated(published, variables, None)
    scores, maps = scorer.score(tuple(anomalib.features(0)))
    np.testing.assert_allclose(maps, golden["map"], atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(scores, golden["score"], rtol=1e-4)


def test_twenty_adam_steps_follow_anomalib(published, reference):
    _model, params, constants, golden = reference
    # Twenty steps hardly feel these two.
    assert (published.train.beta2, published.train.weight_decay) == (0.999, 1e-5)
    optimizer = create_optimizer(published.train, 20)
    zero = jnp.zeros(())
    state = TrainState(zero, params, constants, optimizer.init(params), zero, zero)
    loss = objective(published).loss
    step = jax.jit(partial(train_step, loss=loss, optimizer=optimizer, seed=0))
    rows, weight = jnp.arange(anomalib.BATCH), jnp.ones(anomalib.BATCH)
    losses = []
    for batch in range(20):
        features = tuple(map(jnp.asarray, anomalib.features(batch)))
        state = step(state.replace(epoch_loss=zero), (features, None), rows, weight)
        losses.append(state.epoch_loss / anomalib.BATCH)
    np.testing.assert_allclose(losses[0], golden["losses"][0], rtol=1e-4)
    np.testing.assert_allclose(losses, golden["losses"], rtol=1e-3)


def test_the_published_form_trains_on_whole_maps():
    c = runpy.run_path(str(pathlib.Path(__file__).parents[3] / "configs/reference.py"))
    c = c["get_config"]()
    c.image_size, c.flow.steps = (128,), 1  # maps of up to 32x32, more than the golden file's
    config = fill(c)
    model, nll = flow_model(config), objective(config)
    rng = np.random.default_rng(10)
    shapes = [(32, 32, 64), (16, 16, 128), (8, 8, 256)]
    maps = tuple(rng.normal(size=(1, *shape)).astype(np.float32) for shape in shapes)
    variables = nll.init(jax.random.key(0), maps)
    whole = negative_log_likelihood(model.apply(variables, maps), per_dimension=False)
    loss = nll.loss(variables, maps, None, jax.random.split(jax.random.key(1), 1))
    np.testing.assert_allclose(loss, whole, rtol=1e-5)


def test_the_likelihood_equals_its_definition():
    rng = np.random.default_rng(0)
    latents = [
        (rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4))),
        (rng.normal(size=(2, 2, 2, 3)), rng.normal(size=(2, 2, 2))),
    ]
    expected = -sum(stats.norm.logpdf(z).sum((1, 2, 3)) + ld.sum((1, 2)) for z, ld in latents)
    dimensions = 3 * 4 * 5 + 2 * 2 * 3
    per_dimension = negative_log_likelihood(latents, per_dimension=True)
    np.testing.assert_allclose(per_dimension, expected / dimensions, rtol=1e-5)
    total = negative_log_likelihood(latents, per_dimension=False)  # without the constant
    constant = 0.5 * dimensions * np.log(2 * np.pi)
    np.testing.assert_allclose(total, expected - constant, rtol=1e-5)


def test_location_energies_in_both_forms():
    rng = np.random.default_rng(1)
    z, log_det = rng.normal(size=(1, 2, 2, 4)), rng.normal(size=(1, 2, 2))
    energy = (0.5 * (z**2).sum(-1) - log_det) / 4
    score = partial(location_energies, z, log_det)
    np.testing.assert_allclose(score(form="log", log_det_weight=1.0), energy, rtol=1e-5)
    np.testing.assert_allclose(
        score(form="probability", log_det_weight=0.0), -np.exp(-0.5 * (z**2).mean(-1)), rtol=1e-5
    )


def test_windows_are_cut_at_all_positions():
    height, width, side = 5, 4, 3
    maps = np.arange(2 * height * width * 2).reshape(2, height, width, 2)
    parts = {(y, x): maps[:, y : y + side, x : x + side] for y in range(3) for x in range(2)}
    firsts = [set(), set()]
    for seed in range(60):
        found = random_windows(jnp.asarray(maps), side, jax.random.split(jax.random.key(seed), 2))
        assert found.shape == (2, side, side, 2)
        for i, first in enumerate(firsts):
            at = {place for place, part in parts.items() if (part[i] == found[i]).all()}
            assert len(at) == 1
            first |= at
    assert firsts == [set(parts), set(parts)]
    keys = jax.random.split(jax.random.key(0), 2)
    np.testing.assert_array_equal(random_windows(jnp.asarray(maps), height, keys), maps)
    low = random_windows(jnp.asarray(maps), width, keys)  # whole rows, a part of the height
    assert low.shape == (2, width, width, 2)
    assert (low[..., 0] % (2 * width) == 2 * np.arange(width)).all()


@pytest.mark.parametrize("norm", ["layer", "standardise"])
def test_windows_are_cut_from_normalised_maps(norm):
    """A layer norm is computed over the whole map, also with parameters per location."""
    rng = np.random.default_rng(8)
    maps = tuple(rng.normal(size=(2, n, n, 4)).astype(np.float32) for n in (6, 3))
    model = FastFlow(Flow(steps=2), norm)
    variables = model.init(jax.random.key(0), maps)
    statistics = jax.tree.map(lambda m: m + rng.uniform(size=m.shape), variables)
    variables = {**variables, **{k: statistics[k] for k in variables if k == "statistics"}}

    def cut(scale, x):
        return x[:, scale : scale + 3, :3]

    latents = model.apply(variables, maps, cut)
    assert [z.shape for z, _ in latents] == [(2, 3, 3, 4), (2, 2, 3, 4)]
    for i, (z, _) in enumerate(latents):
        normalised = FeatureNorm(norm).apply(_part(variables, f"norm_{i}"), maps[i])
        expected, _ = model.flow.apply(_part(variables, f"flow_{i}"), cut(i, normalised))
        np.testing.assert_allclose(z, expected, rtol=1e-4, atol=1e-5)


def _part(variables, name):
    return {k: tree[name] for k, tree in variables.items() if name in tree}


@pytest.mark.parametrize("padded", [False, True])
def test_training_takes_windows_and_validation_whole_maps(padded):
    c = default()
    c.backbone, c.image_size, c.train.window, c.flow.steps = "resnet18", (64,), 3, 1
    config = fill(c)  # maps of 8x8, 4x4 and 2x2
    model = flow_model(config)
    rng = np.random.default_rng(9)
    shapes = [(8, 8, 128), (4, 4, 256), (2, 2, 512)]
    maps = tuple(rng.normal(size=(2, *shape)).astype(np.float32) for shape in shapes)
    valid = np.ones((2, 64, 64), bool)
    valid[1, 16:] = False  # some windows have nothing but padding
    valid = valid if padded else None
    nll = objective(config)
    variables = nll.init(jax.random.key(0), tuple(m[:1] for m in maps))

    def expected(cut):
        latents = model.apply(variables, maps, cut)
        masks = None
        if padded:
            seen = [inside(valid, m.shape[1:3])[..., None] for m in maps]
            masks = [cut(i, m)[..., 0] for i, m in enumerate(seen)]
        return negative_log_likelihood(latents, per_dimension=True, inside=masks)

    whole = expected(lambda scale, x: x)
    np.testing.assert_allclose(nll.validation(variables, maps, valid), whole, rtol=1e-6)
    for seed in range(4):
        keys = jax.random.split(jax.random.key(seed), 2)

        def cut(scale, x, keys=keys):
            own = jnp.stack([jax.random.fold_in(key, scale) for key in keys])
            return random_windows(x, 3, own)

        loss = nll.loss(variables, maps, valid, keys)
        np.testing.assert_allclose(loss, expected(cut), rtol=1e-5)
        assert np.isfinite(loss).all()
        assert not np.allclose(loss[0], whole[0], rtol=1e-4)


def test_a_window_of_padding_has_no_effect():
    z, log_det = jnp.ones((2, 2, 2, 3)), jnp.zeros((2, 2, 2))
    masks = [np.stack([np.ones((2, 2), bool), np.zeros((2, 2), bool)])]

    def mean(z):
        return negative_log_likelihood([(z, log_det)], per_dimension=True, inside=masks).mean()

    value, gradient = jax.value_and_grad(mean)(z)
    assert np.isfinite(value)
    np.testing.assert_array_equal(gradient[1], 0)


@pytest.mark.parametrize("norm", ["whiten", "standardise"])
def test_normalised_channels_have_mean_0_and_variance_1(norm):
    rng = np.random.default_rng(2)
    mixing = rng.normal(size=(4, 4))
    maps = (100 + rng.normal(size=(40, 6, 5, 4)) @ mixing * [1, 10, 0.1, 1]).astype(np.float32)
    statistics = channel_statistics((((maps[i : i + 7],), None) for i in range(0, 40, 7)), norm)
    layer = FeatureNorm(norm)
    flat = layer.apply({"statistics": statistics["norm_0"]}, maps).reshape(-1, 4)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-3)
    covariance = np.cov(flat.T, bias=True)
    if norm == "standardise":
        np.testing.assert_allclose(np.diag(covariance), 1, rtol=1e-3)
        return
    # Whitened but for the half of the mean variance added in each direction.
    values, vectors = np.linalg.eigh(np.corrcoef(maps.reshape(-1, 4).T))
    expected = vectors * values / (values + 0.5) @ vectors.T
    np.testing.assert_allclose(covariance, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("norm", ["whiten", "standardise"])
def test_statistics_and_likelihood_exclude_padding(norm):
    rng = np.random.default_rng(4)
    maps = rng.normal(size=(5, 4, 6, 3)).astype(np.float32)
    valid = np.ones((5, 8, 12), bool)
    valid[1:4, :4] = False  # the upper half of some images, which is the upper half of their maps
    spoilt = maps.copy()
    spoilt[1:4, :2] += 50
    for one, other in zip(
        *(channel_statistics([((m,), valid)], norm)["norm_0"].values() for m in (maps, spoilt)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    seen = np.concatenate([maps[[0, 4]].reshape(-1, 3), maps[1:4, 2:].reshape(-1, 3)])
    statistics = channel_statistics([((maps,), valid)], norm)["norm_0"]
    np.testing.assert_allclose(statistics["mean"], seen.mean(0), atol=1e-6)

    def nll(m, per_dimension):
        latents = ((m, jnp.zeros(m.shape[:-1])),)
        masks = [inside(valid, m.shape[1:3])]
        return negative_log_likelihood(latents, per_dimension=per_dimension, inside=masks)

    np.testing.assert_array_equal(nll(maps, True), nll(spoilt, True))
    np.testing.assert_allclose(nll(maps, False)[1], 0.5 * (maps[1, 2:] ** 2).sum(), rtol=1e-5)
    expected = 0.5 * (maps[1, 2:] ** 2).mean() + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(nll(maps, True)[1], expected, rtol=1e-5)


def test_a_constant_channel_stays_finite():
    maps = np.random.default_rng(3).normal(size=(4, 3, 3, 3)).astype(np.float32)
    maps[..., 1] = 5.0
    for norm in ("whiten", "standardise"):
        statistics = channel_statistics([((maps,), None)], norm)["norm_0"]
        y = FeatureNorm(norm).apply({"statistics": statistics}, maps)
        assert np.isfinite(y).all()
        np.testing.assert_allclose(y[..., 1], 0, atol=1e-5)


def test_compressed_vectors_keep_direction_and_order_of_length():
    x = np.random.default_rng(7).normal(size=(2, 3, 3, 5)).astype(np.float32)
    x *= np.geomspace(0.01, 100, 18).reshape(2, 3, 3, 1)
    y = compress(x, 0.25)

    def length(v):
        return np.linalg.norm(v, axis=-1, keepdims=True)

    np.testing.assert_allclose(length(y), length(x) ** 0.25, rtol=1e-3)
    np.testing.assert_allclose(y / length(y), x / length(x), atol=1e-5)
    np.testing.assert_array_equal(compress(x, 1.0), x)
    assert np.isfinite(compress(np.zeros((1, 1, 1, 4), np.float32), 0.25)).all()


def test_layer_norms_are_per_image():
    x = np.random.default_rng(4).normal(3, 2, (2, 4, 3, 5)).astype(np.float32)
    plain = FeatureNorm("layer_plain").apply({}, x)
    np.testing.assert_allclose(plain.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(plain.std((1, 2, 3)), 1, atol=1e-4)
    variables = FeatureNorm("layer").init(jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 2 * 4 * 3 * 5
    np.testing.assert_allclose(FeatureNorm("layer").apply(variables, x), plain, atol=1e-6)


def test_no_norm_leaves_features_as_they_are():
    x = jnp.asarray(np.random.default_rng(8).normal(3, 2, (2, 4, 3, 5)), jnp.float32)
    y, variables = FeatureNorm("none").init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, x)
    assert not variables


def test_a_model_can_be_applied_to_any_size():
    model = FastFlow(Flow(steps=2))
    small = (jnp.ones((1, 4, 4, 6)),)
    variables = jax.jit(model.init)(jax.random.key(0), small)
    ((z, log_det),) = model.apply(variables, (jnp.ones((2, 5, 9, 6)),))
    assert z.shape == (2, 5, 9, 6)
    assert log_det.shape == (2, 5, 9)


def test_bfloat16_convolutions_leave_the_likelihood_float32():
    rng = np.random.default_rng(9)
    maps = (jnp.asarray(rng.normal(size=(2, 4, 5, 6)), jnp.float32),)
    one, half = (
        FastFlow(Flow(steps=2, affine="exp", dtype=d)) for d in (jnp.float32, jnp.bfloat16)
    )
    variables = jax.jit(one.init)(jax.random.key(0), maps)

    def loss(params, model):
        latents = model.apply({**variables, "params": params}, maps)
        return negative_log_likelihood(latents, per_dimension=True).mean(), latents

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    (want, _), want_grads = step(variables["params"], one)
    (got, latents), grads = step(variables["params"], half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((got, latents, grads))} == {"float32"}
    assert got == pytest.approx(float(want), rel=1e-3)
    assert got != want  # the convolutions did compute in another type
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=0.05 * np.abs(w).max())


def test_resize_is_bilinear_with_half_pixel_centres():
    torch = pytest.importorskip("torch", reason="torch's interpolate is the oracle")
    x = np.random.default_rng(5).normal(size=(2, 3, 5)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(x)[:, None], (12, 17), mode="bilinear", align_corners=False
    )[:, 0]
    np.testing.assert_allclose(resize_map(x, (12, 17)), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("size", [(224, 224), (40, 56), (3, 5)])
def test_the_blur_equals_that_of_scipy(size):
    x = np.random.default_rng(5).normal(size=(2, 3, 5)).astype(np.float32)
    sigma = 4 * min(size) / 224
    expected = [gaussian_filter(m, sigma) for m in np.asarray(resize_map(x, size), np.float64)]
    np.testing.assert_allclose(resize_map(x, size, 4.0), expected, atol=1e-5)


def test_top_mean_and_window_maxima_equal_those_of_numpy():
    x = np.random.default_rng(6).normal(size=(3, 8, 10)).astype(np.float32)
    np.testing.assert_allclose(top_mean(x, 0.0), x.max((1, 2)))
    tenth = np.sort(x.reshape(3, -1))[:, -8:].mean(1)
    np.testing.assert_allclose(top_mean(x, 0.1), tenth, rtol=1e-6)

    def highest(x, side):
        windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(1, 2))
        return windows.mean((-1, -2)).max((1, 2))

    # A strip, and a map of one location, have their single locations.
    parts = (x, (1, 2, 4)), (x[:, :7], (1, 2)), (x[:, :1], (1,)), (x[:, :1, :1], (1,))
    for part, sides in parts:
        expected = np.stack([highest(part, side) for side in sides], -1)
        np.testing.assert_allclose(window_maxima(part), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "layer_plain"])
def test_norms_per_image_cannot_be_inverted(norm):
    with pytest.raises(InputError, match=rf"flow\.norm='{norm}'"):
        invert(FastFlow(Flow(steps=1), norm), {}, ())


def test_a_model_of_several_products_equals_the_models_of_each():
    rng = np.random.default_rng(3)
    features = [jnp.asarray(rng.normal(size=(3, 4, 5, 6)), jnp.float32)]
    product = jnp.array([1, 0, 1])
    model = FastFlow(Flow(steps=2, kernels=(3,)), "whiten", products=2)
    variables = model.init(jax.random.key(0), features)
    norms = {
        "mean": rng.normal(size=(2, 6)).astype("f"),
        "whitening": rng.normal(size=(2, 6, 6)).astype("f"),
    }
    variables = {**variables, "statistics": {"norm_0": norms}}
    ((together, log_det),) = model.apply(variables, features, product=product)
    for i, x in enumerate(features[0]):
        own = of_product(variables, int(product[i]), 2)
        ((z, own_log_det),) = model.apply(own, [x[None]])
        np.testing.assert_allclose(z[0], together[i], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(own_log_det[0], log_det[i], rtol=1e-4, atol=1e-4)
        (back,) = invert(model, own, [z])
        np.testing.assert_allclose(back[0], x, atol=1e-3)
    ((other, _),) = model.apply(of_product(variables, 0, 2), [features[0][:1]])
    assert np.abs(other[0] - together[0]).max() > 0.01
