"""SPADE on any data set, beside which FastFlow can be judged.

    python -m fastflow_jax.main --config=configs/spade.py:elpv/mono
    python -m fastflow_jax.main --config=configs/spade.py:mvtec_ad
    python -m fastflow_jax.main --config=configs/spade.py:mvtec_ad/bottle \
        --config.backbone=wide_resnet50_2
    python -m fastflow_jax.main --config=configs/spade.py:folder --config.data.root=photos/screws

The argument is <data set>/<category>; without a category a set is run with all it has.

Cohen and Hoshen, Sub-Image Anomaly Detection with Deep Pyramid Correspondences (arXiv 2005.02357):
an image is compared with the training images nearest to it, a pixel with all pixels of those.
`fastflow_jax/detectors/spade.py` says what follows the paper and what the reference code. The
nearest 5 images are taken, as in that code; --config.spade.images=50, the paper's number, takes ten
times as long and gives much the same. No images are held out: nothing is calibrated.
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "folder"):
    """Configuration for one data set, see above."""
    c = default()
    name_data(c, argument)
    c.update(recipe("spade"))
    return c
