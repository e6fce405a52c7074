"""Images that differ as a whole from the training images are found, others are not."""

import numpy as np
import pytest
from scipy.stats import betabinom, binom, binomtest

from fastflow_jax.features import shift
from fastflow_jax.features.split import split_holdout

RNG = np.random.default_rng(0)


def found(reference, new, groups=None, names=None):
    names = names or [f"{i:04}.png" for i in range(len(new))]
    return shift.find(reference, dict(zip(names, reference.distances(new), strict=True)), groups)


def parts(n, shots):
    """Image means of n parts with several images each, [n * shots, 3]."""
    centers, noise = RNG.normal(size=(n, 1, 3)), RNG.normal(size=(n, shots, 3))
    return (0.8 * centers + 0.6 * noise).reshape(-1, 3)


def test_distances_and_p_value_follow_their_definition():
    train, held, new = (RNG.normal(m, 2, (n, 5)) for m, n in ((3, 60), (3, 7), (4, 50)))
    reference = shift.Reference.fit(train, held)
    kept, other = split_holdout(60, 0.5)
    mean, std = train[kept].mean(0), train[kept].std(0)

    def nearest(rows):
        a = (rows[:, None] - train[kept]) / std
        return np.linalg.norm(a, axis=2).min(1)

    normal = np.sort(nearest(np.concatenate([train[other], held])))
    assert reference.n_parts == len(normal) == 37
    np.testing.assert_allclose(reference.distances(new), nearest(new) / normal[18], rtol=2e-3)
    np.testing.assert_allclose(reference.center, mean, rtol=1e-5)
    result = found(reference, new)
    assert (result.of, result.tested) == ("images", 50)
    assert result.further == np.sum(reference.distances(new) > 1)
    k = np.arange(51)  # normal images among the new ones
    expected = binom.pmf(k, 50, 0.25) @ betabinom.cdf(50 - result.further, k, 19, 19)
    assert result.p_value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("defective", [0, 30, 45])
def test_normal_images_among_defective_ones_are_no_shift(defective):
    reference = shift.Reference.fit(RNG.normal(size=(100, 6)))
    new = RNG.normal(size=(60, 6))
    new[:defective] += 20
    result = found(reference, new)
    assert result.message is None
    assert result.further >= defective


def test_a_shift_of_all_images_is_reported():
    reference = shift.Reference.fit(RNG.normal(size=(100, 6)))
    message = found(reference, RNG.normal(size=(60, 6)) + 3).message
    assert "60 of 60 images are further from the training images" in message


@pytest.mark.parametrize(("normal", "smallest"), [(5, 62), (10, 40), (20, 38), (200, 35)])
def test_the_smallest_number_of_images_is_as_documented(normal, smallest):
    held = RNG.normal(size=(normal, 4))
    reference = shift.Reference.fit(RNG.normal(size=(50, 4)), held, held_out_only=True)
    assert found(reference, np.full((smallest - 1, 4), 99.0)) is None
    assert found(reference, np.full((smallest, 4), 99.0)).message is not None


@pytest.mark.parametrize(
    ("trained_on", "tested", "shots", "can_reject"),
    [(15, 15, 4, False), (40, 40, 1, True), (60, 60, 3, True), (15, 60, 4, True)],
)
def test_the_false_alarm_rate_is_at_most_1_percent_of_sets(trained_on, tested, shots, can_reject):
    """Three quarters of the new parts are defective."""
    names = [f"part_{i:03}/{k}.png" for i in range(tested) for k in range(shots)]
    alarms, sets = 0, 300
    for _ in range(sets):
        train, new = parts(trained_on, shots), parts(tested, shots)
        new[-(-tested // 4) * shots :] += 50
        groups = np.repeat(np.arange(trained_on), shots)
        result = found(shift.Reference.fit(train, groups=groups), new, r"(part_\d+)", names)
        assert (result is not None) == can_reject
        if result:
            assert (result.of, result.tested) == ("parts", tested)
            alarms += result.message is not None
    assert binomtest(alarms, sets, 0.01, alternative="greater").pvalue > 0.01


def test_training_images_of_the_same_part_do_not_make_others_look_shifted():
    train = RNG.normal(size=(50, 6)).repeat(4, 0) + 0.01 * RNG.normal(size=(200, 6))
    new, held = RNG.normal(size=(50, 6)), RNG.normal(size=(20, 6))
    groups = np.arange(50).repeat(4)
    assert found(shift.Reference.fit(train), new).message is not None
    assert found(shift.Reference.fit(train, groups=groups), new).message is None
    assert found(shift.Reference.fit(train, held, held_out_only=True), new).message is None


def test_only_the_first_image_of_a_part_counts():
    reference = shift.Reference.fit(RNG.normal(size=(100, 4)))
    near, far = {f"{i:02}/a": 0.5 for i in range(50)}, {f"{i:02}/b": 9.0 for i in range(50)}
    assert shift.find(reference, far | near, "folder").further == 0
    assert shift.find(reference, far | near).further == 50


def test_names_without_a_part_are_not_tested():
    reference = shift.Reference.fit(RNG.normal(size=(100, 4)))
    assert found(reference, np.full((60, 4), 99.0), r"(part_\d+)") is None
    assert found(reference, np.full((60, 4), 99.0)) is not None


def test_equal_or_too_few_training_images_give_no_reference():
    assert shift.Reference.fit(np.ones((9, 3))) is None
    assert shift.Reference.fit(RNG.normal(size=(1, 3))) is None
    assert shift.Reference.fit(RNG.normal(size=(4, 3)), groups=np.zeros(4)) is None
    assert shift.Reference.fit(RNG.normal(size=(9, 3)), held_out_only=True) is None


def test_a_saved_reference_gives_the_same_distances(tmp_path):
    reference, new = shift.Reference.fit(RNG.normal(size=(20, 4))), RNG.normal(size=(5, 4))
    reference.save(tmp_path / "shift.npz")
    loaded = shift.Reference.load(tmp_path / "shift.npz")
    np.testing.assert_array_equal(loaded.distances(new), reference.distances(new))
    assert loaded.n_parts == reference.n_parts == 10


def test_at_most_2000_training_images_are_used():
    assert shift.chosen(7).all()
    many = shift.chosen(5001)
    assert (many.sum(), many[0], many[-1]) == (2000, True, True)
