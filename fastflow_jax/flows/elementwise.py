"""Learned scale and offset of each channel."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# softplus with beta 0.5, times 0.1: positive, nearly linear around the initial scale of 1.
_UNIT_RAW_SCALE = 2.0 * math.log(math.exp(5.0) - 1.0)  # = 9.98648...


def global_affine(
    x: jax.Array, raw: jax.Array, offset: jax.Array, *, form: str, inverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Scale and offset each channel, the same at every location: y = g * x + offset.

    Args:
      x: [..., C].
      raw: [C], of which the form, see `GlobalAffine`, makes g.
      offset: [C].
      form: "softplus" or "exp".
      inverse: undo the forward direction.

    Returns:
      [..., C] and the log-determinant per location [...], the same number everywhere.
    """
    scale = jnp.exp(raw) if form == "exp" else 0.2 * jax.nn.softplus(0.5 * raw)
    log_det = jnp.broadcast_to(jnp.log(scale).sum(), x.shape[:-1])
    if inverse:
        return (x - offset) / scale, -log_det
    return x * scale + offset, log_det


def unit_scale(form: str) -> float:
    """The `raw` of `global_affine` that makes a scale of 1.

    Raises:
      ValueError: there is no such form.
    """
    if form not in ("softplus", "exp"):
        raise ValueError(f"form is 'softplus' or 'exp', not {form!r}")
    return _UNIT_RAW_SCALE if form == "softplus" else 0.0


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
        channels = (x.shape[-1],)
        start = nn.initializers.constant(unit_scale(self.form))
        raw = self.param("scale", start, channels)
        offset = self.param("offset", nn.initializers.zeros, channels)
        return global_affine(x, raw, offset, form=self.form, inverse=inverse)
