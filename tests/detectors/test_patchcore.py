"""PatchCore against plain numpy and torch's pooling, and the invariants of the authors' tests."""

import os
import signal

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fastflow_jax.backbones import BACKBONES, find_spec
from fastflow_jax.config import default, fill
from fastflow_jax.detectors import nearest, patchcore
from fastflow_jax.detectors.nearest import k_center
from fastflow_jax.detectors.patchcore import (
    METHOD,
    PatchCoreScorer,
    embed,
    fit,
    pooling_kernels,
    weights,
)
from fastflow_jax.errors import Interrupted
from fastflow_jax.features.extract import cached_features
from fastflow_jax.files import write_arrays
from fastflow_jax.training.context import FitContext

RNG = np.random.default_rng(0)
SHAPES = ((8, 12, 5), (4, 6, 9))


def config(**fields):
    c = default()
    c.detector, c.image_size = "patchcore", (32, 48)
    c.batch_size = 4
    c.patchcore.dimension, c.patchcore.projection = 16, 8
    c.update_from_flattened_dict(fields)
    return fill(c)


def random_maps(n, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(n, *shape)).astype(np.float32) for shape in SHAPES)


def fitted(folder, maps, valid=None, seed=0, **fields):
    folder.mkdir(exist_ok=True)
    return fit(FitContext(config(**fields), cached_features(maps, valid), folder, seed))


def adaptive_mean(x, bins):
    """Over the last axis: bin i covers floor(i n / bins) up to ceil((i + 1) n / bins)."""
    n = x.shape[-1]
    ends = [(i * n // bins, -(-(i + 1) * n // bins)) for i in range(bins)]
    return np.stack([x[..., low:high].mean(-1) for low, high in ends], axis=-1)


def bilinear(n, to):
    """[to, n] of half-pixel centres, held at the borders."""
    at = ((np.arange(to) + 0.5) * n / to - 0.5).clip(0, n - 1)
    low = np.floor(at).astype(int)
    matrix = np.zeros((to, n))
    matrix[np.arange(to), low] += 1 - (at - low)
    matrix[np.arange(to), np.minimum(low + 1, n - 1)] += at - low
    return matrix


def resized(maps, size):
    rows, columns = (bilinear(n, to) for n, to in zip(maps.shape[1:3], size, strict=True))
    return np.einsum("ih,bhw...,jw->bij...", rows, maps, columns)


def patch_features(maps, dimension):
    """Section 3.1 and the reference's aggregation, step by step, in float64."""
    levels = []
    for m in maps:
        h, w = m.shape[1:3]
        padded = np.pad(m.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        patches = np.stack(shifted, axis=-1).reshape(len(m), h, w, -1)  # channel by channel
        levels.append(adaptive_mean(resized(patches, maps[0].shape[1:3]), dimension))
    return adaptive_mean(np.concatenate(levels, axis=-1), dimension)


def all_distances(a, b):
    return np.linalg.norm(a[:, None].astype(np.float64) - b, axis=-1)


def greedy(rows, n, start):
    """Algorithm 1, with all distances to the newest point in each step."""
    chosen, far = [], np.full(len(rows), np.inf)
    for _ in range(n):
        chosen.append(far.argmax() if chosen else start)
        far = np.minimum(far, np.linalg.norm(rows - rows[chosen[-1]], axis=1))
        far[chosen] = -1
    return chosen


@pytest.mark.parametrize("dimension", [7, 16, 64])
def test_patch_features_equal_those_of_the_paper(dimension):
    maps = random_maps(2)
    features, seen = embed(pooling_kernels(SHAPES, dimension), maps, None)
    np.testing.assert_allclose(features, patch_features(maps, dimension), atol=1e-5)
    assert np.all(seen)


def test_a_single_map_can_be_used():
    maps = random_maps(2)[:1]
    features, _ = embed(pooling_kernels(SHAPES[:1], 16), maps, None)
    np.testing.assert_allclose(features, patch_features(maps, 16), atol=1e-5)


@pytest.mark.parametrize(("n", "count"), [(501, 400), (6001, 200)])
def test_the_coreset_equals_that_of_the_plain_algorithm(n, count, monkeypatch):
    monkeypatch.setattr(nearest, "_CANDIDATES", 128)  # so that they run out, too
    nearest._pick.clear_cache()
    centres = RNG.normal(size=(20, 12))
    rows = (centres[RNG.integers(20, size=n)] + 0.3 * RNG.normal(size=(n, 12)) + 5).astype("f")
    chosen = list(np.concatenate(list(k_center(rows, count, start=3))))
    assert chosen == greedy(rows.astype(np.float64), count, 3)
    nearest._pick.clear_cache()


def test_the_coreset_of_a_worked_example():
    rows = RNG.normal(size=(100, 16)).astype(np.float32)
    chosen = np.concatenate(list(k_center(rows, 10, start=42)))
    assert chosen[0] == 42
    assert len(set(chosen)) == 10
    ramps = np.arange(5000)[:, None] * np.ones((1, 8), np.float32)
    chosen = np.concatenate(list(k_center(ramps.astype(np.float32), 500, start=0)))
    assert len(np.unique(ramps[chosen], axis=0)) == 500
    constant = np.ones((40, 4), np.float32)
    chosen = np.concatenate(list(k_center(constant, 40, start=7)))
    assert sorted(chosen) == list(range(40))


@pytest.mark.parametrize("kind", ["pmap", "jit"])
@pytest.mark.parametrize(("neighbours", "reweight"), [(1, 0), (3, 0), (1, 5)])
def test_scores_equal_those_of_the_paper(tmp_path, kind, neighbours, reweight):
    fields = {"patchcore.neighbours": neighbours, "patchcore.reweight": reweight, "parallel": kind}
    scorer = fitted(tmp_path, random_maps(6), **{"patchcore.coreset": 0.3, **fields})
    test = random_maps(3, seed=1)
    scores, maps = scorer.score(test)
    assert (scores.shape, maps.shape) == ((3,), (3, 32, 48))

    patches = patch_features(test, 16)
    distances = all_distances(patches.reshape(-1, 16), scorer.bank)
    local = np.sort(distances, axis=1)[:, :neighbours].mean(1).reshape(3, 8, 12)
    expected = local.max((1, 2))
    if reweight:
        for b, patch in enumerate(local.reshape(3, -1).argmax(1)):
            own = distances.reshape(3, 96, -1)[b, patch]
            around = np.argsort(all_distances(scorer.bank, scorer.bank)[own.argmin()])[:reweight]
            expected[b] *= 1 - np.exp(own.min()) / np.exp(own[around]).sum()
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    sigma = 4 * 32 / 224
    blurred = [gaussian_filter(m, sigma) for m in resized(local, (32, 48))]
    np.testing.assert_allclose(maps, blurred, rtol=1e-4, atol=1e-4)


def test_an_isolated_neighbour_has_more_weight():
    bank = np.array([[0, 0], [0.1, 0], [0, 0.1], [9, 9]], np.float32)
    patches = np.array([[1, 0], [9, 8]], np.float32)
    crowded, lonely = weights(patches, np.array([1, 3]), bank, 3)
    assert 0 < crowded < lonely < 1


def test_the_bank_has_patches_of_the_training_images(tmp_path):
    maps = random_maps(11)  # batches of 4, the last one short
    scorer = fitted(tmp_path, maps, **{"patchcore.coreset": 0.1})
    patches = patch_features(maps, 16).reshape(-1, 16)
    assert scorer.bank.shape == (round(0.1 * len(patches)), 16)
    assert all_distances(scorer.bank, patches).min(1).max() < 1e-5
    scores, _ = fitted(tmp_path / "whole", maps, **{"patchcore.coreset": 1.0}).score(
        tuple(m[:4] for m in maps)
    )
    assert scores.max() < 1e-4
    bounded = fitted(tmp_path / "few", maps, **{"patchcore.max_points": 7})
    assert len(bounded.bank) == 7


def test_images_like_the_training_images_score_zero_and_brighter_ones_higher(tmp_path):
    constant = tuple(np.ones((6, *shape), np.float32) for shape in SHAPES)
    scorer = fitted(tmp_path, constant)
    scores, _ = scorer.score(tuple(m[:2] for m in constant))
    assert scores.max() < 1e-3
    scores, _ = scorer.score(tuple(2 * m[:2] for m in constant))
    assert scores.min() > 0


def test_a_loaded_scorer_gives_equal_scores(tmp_path):
    maps = random_maps(6)
    scorer = fitted(tmp_path, maps)
    test = random_maps(3, seed=1)
    again = fitted(tmp_path, random_maps(6, seed=9))  # finished: the bank is not filled again
    for other in (METHOD.load(config(), scorer.shapes, METHOD.read(config(), tmp_path)), again):
        for one, two in zip(scorer.score(test), other.score(test), strict=True):
            np.testing.assert_array_equal(one, two)
    same, another = (fitted(tmp_path / str(s), maps, seed=s).bank for s in (0, 1))
    np.testing.assert_array_equal(same, scorer.bank)
    assert np.any(another != same)


def test_padding_affects_neither_bank_nor_scores(tmp_path):
    maps, test = random_maps(8), random_maps(4, seed=1)
    valid = np.zeros((8, 32, 48), bool)
    valid[:, 8:24] = True
    results = []
    for i, change in enumerate((0.0, 50.0)):
        spoilt = [tuple(m.copy() for m in each) for each in (maps, test)]
        for m in (*spoilt[0], *spoilt[1]):
            quarter = m.shape[1] // 4
            m[:, :quarter] += change
            m[:, -quarter:] -= change
        scorer = fitted(tmp_path / str(i), spoilt[0], valid)
        results.append((scorer.bank, *scorer.score(spoilt[1], valid[:4])))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    scores, _ = scorer.score(spoilt[1])
    assert np.all(scores > results[0][1] + 1)


def test_an_interrupted_fit_starts_again(tmp_path, monkeypatch):
    maps = random_maps(8)
    undisturbed = fitted(tmp_path / "one", maps)

    def stopping(*arguments):
        for picked in k_center(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            yield picked

    with monkeypatch.context() as patch:
        patch.setattr(patchcore, "k_center", stopping)
        with pytest.raises(Interrupted) as stop:
            fitted(tmp_path / "two", maps)
    assert stop.value.exit_code == 128 + signal.SIGTERM
    assert "start again" in str(stop.value)
    np.testing.assert_array_equal(fitted(tmp_path / "two", maps).bank, undisturbed.bank)


def test_a_signal_during_the_save_of_the_bank_interrupts(tmp_path, monkeypatch):
    maps = random_maps(8)

    def stopping(*arguments):
        write_arrays(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(patchcore, "write_arrays", stopping)
        with pytest.raises(Interrupted, match="was saved"):
            fitted(tmp_path / "run", maps)
    kept = fitted(tmp_path / "run", random_maps(8, seed=1)).bank  # which is loaded
    np.testing.assert_array_equal(kept, fitted(tmp_path / "other", maps).bank)


def test_levels_are_chosen_by_their_strides():
    chosen = {name: patchcore.layers(None, find_spec(name)) for name in BACKBONES}
    assert chosen["resnet18"] == chosen["wide_resnet50_2"] == ("layer2", "layer3")
    assert chosen["tf_efficientnet_lite0"] == ("blocks.2", "blocks.4")
    assert chosen["cait_m48_448"] == ("blocks.40",)
    assert config().layers == ("blocks.2", "blocks.4")
    assert config(layers=("blocks.1",)).layers == ("blocks.1",)


def test_the_scorer_takes_maps_of_any_size():
    scorer = PatchCoreScorer(config(), SHAPES, RNG.normal(size=(5, 16)).astype(np.float32))
    _, maps = scorer.score(random_maps(2), size=(20, 30))
    assert maps.shape == (2, 20, 30)
