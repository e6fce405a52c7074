"""Flow steps and chains of them."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastflow_jax.flows.coupling import AffineCoupling, ConvSubnet
from fastflow_jax.flows.elementwise import GlobalAffine
from fastflow_jax.flows.permute import Permute


class FlowStep(nn.Module):
    """Coupling, learned scale and offset, channel shuffle: one step of FastFlow (figure 3).

    Equals FrEIA's `AllInOneBlock` in the form that FastFlow was published with.

    Attributes:
      kernel_size: side of the subnet's kernels.
      hidden_ratio: hidden channels of the subnet, relative to those that come in.
      clamp: bound of a coupling's log-scale.
      coupling: "single" transforms half of the channels, "double" the second half and then, given
        it, the first.
      affine: form of `GlobalAffine`.
      zero_init: see `ConvSubnet`.
      dtype: type that the convolutions compute in.
      out_kernel: side of the subnet's last kernel, where it is another.
    """

    kernel_size: int = 3
    hidden_ratio: float = 1.0
    clamp: float = 2.0
    coupling: str = "single"
    affine: str = "softplus"
    zero_init: bool = False
    dtype: jnp.dtype | None = None
    out_kernel: int | None = None

    def setup(self):
        subnet = partial(
            ConvSubnet,
            hidden_ratio=self.hidden_ratio,
            kernel_size=self.kernel_size,
            zero_init=self.zero_init,
            dtype=self.dtype,
            out_kernel=self.out_kernel,
        )
        couplings = [AffineCoupling(subnet, self.clamp, name="coupling")]
        if is_double(self.coupling):
            couplings.append(AffineCoupling(subnet, self.clamp, swap=True, name="coupling_swapped"))
        affine = GlobalAffine(self.affine, name="affine")
        self.layers = [*couplings, affine, Permute(name="permute")]

    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Transform x [B, h, w, C]; log_det [B, h, w]."""
        return compose(self.layers, x, inverse)


class Flow(nn.Module):
    """A chain of steps whose kernels take turns: the 2D flow of one scale.

    FastFlow (arXiv 2111.07677), section 3.3: kernels (3,) for ResNet18, (3, 1) in turn for larger
    backbones; 8 steps on ResNets, 20 on transformers.

    Attributes:
      steps: number of steps.
      kernels: kernel sides, taken in turn.
      hidden_ratio, clamp, coupling, affine, zero_init, dtype, out_kernel: see `FlowStep`.
      reversible: the backward pass rebuilds what each step saw by inverting the chain, instead of
        keeping it from the forward pass: the memory of 20 steps is a fifth or less (XLA still keeps
        some of what it could drop), and each subnet runs once more. Variables and results are the
        same.
    """

    steps: int = 8
    kernels: tuple[int, ...] = (3, 1)
    hidden_ratio: float = 1.0
    clamp: float = 2.0
    coupling: str = "single"
    affine: str = "softplus"
    zero_init: bool = False
    dtype: jnp.dtype | None = None
    reversible: bool = False
    out_kernel: int | None = None

    def setup(self):
        self.step = [
            FlowStep(
                kernel_size=self.kernels[i % len(self.kernels)],
                hidden_ratio=self.hidden_ratio,
                clamp=self.clamp,
                coupling=self.coupling,
                affine=self.affine,
                zero_init=self.zero_init,
                dtype=self.dtype,
                out_kernel=self.out_kernel,
            )
            for i in range(self.steps)
        ]

    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Map features [B, h, w, C] to z of the same shape, or z back; log_det [B, h, w]."""
        if not self.reversible or self.is_initializing():
            return compose(self.step, x, inverse)
        steps, variables = zip(*(step.unbind() for step in self.step), strict=True)
        params = tuple(v["params"] for v in variables)
        constants = tuple({k: v[k] for k in v if k != "params"} for v in variables)
        return rebuilding(_apply, steps, inverse, params, constants, x)


def is_double(coupling: str) -> bool:
    """Whether a step has two couplings.

    Raises:
      ValueError: `coupling` is neither "single" nor "double".
    """
    if coupling not in ("single", "double"):
        raise ValueError(f"coupling is 'single' or 'double', not {coupling!r}")
    return coupling == "double"


def compose(layers: Sequence[Callable], x: jax.Array, inverse: bool) -> tuple[jax.Array, jax.Array]:
    """All layers upon x, from the last to the first if `inverse`; their log_dets add up."""
    log_det = jnp.zeros(x.shape[:-1], jnp.promote_types(x.dtype, jnp.float32))
    for layer in reversed(layers) if inverse else layers:
        x, layer_log_det = layer(x, inverse=inverse)
        log_det += layer_log_det
    return x, log_det


def _apply(step, constants, params, x, inverse):
    return step.apply({"params": params, **constants}, x, inverse=inverse)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def rebuilding(apply, steps, inverse, params, constants, x):
    """`compose` of steps and their variables, whose gradient needs the output alone.

    Gomez et al., The Reversible Residual Network (arXiv 1707.04585), algorithm 1, for steps whose
    inverse is exact up to rounding.

    Args:
      apply: `apply(step, constants, params, x, inverse=inverse)` is what a step makes of x.
      steps: what `apply` takes for each step, without its variables.
      inverse: invert the chain.
      params: of each step.
      constants: what else each step has, without a gradient.
      x: features [B, h, w, C].
    """
    parts = zip(steps, constants, params, strict=True)
    return compose([partial(apply, *part) for part in parts], x, inverse)


def _rebuilding_forward(apply, steps, inverse, params, constants, x):
    y, log_det = rebuilding(apply, steps, inverse, params, constants, x)
    return (y, log_det), (params, constants, y)


def _rebuilding_backward(apply, steps, inverse, residuals, cotangents):
    params, constants, y = residuals
    g, log_det_g = cotangents
    gradients = []
    chain = list(zip(steps, constants, params, strict=True))
    for step, c, p in chain if inverse else reversed(chain):
        # Rebuilding needs no gradient: without the barrier, XLA may rebuild every step first and
        # keep them all.
        y, g, gradients = jax.lax.optimization_barrier((y, g, gradients))
        run = partial(apply, step, c)
        y, _ = run(p, y, inverse=not inverse)
        _, pull_back = jax.vjp(partial(run, inverse=inverse), p, y)
        step_gradient, g = pull_back((g, log_det_g))
        gradients.append(step_gradient)
    return tuple(gradients if inverse else reversed(gradients)), None, g


rebuilding.defvjp(_rebuilding_forward, _rebuilding_backward)
