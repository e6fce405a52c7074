"""Growth of memory banks by rows of new normal images, see `base.TeachableScorer`."""

from collections.abc import Mapping, Sequence

import numpy as np

from fastflow_jax.detectors.base import Rows
from fastflow_jax.detectors.nearest import lacking
from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import inside

_LARGEST = 3  # size of a memory bank, over its size in training


def choose_rows(
    vectors: Mapping[str, np.ndarray],
    valid: np.ndarray | None,
    banks: Mapping[str, np.ndarray],
    n: int,
) -> dict[str, np.ndarray]:
    """Chooses up to n rows for each memory bank: those that it lacks most, see `lacking`.

    Args:
      vectors: [B, h, w, C] of each bank.
      valid: bool [B, H, W], False in padded pixels, whose vectors are left out; None without
        padding.
      banks: [M, C] each.
      n: largest number of rows, at least 1 is chosen.
    """
    found = {}
    for name, x in vectors.items():
        seen = (
            np.ones(x.shape[:3], bool) if valid is None else np.asarray(inside(valid, x.shape[1:3]))
        )
        rows = np.asarray(x, np.float32)[seen]
        found[name] = rows[lacking(rows, banks[name], max(1, n))].astype(banks[name].dtype)
    return found


def grown(
    banks: Mapping[str, np.ndarray], rows: Sequence[Rows], size: int
) -> dict[str, np.ndarray]:
    """Appends rows to memory banks.

    Args:
      banks: [M, C] each.
      rows: to append in their order.
      size: of a bank in training.

    Raises:
      InputError: a bank would have more than three times that size.
    """
    found = {
        name: np.concatenate([bank, *(each[name] for each in rows)]) for name, bank in banks.items()
    }
    if max(map(len, found.values())) > _LARGEST * size:
        raise InputError(
            f"A memory bank would have more than {_LARGEST} times the {size} rows of its training. "
            "Train again, with the taught images among the training images."
        )
    return found
