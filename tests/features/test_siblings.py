"""Held-out images that show the same part as training images are found, others are not."""

import tracemalloc

import numpy as np
import pytest

from fastflow_jax.features import siblings

RNG = np.random.default_rng(0)


def maps_of(vectors):
    """Features [N, 3, 3, C] of one scale whose means are `vectors`, [N, C]."""
    noise = RNG.normal(size=(len(vectors), 3, 3, vectors.shape[1]))
    return ((vectors[:, None, None] + noise - noise.mean((1, 2), keepdims=True)).astype("f4"),)


def split(vectors, every=10):
    held = np.arange(len(vectors)) % every == every // 2
    return maps_of(vectors[~held]), maps_of(vectors[held])


def parts(n, shots=1, spread=0.0, dimension=12):
    vectors = RNG.normal(size=(n, dimension)).repeat(shots, 0)
    return vectors + spread * RNG.normal(size=vectors.shape)


@pytest.mark.parametrize("n", [40, 200])
def test_images_of_different_parts_are_independent(n):
    assert siblings.find(*split(parts(n)), same_source=True) is None


@pytest.mark.parametrize("n", [10, 60])
def test_several_images_per_part_are_found(n):
    found = siblings.find(*split(parts(n, shots=4, spread=0.1)), same_source=True)
    assert "much closer" in found.kind


def test_a_video_is_found():
    """Each image resembles many others, so the tenth nearest is about as near as the nearest."""
    path = np.cumsum(RNG.normal(size=(400, 12)), 0)
    assert siblings.find(*split(path), same_source=True) is not None


def test_copies_are_found_among_few_images():
    vectors = parts(9)
    train = maps_of(vectors)
    found = siblings.find(train, tuple(m[[4]] for m in train), same_source=True)
    assert "1 of the held-out images are equal" in found.kind
    assert (found.held_out, found.trained_on) == (0, 4)


def test_siblings_among_training_images_alone_are_allowed():
    train, held = parts(20, shots=4, spread=0.1), parts(12)
    assert siblings.find(maps_of(train), maps_of(held), same_source=False) is None
    mixed = np.concatenate([train[::4] + 0.1 * RNG.normal(size=(20, 12)), held[:4]])
    assert siblings.find(maps_of(train), maps_of(mixed), same_source=False) is not None


def test_constant_images_have_no_siblings():
    same = maps_of(np.ones((30, 4)))
    same = tuple(np.ones_like(m) for m in same)
    assert siblings.find(same, tuple(m[:3] for m in same), same_source=True) is None


def test_memory_grows_with_the_images_not_with_their_pairs():
    train, held = maps_of(parts(20_000)), maps_of(parts(600))
    tracemalloc.start()
    assert siblings.find(train, held, same_source=True) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # 500 x 20,000 distances take 80e6
