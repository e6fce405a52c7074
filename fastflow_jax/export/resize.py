"""Resizing inside an ONNX model, for images of any size."""

from typing import Any

import numpy as np

from fastflow_jax.exported import INPUT

_MAP, _MASK = "anomaly_map", "mask"


def resize_inside(model: Any, size: tuple[int, int], pixel_threshold: np.float32 | None) -> None:
    """Changes a model so that it takes images of any size, and its maps have that size.

    Images are resized bilinearly with antialiasing, as by Pillow but for rounding, and maps back
    bilinearly. The images of a batch have one size.

    Args:
      model: `onnx.ModelProto` with the input and outputs of `exported`.
      size: (height, width) of its input.
      pixel_threshold: above which a pixel of the resized map is in the mask; None without masks.
    """
    import onnx
    from onnx import helper, numpy_helper

    graph = model.graph
    for node in graph.node:
        node.input[:] = ["resized" if name == INPUT else name for name in node.input]
        node.output[:] = [
            f"{name}_of_input" if name in (_MAP, _MASK) else name for name in node.output
        ]
    how = {"mode": "linear", "axes": [1, 2], "coordinate_transformation_mode": "half_pixel"}
    before = [
        helper.make_node("Shape", [INPUT], ["image_size"], "image_size", start=1, end=3),
        helper.make_node(
            "Resize", [INPUT, "", "", "input_size"], ["resized"], "resize", antialias=1, **how
        ),
    ]
    after = [
        helper.make_node(
            "Resize", [f"{_MAP}_of_input", "", "", "image_size"], [_MAP], "resize_map", **how
        )
    ]
    constants: dict[str, Any] = {"input_size": np.array(size, np.int64)}
    if pixel_threshold is not None:
        after.append(helper.make_node("Greater", [_MAP, "pixel_threshold"], [_MASK], "mask"))
        constants["pixel_threshold"] = pixel_threshold
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(node for node in nodes if f"{_MASK}_of_input" not in node.output)
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    )
    shapes = {INPUT: ["batch", "height", "width", 3], _MAP: ["batch", "height", "width"]}
    shapes[_MASK] = shapes[_MAP]
    for value in (*graph.input, *graph.output):
        if value.name in shapes:
            kind = value.type.tensor_type.elem_type
            value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shapes[value.name]))
    onnx.checker.check_model(model, full_check=True)
