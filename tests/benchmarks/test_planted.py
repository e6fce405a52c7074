"""Planted images of the benchmark of audits."""

import pathlib
import sys

import numpy as np
import pytest

from fastflow_jax import data

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
import audit


@pytest.fixture
def dataset():
    def source(names, defects):
        image = np.zeros((4, 4, 3), np.uint8)
        return data.Source(names, defects, lambda i: (image + ord(names[i][-1]), None))

    train = source(tuple(f"good/{i}" for i in range(38)), ("good",) * 38)
    kinds = ("good",) * 3 + ("crack",) * 4 + ("dent",) * 4
    return data.Dataset("set", train, source(tuple("abcdefghijk"), kinds), {})


@pytest.mark.parametrize("one_kind", [False, True])
def test_planted_images_are_trained_on_and_not_tested_on(dataset, one_kind):
    planted, joined = audit.Planted(dataset, 1, one_kind), audit.join(dataset.train, dataset.test)
    assert len(planted.names) == 2  # of 40
    if one_kind:
        assert planted.names <= {f"planted/{name}" for name in "hijk"}
    listed, missed = sorted(planted.names)
    planted.listed = {listed, "good/5"}
    sizes = {}
    for training in audit.TRAININGS:
        found = planted.open(training, joined)
        sizes[training] = len(found.train)
        for name, i in zip(found.train.names, range(len(found.train)), strict=True):
            assert found.train[i].image.max() == ord(name[-1])
        whole, rows = found.train.part_of
        assert [whole.names[i] for i in rows] == list(found.train.names)
        assert len(found.test) == 9
        assert not {f"planted/{name}" for name in found.test.names} & planted.names
        assert (missed in found.train.names) == (training != "clean")
    assert list(sizes.values()) == [38, 40, 39, 38]
    assert "good/5" not in planted.open("listed left out", joined).train.names


def test_a_row_has_means_and_deviations():
    auroc = {"knn": dict.fromkeys(audit.TRAININGS, 0.9)}
    entries = [{"set": "s", "found": found, "image_auroc": {}} for found in (1.0, 0.5)]
    entries[0]["image_auroc"] = auroc
    row = audit.row_of(entries)
    assert row["found"] == pytest.approx([0.75, 0.3535533905])
    assert row["knn, planted"] == 0.9
