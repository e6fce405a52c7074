"""Growth of memory banks: the rows that are chosen, and what they do to scores."""

import numpy as np
import pytest

from fastflow_jax.detectors.nearest import lacking
from fastflow_jax.detectors.teaching import choose_rows, grown
from fastflow_jax.errors import InputError


def test_lacking_rows_continue_a_greedy_k_center():
    rng = np.random.default_rng(0)
    bank, rows = rng.normal(size=(50, 6)), rng.normal(1, 2, size=(2000, 6))
    known, expected = bank, []
    for _ in range(40):
        nearest = np.linalg.norm(rows[:, None] - known, axis=-1).min(1)
        expected.append(int(nearest.argmax()))
        known = np.concatenate([known, rows[expected[-1:]]])
    found = lacking(rows.astype(np.float32), bank.astype(np.float32), 40)
    assert found.tolist() == expected


def test_all_of_few_rows_are_taken():
    rows = np.zeros((3, 2), np.float32)
    assert lacking(rows, np.ones((5, 2), np.float32), 3).tolist() == [0, 1, 2]


def test_rows_are_those_of_unpadded_locations_in_the_type_of_the_bank():
    vectors = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    valid = np.ones((2, 8, 8), bool)
    valid[0, :, 4:] = False
    banks = {"one": np.zeros((5, 3), np.float16)}
    rows = choose_rows({"one": vectors}, valid, banks, 100)["one"]
    expected = np.concatenate([vectors[0, :, :2].reshape(-1, 3), vectors[1].reshape(-1, 3)])
    assert rows.dtype == np.float16
    np.testing.assert_array_equal(rows, expected.astype(np.float16))
    assert len(choose_rows({"one": vectors}, valid, banks, 7)["one"]) == 7


def test_banks_grow_up_to_three_times_their_size():
    bank = np.zeros((4, 2), np.float32)
    rows = [{"one": np.full((n, 2), n, np.float32)} for n in (3, 5)]
    found = grown({"one": bank}, rows, 4)["one"]
    np.testing.assert_array_equal(found[:, 0], [0] * 4 + [3] * 3 + [5] * 5)
    with pytest.raises(InputError, match=r"more than 3 times the 3 rows.*Train again"):
        grown({"one": bank}, rows, 3)
