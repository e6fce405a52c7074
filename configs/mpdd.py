"""FastFlow on MPDD, metal parts: all 6 categories and a table at the end.

    python -m fastflow_jax.main --config=configs/mpdd.py                  # all
    python -m fastflow_jax.main --config=configs/mpdd.py:tubes            # one
    python -m fastflow_jax.main --config=configs/mpdd.py:tubes,connector  # several

Needs: MPDD (CC BY-NC-SA 4.0), downloaded manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not run, because the official images were not available.
"""

from fastflow_jax.config import default


def get_config(category: str | None = None):
    """Returns the configuration for one category, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "mpdd"
    c.data.category = category
    return c
