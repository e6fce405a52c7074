"""NNX layers: the results of linen with the same parameters, and the conventions of NNX."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fastflow_jax import flows
from fastflow_jax.flows import nnx as layers

X = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)  # C is odd
FIELDS = {
    "single": {"steps": 2, "kernels": (3, 1), "hidden_ratio": 2.0},
    "double": {"steps": 2, "kernels": (1,), "coupling": "double", "affine": "exp", "clamp": 1.0},
    "reversible": {"steps": 2, "kernels": (3, 1), "reversible": True},
    "out_1x1": {"steps": 2, "kernels": (3,), "out_kernel": 1},
}


def linen_tree(flow):
    """Variables of an NNX flow in the layout of linen."""
    params, permutations = (
        nnx.to_pure_dict(nnx.state(flow, kind)) for kind in (nnx.Param, layers.Permutation)
    )

    def by_name(tree):
        return {f"step_{i}": step for i, step in tree["step"].items()}

    return {"params": by_name(params), "permutations": by_name(permutations)}


def moved(flow):
    """The flow with random parameters: an initialised affine is the identity."""
    rng = np.random.default_rng(1)
    params = nnx.state(flow, nnx.Param)
    nnx.update(flow, jax.tree.map(lambda a: a + 0.3 * rng.normal(size=a.shape), params))
    return flow


@nnx.jit
def gradients(flow, x):
    def loss(flow, x):
        z, log_det = flow(x)
        return jnp.mean(0.5 * jnp.sum(z**2, -1) - log_det)

    return nnx.grad(loss, argnums=(nnx.DiffState(0, nnx.Param), 1))(flow, x)


@pytest.mark.parametrize("name", FIELDS)
def test_same_results_as_linen(name):
    fields = FIELDS[name]
    flow = moved(layers.Flow(5, **fields, rngs=nnx.Rngs(0)))
    linen, variables = flows.Flow(**fields), linen_tree(flow)
    fresh = jax.eval_shape(linen.init, jax.random.key(0), X)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype.name), tree) for tree in (variables, fresh)]
    assert shapes[0] == shapes[1]

    def loss(params, x):
        z, log_det = linen.apply(variables | {"params": params}, x)
        return jnp.mean(0.5 * jnp.sum(z**2, -1) - log_det), (z, log_det)

    want, (z, log_det) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], X)
    for got, expected in zip(nnx.jit(lambda flow: flow(X))(flow), (z, log_det), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    by_parameter, by_x = gradients(flow, X)
    by_parameter = {f"step_{i}": g for i, g in nnx.to_pure_dict(by_parameter)["step"].items()}
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), (by_parameter, by_x), want
    )
    back, inverse_log_det = nnx.jit(lambda flow: flow(z, inverse=True))(flow)
    np.testing.assert_allclose(back, X, atol=1e-4)
    np.testing.assert_allclose(inverse_log_det, -log_det, atol=1e-4)


def test_parameters_are_initialised_as_in_linen():
    flow = layers.Flow(64, steps=1, rngs=nnx.Rngs(0))
    variables = flows.Flow(steps=1).init(jax.random.key(0), jnp.zeros((1, 1, 1, 64)))
    same = jax.tree.map(
        lambda a, b: abs(np.std(a) - np.std(b)) < 0.1 * np.std(b) + 1e-6,
        linen_tree(flow)["params"],
        variables["params"],
    )
    assert jax.tree.all(same)
    z, _ = layers.AffineCoupling(4, partial(layers.ConvSubnet, zero_init=True), rngs=nnx.Rngs(0))(
        jnp.ones((1, 2, 2, 4))
    )
    np.testing.assert_array_equal(z, 1)


def test_permutations_depend_on_the_seed_and_are_not_parameters():
    index = [layers.Permute(64, rngs=nnx.Rngs(seed)).index[...] for seed in (0, 0, 1)]
    assert sorted(index[0].tolist()) == list(range(64))
    np.testing.assert_array_equal(index[0], index[1])
    assert not np.array_equal(index[0], index[2])
    _, params, rest = nnx.split(layers.Flow(4, steps=2, rngs=nnx.Rngs(0)), nnx.Param, ...)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    assert [leaf.dtype.name for leaf in jax.tree.leaves(rest)] == ["int32", "int32"]


def test_optimizer_trains_only_the_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Linear(5, 4, rngs=rngs)
            self.flow = layers.Flow(4, steps=1, kernels=(1,), affine="exp", rngs=rngs)

        def __call__(self, x):
            z, log_det = self.flow(jax.lax.stop_gradient(self.encoder(x)))
            return log_det - 0.5 * (z**2).sum(-1)

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, gradient = nnx.value_and_grad(lambda model: -model(x).mean())(model)
        optimizer.update(model, gradient)
        return loss

    index = np.asarray(model.flow.step[0].permute.index[...])
    losses = [float(step(model, optimizer, X)) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_array_equal(model.flow.step[0].permute.index[...], index)


def test_own_subnet_and_condition():
    def subnet(channels, features, *, rngs):
        return nnx.Sequential(
            nnx.Linear(channels, 8, rngs=rngs), nnx.gelu, nnx.Linear(8, features, rngs=rngs)
        )

    layer = layers.AffineCoupling(5, subnet, swap=True, condition_channels=2, rngs=nnx.Rngs(0))
    x = X[:, 0, 0]  # vectors: this subnet takes any leading axes
    one, _ = layer(x, jnp.zeros((2, 2)))
    two, _ = layer(x, jnp.ones((2, 2)))
    np.testing.assert_array_equal(one[:, 3:], x[:, 3:])  # the last C // 2 are passive
    assert not np.any(one[:, :3] == two[:, :3])
    back, _ = layer(two, jnp.ones((2, 2)), inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_invalid_arguments_are_refused():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="at least two channels, not 1"):
        layers.AffineCoupling(1, rngs=rngs)
    with pytest.raises(ValueError, match="not 'triple'"):
        layers.FlowStep(4, coupling="triple", rngs=rngs)
    with pytest.raises(ValueError, match="not 'log'"):
        layers.GlobalAffine(4, "log")
    with pytest.raises(ValueError, match="no hidden channels"):
        layers.ConvSubnet(1, 2, hidden_ratio=0.1, rngs=rngs)


@pytest.mark.parametrize(
    ("module", "others"), [("fastflow_jax.flows", ("optax",)), ("fastflow_jax.flows.nnx", ())]
)
def test_layers_import_only_jax_and_flax(module, others):
    code = f"import sys, {module}; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = ran.stdout.split()
    assert {module, "flax"} <= set(loaded)
    ours = {name for name in loaded if name.startswith("fastflow_jax")}
    assert all(name == "fastflow_jax" or name.startswith("fastflow_jax.flows") for name in ours)
    for other in (*others, "sklearn", "tensorflow_datasets", "orbax", "grain", "matplotlib", "PIL"):
        assert other not in loaded


@pytest.mark.parametrize("reversible", [False, True])
def test_conditional_flow_equals_linen(reversible):
    fields = {"steps": 2, "kernels": (3, 1), "reversible": reversible}
    flow = moved(layers.Flow(5, condition_channels=3, **fields, rngs=nnx.Rngs(0)))
    condition = np.random.default_rng(2).normal(size=(2, 3, 4, 3)).astype(np.float32)
    want = jax.jit(flows.Flow(**fields).apply)(linen_tree(flow), X, condition)
    got = nnx.jit(lambda flow: flow(X, condition))(flow)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    back, _ = nnx.jit(lambda flow: flow(got[0], condition, inverse=True))(flow)
    np.testing.assert_allclose(back, X, atol=1e-4)
