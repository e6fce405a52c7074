"""Feature maps of timm for seeded numbers, which are made without torch."""

import importlib
import warnings
import zlib

import numpy as np
from torchvision_oracle import import_torchvision

from fastflow_jax.backbones import BACKBONES, porting


def compared_layers(name: str) -> tuple[str, ...]:
    """Layers that are compared: the default ones, or of transformers above ViT-B the second block.

    All blocks of a transformer have the same form, and whole large models take minutes.
    """
    spec = BACKBONES[name]
    is_large = name.startswith("vit_") and spec.architecture.width > 768
    return ("blocks.1",) if is_large else spec.layers


def seeded_state(name: str, layers: tuple[str, ...], seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by timm's names up to the last of `layers`, including batch statistics."""
    spec = BACKBONES[name]
    state = {}
    for key, slot in porting.slots(spec.module(layers), spec.image_size).items():
        rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
        shape = slot.timm_shape
        if key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
            state[key] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        elif key.endswith("weight"):
            deviation = np.prod(shape[1:]) ** -0.5
            state[key] = (rng.standard_normal(shape) * deviation).astype(np.float32)
        else:
            state[key] = (rng.standard_normal(shape) * 0.2).astype(np.float32)
    return state


def seeded_images(height: int, width: int) -> np.ndarray:
    """Two images [2, H, W, 3], smooth, so that errors of padding and alignment are visible."""
    rng = np.random.default_rng([height, width])
    coarse = rng.standard_normal((2, height // 16 + 2, width // 16 + 2, 3))
    y, x = np.arange(height) / 16, np.arange(width) / 16
    smooth = coarse[:, y.astype(int)][:, :, x.astype(int)]
    return (smooth + 0.5 * rng.standard_normal((2, height, width, 3))).astype(np.float32)


def sample(maps: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """A few channels and locations of each map, including the corners."""
    picked = []
    for m in maps:
        _, h, w, c = m.shape
        rows, columns = np.linspace(0, h - 1, 4).astype(int), np.linspace(0, w - 1, 4).astype(int)
        channels = np.linspace(0, c - 1, 6).astype(int)
        picked.append(np.asarray(m)[np.ix_([0, 1], rows, columns, channels)])
    return picked


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def import_timm():
    """Imports timm, with a replacement for torchvision if needed."""
    import_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("timm")


def timm_maps(name: str, state: dict, images: np.ndarray, layers: tuple[str, ...]) -> tuple:
    """Feature maps of timm at `layers`, [B, h, w, C]; tokens after the norm of the model.

    Computed in float64, so that differences are rounding errors of the other side alone.
    """
    timm = import_timm()
    import torch

    tensors = {key: torch.from_numpy(x).double() for key, x in state.items()}
    size = {}
    if name.startswith(("vit", "deit")):
        depth = 1 + max(int(layer.removeprefix("blocks.")) for layer in layers)
        size = {"dynamic_img_size": True, "depth": depth}
    elif name.startswith("cait"):  # has one input size; timm resizes its positions
        size = {"img_size": images.shape[1:3]}
        grid = [side // 16 for side in images.shape[1:3]]
        tensors["pos_embed"] = timm.layers.resample_abs_pos_embed(
            tensors["pos_embed"], grid, num_prefix_tokens=0
        )
    model = timm.create_model(name, pretrained=False, **size).eval().double()
    assert not model.load_state_dict(tensors, strict=False).unexpected_keys

    found = {}
    modules = dict(model.named_modules())
    for layer in layers:
        modules[layer].register_forward_hook(lambda *a, layer=layer: found.update({layer: a[2]}))
    with torch.inference_mode():
        model.forward_features(torch.from_numpy(images).double().permute(0, 3, 1, 2))
        if not size:
            return tuple(found[layer].permute(0, 2, 3, 1).numpy() for layer in layers)
        stride = BACKBONES[name].maps[layers[0]][1]
        b, h, w = len(images), images.shape[1] // stride, images.shape[2] // stride
        return tuple(model.norm(found[x])[:, -h * w :].reshape(b, h, w, -1).numpy() for x in layers)
