"""How much memory does a training step of the flows take, and what does a reversible flow save?

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --out memory.json

XLA's own plan of one step on the feature maps of each backbone, forward and backward, bytes beside
arguments and results; and of scoring. Each backbone in its published setting and in the default
recipe, with 8 and with 20 steps. Nothing is run, so that it needs neither weights nor images.

Each line `ratio reversible_<steps>_steps_<setting> <number>` is autodiff's bytes over those of
`config.flow.reversible`: above 1, ours takes less.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
from outcome import describe_machine, ratios, versions, write_result

from fastflow_jax.backbones import find_spec
from fastflow_jax.config import default, fill
from fastflow_jax.describe import flow_model
from fastflow_jax.model import negative_log_likelihood

BACKBONES = (
    "resnet18",
    "wide_resnet50_2",
    "deit_base_distilled_patch16_384",
    "cait_m48_448",
    "tf_efficientnet_lite0",
)
BATCH = 32


def planned(backbone: str, published: bool, steps: int, reversible: bool) -> dict[str, int]:
    """Bytes that XLA plans for a training step and for scoring."""
    config = default()
    config.backbone, config.published = backbone, published
    config.flow.steps, config.flow.reversible = steps, reversible
    if published:
        config.flow.affine, config.flow.zero_init = "softplus", False
    config = fill(config)
    height, width = config.image_size
    maps = [find_spec(backbone).maps[layer] for layer in config.layers]
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

    return {
        "training": temporary(jax.grad(loss), variables["params"], constants, features),
        "scoring": temporary(model.apply, variables, features),
    }


def main() -> None:
    """Plan all, print a table and the ratios, write them where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=BACKBONES, help="timm's names")
    parser.add_argument(
        "--quick", action="store_true", help="EfficientNet-Lite0's default recipe, under 5 minutes"
    )
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write")
    args = parser.parse_args()

    rows = []
    print("| MiB, batch of 32 | training | reversible | scoring |\n|---|---|---|---|")
    with ratios() as found:
        for name in ("tf_efficientnet_lite0",) if args.quick else args.backbones:
            for published in (False,) if args.quick else (True, False):
                for steps in (8, 20):
                    plain, ours = (planned(name, published, steps, r) for r in (False, True))
                    setting = f"{steps}_steps_{name}" + ("" if published else "_default_recipe")
                    sizes = (plain["training"], ours["training"], plain["scoring"])
                    cells = " | ".join(f"{size / 2**20:.0f}" for size in sizes)
                    print(f"| {setting} | {cells} |", flush=True)
                    found[f"reversible_{setting}"] = plain["training"] / ours["training"]
                    rows.append({"setting": setting, "plain": plain, "reversible": ours})
    result = {
        "question": __doc__.partition("\n")[0],
        "machine": describe_machine(),
        "versions": versions("jax"),
        "rows": rows,
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
