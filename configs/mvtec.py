"""FastFlow on MVTec AD: all 15 categories and a table at the end.

    python -m fastflow_jax.main --config=configs/mvtec.py                  # all
    python -m fastflow_jax.main --config=configs/mvtec.py:bottle           # one
    python -m fastflow_jax.main --config=configs/mvtec.py:bottle,screw     # several

Needs: MVTec AD (CC BY-NC-SA 4.0), downloaded manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not measured.
"""

from fastflow_jax.config import default


def get_config(category: str | None = None):
    """Returns the configuration for one category, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "mvtec_ad"
    c.data.category = category
    return c
