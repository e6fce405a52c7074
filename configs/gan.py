"""GANomaly on CIFAR-10, one class against the rest, to compare FastFlow with.

    python -m fastflow_jax.main --config=configs/gan.py                # every class in turn
    python -m fastflow_jax.main --config=configs/gan.py:cifar10/bird   # one
    python -m fastflow_jax.main --config=configs/gan.py:elpv/mono --config.image_size='(64,)'

The argument is <data set>/<category>. Images are learnt from pixel by pixel, at 32 pixels a side;
no pretrained net is used. The method and its source stand in `fastflow_jax/detectors/gan.py`.
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "cifar10"):
    """Configuration for one data set and, after a slash, one or more of its categories."""
    c = default()
    name_data(c, argument)
    c.update(recipe("gan"))
    return c
