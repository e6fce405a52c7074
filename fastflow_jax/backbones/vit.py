"""Vision transformers: ViT (arXiv 2010.11929), DeiT (2012.12877), DINOv2 (2304.07193), CaiT.

CaiT (class attention in image transformers, arXiv 2103.17239) has only its self-attention blocks
here; its class token is added after them.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.backbones.convolution import Conv
from fastflow_jax.backbones.spec import (
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Architecture,
    Maps,
    Spec,
)
from fastflow_jax.errors import InputError

Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class PatchEmbed(nn.Module):
    """Convolution of each patch: images [B, H, W, 3] -> tokens [B, H / patch, W / patch, C]."""

    patch: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        height, width = images.shape[1:3]
        if height % self.patch or width % self.patch:
            raise InputError(
                f"Images of {height}x{width} cannot be divided into patches of {self.patch}. "
                f"Choose an image_size of multiples of {self.patch}."
            )
        conv = Conv(
            self.width, self.patch, self.patch, 0, use_bias=True, dtype=self.dtype, name="proj"
        )
        return conv(images)


class Mlp(nn.Module):
    """Two dense layers with GELU between them, on tokens [B, N, C]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Dense(4 * x.shape[-1], dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(nn.gelu(y, approximate=False))


class MixHeads(nn.Module):
    """Linear layer over the heads of [heads, B, queries, keys]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        heads = x.shape[0]
        kernel = self.param("kernel", nn.initializers.zeros, (heads, heads)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (heads,)).astype(self.dtype)
        return jnp.einsum("hbqk,hg->gbqk", x, kernel) + bias.reshape(-1, 1, 1, 1)


class Attention(nn.Module):
    """Self-attention of tokens [B, N, C].

    Attributes:
      heads: number of heads.
      dtype: type of the computation.
      talking: whether heads are mixed before and after the softmax (talking heads, arXiv
        2003.02436).
    """

    heads: int
    dtype: jnp.dtype
    talking: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, c = x.shape
        qkv = Dense(3 * c, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, c // self.heads), 2, 0)
        if self.talking:
            # The heads are the first axis, so that mixing them is one matrix product.
            attention = jnp.einsum("bqhd,bkhd->hbqk", q * (c // self.heads) ** -0.5, k)
            attention = nn.softmax(MixHeads(self.dtype, name="proj_l")(attention))
            attention = MixHeads(self.dtype, name="proj_w")(attention)
            x = jnp.einsum("hbqk,bkhd->bqhd", attention, v)
        else:
            x = jax.nn.dot_product_attention(q, k, v)
        return Dense(c, dtype=self.dtype, name="proj")(x.reshape(b, n, c))


class LayerScale(nn.Module):
    """Learned scale of each channel, https://arxiv.org/abs/2103.17239."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],))
        return x * gamma.astype(x.dtype).reshape(1, 1, -1)


class Block(nn.Module):
    """Transformer block on tokens [B, N, C].

    Attributes:
      heads: number of attention heads.
      layer_scale: whether residuals have a `LayerScale`.
      is_cait: whether residuals have CaiT's scale instead, and heads are mixed.
      dtype: type of the computation.
    """

    heads: int
    layer_scale: bool
    is_cait: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def scaled(y: jax.Array, i: int) -> jax.Array:
            if self.is_cait:
                gamma = self.param(f"gamma_{i}", nn.initializers.ones, (x.shape[-1],))
                return y * gamma.astype(y.dtype).reshape(1, 1, -1)
            return LayerScale(name=f"ls{i}")(y) if self.layer_scale else y

        y = LayerNorm(dtype=self.dtype, name="norm1")(x)
        x += scaled(Attention(self.heads, self.dtype, self.is_cait, name="attn")(y), 1)
        y = LayerNorm(dtype=self.dtype, name="norm2")(x)
        return x + scaled(Mlp(self.dtype, name="mlp")(y), 2)


def resize_positions(
    positions: jax.Array, height: int, width: int, antialias: bool = True
) -> jax.Array:
    """Interpolates the position embeddings of a square grid for another grid.

    Args:
      positions: embeddings of the patches, without class tokens, [1, n * n, C].
      height: number of rows of the new grid.
      width: number of columns of the new grid.
      antialias: whether to resize as timm does; False for torch's bicubic interpolation, which
        reads four points at any scale.

    Returns:
      The embeddings [1, height, width, C].
    """
    side = round(positions.shape[1] ** 0.5)
    grid = positions.reshape(side, side, -1)
    if antialias:
        resized = jax.image.resize(grid, (height, width, grid.shape[-1]), "bicubic")
    else:
        rows, columns = _cubic(side, height), _cubic(side, width)
        resized = jnp.einsum("yh,xw,hwc->yxc", rows, columns, grid, precision="highest")
    return resized[None]


def _cubic(old: int, new: int) -> np.ndarray:
    """Torch's bicubic interpolation of a row (a = -0.75, edges repeated) as a matrix [new, old]."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((new, old), np.float32)
    for tap in (-1, 0, 1, 2):
        t = np.abs(centres - (first + tap))
        near = 1.25 * t**3 - 2.25 * t**2 + 1
        far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        column = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), column), np.where(t <= 1, near, far))
    return matrix


class ViT(Architecture):
    """Vision transformer with its blocks "blocks.0", "blocks.1", ... as layers.

    A feature map has the patch tokens of a block after the final norm of the model. Height and
    width of the images must be multiples of `patch`.

    Attributes:
      depth: number of blocks.
      width: number of channels.
      heads: number of attention heads.
      patch: side of a patch, in pixels.
      native: side of the images of the position embeddings, in pixels.
      tokens: names of the tokens in front of the patches.
      layer_scale: see `Block`.
      is_cait: see `Block`.
      antialias: see `resize_positions`.
    """

    depth: int = 12
    width: int = 192
    heads: int = 3
    patch: int = 16
    native: int = 224
    tokens: tuple[str, ...] = ("cls_token",)
    layer_scale: bool = False
    is_cait: bool = False
    antialias: bool = True

    @property
    def maps(self) -> Maps:
        return {f"blocks.{i}": (self.width, self.patch) for i in range(self.depth)}

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        zeros = nn.initializers.zeros
        x = PatchEmbed(self.patch, self.width, self.dtype, name="patch_embed")(images)
        b, h, w, c = x.shape

        n_tokens, n_patches = len(self.tokens), (self.native // self.patch) ** 2
        tokens = [self.param(name, zeros, (1, 1, c)) for name in self.tokens]
        positions = self.param("pos_embed", zeros, (1, n_tokens + n_patches, c))
        resized = resize_positions(positions[:, n_tokens:], h, w, self.antialias)
        x = (x + resized.astype(x.dtype)).reshape(b, h * w, c)
        if tokens:
            first = (jnp.concatenate(tokens, axis=1) + positions[:, :n_tokens]).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(first, (b, *first.shape[1:])), x], axis=1)

        norm = LayerNorm(dtype=self.dtype, name="norm")
        maps = {}
        for i, layer in enumerate(self.maps):
            block = Block(
                self.heads, self.layer_scale, self.is_cait, self.dtype, name=f"blocks_{i}"
            )
            x = block(x)
            if layer in self.layers:
                patches = norm(x)[:, n_tokens:]
                maps[layer] = patches.reshape(b, h, w, c).astype(jnp.float32)
            if len(maps) == len(self.layers):
                break
        return tuple(maps[layer] for layer in self.layers)


_AUGREG = "augreg_in21k_ft_in1k"


def _spec(
    name: str, tag: str, parameters: int, size: int, *, layer: str = "blocks.7", **fields: Any
) -> Spec:
    """Specification for images of size x size; `fields` are those of `ViT`."""
    fields = {"native": size} | fields
    architecture = ViT(**fields)
    of_cait = ("cls_token", "blocks_token_only.", "head.")
    return Spec(
        name=name,
        tag=tag,
        parameters=parameters,
        architecture=architecture,
        layers=(layer,),
        image_size=(size, size),
        # The feature maps are normalised already, by the final norm of the model.
        flow={"norm": "none", "steps": 20, "kernels": (3, 1), "hidden_ratio": 0.16},
        mean=HALF if tag == _AUGREG else IMAGENET_MEAN,
        std=HALF if tag == _AUGREG else IMAGENET_STD,
        unused=of_cait if architecture.is_cait else ("head.", "head_dist.", "mask_token"),
    )


def _family(
    name: str, tag: str, size: int, parameters: tuple[int, ...], **fields: Any
) -> list[Spec]:
    """Specifications of the tiny, small and base model, or only of the last of these."""
    sizes = (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))[-len(parameters) :]
    return [
        _spec(name.format(model), tag, count, size, width=width, heads=heads, **fields)
        for (model, width, heads), count in zip(sizes, parameters, strict=True)
    ]


_DEIT, _DISTILLED = "fb_in1k", {"tokens": ("cls_token", "dist_token")}
_DINO = {"patch": 14, "native": 518, "layer_scale": True}

VITS = (
    *_family("deit_{}_patch16_224", _DEIT, 224, (5_717_416, 22_050_664, 86_567_656)),
    *_family("deit_{}_patch16_384", _DEIT, 384, (86_859_496,)),
    *_family(
        *("deit_{}_distilled_patch16_224", _DEIT, 224, (5_910_800, 22_436_432, 87_338_192)),
        **_DISTILLED,
    ),
    *_family("deit_{}_distilled_patch16_384", _DEIT, 384, (87_630_032,), **_DISTILLED),
    *_family("vit_{}_patch16_224", _AUGREG, 224, (5_717_416, 22_050_664, 86_567_656)),
    *_family("vit_{}_patch16_384", _AUGREG, 384, (5_790_376, 22_196_584, 86_859_496)),
    *_family("vit_{}_patch14_dinov2", "lvd142m", 252, (22_056_192, 86_579_712), **_DINO),
)
CAITS = tuple(
    _spec(
        *(name, "fb_dist_in1k", parameters, size),
        layer=layer,
        depth=depth,
        width=width,
        heads=heads,
        tokens=(),
        is_cait=True,
    )
    for name, parameters, size, layer, depth, width, heads in (
        ("cait_xxs24_224", 11_956_264, 224, "blocks.20", 24, 192, 4),
        ("cait_s24_224", 46_916_200, 224, "blocks.20", 24, 384, 8),
        ("cait_m48_448", 356_460_520, 448, "blocks.40", 48, 768, 16),
    )
)
