"""Every layer: the inverse is exact, and log_det is that of the Jacobian."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow_jax import flows

LAYERS = {
    "coupling": flows.AffineCoupling,
    "coupling_swapped": partial(flows.AffineCoupling, swap=True),
    "global_affine": flows.GlobalAffine,
    "global_affine_exp": partial(flows.GlobalAffine, "exp"),
    "permute": flows.Permute,
    "step": flows.FlowStep,
    "flow_3x3_1x1": partial(flows.Flow, steps=3, kernels=(3, 1)),
    "flow_double": partial(flows.Flow, steps=2, kernels=(3,), coupling="double"),
    "flow_out_1x1": partial(flows.Flow, steps=2, kernels=(3,), out_kernel=1),
}
SHAPES = [(2, 3, 2, 5), (1, 4, 3, 4)]  # odd and even numbers of channels; h != w


def randomised(layer, x, seed=0):
    """Variables with random parameters: an initialised GlobalAffine is the identity."""
    variables = layer.init(jax.random.key(seed), x)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.5, leaf.shape), variables.get("params", {})
    )
    return {**variables, "params": params}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_inverse_and_jacobian_in_float64(name, shape):
    layer = LAYERS[name]()
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=shape))
        variables = randomised(layer, x)
        variables = jax.tree.map(
            lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, variables
        )
        y, log_det = jax.jit(layer.apply)(variables, x)
        back, inverse_log_det = jax.jit(partial(layer.apply, inverse=True))(variables, y)
        np.testing.assert_allclose(back, x, atol=1e-9)
        np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-9)
        assert log_det.shape == shape[:-1]

        def flat(values):
            return layer.apply(variables, values.reshape(1, *shape[1:]))[0].ravel()

        jacobian_of = jax.jit(jax.jacrev(flat))
        for i in range(shape[0]):
            expected = np.linalg.slogdet(np.asarray(jacobian_of(x[i].ravel())))[1]
            np.testing.assert_allclose(log_det[i].sum(), expected, atol=1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_in_float32(name):
    layer = LAYERS[name]()
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 3, 7)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    y, log_det = jax.jit(layer.apply)(variables, x)
    back, _ = jax.jit(partial(layer.apply, inverse=True))(variables, y)
    np.testing.assert_allclose(back, x, atol=1e-5)
    assert y.dtype == log_det.dtype == jnp.float32


def test_initialised_flow_of_eight_steps_inverts_in_float32():
    flow = flows.Flow(steps=8, kernels=(3, 1))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 6, 5, 24)), jnp.float32)
    variables = flow.init(jax.random.key(0), x)
    z, _ = jax.jit(flow.apply)(variables, x)
    back, _ = jax.jit(partial(flow.apply, inverse=True))(variables, z)
    np.testing.assert_allclose(back, x, atol=1e-5)
    assert not np.allclose(z, x)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.floats(-5, 5, width=32), min_size=3 * n, max_size=3 * n)
    ),
    st.floats(0.1, 4.0),
)
def test_coupling_function_inverts_and_is_bounded(values, clamp):
    x, a, b = np.split(np.asarray(values, np.float32)[None], 3, axis=-1)
    scale_shift = np.concatenate([10 * a, b], -1)
    y, log_det = flows.affine_coupling(x, scale_shift, clamp=clamp)
    back, _ = flows.affine_coupling(y, scale_shift, clamp=clamp, inverse=True)
    # The scale is at least exp(-4), so an error of y grows by at most exp(4).
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert np.all(np.abs(log_det) <= clamp * x.shape[-1] * (1 + 1e-6))


def test_soft_clamp_is_that_of_the_published_form():
    # a = 0.1 * 10: clamp * tanh(a) = 1.5232; FrEIA now has 2 * tanh(a / 2) = 0.9242.
    _, log_det = flows.affine_coupling(jnp.ones((1, 1)), jnp.array([[10.0, 0.0]]), clamp=2.0)
    np.testing.assert_allclose(log_det, [1.5232], atol=1e-4)


def test_passive_half_is_unchanged_and_initialised_affine_is_the_identity():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 3, 3, 5)), jnp.float32)
    y, _ = flows.AffineCoupling().init_with_output(jax.random.key(0), x)[0]
    np.testing.assert_array_equal(y[..., :3], x[..., :3])  # C - C//2 passive channels
    assert not np.any(y[..., 3:] == x[..., 3:])
    (y, log_det), _ = flows.GlobalAffine().init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(y, x, atol=1e-6)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)


def test_step_with_zero_subnet_is_a_permutation():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(1, 2, 3, 6)), jnp.float32)
    step = flows.FlowStep()
    variables = step.init(jax.random.key(0), x)
    coupling = jax.tree.map(jnp.zeros_like, variables["params"]["coupling"])
    variables["params"]["coupling"] = coupling
    y, log_det = jax.jit(step.apply)(variables, x)
    index = variables["permutations"]["permute"]["index"]
    assert sorted(index.tolist()) == list(range(6))
    np.testing.assert_allclose(y, x[..., index], atol=1e-6)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)


@pytest.mark.parametrize(("out_kernel", "reach"), [(None, 2), (1, 1)])
def test_receptive_field_of_a_step(out_kernel, reach):
    x = jnp.asarray(np.random.default_rng(7).normal(size=(1, 9, 9, 4)), jnp.float32)
    step = flows.FlowStep(out_kernel=out_kernel)
    variables, apply = step.init(jax.random.key(0), x), jax.jit(step.apply)
    moved = apply(variables, x.at[0, 4, 4].add(1.0))[0] - apply(variables, x)[0]
    rows, columns = np.nonzero(np.abs(moved[0]).max(-1) > 1e-7)
    assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (4 - reach, 4 + reach)


def test_permutations_depend_on_the_seed_and_are_not_parameters():
    x = jnp.zeros((1, 1, 1, 64))
    draw = [flows.Permute().init(jax.random.key(seed), x)["permutations"] for seed in (0, 0, 1)]
    assert jax.tree.all(jax.tree.map(np.array_equal, draw[0], draw[1]))
    assert not jax.tree.all(jax.tree.map(np.array_equal, draw[0], draw[2]))
    assert "params" not in flows.Permute().init(jax.random.key(0), x)


def test_gradient_of_a_permutation_is_its_inverse():
    x = jnp.arange(5.0)
    index = jnp.array([3, 0, 4, 1, 2])
    weights = jnp.array([1.0, 10.0, 100.0, 1000.0, 10000.0])
    gradient = jax.grad(lambda x: (flows.permute(x, index) * weights).sum())(x)
    np.testing.assert_array_equal(gradient, weights[np.argsort(index)])


def test_condition_changes_only_the_active_half():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(1, 2, 2, 4)), jnp.float32)
    layer = flows.AffineCoupling()
    variables = layer.init(jax.random.key(0), x, jnp.zeros((1, 2, 2, 3)))
    apply = jax.jit(layer.apply)
    one, _ = apply(variables, x, jnp.zeros((1, 2, 2, 3)))
    two, _ = apply(variables, x, jnp.ones((1, 2, 2, 3)))
    np.testing.assert_array_equal(one[..., :2], two[..., :2])
    assert not np.allclose(one[..., 2:], two[..., 2:])


def test_outputs_are_float32_with_bfloat16_convolutions():
    x = jnp.asarray(np.random.default_rng(7).normal(size=(1, 4, 4, 6)), jnp.float32)
    flow = flows.Flow(steps=2, dtype=jnp.bfloat16)
    variables = flow.init(jax.random.key(0), x)
    z, log_det = jax.jit(flow.apply)(variables, x)
    assert z.dtype == log_det.dtype == jnp.float32
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables["params"])} == {"float32"}
    # The inverse is exact in any type of the subnets.
    back, _ = jax.jit(partial(flow.apply, inverse=True))(variables, z)
    np.testing.assert_allclose(back, x, atol=1e-2)


def test_invalid_arguments_are_refused():
    x = jnp.zeros((1, 2, 2, 1))
    with pytest.raises(ValueError, match="at least two channels, not 1"):
        flows.AffineCoupling().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="not 'triple'"):
        flows.FlowStep(coupling="triple").init(jax.random.key(0), jnp.zeros((1, 2, 2, 4)))
    with pytest.raises(ValueError, match="no hidden channels"):
        flows.ConvSubnet(features=2, hidden_ratio=0.1).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="4 channels for 2 active channels, not 5"):
        flows.affine_coupling(jnp.zeros((1, 2)), jnp.zeros((1, 5)))
    with pytest.raises(
        ValueError, match=r"\[B, h, w, C\], not \[8, 2\]\. Pass vectors as x\[:, None"
    ):
        flows.Flow().init(jax.random.key(0), jnp.zeros((8, 4)))
    with pytest.raises(ValueError, match=r"a tuple such as \(3, 1\), not 3"):
        flows.Flow(kernels=3).init(jax.random.key(0), jnp.zeros((1, 2, 2, 4)))
    with pytest.raises(ValueError, match=r"`affine` of a step, must be .* not 'log'"):
        flows.Flow(affine="log").init(jax.random.key(0), jnp.zeros((1, 2, 2, 4)))


class Scales(nn.Module):
    """One flow per scale, all with the fields of `flow`."""

    flow: flows.Flow

    @nn.compact
    def __call__(self, features):
        return [self.flow.copy(name=f"flow_{i}")(x) for i, x in enumerate(features)]


@pytest.mark.parametrize("reversible", [False, True])
def test_flow_as_a_field_gives_one_flow_per_scale(reversible):
    flow = flows.Flow(steps=2, reversible=reversible)
    features = [jnp.ones((1, 2, 2, 4)), jnp.ones((1, 1, 1, 6))]
    scales = Scales(flow)
    variables = scales.init(jax.random.key(0), features)
    assert set(variables["params"]) == {"flow_0", "flow_1"}
    for i, (z, log_det) in enumerate(jax.jit(scales.apply)(variables, features)):
        own = {collection: tree[f"flow_{i}"] for collection, tree in variables.items()}
        want = jax.jit(flow.apply)(own, features[i])
        np.testing.assert_allclose(z, want[0], atol=1e-6)
        np.testing.assert_allclose(log_det, want[1], atol=1e-6)


def test_conditional_flow_depends_on_the_condition_and_inverts_given_it():
    x, condition = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(2, 3, 4, width)), jnp.float32)
        for seed, width in ((8, 6), (9, 3))
    )
    flow = flows.Flow(steps=3, kernels=(3, 1), coupling="double")
    variables = flow.init(jax.random.key(0), x, condition)
    z, log_det = jax.jit(flow.apply)(variables, x, condition)
    back, inverse_log_det = jax.jit(partial(flow.apply, inverse=True))(variables, z, condition)
    np.testing.assert_allclose(back, x, atol=1e-4)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-4)
    other, _ = jax.jit(flow.apply)(variables, x, condition.at[1].add(1.0))
    np.testing.assert_array_equal(other[0], z[0])
    assert np.abs(other[1] - z[1]).max() > 0.01
