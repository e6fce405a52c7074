"""FastFlow on CIFAR-10, one class against the rest: ten runs and their mean.

    python -m fastflow_jax.main --config=configs/cifar10.py                # every class in turn
    python -m fastflow_jax.main --config=configs/cifar10.py:bird,ship      # some
    python -m fastflow_jax.main --config=configs/cifar10.py --config.data.root=DIR

Each class is normal in turn: 5,000 training images of it, all 10,000 test images. Images are
enlarged to 128 pixels a side; the features of all 60,000 are computed once, for all ten runs.

CIFAR-10 is downloaded by hand; where it is missing, the message says from where and where to put
it. DIR may hold image files instead, train/<class>/* and test/<class>/*.
"""

from fastflow_jax.config import default


def get_config(classes: str | None = None):
    """Configuration for one normal class, for several with commas between them, or for all."""
    c = default()
    c.data.name = "cifar10"
    c.data.category = classes
    c.image_size = (128,)
    c.heatmaps = 10  # of each class
    return c
