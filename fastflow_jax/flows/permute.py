"""Fixed channel shuffles: they let every channel meet every other along the flow."""

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_vjp
def permute(x: jax.Array, index: jax.Array) -> jax.Array:
    """y[..., i] = x[..., index[i]], for a permutation `index` [C] of the channels.

    The gradient is the inverse permutation, a gather too: without being told that the indices are
    a permutation, autodiff scatters, three to twelve times slower on a CPU.
    """
    return jnp.take(x, index, axis=-1, mode="clip")


permute.defvjp(
    lambda x, index: (permute(x, index), index),
    lambda index, g: (permute(g, jnp.argsort(index)), None),
)


class Permute(nn.Module):
    """A shuffle of the channels, drawn once from the "params" key.

    The index [C] (int32) is no parameter: it lives in the collection "permutations", which is to
    be saved with the parameters, since the flow is another function without it.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, inverse: bool = False) -> tuple[jax.Array, jax.Array]:
        """Shuffle x [..., C]; log_det [...] is zero."""
        index = self.variable(
            "permutations",
            "index",
            lambda: jax.random.permutation(
                self.make_rng("params"), jnp.arange(x.shape[-1], dtype=jnp.int32)
            ),
        ).value
        log_det = jnp.zeros(x.shape[:-1], jnp.promote_types(x.dtype, jnp.float32))
        return permute(x, jnp.argsort(index) if inverse else index), log_det
