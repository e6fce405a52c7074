"""What does a channel permutation cost, as an index, as a product, or folded into the weights?

    python benchmarks/permutation.py --quick
    python benchmarks/permutation.py --out permutation.json

Likelihood and gradient of the default recipe's flow on each of its maps, batch of 32, with random
weights: couplings and shuffles alone, in four forms that take turns.

    index     channels are gathered in their new order: `flows.permute`
    product   x times a one-hot matrix, C x C
    folded    channels stay where they are. Each kernel is spread over all channels, with zeros for
              those that it does not see or change: no shuffle, and twice the multiplications
    none      no shuffle at all, which is another flow: what is above it is the shuffle's

All but the last are checked to give the same likelihood and gradients. Each line
`ratio <form>_<map> <number>` is the form's median seconds over those of the index, the form that
ours has: above 1, the index is faster.
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from outcome import describe_machine, ratios, versions, write_result

from fastflow_jax.backbones import find_spec
from fastflow_jax.config import default, fill
from fastflow_jax.flows.coupling import affine_coupling, couple, hidden_channels
from fastflow_jax.flows.permute import permute

BATCH = 32


def convolution(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """[B, h, w, I] and [k, k, I, O] -> [B, h, w, O]."""
    layout = ("NHWC", "HWIO", "NHWC")
    return bias + jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def subnet(params: dict, x: jax.Array) -> jax.Array:
    """As of `flows.ConvSubnet`."""
    hidden = jax.nn.relu(convolution(x, *params["in"]))
    return convolution(hidden, *params["out"])


def shuffled(shuffle: Callable, params: list[dict], indices: list[np.ndarray], x: jax.Array):
    """Z and log_det [B, h, w] of a flow that shuffles before each coupling."""
    total = 0.0
    for p, index in zip(params, indices, strict=True):
        x, log_det = couple(shuffle(x, index), partial(subnet, p))
        total += log_det
    return x, total


def product(x: jax.Array, index: np.ndarray) -> jax.Array:
    """`permute` as a product with a one-hot matrix."""
    return x @ jnp.asarray(np.eye(len(index), dtype=np.float32)[:, index])


def folded(params: list[dict], indices: list[np.ndarray], x: jax.Array):
    """`shuffled`, but that z has its channels where x had them."""
    channels = x.shape[-1]
    order, total = np.arange(channels), 0.0
    for p, index in zip(params, indices, strict=True):
        order = order[index]  # where the channels lie that would be in these places
        passive, active = np.split(order, [channels - channels // 2])

        def spread(array, places, axis):
            shape = list(array.shape)
            shape[axis] = channels
            where = (slice(None),) * (axis % array.ndim) + (places,)
            return jnp.zeros(shape).at[where].set(array)

        kernel, bias = p["in"]
        inner = spread(kernel, passive, -2), bias
        outer = [
            jnp.concatenate([spread(half, active, -1) for half in jnp.split(a, 2, -1)], -1)
            for a in p["out"]
        ]
        x, log_det = affine_coupling(x, subnet({"in": inner, "out": outer}, x))
        total += log_det
    return x, total


FORMS = {
    "index": partial(shuffled, permute),
    "product": partial(shuffled, product),
    "folded": folded,
    "none": partial(shuffled, lambda x, index: x),
}


def random_flow(flow, channels: int) -> tuple[list[dict], list[np.ndarray]]:
    """Weights and permutations of each step; `flow` as of a filled configuration."""
    rng = np.random.default_rng(0)
    params, passive = [], channels - channels // 2
    hidden = hidden_channels(passive, flow.hidden_ratio)
    for i in range(flow.steps):
        side = flow.kernels[i % len(flow.kernels)]

        def layer(inputs, outputs, side=side):
            bound = (inputs * side**2) ** -0.5
            kernel = rng.uniform(-bound, bound, (side, side, inputs, outputs))
            return jnp.float32(kernel), jnp.zeros(outputs)

        params.append({"in": layer(passive, hidden), "out": layer(hidden, 2 * (channels // 2))})
    return params, [rng.permutation(channels) for _ in range(flow.steps)]


def assert_close(one: jax.Array, other: jax.Array) -> None:
    """Up to the rounding of other sums, which may turn single ReLUs on or off."""
    one, other = map(np.ravel, (one, other))
    if np.linalg.norm(one - other) > 1e-2 * np.linalg.norm(other):
        raise SystemExit("the forms do not compute the same")


def compare(flow, shape: tuple[int, ...], repeats: int) -> dict[str, float]:
    """Median seconds of each form on maps of shape [B, h, w, C], in turns, after all are warm."""
    params, indices = random_flow(flow, shape[-1])
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    programs, results = {}, {}
    for name, form in FORMS.items():

        def loss(params, x, form=form):
            z, log_det = form(params, indices, x)
            return jnp.mean(0.5 * (z**2).sum(-1) - log_det)

        programs[name] = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        results[name] = jax.block_until_ready(programs[name](params, x))
    for name in ("product", "folded"):
        jax.tree.map(assert_close, results[name], results["index"])
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params, x))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Compare on all maps, print a line each and the ratios, write them where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=["tf_efficientnet_lite0", "resnet18"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="EfficientNet-Lite0, 5 repeats")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write")
    args = parser.parse_args()

    rows = []
    with ratios() as found:
        for backbone in args.backbones[:1] if args.quick else args.backbones:
            config = default()
            config.backbone = backbone
            config = fill(config)
            height, width = config.image_size
            for layer in config.layers:
                channels, stride = find_spec(backbone).maps[layer]
                shape = (BATCH, height // stride, width // stride, channels)
                seconds = compare(config.flow, shape, 5 if args.quick else args.repeats)
                name = f"{height // stride}x{width // stride}x{channels}"
                milliseconds = (f"{form} {1e3 * s:.1f}" for form, s in seconds.items())
                print(f"{backbone} {name}: {', '.join(milliseconds)} ms", flush=True)
                for form in list(FORMS)[1:]:
                    found[f"{form}_{name}"] = seconds[form] / seconds["index"]
                rows.append({"backbone": backbone, "shape": shape, "seconds": seconds})
    on_cpu = jax.default_backend() == "cpu"
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(None if on_cpu else jax.devices()[0].device_kind),
        "versions": versions("jax"),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
