"""Memory of training and scoring compared with anomalib, and with reversible flows.

    pip install -e '.[bench]'
    python benchmarks/memory.py --quick
    python benchmarks/memory.py --out memory.json
    python benchmarks/memory.py --parts plan        # needs no torch, weights or images

For each backbone:

    plan      memory that XLA plans for one training step of the flows on its feature maps,
              excluding arguments and results, and for scoring. In the published form and in the
              default recipe, with 8 and with 20 steps. Nothing is run.
    resident  peak memory of a process (on a GPU, of the device) that only trains a few steps, or
              scores a batch: the published form (`configs/reference.py`) on both sides, with random
              weights and images. Ours trains on cached features, anomalib with its backbone in each
              step.

Each line `ratio reversible_<steps>_steps_<setting> <number>` is the memory without over that with
`config.flow.reversible`; each line `ratio resident_<training or scoring>_<setting> <number>` is
anomalib's memory over ours: above 1, ours needs less.
"""

import argparse
import pathlib
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from outcome import describe_machine, peak_memory, ratios, versions, write_result
from peer import Peer
from same_weights import published

from fastflow_jax import parallel
from fastflow_jax.backbones import create_backbone, find_spec
from fastflow_jax.config import default, fill
from fastflow_jax.detector import Detector
from fastflow_jax.detectors.fastflow.scorer import FastFlowScorer, calibrated, flow_model, objective
from fastflow_jax.features.extract import extractor
from fastflow_jax.runs.describe import training_memory
from fastflow_jax.training.step import create_optimizer, create_state, train_step

BACKBONES = (
    "resnet18",
    "wide_resnet50_2",
    "deit_base_distilled_patch16_384",
    "cait_m48_448",
    "tf_efficientnet_lite0",
)
BATCH = 32  # images of a planned step
PARTS = ("plan", "resident")
DOING = ("training", "scoring")


def planned(backbone: str, published: bool, steps: int, reversible: bool) -> dict[str, int]:
    """Bytes that XLA plans for a training step and for scoring, by name."""
    config = default()
    config.backbone, config.published = backbone, published
    config.flow.steps, config.flow.reversible = steps, reversible
    if published:
        config.flow.affine, config.flow.zero_init = "softplus", False
        config.train.window = 0
    config = fill(config)
    height, width = config.image_size
    maps = [find_spec(backbone).maps[layer] for layer in config.layers]
    features = tuple(
        jax.ShapeDtypeStruct((BATCH, height // stride, width // stride, channels), jnp.float32)
        for channels, stride in maps
    )
    model = flow_model(config)
    variables = jax.eval_shape(model.init, jax.random.key(0), features)
    scoring = jax.jit(model.apply).lower(variables, features).compile()
    return {
        "training": training_memory(config, variables, features),
        "scoring": scoring.memory_analysis().temp_size_in_bytes,
    }


def resident(doing: str, backbone: str, batch: int) -> int:
    """Peak memory in bytes of this process (or its GPU), which must do nothing else."""
    config = published(backbone, batch)
    net = create_backbone(backbone, weights="random", layers=config.layers)
    images = np.random.default_rng(0).standard_normal((batch, *config.image_size, 3), np.float32)
    how = (config.length_power, config.parallel, batch, config.feature_dtype)
    features = extractor(net, *how)(images)
    flow_model(config)
    nll = objective(config)
    if doing == "training":
        optimizer = create_optimizer(config.train, 3)
        state = create_state(nll, optimizer, [m.shape[1:] for m in features], 0)
        step = partial(train_step, loss=nll.loss, optimizer=optimizer, seed=0)
        run = parallel.step(step, config.parallel)
        rows, weight = np.arange(batch, dtype=np.int32), np.ones(batch, np.float32)
        for _ in range(3):
            state = jax.block_until_ready(run(state, (features, None), rows, weight))
    else:
        variables = nll.init(jax.random.key(0), tuple(m[:1] for m in features))
        calibration = calibrated(config, variables, None).calibration
        scorer = FastFlowScorer(config, variables, calibration)
        Detector(config, net, scorer).score(images)
    if jax.default_backend() == "cpu":
        return peak_memory()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def compare_with_anomalib(doing: str, backbone: str, batch: int) -> dict[str, int]:
    """Peak memory in bytes of both sides, each in a process of its own."""
    command = [sys.executable, __file__, "--measure", doing, backbone, str(batch)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    config = published(backbone, batch)
    with Peer() as peer:
        theirs = peer.call(
            "peak_memory",
            part=doing,
            batch=batch,
            backbone=backbone,
            side=config.image_size[0],
            steps=config.flow.steps,
            kernels=list(config.flow.kernels),
            ratio=config.flow.hidden_ratio,
        )
    return {"ours": int(out.splitlines()[-1]), "anomalib": theirs}


def main() -> None:
    """Measures all, prints tables and ratios, and writes the file if requested."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, help="timm's names")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batch", type=int, default=8, help="images of a batch for `resident`")
    parser.add_argument(
        "--quick", action="store_true", help="EfficientNet-Lite0 only, under five minutes"
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    parser.add_argument(
        "--measure", nargs=3, help=argparse.SUPPRESS
    )  # run by `compare_with_anomalib`
    args = parser.parse_args()
    if args.measure:
        doing, backbone, batch = args.measure
        print(resident(doing, backbone, int(batch)))
        return

    rows, names = [], ("tf_efficientnet_lite0",) if args.quick else args.backbones
    with ratios() as found:
        if "plan" in args.parts:
            print("| MiB, batch of 32 | training | reversible | scoring |\n|---|---|---|---|")
        for name in names if "plan" in args.parts else ():
            for is_published in (False,) if args.quick else (True, False):
                for steps in (8, 20):
                    plain, ours = (planned(name, is_published, steps, r) for r in (False, True))
                    setting = f"{steps}_steps_{name}" + ("" if is_published else "_default_recipe")
                    sizes = (plain["training"], ours["training"], plain["scoring"])
                    cells = " | ".join(f"{size / 2**20:.0f}" for size in sizes)
                    print(f"| {setting} | {cells} |", flush=True)
                    found[f"reversible_{setting}"] = plain["training"] / ours["training"]
                    rows.append({"setting": setting, "plain": plain, "reversible": ours})
        for name in names if "resident" in args.parts else ():
            for doing in DOING:
                both = compare_with_anomalib(doing, name, args.batch)
                sizes = ", ".join(f"{side} {n / 2**20:.0f} MiB" for side, n in both.items())
                print(f"{doing} {name} batch {args.batch}: {sizes}", flush=True)
                key = f"resident_{doing}_{name}_batch{args.batch}"
                found[key] = both["anomalib"] / both["ours"]
                rows.append({"setting": key, **both})
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(),
        "versions": versions("jax"),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
