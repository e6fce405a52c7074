"""Convolution and batch norm of the frozen backbones, and batch norm folded away."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fastflow_jax import parallel

Array = jax.Array
Padding = str | int  # "SAME" as TensorFlow has it, or as many zeros on every side as torch adds


def convolve(x: Array, kernel: Array, stride: int, padding: Padding, groups: int) -> Array:
    """2-D convolution, [B, H, W, C] with [k, k, C / groups, D] -> [B, h, w, D].

    The one place that knows how a backend likes its convolutions. XLA's CPU code is slow where few
    numbers meet in one product: a depthwise convolution is 4 to 30 times faster as a sum of
    shifted slices, which XLA fuses into one loop, and a 1x1 convolution of few channels up to 6
    times as a matrix product.
    """
    on_cpu = parallel.on_cpu()
    k = kernel.shape[0]
    if on_cpu and k == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    if on_cpu and groups == x.shape[-1] == kernel.shape[-1]:
        return _sum_of_shifts(x, kernel, stride, padding)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding if padding == "SAME" else [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _sum_of_shifts(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """A depthwise convolution, tap by tap; kernel [k, k, 1, C]."""
    k = kernel.shape[0]
    if padding == "SAME":
        pads = lax.padtype_to_pads(x.shape[1:3], (k, k), (stride, stride), "SAME")
    else:
        pads = [(padding, padding)] * 2
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
    height, width = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
    total = 0.0
    for i in range(k):
        for j in range(k):
            rows = slice(i, i + (height - 1) * stride + 1, stride)
            columns = slice(j, j + (width - 1) * stride + 1, stride)
            total += x[:, rows, columns] * kernel[i : i + 1, j : j + 1]
    return total


class Conv(nn.Module):
    """`nn.Conv` for square kernels, by way of `convolve`; zero until weights are loaded."""

    features: int
    kernel_size: int
    stride: int
    padding: Padding
    groups: int = 1
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32

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
    dtype: jnp.dtype = jnp.float32,
) -> Array:
    """A convolution and its batch norm, under the two names they have in timm.

    To be called in the compact method of a module, to which both then belong.

    Args:
      x: [B, H, W, C].
      features: channels of the result.
      kernel_size: side of the kernel.
      stride: in both directions.
      names: of the convolution and of the batch norm.
      epsilon: of the batch norm.
      same: pad as TensorFlow's "SAME" does, which is lopsided at stride 2; else as torch does.
      groups: of channels; C of them make a depthwise convolution.
      folded: there is no batch norm any more, see `fold_batch_norm`.
      dtype: of the computation.
    """
    conv, norm = names
    padding = "SAME" if same else kernel_size // 2
    x = Conv(features, kernel_size, stride, padding, groups, folded, dtype, name=conv)(x)
    if folded:
        return x
    return nn.BatchNorm(use_running_average=True, epsilon=epsilon, dtype=dtype, name=norm)(x)


def fold_batch_norm(module: nn.Module, variables: dict) -> tuple[nn.Module, dict]:
    """The same function without batch norm: its scale goes into the kernel before it.

    Args:
      module: a backbone with a field `folded`.
      variables: "params" and "batch_stats" of it, numpy arrays.

    Returns:
      The module with `folded` set, and its variables.
    """
    pairs = []  # paths of each convolution and of the batch norm called right after it

    def note(call, args, kwargs, context):
        if isinstance(context.module, Conv):
            pairs.append([context.module.path])
        elif isinstance(context.module, nn.BatchNorm):
            pairs[-1] += [context.module.path, context.module.epsilon]
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(module.apply, variables, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))

    folded = jax.tree.map(lambda x: x, variables["params"])  # new dicts, the same arrays
    for conv, norm, epsilon in pairs:
        affine = _pop(folded, norm)
        statistics = _get(variables["batch_stats"], norm)
        gain = affine["scale"] / np.sqrt(statistics["var"] + np.float32(epsilon))
        layer = _get(folded, conv)
        layer["kernel"] = layer["kernel"] * gain
        layer["bias"] = affine["bias"] - statistics["mean"] * gain
    return module.clone(folded=True), {"params": folded}


def _get(tree: dict, path: tuple[str, ...]) -> dict:
    for name in path:
        tree = tree[name]
    return tree


def _pop(tree: dict, path: tuple[str, ...]) -> dict:
    return _get(tree, path[:-1]).pop(path[-1])
