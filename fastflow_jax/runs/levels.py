"""The levels of a window of percentiles, measured once for a run."""

from ml_collections import ConfigDict

from fastflow_jax import data
from fastflow_jax.data.levels import Levels
from fastflow_jax.errors import InputError


def with_levels(config: ConfigDict, dataset: data.Dataset | None = None) -> ConfigDict:
    """Returns a configuration with the levels of `config.data.window`.

    Args:
      config: the configuration of a run. It is returned as it is without a window, or if the levels
        are set.
      dataset: the images; None to open `config.data`.

    Raises:
      InputError: the data set cannot be opened, or was opened with other levels.
    """
    stated = Levels.of(config.data)
    if dataset is None and (stated is None or not stated.is_pending):
        return config
    levels = (dataset or data.open_dataset(config.data)).levels
    c = config.copy_and_resolve_references()
    if levels is not None and c.data.window is not None:
        c.data.levels = (levels.black, levels.white)
    if Levels.of(c.data) != levels:
        raise InputError(
            "The data set was opened with other levels than those of the configuration. Set "
            "config.data.bits and config.data.window to those of the data set."
        )
    return c
