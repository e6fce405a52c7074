"""FastFlow and the paper's comparisons under one protocol, as one table.

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

What scoring costs is measured on the finished run by `python benchmarks/costs.py RUN`: milliseconds
per image, memory, and space on disk.
"""

from ml_collections import ConfigDict

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "folder"):
    """Configuration for one data set, see above."""
    c = default()
    name_data(c, argument)
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
