"""A variational autoencoder on CIFAR-10, one class against the rest, for comparison with FastFlow.

    python -m fastflow_jax.main --config=configs/vae.py                # each class in turn
    python -m fastflow_jax.main --config=configs/vae.py:cifar10/bird   # one class
    python -m fastflow_jax.main --config=configs/vae.py:elpv/mono --config.image_size='(64,)'

The argument is <data set>/<category>. The network learns from pixels, at 32x32; no pretrained
backbone is used. `fastflow_jax/detectors/vae.py` describes the method and its sources.

Needs: CIFAR-10, downloaded manually (docs/data.md), or another data set. No weights.
Time: not measured.
Figure: mean image AUROC .579, on a copy of CIFAR-10 stored as JPEG (docs/results.md).
"""

from fastflow_jax.config import default, name_data
from fastflow_jax.detectors.base import recipe


def get_config(argument: str = "cifar10"):
    """Returns the configuration for <data set>/<category>; categories may be several."""
    c = default()
    name_data(c, argument)
    c.update(recipe("vae"))
    return c
