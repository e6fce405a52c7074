"""Ablations of the paper and of the default recipe on any data set, one table row per variant.

    python -m fastflow_jax.main --config=configs/ablations.py:kernels/mvtec_ad/bottle,screw
    python -m fastflow_jax.main --config=configs/ablations.py:augmentation/elpv/mono
    python -m fastflow_jax.main --config=configs/ablations.py:tampered/folder \
        --config.data.root=photos/screws
    python -m fastflow_jax.main --config=configs/ablations.py:steps/synthetic/brick

The argument is <ablation>/<data set>/<category>; without a category all of the data set are run.

    kernels       3x3 kernels, or 3x3 and 1x1 in turn, with a small and with a large backbone
    augmentation  training images flipped, rotated, or with changed colours
    copies        cached copies of training images rotated by up to 10 degrees, for test images as
                  they are and rotated by 5 degrees
    tampered      test images rotated, zoomed and shifted, for one training
    steps         flows of 1 to 16 steps
    recipe        one choice of the default recipe changed at a time

Every value of a variant is a field, for example --config.variants.rotate_10.data.tamper.rotate=12.
The small backbone is --config.backbone. For the large one set
--config.variants.large_3x3.backbone and --config.variants.large_3x3.weights, for both its rows.

Needs: the data set; for `kernels` weights of WideResNet50-2, `pip install -e '.[hub]'`.
Time: one training per row (`tampered`: one in all, `copies`: one per two rows), about two minutes
each for ELPV mono on two CPU cores.
Figures: docs/results.md.
"""

from ml_collections import ConfigDict, FieldReference

from fastflow_jax.config import default, name_data
from fastflow_jax.errors import InputError


def get_config(argument: str = "kernels"):
    """Returns the configuration of one ablation; the module docstring describes the argument."""
    ablation, _, rest = argument.partition("/")
    if ablation not in _ABLATIONS:
        raise InputError(f"There is no ablation {ablation!r}. Choose from {', '.join(_ABLATIONS)}.")
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


def _copies(c) -> dict:
    rows = {}
    for copies in (0, 4):
        fields = {"augment": {"rotate": 10.0, "copies": copies}} if copies else {}
        rows[f"copies_{copies}"] = fields
        rows[f"copies_{copies}_rotate_5"] = fields | {"data": {"tamper": {"rotate": 5.0}}}
    return rows


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
        "border_in_full": {"map": {"border": 1}},
        "equal_maps": {"map": {"feature_weight": 1.0, "coarse_weight": 1.0}},
        "z_alone": {"map": {"log_det": 0.0}},
        "likelihood": {"map": {"log_det": 1.0}},
        "maximum": {"score": {"form": "top_k", "top_k": 0.0}},
        "top_percent": {"score": {"form": "top_k", "top_k": 0.01}},
    }


_ABLATIONS = {
    "kernels": _kernels,
    "augmentation": _augmentation,
    "copies": _copies,
    "tampered": _tampered,
    "steps": _steps,
    "recipe": _recipe,
}
