"""The paper's ablations on any data set: a table with a row for each variant.

    python -m fastflow_jax.main --config=configs/ablations.py:kernels/mvtec_ad/bottle,screw
    python -m fastflow_jax.main --config=configs/ablations.py:augmentation/elpv/mono
    python -m fastflow_jax.main --config=configs/ablations.py:tampered/folder \
        --config.data.root=photos/screws
    python -m fastflow_jax.main --config=configs/ablations.py:steps/synthetic/brick

The argument is <ablation>/<data set>/<category>; without a category a set is run with all it has.

    kernels       3x3 alone against 3x3 and 1x1 in turn, both kernels of a subnet alike, with a
                  small and with a large backbone
    augmentation  training images flipped, turned by a little, in other colours
    tampered      test images turned, zoomed and moved, for one and the same training
    steps         flows of 1 to 16 steps
    recipe        each choice of the default recipe undone, the others kept

Every value of a variant is a field, --config.variants.rotate_10.data.tamper.rotate=12 for one.
The small backbone is that of the run, --config.backbone; the large one is set for both its rows by
--config.variants.large_3x3.backbone and --config.variants.large_3x3.weights.
"""

from ml_collections import ConfigDict, FieldReference

from fastflow_jax.config import default, name_data
from fastflow_jax.errors import InputError


def get_config(argument: str = "kernels"):
    """Configuration of one ablation, see above."""
    ablation, _, rest = argument.partition("/")
    if ablation not in _ABLATIONS:
        raise InputError(f"no ablation {ablation!r}; there is {', '.join(_ABLATIONS)}")
    c = default()
    name_data(c, rest)
    c.variants = ConfigDict(_ABLATIONS[ablation](c))
    return c


def _kernels(c) -> dict:
    large = {
        "backbone": FieldReference("wide_resnet50_2"),
        "weights": c.get_oneway_ref("weights"),
    }
    in_turn = [{"kernels": kernels, "out_kernel": 0} for kernels in ((3,), (3, 1))]
    return {
        "small_3x3": {"flow": in_turn[0]},
        "small_3x3_1x1": {"flow": in_turn[1]},
        "large_3x3": {"flow": in_turn[0], **large},
        "large_3x3_1x1": {"flow": in_turn[1], **large},
    }


def _augmentation(c) -> dict:
    flips, rotation, colour = {"flips": True}, {"rotate": 10.0}, {"colour": 0.2}
    rows = {
        "none": {},
        "flips": flips,
        "rotation": rotation,
        "colour": colour,
        "all": flips | rotation | colour,
    }
    return {name: {"augment": fields} for name, fields in rows.items()}


def _tampered(c) -> dict:
    rows = {
        "untouched": {},
        "rotate_5": {"rotate": 5.0},
        "rotate_10": {"rotate": 10.0},
        "rotate_30": {"rotate": 30.0},
        "zoom_out_10": {"zoom": 0.9},
        "zoom_in_10": {"zoom": 1.1},
        "shift_5": {"down": 0.05, "right": 0.05},
        "all_5": {"rotate": 5.0, "zoom": 1.05, "down": 0.05, "right": 0.05},
    }
    return {name: {"data": {"tamper": fields}} for name, fields in rows.items()}


def _steps(c) -> dict:
    return {f"steps_{n}": {"flow": {"steps": n}} for n in (1, 2, 4, 8, 16)}


def _recipe(c) -> dict:
    kept = {"norm": "whiten", "steps": 4, "kernels": (3,), "hidden_ratio": 2.0}
    return {
        "default": {},
        "published_maps": {"published": True, "flow": kept},
        "standardise": {"flow": {"norm": "standardise"}},
        "norm_per_image": {"flow": {"norm": "layer_plain"}},
        "lengths_kept": {"length_power": 1.0},
        "published_kernels": {"flow": {"out_kernel": 0}},
        "whole_maps": {"train": {"window": 0}},
        "batches_of_32": {"train": {"batch_size": 32, "steps": 125}},
        "twenty_epochs": {"train": {"max_epochs": 20}},
        "no_bank": {"map": {"bank": 0}},
        "not_compressed": {"map": {"compress": False}},
        "z_alone": {"map": {"log_det": 0.0}},
        "likelihood": {"map": {"log_det": 1.0}},
        "maximum": {"score": {"form": "top_k", "top_k": 0.0}},
        "top_percent": {"score": {"form": "top_k", "top_k": 0.01}},
    }


_ABLATIONS = {
    "kernels": _kernels,
    "augmentation": _augmentation,
    "tampered": _tampered,
    "steps": _steps,
    "recipe": _recipe,
}
