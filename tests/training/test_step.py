"""One step does what SGD does, on one device or several; every image comes once an epoch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_loop import (
    FEATURES,
    VALID,
    N,
    assert_close,
    assert_same,
    images,
    noisy_loss,
    small,
)

from fastflow_jax import parallel
from fastflow_jax.config import default
from fastflow_jax.detectors.fastflow.model import negative_log_likelihood
from fastflow_jax.detectors.fastflow.scorer import flow_model, objective
from fastflow_jax.features.extract import inside
from fastflow_jax.training.step import (
    create_optimizer,
    create_state,
    epoch_order,
    train_epoch,
    train_step,
)


@pytest.fixture(scope="module")
def step_setup():
    config = small()
    config.train.update({"clip": 0.0, "window": 16})
    config.train.update({"schedule": "constant", "warmup": 0.0})
    optimizer = create_optimizer(config.train, 10)
    nll = objective(config, FEATURES.statistics("whiten"))
    state = create_state(nll, optimizer, FEATURES.shapes, seed=0)

    step = partial(train_step, loss=noisy_loss(nll.loss), optimizer=optimizer, seed=3)
    # One device, eight images.
    expected = jax.jit(step)(state, rows_of(np.arange(8)), np.arange(8), np.ones(8, np.float32))
    return step, state, expected


def rows_of(rows):
    """Features and padding of some images, as a step takes them."""
    return tuple(m[rows] for m in images()), VALID[rows]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_short_run_may_warm_up_for_most_of_it(schedule, steps):
    """And still moves: the rate is above zero before the last step."""
    config = default().train
    config.update({"schedule": schedule, "warmup": 0.9})
    optimizer = create_optimizer(config, steps)
    gradient, state = jnp.ones(2), optimizer.init(jnp.ones(2))
    for _ in range(max(steps, 1)):
        update, state = optimizer.update(gradient, state, gradient)
    assert update.tolist() == pytest.approx([-config.learning_rate] * 2, rel=1e-5)


def test_a_step_of_sgd_equals_gradient_descent(step_setup):
    _, state, after = step_setup
    maps, valid = rows_of(np.arange(8))
    key = jax.random.fold_in(jax.random.key(3), 0)
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row)))(np.arange(8))

    def loss(params):
        latents = flow_model(small()).apply({"params": params, **state.constants}, maps)
        masks = [inside(valid, m.shape[1:3]) for m in maps]
        nll = negative_log_likelihood(latents, per_dimension=True, inside=masks)
        return (nll * (1 + 0.1 * noise)).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.05 * g, state.params, grads)
    assert_close(after.params, expected)
    assert after.epoch_loss / after.epoch_images == pytest.approx(float(value), rel=1e-6)
    assert int(after.step) == 1
    assert_same(after.constants, state.constants)


@pytest.mark.parametrize("kind", parallel.KINDS)
def test_four_devices_equal_one(step_setup, kind):
    assert jax.local_device_count() == 4
    step, state, expected = step_setup
    compiled = parallel.step(step, kind)
    one = compiled(state, rows_of(np.arange(8)), np.arange(8), np.ones(8, np.float32))
    assert_close(one.params, expected.params)
    # Padding of weight zero changes nothing.
    rows = np.array([*range(8), 0, 0, 0, 0])
    padded = compiled(state, rows_of(rows), rows, np.float32(np.arange(12) < 8))
    assert_close(padded.params, expected.params)
    assert float(padded.epoch_images) == 8


@pytest.mark.parametrize("kind", parallel.KINDS)
def test_an_epoch_in_one_program_equals_its_steps(step_setup, kind):
    step, state, _ = step_setup
    index, weight = epoch_order(N, 4, seed=0, epoch=0, drop_last=False, multiple=4)
    whole = parallel.epoch(partial(train_epoch, step=step), kind)
    one = whole(state, jax.tree.map(jnp.asarray, rows_of(np.arange(N))), index, weight)
    single = jax.jit(step)
    for rows, row_weight in zip(index, weight, strict=True):
        state = single(state, rows_of(rows), rows, row_weight)
    assert_close(one.params, state.params)
    assert float(one.epoch_images) == N


@given(st.integers(1, 50), st.integers(1, 20), st.booleans(), st.integers(1, 4), st.integers(0, 3))
def test_each_image_is_used_once_per_epoch(n, batch_size, drop_last, multiple, epoch):
    index, weight = epoch_order(
        n, batch_size, seed=1, epoch=epoch, drop_last=drop_last, multiple=multiple
    )
    seen = index[weight == 1]
    assert len(set(seen)) == len(seen)
    assert index.shape == weight.shape
    assert index.shape[1] % multiple == 0
    assert np.all(weight.sum(1) <= batch_size)
    if drop_last and n >= batch_size:
        assert len(seen) == n // batch_size * batch_size
    else:
        assert len(seen) == n


def test_the_order_depends_on_seed_and_epoch():
    order = partial(epoch_order, 30, 8, drop_last=False, multiple=1)
    one = order(seed=0, epoch=0)[0]
    np.testing.assert_array_equal(one, order(seed=0, epoch=0)[0])
    assert not np.array_equal(one, order(seed=0, epoch=1)[0])
    assert not np.array_equal(one, order(seed=1, epoch=0)[0])


def test_schedule_warms_up_and_ends_at_zero():
    config = default().train
    config.update({"optimizer": "sgd", "learning_rate": 1.0, "warmup": 0.2, "schedule": "cosine"})
    optimizer = create_optimizer(config, 10)
    state, rates = optimizer.init(jnp.zeros(())), []
    for _ in range(11):
        update, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
        rates.append(-float(update))
    assert rates[0] == 0.0
    assert rates[2] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(0.0, abs=1e-6)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_weight_decay_is_inside_adam():
    config = default().train
    config.update({"learning_rate": 1e-3, "weight_decay": 0.1})
    config.update({"schedule": "constant", "warmup": 0.0})
    optimizer = create_optimizer(config, 10)
    # Where the gradient is the decay's alone, Adam's first step is the rate, whatever the decay.
    params = jnp.array([1.0, -3.0])
    updates, _ = optimizer.update(jnp.zeros(2), optimizer.init(params), params)
    np.testing.assert_allclose(updates, [-1e-3, 1e-3], rtol=1e-4)
