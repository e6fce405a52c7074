"""FastFlow on MVTec LOCO AD: all 5 categories and a table at the end.

    python -m fastflow_jax.main --config=configs/mvtec_loco.py                     # all
    python -m fastflow_jax.main --config=configs/mvtec_loco.py:pushpins            # one
    python -m fastflow_jax.main --config=configs/mvtec_loco.py:pushpins,screw_bag  # several

The kinds of defects are `logical_anomalies` and `structural_anomalies`. The images of `validation`
are held out for calibration and thresholds.

Needs: MVTec LOCO AD (CC BY-NC-SA 4.0), downloaded manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not run, because the official images were not available.
"""

from fastflow_jax.config import default


def get_config(category: str | None = None):
    """Returns the configuration for one category, several with commas, or all."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = "mvtec_loco"
    c.data.category = category
    return c
