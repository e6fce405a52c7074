"""FastFlow on Real-IAD, with all five views: all 30 products and a table at the end.

    python -m fastflow_jax.main --config=configs/real_iad.py                # all
    python -m fastflow_jax.main --config=configs/real_iad.py:audiojack      # one
    python -m fastflow_jax.main --config=configs/real_iad.py:audiojack,usb  # several

`--config.data.name=real_iad_sv` uses the view from above alone.

Needs: Real-IAD (CC BY-NC-SA 4.0), asked for manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not run, because the official images were not available.
"""

from fastflow_jax.config import default


def get_config(product: str | None = None):
    """Returns the configuration for one product, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "real_iad"
    c.data.category = product
    return c
