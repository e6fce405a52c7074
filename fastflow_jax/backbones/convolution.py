"""Convolution and batch norm of the frozen backbones, and folding of batch norm."""

import functools
from collections.abc import Hashable
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax
from jax.typing import DTypeLike

from fastflow_jax.backbones.spec import Architecture

Array = jax.Array
Padding = Literal["SAME"] | int  # TensorFlow's padding, or zeros on each side as in torch


def convolve(x: Array, kernel: Array, stride: int, padding: Padding, groups: int) -> Array:
    """2-D convolution, [B, H, W, C] with [k, k, C / groups, D] -> [B, h, w, D].

    On a CPU, XLA's convolutions of few channels are slow. There a depthwise convolution is computed
    as a sum of shifted slices, 4 to 30 times faster, and a 1x1 convolution as a matrix product, up
    to 6 times faster. The form is chosen for the platform that the function is compiled for; other
    platforms and exported files have the convolution.
    """
    k = kernel.shape[0]
    if padding == "SAME":
        pads = lax.padtype_to_pads(x.shape[1:3], (k, k), (stride, stride), "SAME")
    else:
        pads = [(padding, padding)] * 2

    def convolution(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(stride, stride),
            padding=pads,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def product(x: Array, kernel: Array) -> Array:
        return x[:, ::stride, ::stride] @ kernel[0, 0]

    def shifts(x: Array, kernel: Array) -> Array:
        return _sum_of_shifts(jnp.pad(x, [(0, 0), *pads, (0, 0)]), kernel, stride)

    if k == 1:
        on_cpu = product
    elif groups == x.shape[-1] == kernel.shape[-1]:
        on_cpu = shifts
    else:
        return convolution(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=convolution)


def _sum_of_shifts(x: Array, kernel: Array, stride: int) -> Array:
    """Depthwise convolution of padded x as a sum over the taps of the kernel [k, k, 1, C]."""
    k = kernel.shape[0]
    height, width = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
    total = jnp.zeros((), x.dtype)
    for i in range(k):
        for j in range(k):
            rows = slice(i, i + (height - 1) * stride + 1, stride)
            columns = slice(j, j + (width - 1) * stride + 1, stride)
            total += x[:, rows, columns] * kernel[i : i + 1, j : j + 1]
    return total


class Conv(nn.Module):
    """`nn.Conv` with a square kernel by `convolve`; initialised with zeros."""

    features: int
    kernel_size: int
    stride: int
    padding: Padding
    groups: int = 1
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", nn.initializers.zeros, shape)
        x = convolve(
            x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding, self.groups
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            x += bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return x


def conv_norm(
    x: Array,
    features: int,
    kernel_size: int = 1,
    stride: int = 1,
    *,
    names: tuple[str, str],
    epsilon: float,
    same: bool = False,
    groups: int = 1,
    folded: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """Convolution and batch norm as submodules of the calling compact module.

    Args:
      x: [B, H, W, C].
      features: number of output channels.
      kernel_size: side of the kernel.
      stride: stride in both directions.
      names: timm's names of the convolution and of the batch norm.
      epsilon: epsilon of the batch norm.
      same: whether to pad as TensorFlow's "SAME", which is asymmetric at stride 2, instead of as
        torch.
      groups: number of groups of channels; C for a depthwise convolution.
      folded: whether batch norm is folded into the convolution, see `fold_batch_norm`.
      dtype: type of the computation.
    """
    conv, norm = names
    padding = "SAME" if same else kernel_size // 2
    x = Conv(features, kernel_size, stride, padding, groups, folded, dtype, name=conv)(x)
    if folded:
        return x
    return nn.BatchNorm(use_running_average=True, epsilon=epsilon, dtype=dtype, name=norm)(x)


@functools.lru_cache(maxsize=16)
def _pairs(module: Any) -> list[list[Any]]:
    """Paths of each convolution and of the batch norm after it, and the epsilon of that."""
    pairs: list[list[Any]] = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, Conv):
            pairs.append([context.module.path])
        elif isinstance(context.module, nn.BatchNorm):
            pairs[-1] += [context.module.path, context.module.epsilon]
        return call(*args, **kwargs)

    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    with nn.intercept_methods(note):
        jax.eval_shape(module.init, jax.random.key(0), image)
    return [pair for pair in pairs if len(pair) == 3]  # other convolutions have a bias


def fold_batch_norm(module: Architecture, variables: dict) -> tuple[Architecture, dict]:
    """Folds each batch norm into the convolution before it; the function stays the same.

    Args:
      module: a backbone with a field `folded`.
      variables: its "params" and "batch_stats", numpy arrays.

    Returns:
      The module with `folded` set, and its variables.
    """
    params: dict[tuple, Any] = dict(flatten_dict(variables["params"]))
    statistics: dict[tuple, Any] = dict(flatten_dict(variables["batch_stats"]))
    for conv, norm, epsilon in _pairs(cast(Hashable, module)):
        variance = statistics[*norm, "var"]
        gain = params.pop((*norm, "scale")) / np.sqrt(variance + np.float32(epsilon))
        params[*conv, "kernel"] = params[*conv, "kernel"] * gain
        params[*conv, "bias"] = params.pop((*norm, "bias")) - statistics[*norm, "mean"] * gain
    return module.clone(folded=True), {"params": unflatten_dict(params)}
