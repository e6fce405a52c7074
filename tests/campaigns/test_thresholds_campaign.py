"""Short form of the campaign on thresholds, on simulated scores and maps."""

import numpy as np
import pytest
import thresholds as campaign
import tiny

from fastflow_jax.evaluation.thresholds import image_threshold, pixel_threshold, tails


def image_splits(shift):
    """Splits of scores that are exchangeable if the shift of new ones is 0."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        scores = rng.exponential(size=140)
        yield campaign.image_split(image_threshold(scores[:40], 0.05), scores[40:] + shift)


def pixel_splits(shift):
    """Splits of maps with levels that differ by image."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        maps = rng.normal(rng.normal(0, 0.2, (90, 1, 1)), 1, (90, 16, 16)).astype(np.float32)
        threshold = pixel_threshold(tails(maps[:30]), 0.05)
        yield campaign.pixel_split(threshold, maps[30:] + np.float32(shift))


@pytest.mark.parametrize("splits", [image_splits, pixel_splits])
@pytest.mark.parametrize(("shift", "lost"), [(0, 0), (0.6, 1)])
def test_a_promise_is_lost_if_new_images_differ(splits, shift, lost):
    row = campaign.row("simulated", "", 40, list(splits(shift)))
    assert row["lost"] == lost
    assert (row["inside"] > 0.9) == (not lost)


def test_all_statements_are_tried_on_a_set(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "_TILES", {"data.tile": 16, "data.resolution": 32})
    monkeypatch.setattr(campaign, "_UPDATED", {"image_size": (16,)})
    tiny.write_images(tmp_path, train=24, test=6)
    fields = {"data.name": "folder", "data.root": str(tmp_path), "backbone": "pixels"}
    fields |= {"image_size": (32,), "layers": None, "knn.points": 100}
    rows = list(campaign.statements("tiny", fields, 4, np.random.default_rng(0), apart=False))
    assert [(row["what"], row["n"], row["splits"]) for row in rows] == [
        ("whole images", 5, 4),
        ("pixels of whole images", 5, 4),
        ("images of tiles", 4, 1),
        ("pixels of images of tiles", 4, 1),
        ("images after an update", 6, 1),
    ]
    assert not any(row["lost"] for row in rows)


def test_the_range_of_alarms_is_that_of_simulations():
    rng = np.random.default_rng(0)
    scores = rng.random((8000, 60)).astype(np.float32)
    inside, promised = [], set()
    for each in scores:
        found = campaign.image_split(image_threshold(each[:19], 0.1), each[19:])
        inside.append(found.inside)
        promised.add(found.promised)
    assert len(promised) == 1
    assert np.mean(inside) == pytest.approx(promised.pop(), abs=0.01)
