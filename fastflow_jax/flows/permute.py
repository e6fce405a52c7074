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


def shuffle(
    x: jax.Array, index: jax.Array, *, inverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`permute` x [..., C] as a layer does: back with `inverse`, and with log_det [...], zero."""
    log_det = jnp.zeros(x.shape[:-1], jnp.promote_types(x.dtype, jnp.float32))
    return permute(x, jnp.argsort(index) if inverse else index), log_det


def draw_permutation(key: jax.Array, channels: int) -> jax.Array:
    """A permutation of the channels, int32 [channels]."""
    return jax.random.permutation(key, jnp.arange(channels, dtype=jnp.int32))


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
            lambda: draw_permutation(self.make_rng("params"), x.shape[-1]),
        )
        return shuffle(x, index.value, inverse=inverse)
