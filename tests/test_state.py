"""State dicts: names of trees, checks, and their bytes."""

import jax.numpy as jnp
import numpy as np
import pytest

from fastflow_jax.errors import InputError
from fastflow_jax.state import Slot, check, flatten, from_bytes, to_bytes, unflatten

TYPES = ("float16", "float32", "float64", "bfloat16", "int32", "int64", "uint8", "bool")


def test_a_tree_is_restored_from_its_names():
    tree = {"params": {"flow_0": {"scale": jnp.arange(3.0)}}, "bank": np.zeros((2, 1))}
    state = flatten(tree)
    assert list(state) == ["params/flow_0/scale", "bank"]
    again = unflatten(state)
    np.testing.assert_array_equal(again["params"]["flow_0"]["scale"], [0, 1, 2])
    assert again.keys() == tree.keys()


@pytest.mark.parametrize("dtype", TYPES)
def test_arrays_are_restored_bit_for_bit(dtype):
    whole = np.arange(24).reshape(2, 3, 4).astype(dtype)
    state = {"whole": whole, "turned": whole.T, "part": whole[:, ::2, 1:], "number": whole[1, 1, 1]}
    state |= {"empty": whole[:0], "on device": jnp.asarray(whole[0, 0])}
    again = from_bytes(to_bytes(state))
    assert again.keys() == state.keys()
    for name, x in state.items():
        assert again[name].dtype == x.dtype
        assert again[name].shape == x.shape
        np.testing.assert_array_equal(again[name], x)
    assert to_bytes(again) == to_bytes(state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "mean is missing"),
        ({"mean": np.ones(3), "b": np.ones(1)}, "'b' is unknown"),
        ({"mean": np.ones(4)}, r"mean has the shape \(4,\), not \(3\)"),
        ({"mean": np.ones((3, 1))}, r"mean has the shape \(3, 1\), not \(3\)"),
        ({"mean": np.ones(3, np.int32)}, "mean has the type int32, not floating"),
        ({"mean": np.ones(3), "rows": np.ones((0, 2), np.int32)}, r"\(0, 2\), not \(any, 2\)"),
        ({"mean": np.ones(3), "rows": np.ones((1, 2))}, "type float64, not int32"),
    ],
)
def test_other_arrays_are_refused(state, message):
    slots = {"mean": Slot((3,))}
    if "rows" in state:
        slots["rows"] = Slot((None, 2), np.int32)
    with pytest.raises(InputError, match=message):
        check(state, slots)


def test_arrays_that_fit_are_accepted():
    slots = {"mean": Slot((3,)), "rows": Slot((None, 2), np.int32)}
    check({"rows": np.ones((5, 2), np.int32), "mean": np.ones(3, jnp.bfloat16)}, slots)
