"""FastFlow and the paper's comparisons under one protocol: a table, and a picture of the trade-off.

    python -m fastflow_jax.main --config=configs/compare.py:elpv/mono --config.seeds=3
    python -m fastflow_jax.main --config=configs/compare.py:mvtec_ad/bottle \
        --config.backbone=wide_resnet50_2
    python -m fastflow_jax.main --config=configs/compare.py:folder \
        --config.data.root=photos/screws
    python -m fastflow_jax.main --config=configs/compare.py:cifar10

The argument is <data set>/<category>; without a category a set is run with all it has. All see the
same backbone and the same maps of it, those that FastFlow takes; rows that end in `_own_maps` have
the maps that the method was published with. PatchCore and SPADE, which need no thresholds for their
figures, learn from all training images; FastFlow and CFLOW from those that are not held out, a
tenth fewer. CIFAR-10 is for FastFlow, the VAE and the GAN, which learn from pixels. Of a
transformer FastFlow takes two maps, each of the others one.

Beside the figures stand the seconds of training (features are computed before), milliseconds an
image in batches of 1 and 16, whole and without the backbone, the memory of a process that scores,
and the space on disk; see `fastflow_jax/runs/speed.py`.
"""

from ml_collections import ConfigDict

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.registry import recipe


def get_config(argument: str = "folder"):
    """Configuration for one data set, see above."""
    c = default()
    name_data(c, argument)
    c.measure_speed = True
    if c.data.name == "cifar10":
        c.image_size = (128,)
        c.variants = ConfigDict(
            {
                "fastflow": {},
                **{name: recipe(name) | {"image_size": (32,)} for name in ("vae", "gan")},
            }
        )
        return c
    rows = {"fastflow": {}}
    for name in ("patchcore", "spade", "cflow"):
        rows[name] = recipe(name) | {"layers_as": "fastflow"}
        rows[f"{name}_own_maps"] = recipe(name)
    c.variants = ConfigDict(rows)
    return c
