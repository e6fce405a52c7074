"""Learned scale and offset of each channel."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# softplus with beta 0.5, times 0.1: positive, nearly linear around the initial scale of 1.
_UNIT_RAW_SCALE = 2.0 * math.log(math.exp(5.0) - 1.0)  # = 9.98648...


class GlobalAffine(nn.Module):
    """y = g * x + offset, the same at every location; a fresh layer is the identity.

    Kingma & Dhariwal, Glow (arXiv 1807.03039), section 3.1, without the initialisation from data.

    Attributes:
      form: "softplus" is FrEIA's `AllInOneBlock` and so the reference's, g = 0.2 * log(1 +
        exp(scale / 2)), where a step of Adam moves g by a tenth of the learning rate; "exp" is
        Glow's, g = exp(scale), where it moves log g by the whole.
    """

    form: str = "softplus"

    @nn.compact
    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Transform x [..., C]; log_det [...] is the same number at every location."""
        if self.form not in ("softplus", "exp"):
            raise ValueError(f"form is 'softplus' or 'exp', not {self.form!r}")
        channels = (x.shape[-1],)
        start = _UNIT_RAW_SCALE if self.form == "softplus" else 0.0
        raw = self.param("scale", nn.initializers.constant(start), channels)
        offset = self.param("offset", nn.initializers.zeros, channels)
        scale = jnp.exp(raw) if self.form == "exp" else 0.2 * jax.nn.softplus(0.5 * raw)
        log_det = jnp.broadcast_to(jnp.log(scale).sum(), x.shape[:-1])
        if inverse:
            return (x - offset) / scale, -log_det
        return x * scale + offset, log_det
