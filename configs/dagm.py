"""FastFlow on DAGM 2007: all 10 textures and a table at the end.

    python -m fastflow_jax.main --config=configs/dagm.py                # all
    python -m fastflow_jax.main --config=configs/dagm.py:Class1         # one
    python -m fastflow_jax.main --config=configs/dagm.py:Class1,Class7  # several

Needs: DAGM 2007, downloaded manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not run, because the official images were not available.
"""

from fastflow_jax.config import default


def get_config(texture: str | None = None):
    """Returns the configuration for one texture, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "dagm"
    c.data.category = texture
    return c
