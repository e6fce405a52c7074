"""FastFlow on BTAD: all three products and a table at the end.

    python -m fastflow_jax.main --config=configs/btad.py           # all
    python -m fastflow_jax.main --config=configs/btad.py:01        # one
    python -m fastflow_jax.main --config=configs/btad.py:01,03     # several

Needs: BTAD, downloaded manually (docs/data.md); WideResNet50-2 weights, `pip install -e '.[hub]'`.
Time and figures: not measured.
"""

from fastflow_jax.config import default


def get_config(product: str | None = None):
    """Returns the configuration for one product, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "btad"
    c.data.category = product
    return c
