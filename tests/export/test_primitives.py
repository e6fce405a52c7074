"""Exported primitives equal JAX, for any shapes and layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from fastflow_jax.errors import InputError

RNG = np.random.default_rng(0)
BATCH = 3


def moved(x):
    """The same value with its channels in front in the exported file, after a convolution."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    kernel = jnp.eye(x.shape[-1])[None, None]
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dimensions)


# How a value [B, h, w, C] is stored in the exported file.
LAYOUTS = {
    "as in JAX": lambda x: x,
    "channels first": moved,
    "without an axis": lambda x: jnp.broadcast_to(x[:, :1], x.shape),
    "without an axis, channels first": lambda x: jnp.broadcast_to(
        moved(x).max(1)[:, None], x.shape
    ),
}
SIZES = st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(2, 4))
CHEAP = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


FUNCTIONS = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: 1 - x - y,
    "multiply": lambda x, y: x * y * 1.5,
    "divide": lambda x, y: x / (2 + jnp.abs(y)) / 3,
    "power": lambda x, y: (jnp.abs(x) + 0.5) ** y,
    "constant powers": lambda x, y: x**2 + x**3 + jnp.square(y) + (2 + jnp.abs(y)) ** -1,
    "maximum, minimum": lambda x, y: jnp.maximum(x, y) + jnp.minimum(jnp.maximum(2 * x, 0), 1.5),
    "clip": lambda x, y: jnp.clip(x, -0.5, 0.5) + lax.clamp(-jnp.abs(y), x, jnp.abs(y)),
    "roots": lambda x, y: jnp.sqrt(jnp.abs(x)) + lax.rsqrt(1 + jnp.abs(y)),
    "exponential": lambda x, y: jnp.exp(x) + jnp.log(1 + jnp.exp(y)) + jax.nn.sigmoid(x),
    "trigonometric": lambda x, y: jnp.sin(x) + jnp.cos(y) + jnp.tanh(x) + jnp.arcsinh(9 * y),
    "error function": lambda x, y: lax.erf(x) + jax.nn.gelu(y, approximate=False),
    "rounding": lambda x, y: jnp.floor(3 * x) + jnp.ceil(3 * y) + jnp.sign(x),
    "comparison": lambda x, y: (x < y) | (x == 2 * y) & (x != y) & ~(x >= 0),
    "finite": lambda x, y: jnp.isfinite(jnp.where(x > 0, x, jnp.inf)),
    "where": lambda x, y: jnp.where((x > y) & (x <= 1), x, y),
    "types": lambda x, y: x.astype(jnp.float16).astype(jnp.float32) + (3 * y).astype(jnp.int32),
    "bfloat16": lambda x, y: x.astype(jnp.bfloat16).astype(jnp.float32) * y,
    "softmax": lambda x, y: jax.nn.softmax(x, 2) + jax.nn.log_softmax(y, -1),
    "sums": lambda x, y: x.sum((1, 2)) + (x * y).mean(-1).sum(1)[..., :1],
    "extremes": lambda x, y: x.max(1, keepdims=True) - y.min((2, 3), keepdims=True),
    "logical reductions": lambda x, y: (x > 0).any(1) & (y > -1).all(1),
    "product of entries": lambda x, y: jnp.prod(x, 2),
    "norm": lambda x, y: x / (jnp.linalg.norm(y, axis=-1, keepdims=True) + 1e-6),
    "outer": lambda x, y: x[:, :, 0, :, None] * y[:, 0, :, None, :].sum(1, keepdims=True),
    "transpose": lambda x, y: x.transpose(0, 2, 1, 3) + y.max((1, 2), keepdims=True),
    "reshape": lambda x, y: (
        x.reshape(x.shape[0], -1, x.shape[-1]) * y.reshape(y.shape[0], 1, -1).max(-1, keepdims=True)
    ),
    "units": lambda x, y: x[:, None].reshape(*x.shape[:3], 1, x.shape[3]) + y[..., None, :],
    "concatenate": lambda x, y: jnp.concatenate([x, y[:, :1], 0 * y + 1], 1),
    "concatenate a constant": lambda x, y: jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(2.0)[:, None], (x.shape[0], 2, x.shape[3])), x[:, 0]], 1
    ),
    "stack": lambda x, y: jnp.stack([x, y, x], 2),
    "unstack": lambda x, y: (
        jnp.unstack(x, axis=-1)[1][..., None] + jnp.unstack(y, axis=2)[0][:, :, None]
    ),
    "split": lambda x, y: jnp.split(x, [1], 2)[1] + jnp.split(y, [1], 2)[0],
    "slices": lambda x, y: x[:, 1:] + y[:, :-1, :1] + x[:, 0, 1, None, None],
    "strides": lambda x, y: x[:, ::2] + lax.slice_in_dim(y, 1, None, 2, 2)[:, :1, :1],
    "pad": lambda x, y: jnp.pad(x, [(0, 0), (1, 0), (0, 2), (0, 0)], constant_values=2.0),
    "crop": lambda x, y: lax.pad(x, 0.0, [(0, 0, 0), (-1, 1, 0), (2, -1, 0), (0, 0, 0)]),
    "mean over the batch": lambda x, y: x - y.mean(0),
    "range": lambda x, y: x + jnp.arange(x.shape[2])[:, None] * y,
    "permutation": lambda x, y: jnp.take(x, np.arange(x.shape[-1])[::-1].copy(), -1, mode="clip"),
    "rows of a constant": lambda x, y: jnp.arange(20.0).reshape(10, 2)[
        jnp.argmax(x, 1).astype(jnp.int32)
    ],
    "clipped indices": lambda x, y: jnp.take(x, (3 * y.max((0, 1, 3))).astype(int), 1, mode="clip"),
    "entries of each row": lambda x, y: jnp.take_along_axis(
        x, jnp.argmin(y, 1, keepdims=True), 1, mode="promise_in_bounds"
    ),
    "largest": lambda x, y: jnp.concatenate(
        [part.astype(jnp.float32) for part in lax.top_k(x + y, 2)], -1
    ),
    "matrix": lambda x, y: x @ jnp.arange(x.shape[-1] * 3.0).reshape(-1, 3),
    "matrix on the left": lambda x, y: jnp.einsum(
        "ih,bhwc,jw->bijc", jnp.ones((2, x.shape[1])), x, jnp.ones((3, x.shape[2]))
    ),
    "products of batches": lambda x, y: jnp.einsum("bhwc,bhvc->bhwv", x, y),
    "attention": lambda x, y: jax.nn.dot_product_attention(x, y, x + y),
    "product over two axes": lambda x, y: jnp.einsum("bhwc,bhvc->bwv", x, y),
    "a matrix per location": lambda x, y: jnp.einsum(
        "bhwc,hwcd->bhwd", x, jnp.ones((*x.shape[1:], 2)) * jnp.arange(2.0)
    ),
    "rows at a time": lambda x, y: lax.map(lambda rows: rows[0].sum(0) * rows[1].max(0), (x, y)),
    "dependent steps": lambda x, y: lax.scan(
        lambda total, row: (total * row + x, None), y, jnp.arange(3.0)
    )[0],
    "platforms": lambda x, y: lax.platform_dependent(
        x, y, cpu=lambda x, y: (x + 1) * y, default=lambda x, y: x * y + y
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@CHEAP
@given(data=st.data())
def test_equals_jax(agree, name, data):
    height, width, channels = data.draw(SIZES, label="sizes")
    layouts = [data.draw(st.sampled_from(sorted(LAYOUTS)), label="layout") for _ in "xy"]
    first, second = (LAYOUTS[layout] for layout in layouts)
    arrays = {name: normal(BATCH, height, width, channels) for name in "xy"}
    agree(lambda x, y: {"z": FUNCTIONS[name](first(x), second(y))}, arrays)


@CHEAP
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from(["SAME", "VALID", ((2, 0), (1, 1))]),
    depthwise=st.booleans(),
    activation=st.sampled_from([jax.nn.relu, jax.nn.relu6, jnp.tanh]),
)
def test_convolutions(agree, kernel, stride, dilation, padding, depthwise, activation):
    weights, bias = normal(*kernel, 1 if depthwise else 4, 8), normal(8)

    def function(x):
        y = lax.conv_general_dilated(
            x,
            weights,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=4 if depthwise else 1,
        )
        return {"y": activation(y + bias)}

    model = agree(function, {"x": normal(2, 9, 8, 4)})
    kinds = [node.op_type for node in model.graph.node]
    assert "Add" not in kinds  # the bias is part of the convolution
    assert kinds.count("Transpose") == 2
    assert ("Clip" in kinds) == (activation is jax.nn.relu6)
    assert ("Relu" in kinds) == (activation is jax.nn.relu)


@CHEAP
@given(
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.sampled_from(["SAME", "VALID", ((0, 0), (1, 1), (1, 0), (0, 0))]),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_windows(agree, window, stride, padding, layout):
    def function(x):
        x = LAYOUTS[layout](x)
        settings = (1, *window, 1), (1, stride, stride, 1), padding
        return {
            "sums": lax.reduce_window(x, 0.0, lax.add, *settings),
            "maxima": lax.reduce_window(x, -jnp.inf, lax.max, *settings),
        }

    agree(function, {"x": normal(2, 6, 5, 3)})


UNSUPPORTED = {
    "cumsum": lambda x: jnp.cumsum(x, 1),
    "random_seed": lambda x: x + jax.random.normal(jax.random.key(0), (4,)),
    "booleans": lambda x: x.astype(jnp.int32) & 3,
    "between entries": lambda x: lax.pad(x, 0.0, [(0, 0, 0), (0, 0, 1)]),
    "out of bounds": lambda x: jnp.take_along_axis(x, x.astype(jnp.int32), 1),
    "depend on the input": lambda x: lax.cond(x.sum() > 0, jnp.sin, jnp.cos, x),
    "free axis": lambda x: jnp.arange(x.shape[0])[:, None] + x,
    "two of four axes": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2), (1, 1), "SAME"),
    "dependent steps": lambda x: lax.scan(lambda c, row: (c + row, c), x, jnp.arange(3.0))[1],
}


@pytest.mark.parametrize("words", UNSUPPORTED)
def test_what_is_not_supported_is_named(exported, words):
    with pytest.raises(InputError, match=words):
        exported(lambda x: {"y": UNSUPPORTED[words](x)}, {"x": normal(2, 4)})
