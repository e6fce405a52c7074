"""Learned scale and offset of each channel."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# softplus with beta 0.5, times 0.1: positive, nearly linear around the initial scale of 1.
_UNIT_RAW_SCALE = 2.0 * math.log(math.exp(5.0) - 1.0)  # = 9.98648...


class GlobalAffine(nn.Module):
    """y = g * x + offset with g = 0.2 * log(1 + exp(scale / 2)), the same at every location.

    A fresh layer is the identity. Kingma & Dhariwal, Glow (arXiv 1807.03039), section 3.1, without
    the initialisation from data; the form of g is that of FrEIA's `AllInOneBlock`.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Transform x [..., C]; log_det [...] is the same number at every location."""
        channels = (x.shape[-1],)
        raw = self.param("scale", nn.initializers.constant(_UNIT_RAW_SCALE), channels)
        offset = self.param("offset", nn.initializers.zeros, channels)
        scale = 0.2 * jax.nn.softplus(0.5 * raw)
        log_det = jnp.broadcast_to(jnp.log(scale).sum(), x.shape[:-1])
        if inverse:
            return (x - offset) / scale, -log_det
        return x * scale + offset, log_det
