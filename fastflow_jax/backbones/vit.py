"""Vision transformers: ViT, https://arxiv.org/abs/2010.11929, DeiT, https://arxiv.org/abs/2012.12877,
and DINOv2, https://arxiv.org/abs/2304.07193.
"""

import functools
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.backbones.convolution import Conv
from fastflow_jax.errors import InputError

Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-6)


class PatchEmbed(nn.Module):
    """Images [B, H, W, 3] -> one token a patch, [B, H / patch, W / patch, C]."""

    patch: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        if images.shape[1] % self.patch or images.shape[2] % self.patch:
            raise InputError(
                f"images of {images.shape[1]}x{images.shape[2]} do not divide into patches of "
                f"{self.patch}: choose an image_size of multiples of {self.patch}"
            )
        conv = Conv(
            self.width, self.patch, self.patch, 0, use_bias=True, dtype=self.dtype, name="proj"
        )
        return conv(images)


class Mlp(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = Dense(4 * x.shape[-1], dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(nn.gelu(y, approximate=False))


class Attention(nn.Module):
    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, n, c = x.shape
        qkv = Dense(3 * c, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, c // self.heads), 2, 0)
        x = jax.nn.dot_product_attention(q, k, v).reshape(b, n, c)
        return Dense(c, dtype=self.dtype, name="proj")(x)


class LayerScale(nn.Module):
    """A learned gain for each channel, https://arxiv.org/abs/2103.17239."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param("gamma", nn.initializers.ones, (x.shape[-1],))
        return x * gamma.astype(x.dtype).reshape(1, 1, -1)


class Block(nn.Module):
    heads: int
    layer_scale: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = LayerNorm(dtype=self.dtype, name="norm1")(x)
        y = Attention(self.heads, self.dtype, name="attn")(y)
        x += LayerScale(name="ls1")(y) if self.layer_scale else y
        y = LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = Mlp(self.dtype, name="mlp")(y)
        return x + (LayerScale(name="ls2")(y) if self.layer_scale else y)


def resize_positions(
    positions: jax.Array, height: int, width: int, antialias: bool = True
) -> jax.Array:
    """Position embeddings of a square grid, [1, n * n, C], for another grid: [1, height, width, C].

    Args:
      positions: of the patches, without those of class tokens.
      height: patches of the new grid in a column.
      width: and in a row.
      antialias: resize as timm does; False as torch's plain bicubic does, which reads four points
        however much smaller the new grid is.
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
    """Bicubic interpolation of a row as torch has it (a = -0.75, edges repeated): [new, old]."""
    places = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(places).astype(int)
    matrix = np.zeros((new, old), np.float32)
    for tap in (-1, 0, 1, 2):
        t = np.abs(places - (first + tap))
        near = 1.25 * t**3 - 2.25 * t**2 + 1
        far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        column = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), column), np.where(t <= 1, near, far))
    return matrix


class ViT(nn.Module):
    """Images [B, H, W, 3] -> a map [B, H / patch, W / patch, C] for each of `layers`.

    A layer is a block, "blocks.0" to "blocks.11"; its map is its patch tokens through the model's
    own final norm. Computes up to the last of `layers`. Sides are multiples of the patch.
    """

    spec: "ViTSpec"
    layers: tuple[str, ...]
    antialias: bool = True  # see `resize_positions`
    dtype: jnp.dtype = jnp.float32  # of the computation; maps are float32

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        spec = self.spec
        zeros = nn.initializers.zeros
        x = PatchEmbed(spec.patch, spec.width, self.dtype, name="patch_embed")(images)
        b, h, w, c = x.shape

        names = ("cls_token", "dist_token") if spec.distilled else ("cls_token",)
        tokens = jnp.concatenate([self.param(name, zeros, (1, 1, c)) for name in names], axis=1)
        n = (spec.native // spec.patch) ** 2
        positions = self.param("pos_embed", zeros, (1, len(names) + n, c))
        tokens = (tokens + positions[:, : len(names)]).astype(x.dtype)
        positions = resize_positions(positions[:, len(names) :], h, w, self.antialias)
        x = (x + positions.astype(x.dtype)).reshape(b, h * w, c)
        x = jnp.concatenate([jnp.broadcast_to(tokens, (b, *tokens.shape[1:])), x], axis=1)

        norm = LayerNorm(dtype=self.dtype, name="norm")
        maps = {}
        for i, layer in enumerate(spec.maps):
            x = Block(spec.heads, spec.layer_scale, self.dtype, name=f"blocks_{i}")(x)
            if layer in self.layers:
                patches = norm(x)[:, len(names) :]
                maps[layer] = patches.reshape(b, h, w, c).astype(jnp.float32)
            if len(maps) == len(self.layers):
                break
        return tuple(maps[layer] for layer in self.layers)


@dataclass(frozen=True)
class ViTSpec:
    """A vision transformer by timm's name, and FastFlow's use of it."""

    name: str
    tag: str  # of the weights: timm/<name>.<tag> on the hub
    parameters: int  # of the whole classifier
    width: int
    heads: int
    patch: int = 16
    native: int = 224  # side of the images that the position embeddings are for
    distilled: bool = False
    layer_scale: bool = False
    image_size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    layers: tuple[str, ...] = ("blocks.7",)
    package: str | None = None  # none on PyPI holds the weights
    # What a file holds after the last layer, and DINOv2's token of masked patches.
    unused: tuple[str, ...] = ("head.", "head_dist.", "mask_token")

    @property
    def flow(self) -> dict:
        """FastFlow's settings for this backbone, whose own last norm stands before the flow."""
        return {"norm": "none", "steps": 20, "kernels": (3, 1), "hidden_ratio": 0.16}

    @property
    def maps(self) -> dict[str, tuple[int, int]]:
        """Channels and stride of each layer that can be asked for, in order of depth."""
        return {f"blocks.{i}": (self.width, self.patch) for i in range(12)}

    def module(self, layers: tuple[str, ...], dtype: jnp.dtype = jnp.float32) -> ViT:
        return ViT(self, layers, dtype=dtype)

    def timm_name(self, name: str) -> str:
        """The name in timm of a tensor in a weight file: itself."""
        return name


def _family(name: str, tag: str, parameters: tuple[int, ...], **fields) -> tuple[ViTSpec, ...]:
    """The tiny, small and base of a model, as many as there are parameters, base last."""
    sizes = (("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12))[-len(parameters) :]
    return tuple(
        ViTSpec(name.format(size), tag, count, width, heads, **fields)
        for (size, width, heads), count in zip(sizes, parameters, strict=True)
    )


_AT_384 = {"native": 384, "image_size": (384, 384)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_AUGREG = "augreg_in21k_ft_in1k"

VITS = (
    *_family("deit_{}_patch16_224", "fb_in1k", (5_717_416, 22_050_664, 86_567_656)),
    *_family("deit_{}_patch16_384", "fb_in1k", (86_859_496,), **_AT_384),
    *_family(
        "deit_{}_distilled_patch16_224",
        "fb_in1k",
        (5_910_800, 22_436_432, 87_338_192),
        distilled=True,
    ),
    *_family("deit_{}_distilled_patch16_384", "fb_in1k", (87_630_032,), distilled=True, **_AT_384),
    *_family("vit_{}_patch16_224", _AUGREG, (5_717_416, 22_050_664, 86_567_656), **_HALF),
    *_family(
        "vit_{}_patch16_384", _AUGREG, (5_790_376, 22_196_584, 86_859_496), **_HALF, **_AT_384
    ),
    *_family(
        "vit_{}_patch14_dinov2",
        "lvd142m",
        (22_056_192, 86_579_712),
        patch=14,
        native=518,
        layer_scale=True,
        image_size=(252, 252),
    ),
)
