"""FastFlow on BTAD: all three products and a table at the end.

    python -m fastflow_jax.main --config=configs/btad.py           # all
    python -m fastflow_jax.main --config=configs/btad.py:01        # one
    python -m fastflow_jax.main --config=configs/btad.py:01,03     # some

BTAD is downloaded by hand; where it is missing, the message says from where and where to put it.
"""

from fastflow_jax.config import default


def get_config(product: str | None = None):
    """Configuration for one product, for several with commas between them, or for all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "btad"
    c.data.category = product
    return c
