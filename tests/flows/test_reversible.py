"""A reversible flow has the results and gradients of the plain one, and uses less memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fastflow_jax.flows import Flow

X = np.random.default_rng(0).normal(size=(2, 3, 4, 5))  # C is odd
VARIANTS = [  # coupling, affine, inverse
    ("single", "softplus", False),
    ("double", "exp", False),
    ("single", "exp", True),
    ("double", "softplus", True),
]


def pair(**fields):
    return Flow(**fields), Flow(**fields, reversible=True)


def trained_like(variables, size=0.3):
    """Variables with random parameters: an initialised affine is the identity."""
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda a: a + size * rng.normal(size=a.shape), variables["params"])
    return {**variables, "params": moved}


def gradients(flow, variables, x, inverse=False):
    """A loss of z and log_det at every location, and its gradients by parameters and x."""
    constants = {k: v for k, v in variables.items() if k != "params"}

    def loss(params, x):
        z, log_det = flow.apply({"params": params, **constants}, x, inverse=inverse)
        weight = jnp.linspace(0.5, 1.5, log_det.size).reshape(log_det.shape)
        return jnp.sum(weight * (0.5 * jnp.sum(z**2, -1) - log_det)) / z.size

    return jax.value_and_grad(loss, (0, 1))(variables["params"], x)


def assert_close(got, want, atol):
    """Asserts that errors are at most `atol` times the largest entry of each array."""

    def check(g, w):
        np.testing.assert_allclose(g, w, rtol=0, atol=atol * np.abs(w).max())

    jax.tree.map(check, got, want)


@pytest.mark.parametrize(("coupling", "affine", "inverse"), VARIANTS)
def test_gradients_equal_autodiff_in_float64(coupling, affine, inverse):
    plain, reversible = pair(steps=2, kernels=(3, 1), coupling=coupling, affine=affine)
    with jax.enable_x64(True):
        x = jnp.asarray(X)
        variables = trained_like(plain.init(jax.random.key(0), x))
        got, want = (
            jax.jit(partial(gradients, flow, inverse=inverse))(variables, x)
            for flow in (reversible, plain)
        )
        assert want[1][1].dtype == jnp.float64
        assert_close(got, want, 1e-5)


def test_same_variables_and_results():
    plain, reversible = pair(steps=2, kernels=(3, 1))
    x = jnp.asarray(X, jnp.float32)
    one, other = (flow.init(jax.random.key(0), x) for flow in (plain, reversible))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    z, log_det = jax.jit(plain.apply)(one, x)
    for got, want in zip(jax.jit(reversible.apply)(one, x), (z, log_det), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    back, _ = jax.jit(partial(reversible.apply, inverse=True))(one, z)
    np.testing.assert_allclose(back, x, atol=1e-5)


def compiled(flow, variables, x):
    return jax.jit(partial(gradients, flow)).lower(variables, x).compile()


@pytest.fixture(scope="module")
def trained():
    """Twenty steps trained on correlated features; compiled gradients of both flows."""
    plain, reversible = pair(steps=20, kernels=(3, 1), affine="exp")
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4, 16, 16, 3)) @ rng.normal(size=(3, 12))
    x = x + np.roll(x, 1, 1) + np.roll(x, 1, 2) + 0.1 * rng.normal(size=x.shape)
    x = jnp.asarray(x / x.std((0, 1, 2)), jnp.float32)
    variables = plain.init(jax.random.key(0), x)
    programs = compiled(plain, variables, x), compiled(reversible, variables, x)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def update(params, grads, state):
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    state, losses = optimizer.init(variables["params"]), []
    for _ in range(60):
        value, (grads, _) = programs[0](variables, x)
        params, state = update(variables["params"], grads, state)
        variables = {**variables, "params": params}
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.5
    return programs, variables, x


def test_gradients_of_twenty_trained_steps_in_float32(trained):
    programs, variables, x = trained
    want, got = (program(variables, x)[1] for program in programs)
    for g, w in zip(got, want, strict=True):  # gradients by parameters and x
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(w))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-3 * largest), g, w)


def test_memory_does_not_grow_with_steps(trained):
    (plain, reversible), _, x = trained

    def temporary(program):
        return program.memory_analysis().temp_size_in_bytes

    four = Flow(steps=4, kernels=(3, 1), affine="exp", reversible=True)
    few = compiled(four, jax.eval_shape(four.init, jax.random.key(0), x), x)
    assert temporary(reversible) < 1.3 * temporary(few)
    assert temporary(reversible) < 0.25 * temporary(plain)


def test_gradients_with_bfloat16_subnets():
    plain, reversible = pair(steps=3, kernels=(3, 1), dtype=jnp.bfloat16)
    x = jnp.asarray(X, jnp.float32)
    variables = trained_like(plain.init(jax.random.key(0), x), 0.1)
    got, want = (jax.jit(partial(gradients, f))(variables, x) for f in (reversible, plain))
    assert_close(got, want, 3e-2)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {"float32"}


def test_works_in_vmap_scan_and_pmap():
    plain, reversible = pair(steps=2, kernels=(3, 1))
    devices = jax.local_device_count()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(devices, 2, 3, 3, 4)), jnp.float32)
    variables = trained_like(plain.init(jax.random.key(0), x[0]))
    by_autodiff = jax.jit(partial(gradients, plain))
    want = [by_autodiff(variables, part) for part in x]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *want)
    gradient = partial(gradients, reversible)
    for got in (
        jax.jit(jax.vmap(gradient, (None, 0)))(variables, x),
        jax.pmap(gradient, in_axes=(None, 0))(variables, x),
        jax.lax.scan(lambda _, part: (None, gradient(variables, part)), None, x)[1],
    ):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got, want)


def test_conditional_flow_has_the_results_and_gradients_of_the_plain_one():
    plain, reversible = pair(steps=2, kernels=(3, 1))
    x = jnp.asarray(X, jnp.float32)
    condition = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 4, 3)), jnp.float32)
    variables = trained_like(plain.init(jax.random.key(0), x, condition))
    constants = {"permutations": variables["permutations"]}

    def loss(flow, params, x):
        z, log_det = flow.apply({"params": params, **constants}, x, condition)
        return jnp.mean(0.5 * jnp.sum(z**2, -1) - log_det)

    got, want = (
        jax.jit(jax.value_and_grad(partial(loss, flow), (0, 1)))(variables["params"], x)
        for flow in (reversible, plain)
    )
    assert_close(got, want, 1e-4)
