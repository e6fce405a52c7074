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
from jax.typing import DTypeLike

from fastflow_jax.backbones.convolution import Conv
from fastflow_jax.backbones.positions import resize_positions, rotate, rotations
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
Rotation = tuple[np.ndarray, np.ndarray]  # see `rotations`


class PatchEmbed(nn.Module):
    """Convolution of each patch: images [B, H, W, 3] -> tokens [B, H / patch, W / patch, C]."""

    patch: int
    width: int
    dtype: DTypeLike

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
    """Two dense layers with GELU or a gate (SwiGLU, arXiv 2002.05202) between them.

    Tokens are [B, N, C].

    Attributes:
      hidden: number of channels between the layers.
      form: "gelu"; "packed", a gate by SiLU with the gate and the gated half in one layer; or
        "split", the same in two layers.
      dtype: type of the computation.
    """

    hidden: int
    form: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = functools.partial(Dense, dtype=self.dtype)
        if self.form == "gelu":
            y = nn.gelu(dense(self.hidden, name="fc1")(x), approximate=False)
        elif self.form == "packed":
            gate, y = jnp.split(dense(2 * self.hidden, name="fc1")(x), 2, axis=-1)
            y = nn.silu(gate) * y
        else:
            y = nn.silu(dense(self.hidden, name="fc1_g")(x)) * dense(self.hidden, name="fc1_x")(x)
        return dense(x.shape[-1], name="fc2")(y)


class MixHeads(nn.Module):
    """Linear layer over the heads of [heads, B, queries, keys]."""

    dtype: DTypeLike

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
      use_bias: whether queries, keys and values have a bias.
    """

    heads: int
    dtype: DTypeLike
    talking: bool = False
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, rotation: Rotation | None = None) -> jax.Array:
        b, n, c = x.shape
        qkv = Dense(3 * c, self.use_bias, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, self.heads, c // self.heads), 2, 0)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
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
      hidden: see `Mlp`.
      mlp: form of the `Mlp`.
      scale: learned scale of the residuals: "module", `LayerScale` "ls1" and "ls2"; "parameter",
        parameters "gamma_1" and "gamma_2"; or None.
      talking: see `Attention`.
      use_bias: see `Attention`.
      epsilon: of the norms.
      dtype: type of the computation.
    """

    heads: int
    hidden: int
    mlp: str
    scale: str | None
    talking: bool
    use_bias: bool
    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, rotation: Rotation | None = None) -> jax.Array:
        def scaled(y: jax.Array, i: int) -> jax.Array:
            if self.scale == "parameter":
                gamma = self.param(f"gamma_{i}", nn.initializers.ones, (x.shape[-1],))
                return y * gamma.astype(y.dtype).reshape(1, 1, -1)
            return LayerScale(name=f"ls{i}")(y) if self.scale else y

        attention = Attention(self.heads, self.dtype, self.talking, self.use_bias, name="attn")
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm1")(x)
        x += scaled(attention(y, rotation), 1)
        y = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm2")(x)
        return x + scaled(Mlp(self.hidden, self.mlp, self.dtype, name="mlp")(y), 2)


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
      registers: number of further tokens in front of the patches (arXiv 2309.16588). If there are
        any, only patches have positions.
      rotary: whether positions are rotations of queries and keys, as in DINOv3, whose queries, keys
        and values have no bias.
      hidden: see `Mlp`; None for 4 * `width`.
      mlp: see `Block`.
      scale: see `Block`.
      talking: see `Attention`.
      antialias: see `resize_positions`.
    """

    depth: int = 12
    width: int = 192
    heads: int = 3
    patch: int = 16
    native: int = 224
    tokens: tuple[str, ...] = ("cls_token",)
    registers: int = 0
    rotary: bool = False
    hidden: int | None = None
    mlp: str = "gelu"
    scale: str | None = None
    talking: bool = False
    antialias: bool = True

    @property
    def maps(self) -> Maps:
        return {f"blocks.{i}": (self.width, self.patch) for i in range(self.depth)}

    @property
    def epsilon(self) -> float:
        """Epsilon of the norms."""
        return 1e-5 if self.rotary else 1e-6

    @property
    def n_prefix(self) -> int:
        """Number of tokens in front of the patches."""
        return len(self.tokens) + self.registers

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        x = PatchEmbed(self.patch, self.width, self.dtype, name="patch_embed")(images)
        b, h, w, c = x.shape
        x = self._with_tokens(x)
        rotation = rotations(h, w, c // self.heads, self.n_prefix) if self.rotary else None
        norm = nn.LayerNorm(self.epsilon, dtype=self.dtype, name="norm")
        maps = {}
        for i, layer in enumerate(self.maps):
            block = Block(
                heads=self.heads,
                hidden=self.hidden or 4 * c,
                mlp=self.mlp,
                scale=self.scale,
                talking=self.talking,
                use_bias=not self.rotary,
                epsilon=self.epsilon,
                dtype=self.dtype,
                name=f"blocks_{i}",
            )
            x = block(x, rotation)
            if layer in self.layers:
                patches = norm(x)[:, self.n_prefix :]
                maps[layer] = patches.reshape(b, h, w, c).astype(jnp.float32)
            if len(maps) == len(self.layers):
                break
        return tuple(maps[layer] for layer in self.layers)

    def _with_tokens(self, x: jax.Array) -> jax.Array:
        """Tokens [B, N, C] of patches [B, h, w, C], with positions and the tokens in front."""
        b, h, w, c = x.shape
        zeros = nn.initializers.zeros
        first = [self.param(name, zeros, (1, 1, c)) for name in self.tokens]
        if self.registers:
            first.append(self.param("reg_token", zeros, (1, self.registers, c)))
        if not self.rotary:
            n, n_patches = 0 if self.registers else len(first), (self.native // self.patch) ** 2
            positions = self.param("pos_embed", zeros, (1, n + n_patches, c))
            x += resize_positions(positions[:, n:], h, w, self.antialias).astype(x.dtype)
            first = [token + positions[:, i : i + 1] for i, token in enumerate(first[:n])] or first
        x = x.reshape(b, h * w, c)
        if not first:
            return x
        tokens = jnp.concatenate(first, axis=1).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(tokens, (b, *tokens.shape[1:])), x], axis=1)


_AUGREG = "augreg_in21k_ft_in1k"
# Mean and standard deviation of default tags that are not those of ImageNet.
_NORMALISATIONS = {_AUGREG: (HALF, HALF), "webli": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))}


def _spec(
    name: str, tag: str, parameters: int, size: int, *, layer: int | None = None, **fields: Any
) -> Spec:
    """Specification for images of size x size; `fields` are those of `ViT`.

    `layer` is the number of the published block, by default at two thirds of the depth.
    """
    fields = {"native": size} | fields
    architecture = ViT(**fields)
    of_cait = ("cls_token", "blocks_token_only.", "head.")
    mean, std = _NORMALISATIONS.get(tag, (IMAGENET_MEAN, IMAGENET_STD))
    return Spec(
        name=name,
        tag=tag,
        parameters=parameters,
        architecture=architecture,
        layers=(f"blocks.{2 * architecture.depth // 3 - 1 if layer is None else layer}",),
        image_size=(size, size),
        # The feature maps are normalised already, by the final norm of the model.
        flow={"norm": "none", "steps": 20, "kernels": (3, 1), "hidden_ratio": 0.16},
        mean=mean,
        std=std,
        unused=of_cait if architecture.talking else ("head.", "head_dist.", "mask_token"),
    )


_SIZES = {  # width, heads, depth
    "tiny": (192, 3, 12),
    "small": (384, 6, 12),
    "small_plus": (384, 6, 12),
    "base": (768, 12, 12),
    "large": (1024, 16, 24),
    "so400m": (1152, 16, 27),
    "huge_plus": (1280, 20, 32),
    "giant": (1536, 24, 40),
}


def _family(
    name: str, tag: str, size: int, parameters: dict[str, int], **fields: Any
) -> list[Spec]:
    """Specifications of models of several sizes, by their numbers of parameters."""
    specs = []
    for model, count in parameters.items():
        width, heads, depth = _SIZES[model]
        shape = {"width": width, "heads": heads, "depth": depth} | _MLPS.get(model, {})
        specs.append(_spec(name.format(model), tag, count, size, **shape, **fields))
    return specs


_MLPS = {
    "small_plus": {"mlp": "split"},
    "so400m": {"hidden": 4304},
    "huge_plus": {"mlp": "split"},
    "giant": {"mlp": "packed", "hidden": 4096},
}
_DEIT, _DISTILLED = "fb_in1k", {"tokens": ("cls_token", "dist_token")}
_DINO2 = {"patch": 14, "native": 518, "scale": "module"}
_TIPS = {"patch": 14, "native": 448, "scale": "module", "registers": 1}
_DINO3 = {"registers": 4, "rotary": True, "scale": "parameter"}

VITS = (
    *_family(
        *("deit_{}_patch16_224", _DEIT, 224),
        {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656},
    ),
    *_family("deit_{}_patch16_384", _DEIT, 384, {"base": 86_859_496}),
    *_family(
        *("deit_{}_distilled_patch16_224", _DEIT, 224),
        {"tiny": 5_910_800, "small": 22_436_432, "base": 87_338_192},
        **_DISTILLED,
    ),
    *_family("deit_{}_distilled_patch16_384", _DEIT, 384, {"base": 87_630_032}, **_DISTILLED),
    *_family(
        *("vit_{}_patch16_224", _AUGREG, 224),
        {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656},
    ),
    *_family(
        *("vit_{}_patch16_384", _AUGREG, 384),
        {"tiny": 5_790_376, "small": 22_196_584, "base": 86_859_496},
    ),
    *_family(
        *("vit_{}_patch14_dinov2", "lvd142m", 252),
        {"small": 22_056_192, "base": 86_579_712, "large": 304_367_616, "giant": 1_136_479_232},
        **_DINO2,
    ),
    *_family(
        *("vit_{}_patch14_reg4_dinov2", "lvd142m", 252),
        {"small": 22_057_344, "base": 86_582_016, "large": 304_370_688, "giant": 1_136_483_840},
        **_DINO2 | {"registers": 4},
    ),
    *_family(
        *("vit_{}_patch14_reg1_tipsv2", "webli", 252),
        {
            "base": 86_314_752,
            "large": 304_014_336,
            "so400m": 413_391_600,
            "giant": 1_135_949_312,
        },
        **_TIPS,
    ),
    *_family(
        *("vit_{}_patch16_dinov3", "lvd1689m", 256),
        {
            "small": 21_586_944,
            "small_plus": 28_683_264,
            "base": 85_641_216,
            "large": 303_079_424,
            "huge_plus": 840_509_440,
        },
        **_DINO3,
    ),
)
CAITS = tuple(
    _spec(
        *(name, "fb_dist_in1k", parameters, size),
        layer=layer,
        depth=depth,
        width=width,
        heads=heads,
        tokens=(),
        scale="parameter",
        talking=True,
    )
    for name, parameters, size, layer, depth, width, heads in (
        ("cait_xxs24_224", 11_956_264, 224, 20, 24, 192, 4),
        ("cait_s24_224", 46_916_200, 224, 20, 24, 384, 8),
        ("cait_m48_448", 356_460_520, 448, 40, 48, 768, 16),
    )
)
