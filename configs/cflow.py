"""CFLOW (arXiv 2107.12571) on any data set, to compare FastFlow with.

    python -m fastflow_jax.main --config=configs/cflow.py                  # MVTec AD, all
    python -m fastflow_jax.main --config=configs/cflow.py:mvtec_ad/bottle  # one category
    python -m fastflow_jax.main --config=configs/cflow.py:elpv/mono
    python -m fastflow_jax.main --config=configs/cflow.py:folder --config.data.root=photos/screws
    python -m fastflow_jax.main --config=configs/cflow.py \
        --config.backbone=wide_resnet50_2 --config.weights=tv_in1k         # as published

The argument is <data set>/<category>. The flows are the paper's; what differs in training and
scoring stands at the top of `fastflow_jax/detectors/cflow.py`.
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "mvtec_ad"):
    """Configuration for one data set and, after a slash, one or more of its categories."""
    c = default()
    name_data(c, argument)
    c.update(recipe("cflow"))
    return c
