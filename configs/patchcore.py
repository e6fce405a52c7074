"""PatchCore on any data set, beside which FastFlow can be judged.

    python -m fastflow_jax.main --config=configs/patchcore.py:elpv/mono
    python -m fastflow_jax.main --config=configs/patchcore.py:mvtec_ad
    python -m fastflow_jax.main --config=configs/patchcore.py:mvtec_ad/bottle \
        --config.backbone=wide_resnet50_2
    python -m fastflow_jax.main --config=configs/patchcore.py:folder \
        --config.data.root=photos/screws

The argument is <data set>/<category>; without a category a set is run with all it has.

Roth et al., Towards Total Recall in Industrial Anomaly Detection (arXiv 2106.08265): levels 2 and 3
of the backbone (of a transformer its one map), patches of 3x3, 1024 numbers a patch, a coreset of
10 %, the nearest neighbour. `fastflow_jax/detectors/patchcore.py` says what follows the paper and
what the authors' code. The paper's re-weighting of image scores, which that code leaves out, is
--config.patchcore.reweight=9. The bank stops at 10,000 points, so that a CPU is done in minutes;
--config.patchcore.max_points=1000000 lifts that. No images are held out: nothing is calibrated.
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "folder"):
    """Configuration for one data set, see above."""
    c = default()
    name_data(c, argument)
    c.update(recipe("patchcore"))
    return c
