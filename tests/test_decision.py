"""Decisions agree between numpy and JAX, and with the definition in float64."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fastflow_jax.decision import Decision, Threshold

numbers = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)  # XLA takes these as 0


@settings(deadline=None)
@given(
    held_out=st.lists(numbers, min_size=1, max_size=20),
    score=numbers,
    image_level=numbers,
    pixel_level=numbers,
    grouped=st.booleans(),
    of_kinds=st.booleans(),
)
def test_numpy_and_jax_decide_alike(held_out, score, image_level, pixel_level, grouped, of_kinds):
    held_out = np.float32(held_out)
    groups = np.arange(len(held_out)) // 2 if grouped else None
    kinds = np.arange(len(held_out)) // 8 if of_kinds else None
    decision = Decision(Threshold(image_level), Threshold(pixel_level), held_out, groups, kinds)
    scores, maps = np.float32([score, held_out[0]]), np.full((2, 3, 4), score, np.float32)
    found, other = decision(scores, maps), decision(jnp.asarray(scores), jnp.asarray(maps))
    assert found.keys() == other.keys() == {"p_value", "is_anomalous", "mask"}
    np.testing.assert_allclose(other["p_value"], found["p_value"], rtol=1e-6)
    np.testing.assert_array_equal(other["is_anomalous"], found["is_anomalous"])
    np.testing.assert_array_equal(other["mask"], found["mask"])
    shapes = jax.eval_shape(decision, scores, maps)  # it can be traced
    assert {name: each.shape for name, each in shapes.items()} == {
        name: each.shape for name, each in found.items()
    }
    np.testing.assert_array_equal(found["is_anomalous"], np.float64(scores) > image_level)
    np.testing.assert_array_equal(found["mask"], np.float64(maps) > pixel_level)


@pytest.mark.parametrize("value", [0.1, -0.1, 1 / 3, 1e-40, 123456.789])
def test_a_threshold_between_two_floats_separates_them(value):
    """No float32 is between the two neighbours of a float64."""
    near = np.float32(value)
    neighbours = np.array([np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf)])
    scores = np.sort(np.append(neighbours, near))
    found = Decision(Threshold(value))(scores, scores)
    assert found.keys() == {"is_anomalous"}
    np.testing.assert_array_equal(found["is_anomalous"], scores.astype(np.float64) > value)


def test_a_compiled_decision_is_that_of_numpy():
    held_out = np.float32([0.5, 1, 2, 4])
    decision = Decision(Threshold(1.0), Threshold(0.3), held_out, np.array([0, 0, 1, 1]))
    scores, maps = np.float32([0.1, 1, 3]), np.linspace(0, 1, 9, dtype=np.float32)
    found, traced = decision(scores, maps), jax.jit(decision)(scores, maps)
    np.testing.assert_allclose(traced["p_value"], found["p_value"], rtol=1e-6)
    for name in ("is_anomalous", "mask"):
        np.testing.assert_array_equal(traced[name], found[name])


def test_a_threshold_states_its_promise():
    limit = Threshold(1.0, "image", 0.05, (0.001, 0.176), 0.95, 19)
    assert limit.promise == "false-alarm rate 5.0%, true rate between 0.1% and 17.6% (95 %)"
    unsupported = dataclasses.replace(limit, rate=0.01, supported=False)
    assert "rate 1.0% (wanted, but too low for so few images), true" in unsupported.promise
    assert Threshold(1.0).promise is None
