"""CaiT, class attention in image transformers, https://arxiv.org/abs/2103.17239.

Only its self-attention blocks: the class token comes in after them.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastflow_jax.backbones.vit import Dense, LayerNorm, Mlp, PatchEmbed, resize_positions


class MixHeads(nn.Module):
    """A linear layer over the heads of [heads, B, queries, keys]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = x.shape[0]
        kernel = self.param("kernel", nn.initializers.zeros, (heads, heads)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (heads,)).astype(self.dtype)
        return jnp.einsum("hbqk,hg->gbqk", x, kernel) + bias.reshape(-1, 1, 1, 1)


class TalkingHeadAttention(nn.Module):
    """Attention with the heads mixed before and after the softmax, arXiv 2003.02436."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, c = x.shape
        qkv = Dense(3 * c, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, c // self.heads), 2, 0)
        # Heads first: what mixes them is then one product of matrices with long rows.
        attention = jnp.einsum("bqhd,bkhd->hbqk", q * (c // self.heads) ** -0.5, k)
        attention = nn.softmax(MixHeads(self.dtype, name="proj_l")(attention))
        attention = MixHeads(self.dtype, name="proj_w")(attention)
        x = jnp.einsum("hbqk,bkhd->bqhd", attention, v).reshape(b, n, c)
        return Dense(c, dtype=self.dtype, name="proj")(x)


class Block(nn.Module):
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma_1, gamma_2 = (
            self.param(name, nn.initializers.ones, (x.shape[-1],)).astype(x.dtype).reshape(1, 1, -1)
            for name in ("gamma_1", "gamma_2")
        )
        y = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x += gamma_1 * TalkingHeadAttention(self.heads, self.dtype, name="attn")(y)
        y = LayerNorm(dtype=self.dtype, name="norm2")(x)
        return x + gamma_2 * Mlp(self.dtype, name="mlp")(y)


class CaiT(nn.Module):
    """Images [B, H, W, 3] -> a map [B, H / 16, W / 16, C] for each of `layers`.

    A layer is a block, "blocks.0" and so on; its map is its tokens through the model's own final
    norm. Computes up to the last of `layers`. Sides are multiples of 16.
    """

    spec: "CaiTSpec"
    layers: tuple[str, ...]
    dtype: jnp.dtype = jnp.float32  # of the computation; maps are float32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        spec = self.spec
        x = PatchEmbed(16, spec.width, self.dtype, name="patch_embed")(images)
        b, h, w, c = x.shape
        n = (spec.native // 16) ** 2
        positions = self.param("pos_embed", nn.initializers.zeros, (1, n, c))
        x += resize_positions(positions, h, w).astype(x.dtype)
        x = x.reshape(b, h * w, c)

        norm = LayerNorm(dtype=self.dtype, name="norm")
        maps = {}
        for i, layer in enumerate(spec.maps):
            x = Block(spec.heads, self.dtype, name=f"blocks_{i}")(x)
            if layer in self.layers:
                maps[layer] = norm(x).reshape(b, h, w, c).astype(jnp.float32)
            if len(maps) == len(self.layers):
                break
        return tuple(maps[layer] for layer in self.layers)


@dataclass(frozen=True)
class CaiTSpec:
    """A CaiT by timm's name, and the published FastFlow's use of it."""

    name: str
    tag: str  # of the weights: timm/<name>.<tag> on the hub
    parameters: int  # of the whole classifier
    depth: int
    width: int
    heads: int
    native: int  # side of the images that the position embeddings are for
    image_size: tuple[int, int]
    layers: tuple[str, ...]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    package: str | None = None  # none on PyPI holds the weights
    # What a file holds after the last layer.
    unused: tuple[str, ...] = ("cls_token", "blocks_token_only.", "head.")

    @property
    def flow(self) -> dict:
        """FastFlow's settings for this backbone, whose own last norm stands before the flow."""
        return {"norm": "none", "steps": 20, "kernels": (3, 1), "hidden_ratio": 0.16}

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Channels and stride of each layer that can be asked for, in order of depth."""
        return {f"blocks.{i}": (self.width, 16) for i in range(self.depth)}

    def module(self, layers: tuple[str, ...], dtype: jnp.dtype = jnp.float32) -> CaiT:
        return CaiT(self, layers, dtype=dtype)

    def timm_name(self, name: str) -> str:
        """The name in timm of a tensor in a weight file: itself."""
        return name


_AT_224 = {"native": 224, "image_size": (224, 224), "layers": ("blocks.20",)}
_TAG = "fb_dist_in1k"

CAITS = (
    CaiTSpec("cait_xxs24_224", _TAG, 11_956_264, 24, 192, 4, **_AT_224),
    CaiTSpec("cait_s24_224", _TAG, 46_916_200, 24, 384, 8, **_AT_224),
    CaiTSpec("cait_m48_448", _TAG, 356_460_520, 48, 768, 16, 448, (448, 448), ("blocks.40",)),
)
