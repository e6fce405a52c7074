"""Our published form with the weights of the torch models of `torch_side.Session.build`."""

import dataclasses
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fastflow_jax.backbones import Backbone, create_backbone
from fastflow_jax.config import fill
from fastflow_jax.detectors.fastflow.model import FastFlow
from fastflow_jax.detectors.fastflow.scorer import flow_model

REFERENCE = pathlib.Path(__file__).parent.parent / "configs/reference.py"


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our model with the weights of the torch side, and a batch of images."""

    config: object
    backbone: Backbone
    model: FastFlow
    variables: dict
    images: np.ndarray  # float32 [B, H, W, 3]


def published(backbone: str, batch: int):
    """Filled configuration of `configs/reference.py` for a backbone."""
    config = runpy.run_path(str(REFERENCE))["get_config"]()
    config.backbone = backbone
    config.train.batch_size = config.batch_size = batch
    return fill(config)


def build(peer, backbone: str, batch: int, dtype: str, folder: pathlib.Path) -> Ours:
    """Builds the models of both sides with one set of random weights, and a batch of images.

    Args:
      peer: a `peer.Peer`.
      backbone: timm's name.
      batch: number of images.
      dtype: of our convolutions and matrix products; the peer gets it with each call.
      folder: empty directory, for the weights and images.
    """
    config = published(backbone, batch)
    side, _ = config.image_size
    images = np.random.default_rng(0).standard_normal((batch, side, side, 3), np.float32)
    safetensors.numpy.save_file({"images": images}, folder / "images.safetensors")
    flow = config.flow
    answer = peer.call(
        "build",
        backbone=backbone,
        side=side,
        steps=flow.steps,
        kernels=list(flow.kernels),
        ratio=flow.hidden_ratio,
        folder=str(folder),
    )
    device = jax.default_backend()
    if (device == "cpu") != (answer["device"] == "cpu"):
        raise ValueError(
            f"JAX runs on {device}, torch on {answer['device']}. Both must use the same device."
        )
    variables = flow_variables(safetensors.numpy.load_file(folder / "flow.safetensors"))
    trainable = sum(x.size for x in jax.tree.leaves(variables["params"]))
    if trainable != answer["trainable"]:
        raise ValueError(
            f"{backbone}: ours has {trainable} trainable numbers, torch {answer['trainable']}"
        )
    return Ours(
        config,
        create_backbone(
            backbone,
            weights=str(folder / "backbone.safetensors"),
            layers=config.layers,
            dtype=getattr(jnp, dtype),
        ),
        flow_model(config).clone(dtype=getattr(jnp, dtype)),
        variables,
        images,
    )


def flow_variables(tensors: dict[str, np.ndarray]) -> dict:
    """Converts norms and flows of anomalib's state to variables of `model.FastFlow`."""
    params: dict = {}
    permutations: dict = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"norms\.(\d+)\.(weight|bias)", name):
            scale, kind = match.groups()
            norm = params.setdefault(f"norm_{scale}", {"LayerNorm_0": {}})["LayerNorm_0"]
            norm["scale" if kind == "weight" else kind] = np.moveaxis(tensor, 0, -1)
            continue
        scale, step, part = re.fullmatch(
            r"fast_flow_blocks\.(\d+)\.module_list\.(\d+)\.(.+)", name
        ).groups()
        flow, step = f"flow_{scale}", f"step_{step}"
        empty = {"coupling": {"subnet": {"conv_in": {}, "conv_out": {}}}, "affine": {}}
        ours = params.setdefault(flow, {}).setdefault(step, empty)
        if part.startswith("subnet."):
            _, place, kind = part.split(".")
            conv = ours["coupling"]["subnet"]["conv_in" if place == "0" else "conv_out"]
            if kind == "bias":
                conv["bias"] = tensor
            else:
                conv["kernel"] = tensor.transpose(2, 3, 1, 0)
        elif part in ("global_scale", "global_offset"):
            ours["affine"][part.removeprefix("global_")] = tensor.ravel()
        elif part == "w_perm":
            index = tensor[:, :, 0, 0].argmax(1).astype(np.int32)
            permutations.setdefault(flow, {})[step] = {"permute": {"index": index}}
    return jax.tree.map(jnp.asarray, {"params": params, "permutations": permutations})
