"""FastFlow on photographs of materials with painted defects: quick, and needs no data set.

    python -m fastflow_jax.main --config=configs/synthetic.py             # brick
    python -m fastflow_jax.main --config=configs/synthetic.py:gravel

The photographs are scikit-image's (CC0); the defects are painted, so that their masks are exact.
"""

from fastflow_jax.config import default


def get_config(material: str = "brick"):
    """Configuration for one material: brick, grass or gravel."""
    c = default()
    c.data.name = "synthetic"
    c.data.category = material
    return c
