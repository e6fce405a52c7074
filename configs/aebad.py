"""FastFlow on AeBAD: test images of four domains and of three videos, and a table at the end.

    python -m fastflow_jax.main --config=configs/aebad.py            # all
    python -m fastflow_jax.main --config=configs/aebad.py:same       # one
    python -m fastflow_jax.main --config=configs/aebad.py:same,view  # several

The domains are `same`, `background`, `illumination` and `view`, the videos `video1` to `video3`.

Needs: AeBAD (CC BY 4.0), downloaded manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not run, because the official images were not available.
"""

from fastflow_jax.config import default


def get_config(domain: str | None = None):
    """Returns the configuration for one domain, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "aebad"
    c.data.category = domain
    return c
