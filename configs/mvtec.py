"""FastFlow on MVTec AD: all 15 categories and a table at the end.

    python -m fastflow_jax.main --config=configs/mvtec.py                  # all
    python -m fastflow_jax.main --config=configs/mvtec.py:bottle           # one
    python -m fastflow_jax.main --config=configs/mvtec.py:bottle,screw     # some

MVTec AD (CC BY-NC-SA 4.0) is downloaded by hand; where it is missing, the message says from where
and where to put it.
"""

from fastflow_jax.config import default


def get_config(category: str | None = None):
    """Configuration for one category, for several with commas between them, or for all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "mvtec_ad"
    c.data.category = category
    return c
