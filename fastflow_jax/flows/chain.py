"""Flow steps and chains of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fastflow_jax.flows.coupling import AffineCoupling, ConvSubnet
from fastflow_jax.flows.elementwise import GlobalAffine
from fastflow_jax.flows.permute import Permute


class FlowStep(nn.Module):
    """Coupling, learned scale and offset, channel shuffle: one step of FastFlow (figure 3).

    Equals FrEIA's `AllInOneBlock` in the published form of FastFlow.

    Attributes:
      kernel_size: side of the subnet's kernels.
      hidden_ratio: hidden channels of the subnet, relative to its input channels.
      clamp: bound of a coupling's log-scale.
      coupling: "single" transforms the second half of the channels; "double" also transforms the
        first half, given the transformed second half.
      affine: form of `GlobalAffine`: "softplus", or "exp", which adapts faster to features whose
        scale is far from 1.
      zero_init: see `ConvSubnet`.
      dtype: type of the convolutions' computation; None for the input's.
      out_kernel: side of the subnet's last kernel; None or 0 for `kernel_size`.
    """

    kernel_size: int = 3
    hidden_ratio: float = 1.0
    clamp: float = 2.0
    coupling: str = "single"
    affine: str = "softplus"
    zero_init: bool = False
    dtype: DTypeLike | None = None
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

    def __call__(
        self, x: jax.Array, condition: jax.Array | None = None, *, inverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Transforms x [B, h, w, C], given `condition` [B, h, w, D] if any; log_det [B, h, w].

        Args:
          x: features [B, h, w, C], or transformed ones with `inverse`.
          condition: [B, h, w, D], a further input of the subnets; None for none.
          inverse: whether to compute the inverse.
        """
        layers = [
            partial(layer, condition=condition) if isinstance(layer, AffineCoupling) else layer
            for layer in self.layers
        ]
        return compose(layers, x, inverse)


class Flow(nn.Module):
    """Chain of steps with alternating kernel sizes: the 2D flow of one scale.

    FastFlow (arXiv 2111.07677), section 3.3: kernels (3,) for ResNet18, (3, 1) for larger
    backbones; 8 steps on ResNets, 20 on transformers. A module with a field of type `Flow` gets
    one flow per scale by `self.flow.copy(name=f"flow_{i}")`.

    Attributes:
      steps: number of steps.
      kernels: kernel sizes; step i has `kernels[i % len(kernels)]`.
      hidden_ratio, clamp, coupling, affine, zero_init, dtype, out_kernel: see `FlowStep`.
      reversible: whether the backward pass recomputes the input of each step by inverting the
        chain, instead of storing it in the forward pass. With 20 steps this takes at most a fifth
        of the memory and evaluates each subnet once more. Variables and results are the same.
    """

    steps: int = 8
    kernels: tuple[int, ...] = (3, 1)
    hidden_ratio: float = 1.0
    clamp: float = 2.0
    coupling: str = "single"
    affine: str = "softplus"
    zero_init: bool = False
    dtype: DTypeLike | None = None
    reversible: bool = False
    out_kernel: int | None = None

    def setup(self):
        if isinstance(self.kernels, int):
            raise ValueError(f"kernels must be a tuple such as (3, 1), not {self.kernels}.")
        self.step = [FlowStep(**step_fields(self, i)) for i in range(self.steps)]

    def __call__(
        self, x: jax.Array, condition: jax.Array | None = None, *, inverse: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Maps features to latents, or latents to features.

        Args:
          x: features [B, h, w, C], or latents with `inverse`.
          condition: [B, h, w, D], a further input of every coupling's subnet; None for none. It
            gets no gradient in a reversible flow.
          inverse: whether to map latents to features.

        Returns:
          Latents or features [B, h, w, C], and log_det [B, h, w].
        """
        if not self.reversible or self.is_initializing():
            return compose([partial(step, condition=condition) for step in self.step], x, inverse)
        unbound: list[tuple[nn.Module, Any]] = [step.unbind() for step in self.step]
        params = tuple(variables["params"] for _, variables in unbound)
        constants = tuple(({k: v[k] for k in v if k != "params"}, condition) for _, v in unbound)
        steps = tuple(step for step, _ in unbound)
        return rebuilding(_apply, steps, inverse, params, constants, x)


def step_fields(flow: Flow, i: int) -> dict[str, Any]:
    """Returns the fields of the flow's `FlowStep` number `i`."""
    shared = ("hidden_ratio", "clamp", "coupling", "affine", "zero_init", "dtype", "out_kernel")
    return {
        "kernel_size": flow.kernels[i % len(flow.kernels)],
        **{name: getattr(flow, name) for name in shared},
    }


def is_double(coupling: str) -> bool:
    """Returns whether a step has two couplings.

    Raises:
      ValueError: `coupling` is neither "single" nor "double".
    """
    if coupling not in ("single", "double"):
        raise ValueError(f"coupling must be 'single' or 'double', not {coupling!r}.")
    return coupling == "double"


def compose(layers: Sequence[Callable], x: jax.Array, inverse: bool) -> tuple[jax.Array, jax.Array]:
    """Applies layers in order, in reverse if `inverse`; returns x and the summed log_det."""
    log_det = jnp.zeros(x.shape[:-1], jnp.promote_types(x.dtype, jnp.float32))
    for layer in reversed(layers) if inverse else layers:
        x, layer_log_det = layer(x, inverse=inverse)
        log_det += layer_log_det
    return x, log_det


def _apply(step, constants, params, x, inverse):
    collections, condition = constants
    return step.apply({"params": params, **collections}, x, condition, inverse=inverse)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def rebuilding(apply, steps, inverse, params, constants, x):
    """`compose` with a backward pass that recomputes inputs from the output.

    Gomez et al., The Reversible Residual Network (arXiv 1707.04585), algorithm 1. The inverse of
    each step must be exact up to rounding.

    Args:
      apply: `apply(step, constants, params, x, inverse=inverse)` returns the result of a step.
      steps: the steps, without their variables.
      inverse: whether to invert the chain.
      params: trained variables of each step.
      constants: other variables of each step; they get no gradient.
      x: features [B, h, w, C].
    """
    parts = zip(steps, constants, params, strict=True)
    return compose([partial(apply, *part) for part in parts], x, inverse)


def _rebuilding_forward(apply, steps, inverse, params, constants, x):
    result: Any = rebuilding(apply, steps, inverse, params, constants, x)
    return result, (params, constants, result[0])


def _rebuilding_backward(apply, steps, inverse, residuals, cotangents):
    params, constants, y = residuals
    g, log_det_g = cotangents
    gradients = []
    chain = list(zip(steps, constants, params, strict=True))
    for step, c, p in chain if inverse else reversed(chain):
        # The recomputation does not depend on the gradient. Without this barrier, XLA may
        # recompute all inputs first and store them.
        y, g, gradients = jax.lax.optimization_barrier((y, g, gradients))
        run = partial(apply, step, c)
        y, _ = run(p, y, inverse=not inverse)
        _, pull_back = jax.vjp(partial(run, inverse=inverse), p, y)
        step_gradient, g = pull_back((g, log_det_g))
        gradients.append(step_gradient)
    return tuple(gradients if inverse else reversed(gradients)), None, g


rebuilding.defvjp(_rebuilding_forward, _rebuilding_backward)
