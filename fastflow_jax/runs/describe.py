"""Summary of the model of a configuration; needs neither data nor weights."""

import math

import jax
import jax.numpy as jnp

from fastflow_jax.backbones import spec_of
from fastflow_jax.backbones.weights import licence, origin
from fastflow_jax.data.levels import Levels
from fastflow_jax.detectors.fastflow.scorer import flow_model, objective
from fastflow_jax.errors import InputError
from fastflow_jax.features.cache import n_bytes


def describe(config) -> str:
    """Returns a table of scales, shapes, trainable parameters, operations and memory.

    Operations are counted by XLA, two per multiply-add. The memory of a training step is that of
    its temporary values on one device, as planned by XLA.

    Args:
      config: filled, see `config.fill`.

    Raises:
      InputError: the detector is not FastFlow.
    """
    if config.detector != "fastflow":
        raise InputError(
            f"Only fastflow can be described, not {config.detector}. Pass a configuration with "
            "config.detector = 'fastflow'."
        )
    spec = spec_of(config)
    backbone = spec.module(tuple(config.layers))
    model = flow_model(config)
    images = jax.ShapeDtypeStruct((1, *config.image_size, 3), jnp.float32)
    key = jax.random.key(0)
    backbone_variables = jax.eval_shape(backbone.init, key, images)
    maps = jax.eval_shape(backbone.apply, backbone_variables, images)
    variables = jax.eval_shape(model.init, key, maps)

    cached = [jax.ShapeDtypeStruct(m.shape, jnp.dtype(config.feature_dtype)) for m in maps]
    batch = config.train.batch_size
    features = tuple(jax.ShapeDtypeStruct((batch, *m.shape[1:]), m.dtype) for m in cached)
    planned = training_memory(config, variables, features)

    lines = [f"{config.backbone} at {config.image_size[0]}x{config.image_size[1]}"]
    lines.append(f"{'layer':<12}{'map':>16}{'stride':>8}{'trainable':>14}")
    for i, (layer, m) in enumerate(zip(config.layers, maps, strict=True)):
        shape = "x".join(map(str, m.shape[1:]))
        numbers = sum(
            _numbers(variables["params"].get(name, {})) for name in (f"flow_{i}", f"norm_{i}")
        )
        lines.append(f"{layer:<12}{shape:>16}{spec.blocks[layer][1]:>8}{numbers:>14,}")
    # Each location of a map is compared with all rows of two banks.
    compared = 2 * config.map.bank * sum(math.prod(m.shape) for m in maps)
    banked = 2 * config.map.bank * sum(m.shape[-1] for m in maps)
    rows = {
        "trainable parameters": f"{_numbers(variables['params']):,}",
        "frozen parameters (backbone)": f"{_numbers(backbone_variables):,}",
        "images of more than 8 bits": str(Levels.of(config.data) or "their high byte"),
        "licence of the weights": licence(origin(spec, config.weights)),
        "operations per image, backbone": _operations(backbone.apply, backbone_variables, images),
        "operations per image, flow": _operations(model.apply, variables, maps),
        "operations per image, banks": f"{2 * compared / 1e9:.2f} G",
        "features per image": f"{_bytes(n_bytes(1, cached))} in {config.feature_dtype}",
        "weights": _bytes(4 * (_numbers(variables["params"]) + _numbers(backbone_variables))),
        "banks (about)": f"{_bytes(2 * banked)} in float16",
        f"training step, batch of {batch}": f"{_bytes(planned)} of temporary values",
    }
    width = max(map(len, rows)) + 2
    return "\n".join(lines + [f"{name:<{width}}{value}" for name, value in rows.items()])


def training_memory(config, variables, features) -> int:
    """Bytes of temporary values in the gradient of a training step, as planned by XLA.

    Args:
      config: filled.
      variables: shapes of the variables of `flow_model(config)`.
      features: shapes of a batch of features, [B, h, w, C] per scale.
    """
    nll = objective(config).loss
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), features[0].shape[0]))

    def loss(params, constants, features, keys):
        return nll({"params": params, **constants}, features, None, keys).mean()

    constants = {k: v for k, v in variables.items() if k != "params"}
    step = jax.jit(jax.grad(loss)).lower(variables["params"], constants, features, keys).compile()
    memory = step.memory_analysis()
    assert memory is not None  # None if the compiler does not support it; those of jaxlib do
    return memory.temp_size_in_bytes


def _numbers(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _operations(apply, variables, inputs) -> str:
    costs = jax.jit(apply).lower(variables, inputs).cost_analysis()
    flops = costs.get("flops", 0) if costs else 0
    return f"{flops / 1e9:.2f} G"


def _bytes(n: float) -> str:
    return f"{n / 2**20:.1f} MiB"
