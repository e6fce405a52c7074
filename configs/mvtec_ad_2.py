"""FastFlow on MVTec AD 2, with its public test images: all 8 categories and a table at the end.

    python -m fastflow_jax.main --config=configs/mvtec_ad_2.py           # all
    python -m fastflow_jax.main --config=configs/mvtec_ad_2.py:can       # one
    python -m fastflow_jax.main --config=configs/mvtec_ad_2.py:can,rice  # several

The images of `validation` are held out for calibration and thresholds. docs/data.md states how to
write the results of the private test images for the evaluation server.

Needs: MVTec AD 2 (CC BY-NC-SA 4.0), downloaded manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not run, because the official images were not available.
"""

from fastflow_jax.config import default


def get_config(category: str | None = None):
    """Returns the configuration for one category, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "mvtec_ad_2"
    c.data.category = category
    return c
