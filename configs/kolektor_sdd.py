"""FastFlow on KolektorSDD2, or on KolektorSDD.

    python -m fastflow_jax.main --config=configs/kolektor_sdd.py                  # KolektorSDD2
    python -m fastflow_jax.main --config=configs/kolektor_sdd.py:kolektor_sdd     # KolektorSDD

The images are about 2.5 times as high as wide, so the input is 640x256.

Needs: the set (CC BY-NC-SA 4.0), downloaded manually (docs/data.md); WideResNet50-2 weights,
`pip install -e '.[hub]'`.
Time and figures: not run, because the official images were not available.
"""

from fastflow_jax.config import default


def get_config(name: str = "kolektor_sdd2"):
    """Returns the configuration for `kolektor_sdd2` or `kolektor_sdd`."""
    c = default()
    c.backbone = "wide_resnet50_2"
    c.data.name = name
    c.image_size = (640, 256)
    return c
