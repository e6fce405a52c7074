"""Learned scale and offset of each channel."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# The `raw` of each form at which the scale is 1.
_UNIT_RAW = {"softplus": 2.0 * math.log(math.exp(5.0) - 1.0), "exp": 0.0}


def global_affine(
    x: jax.Array, raw: jax.Array, offset: jax.Array, *, form: str, inverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Scales and offsets each channel, equally at every location: y = g * x + offset.

    Args:
      x: [..., C].
      raw: [C], mapped to the scale g > 0 by `form`.
      offset: [C].
      form: "softplus" for g = 0.2 * log(1 + exp(raw / 2)), or "exp" for g = exp(raw).
      inverse: whether to compute x from y.

    Returns:
      [..., C] and the log-determinant per location [...], which is constant.
    """
    scale = jnp.exp(raw) if form == "exp" else 0.2 * jax.nn.softplus(0.5 * raw)
    log_det = jnp.broadcast_to(jnp.log(scale).sum(), x.shape[:-1])
    if inverse:
        return (x - offset) / scale, -log_det
    return x * scale + offset, log_det


class GlobalAffine(nn.Module):
    """Learned scale and offset of each channel; the identity when initialised.

    Kingma & Dhariwal, Glow (arXiv 1807.03039), section 3.1, without data-dependent initialisation.

    Attributes:
      form: of the scale g. "softplus", g = 0.2 * log(1 + exp(raw / 2)), is that of FrEIA's
        `AllInOneBlock` and of the published FastFlow; a step of Adam changes g by a tenth of the
        learning rate. "exp", g = exp(raw), is Glow's; a step of Adam changes log g by the learning
        rate.
    """

    form: str = "softplus"

    @nn.compact
    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Transforms x [..., C]; log_det [...] is the same at every location.

        Args:
          x: features [..., C], or transformed ones with `inverse`.
          inverse: whether to compute the inverse.
        """
        if self.form not in _UNIT_RAW:
            raise ValueError(
                f"The form of GlobalAffine, `affine` of a step, must be 'softplus' or 'exp', not "
                f"{self.form!r}."
            )
        channels = (x.shape[-1],)
        raw = self.param("scale", nn.initializers.constant(_UNIT_RAW[self.form]), channels)
        offset = self.param("offset", nn.initializers.zeros, channels)
        return global_affine(x, raw, offset, form=self.form, inverse=inverse)
