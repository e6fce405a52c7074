"""Features of a backbone: rounding, range and statistics."""

import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from fastflow_jax.errors import InputError
from fastflow_jax.features.extract import (
    DTYPES,
    cached_features,
    channel_statistics,
    extractor,
    image_means,
)


class Multiply(nn.Module):
    def __call__(self, x):
        return (self.get_variable("params", "factor") * x,)


def features_of(images, dtype, factor=1.0, power=1.0):
    """Features of a backbone that multiplies by `factor`."""
    variables = {"params": {"factor": jnp.float32(factor)}}
    backbone = types.SimpleNamespace(module=Multiply(), variables=variables)
    return extractor(backbone, power, "pmap", 4, dtype)(images)[0]


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(3, 4, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_are_rounded_to_the_nearest_value_of_their_dtype(images, dtype):
    features = features_of(images, dtype)
    assert features.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(features, images.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize("factor", [1e5, 1e-6])
def test_features_out_of_the_range_of_float16_are_an_error(images, factor):
    with pytest.raises(InputError, match=r"range of float16, 6e-05 to 7e\+04\. Pass --config"):
        features_of(images, "float16", factor)
    for dtype in ("bfloat16", "float32"):
        np.testing.assert_allclose(
            features_of(images, dtype, factor).astype(np.float32), factor * images, rtol=4e-3
        )
    # Features with compressed lengths are in the range.
    assert np.isfinite(features_of(images, "float16", factor, 0.25)).all()


def test_zero_features_are_no_underflow():
    assert not features_of(np.zeros((1, 4, 4, 3), np.float32), "float16").any()


def test_image_means_leave_out_padding(images):
    valid = np.zeros((3, 8, 8), bool)
    valid[:, :4], valid[1, 4:] = True, True
    means = image_means((images, images[:, :2, :2]), valid)
    np.testing.assert_allclose(means[0, :3], images[0, :2].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(means[0, 3:], images[0, :1, :2].mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(means[1], image_means((images, images[:, :2, :2]))[1])
    np.testing.assert_allclose(means[1, :3], images[1].mean((0, 1)), rtol=1e-5)


def test_constant_features_are_whitened_to_zero():
    maps = np.full((5, 2, 2, 3), 7.0, np.float32)
    (norm,) = channel_statistics([((maps,), None)], "whiten").values()
    np.testing.assert_allclose((maps - norm["mean"]) @ norm["whitening"], 0, atol=1e-5)


@pytest.mark.parametrize("norm", ["whiten", "standardise"])
def test_an_almost_constant_channel_does_not_explode_in_a_new_image(norm):
    """One location of 16,384 has .05 in a channel that is 0 elsewhere; a new one has 1."""
    rng = np.random.default_rng(0)
    maps = rng.normal(scale=0.3, size=(64, 16, 16, 128)).astype(np.float32)
    maps[..., 0] = 0
    maps[0, 0, 0, 0] = 0.05
    (norm_of,) = channel_statistics([((maps,), None)], norm).values()
    new = maps[1, 0, 0].copy()
    new[0] = 1.0
    if norm == "whiten":
        whitened, typical = ((x - norm_of["mean"]) @ norm_of["whitening"] for x in (new, maps[1]))
    else:
        whitened, typical = ((x - norm_of["mean"]) / norm_of["std"] for x in (new, maps[1]))
    energy, usual = (whitened**2).mean(), (typical**2).mean()
    assert usual < energy < 100  # above 10,000 without a floor of the deviation


def test_features_that_are_not_finite_are_an_error():
    maps = np.full((5, 2, 2, 3), np.nan, np.float32)
    with pytest.raises(InputError, match="not finite numbers"):
        channel_statistics([((maps,), None)], "whiten")


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_computed_from_rounded_features_in_float64(dtype):
    rng = np.random.default_rng(0)
    features = (100 + rng.normal(size=(50, 4, 4, 3))).astype(jnp.dtype(dtype))
    statistics = cached_features((features,)).statistics("standardise")["norm_0"]
    exact = features.astype(np.float64).reshape(-1, 3)
    np.testing.assert_allclose(statistics["mean"], exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics["std"], exact.std(0), rtol=1e-6)
