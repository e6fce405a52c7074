"""FastFlow on a folder of your own photographs.

    python -m fastflow_jax.main --config=configs/folder.py --config.data.root=photos/screws \
        --workdir=runs/screws

The folder is `root/train/good/*` and, where there are any, `root/test/good/*`,
`root/test/<defect>/*` and `root/ground_truth/<defect>/<name>_mask.png`; a bare folder of images is
all normal.
"""

from fastflow_jax.config import default


def get_config(root: str | None = None):
    """Configuration for the folder `root`."""
    c = default()
    c.data.name = "folder"
    c.data.root = root
    return c
