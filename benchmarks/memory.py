"""How much memory do training and inference take, and what does a reversible flow save?

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --out memory.json
    python benchmarks/memory.py --peer-python PEER/bin/python    # see anomalib_fastflow.py

First XLA's own analysis of one training step of the flows alone, forward and backward, on the
feature maps of each backbone, in its published setting and in the default recipe, with 8 and with
20 steps: bytes beside arguments and results. Each line `ratio reversible_<steps>_steps_<setting>
<number>` is autodiff's bytes over those of `config.flow.reversible`: above 1, ours takes less.

Then the largest resident set of a fresh process, interpreter and libraries included, that trains
the published form on EfficientNet-Lite0's features for a few steps, backbone in every step, or
scores a batch with it. With the peer's interpreter, anomalib's FastFlow does the same, and `ratio
resident_<training or inference> <number>` is the peer's bytes over ours.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
BACKBONES = (
    "resnet18",
    "wide_resnet50_2",
    "deit_base_distilled_patch16_384",
    "cait_m48_448",
    "tf_efficientnet_lite0",
)
QUICK = ("tf_efficientnet_lite0",)
BATCH, RESIDENT_BATCH, RESIDENT_STEPS = 32, 8, 3

# What each side of the resident set runs in a fresh process; prints its largest set in KiB.
OURS = """
import resource
from functools import partial
import jax, numpy as np, optax
from fastflow_jax.backbones import create_backbone
from fastflow_jax.model import FastFlow, location_scores, negative_log_likelihood

backbone = create_backbone(
    "tf_efficientnet_lite0", weights="random", layers=["blocks.1", "blocks.2", "blocks.4"]
)
model = FastFlow(norm="layer", steps=8, kernels=(3,), reversible={reversible})
images = np.random.default_rng(0).normal(size=({batch}, 256, 256, 3)).astype(np.float32)
variables = jax.jit(model.init)(jax.random.key(0), backbone(images))
params = variables.pop("params")
optimizer = optax.adam(1e-3)

@partial(jax.jit, donate_argnums=(0, 1))
def train(params, state, features):
    def loss(params):
        latents = model.apply({{"params": params, **variables}}, features)
        return negative_log_likelihood(latents, per_dimension=True).mean()
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

@jax.jit
def score(params, features):
    latents = model.apply({{"params": params, **variables}}, features)
    return [location_scores(*l, form="probability", log_det_weight=0.0) for l in latents]

state = optimizer.init(params) if "{mode}" == "training" else None
for _ in range({steps}):
    if "{mode}" == "training":
        params, state = train(params, state, backbone(images))
    else:
        jax.block_until_ready(score(params, backbone(images)))
jax.block_until_ready(params)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
PEER = """
import resource, sys
sys.path.insert(0, {folder!r})
import torch
from anomalib_fastflow import FastflowLoss, build_model, make_optimizer, train_step

model = build_model(256)
images = torch.randn({batch}, 3, 256, 256)
optimizer = make_optimizer(model)
for _ in range({steps}):
    if "{mode}" == "training":
        train_step(model.train(), optimizer, FastflowLoss(), images)
    else:
        with torch.no_grad():
            model.eval()(images)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def planned(backbone: str, published: bool, steps: int, reversible: bool) -> dict:
    """Bytes beside arguments and results that XLA plans for a training step and for inference."""
    import jax
    import jax.numpy as jnp

    from fastflow_jax.config import default, fill
    from fastflow_jax.describe import flow_model
    from fastflow_jax.model import negative_log_likelihood

    config = default()
    config.backbone, config.published = backbone, published
    config.flow.steps, config.flow.reversible = steps, reversible
    if published:
        config.flow.affine, config.flow.zero_init = "softplus", False
    config = fill(config)
    height, width = config.image_size
    maps = find_maps(config)
    features = tuple(
        jax.ShapeDtypeStruct((BATCH, height // stride, width // stride, channels), jnp.float32)
        for channels, stride in maps
    )
    model = flow_model(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), features)
    constants = {k: v for k, v in variables.items() if k != "params"}

    def loss(params, constants, features):
        latents = model.apply({"params": params, **constants}, features)
        return negative_log_likelihood(latents, per_dimension=True).mean()

    def temporary(function, *arguments):
        program = jax.jit(function).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    result = {"training": temporary(jax.grad(loss), variables["params"], constants, features)}
    if not reversible:  # the forward pass is the same
        result["inference"] = temporary(model.apply, variables, features)
    return result


def find_maps(config) -> list[tuple[int, int]]:
    """(channels, stride) of each scale."""
    from fastflow_jax.backbones import find_spec

    spec = find_spec(config.backbone)
    return [spec.maps[layer] for layer in config.layers]


def resident(python: str, program: str, mode: str, **fields) -> int:
    """Largest resident set of a fresh process, bytes."""
    fields |= {"mode": mode, "batch": RESIDENT_BATCH, "steps": RESIDENT_STEPS}
    text = program.format(folder=str(HERE), **fields)
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [python, "-c", text],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(run.stdout.split()[-1]) * (1 if sys.platform == "darwin" else 1024)


def mebibytes(n: float) -> str:
    """Bytes as people read them."""
    return f"{n / 2**20:.0f} MiB"


def main() -> None:
    """Measure all, print a line each and the ratios, write them where asked."""
    import jax

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", help="timm's names")
    parser.add_argument("--quick", action="store_true", help="one backbone, under five minutes")
    parser.add_argument("--peer-python", help="interpreter of the peer")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write")
    args = parser.parse_args()

    names = args.backbones or (QUICK if args.quick else BACKBONES)
    rows, ratios = [], {}
    for name in names:
        for published in (False,) if args.quick else (True, False):
            for steps in (8, 20):
                plain, ours = (planned(name, published, steps, r) for r in (False, True))
                setting = name if published else f"{name}_default_recipe"
                ratio = plain["training"] / ours["training"]
                ratios[f"reversible_{steps}_steps_{setting}"] = ratio
                row = {"backbone": name, "published": published, "steps": steps, "batch": BATCH}
                row |= {"training": plain["training"], "inference": plain["inference"]}
                rows.append(row | {"training_reversible": ours["training"]})
                print(
                    f"{setting}, {steps} steps: training {mebibytes(plain['training'])}, "
                    f"reversible {mebibytes(ours['training'])}, "
                    f"inference {mebibytes(plain['inference'])}",
                    flush=True,
                )
    processes = {}
    for mode in ("training", "inference"):
        sides = {"ours": resident(sys.executable, OURS, mode, reversible=False)}
        if mode == "training":
            sides["ours_reversible"] = resident(sys.executable, OURS, mode, reversible=True)
        if args.peer_python:
            sides["peer"] = resident(args.peer_python, PEER, mode)
            ratios[f"resident_{mode}"] = sides["peer"] / sides["ours"]
            if mode == "training":
                ratios["resident_training_reversible"] = sides["peer"] / sides["ours_reversible"]
        processes[mode] = sides
        shown = ", ".join(f"{side} {mebibytes(size)}" for side, size in sides.items())
        print(f"resident set, {mode}: {shown}", flush=True)
    for name, ratio in ratios.items():
        print(f"ratio {name} {ratio:.2f}")
    if args.out:
        device = jax.devices()[0]
        machine = platform.machine() if device.platform == "cpu" else device.device_kind
        result = {
            "question": __doc__.partition("\n")[0],
            "machine": f"{machine}, {os.cpu_count()} cores",
            "versions": {"jax": jax.__version__},
            "rows": rows,
            "resident": {"batch": RESIDENT_BATCH, "steps": RESIDENT_STEPS, **processes},
            "ratios": ratios,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
