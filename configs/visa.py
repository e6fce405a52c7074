"""FastFlow on VisA, with its split for one class: all 12 categories and a table at the end.

    python -m fastflow_jax.main --config=configs/visa.py              # all
    python -m fastflow_jax.main --config=configs/visa.py:candle       # one
    python -m fastflow_jax.main --config=configs/visa.py:candle,pcb1  # several

Needs: VisA (CC BY 4.0), downloaded manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not run, because the official images were not available.
"""

from fastflow_jax.config import default


def get_config(category: str | None = None):
    """Returns the configuration for one category, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "visa"
    c.data.category = category
    return c
