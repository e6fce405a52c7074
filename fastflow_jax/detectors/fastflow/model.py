"""The FastFlow model: a norm and a flow per scale, its likelihood and its energies.

Yu et al., FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows
(arXiv 2111.07677).
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fastflow_jax.errors import InputError
from fastflow_jax.flows import Flow

NORMS = ("whiten", "standardise", "layer", "layer_plain", "none")
# (z [B, h, w, C], log_det [B, h, w]) per scale
Latents = tuple[tuple[jax.Array, jax.Array], ...]


class FeatureNorm(nn.Module):
    """Normalisation of the features of one scale before the flow, [B, h, w, C] -> same shape.

    Attributes:
      kind: "whiten" makes the channels uncorrelated with mean 0 and deviation 1 over the training
        set, "standardise" gives them mean 0 and deviation 1; the statistics are in the collection
        "statistics", see `extract.channel_statistics`. "layer" is the reference's layer norm of
        each image over h, w and C, with a trainable scale and offset per location and channel,
        which fixes the input size; "layer_plain" is the same without them. "none" is the identity,
        as in the reference with transformers, which end in a norm.
    """

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array, product: jax.Array | None = None) -> jax.Array:
        """Normalises x.

        Args:
          x: features.
          product: int [B], the product of each image, if the statistics of several products are
            stacked; None if the statistics are those of one product.
        """
        if self.kind == "none":
            return x
        channels = x.shape[-1]
        if self.kind in ("whiten", "standardise"):
            mean = self.variable("statistics", "mean", jnp.zeros, (channels,)).value
            x = x - (mean if product is None else mean[product][:, None, None])
            if self.kind == "standardise":
                std = self.variable("statistics", "std", jnp.ones, (channels,)).value
                return x / (std if product is None else std[product][:, None, None])
            matrix = self.variable("statistics", "whitening", jnp.eye, channels).value
            return x @ (matrix if product is None else matrix[product][:, None])
        affine = self.kind == "layer"
        axes = (-3, -2, -1)
        return nn.LayerNorm(
            epsilon=1e-5,
            use_scale=affine,
            use_bias=affine,
            reduction_axes=axes,
            feature_axes=axes,
            use_fast_variance=False,
        )(x)


class FastFlow(nn.Module):
    """A norm and a flow for each scale of a backbone's features.

    Attributes:
      flow: the flow of every scale, with its hyperparameters; each scale has its own parameters.
      norm: see `FeatureNorm`.
      products: number of products; with 0 or 1 the flows have no condition. Otherwise the condition
        is the product as a one-hot vector, which is in the collection "product" if the variables
        are those of one product.
    """

    flow: Flow
    norm: str = "whiten"
    products: int = 0

    @nn.compact
    def __call__(
        self,
        features: Sequence[jax.Array],
        cut: Callable[[int, jax.Array], jax.Array] = lambda scale, x: x,
        product: jax.Array | None = None,
    ) -> Latents:
        """Maps features [B, h, w, C] per scale to (z [B, h, w, C], log_det [B, h, w]) per scale.

        Args:
          features: of the backbone.
          cut: (scale, map) -> the part of the map that the flow gets, see `random_windows`; the
            whole map by default.
          product: int [B], the product of each image, if the variables are those of all products.
        """
        latents, one_hot = [], None
        if self.products > 1:
            one_hot = self.variable("product", "one_hot", jnp.zeros, (self.products,)).value
            one_hot = one_hot if product is None else jax.nn.one_hot(product, self.products)
        for i, x in enumerate(features):
            norm = FeatureNorm(self.norm, name=f"norm_{i}")
            x = x.astype(jnp.float32)
            # A norm over the training set may follow the cut, which is cheaper.
            is_layer = self.norm.startswith("layer")
            x = cut(i, norm(x)) if is_layer else norm(cut(i, x), product)
            flow = self.flow.clone(parent=self, name=f"flow_{i}")
            latents.append(flow(x, condition(one_hot, x)))
        return tuple(latents)


def condition(one_hot: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """The condition of a flow, [B, h, w, P], for features x [B, h, w, C].

    Args:
      one_hot: [B, P], or [P] for all images; None without a condition.
      x: the features.
    """
    if one_hot is None:
        return None
    rows = jnp.broadcast_to(one_hot, (x.shape[0], one_hot.shape[-1]))
    return jnp.broadcast_to(rows[:, None, None], (*x.shape[:3], rows.shape[-1]))


def of_product(variables: dict, product: int, products: int) -> dict:
    """The variables of one product, from those of all products with stacked statistics."""
    statistics = jax.tree.map(lambda x: x[product], variables.get("statistics", {}))
    one_hot = np.eye(products, dtype=np.float32)[product]
    return {**variables, "statistics": statistics, "product": {"one_hot": one_hot}}


def normalise(model: FastFlow, variables: dict, features: Sequence[jax.Array]) -> list[jax.Array]:
    """Features [B, h, w, C] per scale after the norm: the inputs of the flows."""

    def of_scale(i, x):
        own = {k: tree[f"norm_{i}"] for k, tree in variables.items() if f"norm_{i}" in tree}
        return cast(jax.Array, FeatureNorm(model.norm).apply(own, x.astype(jnp.float32)))

    return [of_scale(i, x) for i, x in enumerate(features)]


def invert(model: FastFlow, variables: dict, latents: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Features [B, h, w, C] per scale that `model` maps to latents of the same shapes.

    Raises:
      InputError: the norm is a layer norm, which does not keep the mean and deviation of an image.
    """
    if model.norm.startswith("layer"):
        raise InputError(
            f"flow.norm={model.norm!r} cannot be inverted, because it does not keep each image's "
            "mean and deviation. Train with whiten, standardise or none."
        )
    flow, features = model.flow, []
    for i, z in enumerate(latents):
        own = {k: tree[f"flow_{i}"] for k, tree in variables.items() if f"flow_{i}" in tree}
        given = condition(variables.get("product", {}).get("one_hot"), z)
        x, _ = flow.apply(own, z.astype(jnp.float32), given, inverse=True)
        statistics = variables.get("statistics", {}).get(f"norm_{i}", {})
        if "whitening" in statistics:
            x = x @ jnp.linalg.inv(statistics["whitening"])
        elif "std" in statistics:
            x = x * statistics["std"]
        features.append(x + statistics.get("mean", 0.0))
    return tuple(features)


def random_windows(x: jax.Array, side: int, keys: jax.Array) -> jax.Array:
    """A random window of each image's map: [B, h, w, C] -> [B, min(side, h), min(side, w), C].

    Convolutions share parameters between locations, so that a part of a fine map is enough.

    Args:
      x: the maps.
      side: height and width of the windows, in locations.
      keys: [B].
    """
    height, width = (min(side, n) for n in x.shape[1:3])
    if (height, width) == x.shape[1:3]:
        return x

    def of_image(x, key):
        highest = jnp.array([x.shape[0] - height, x.shape[1] - width])
        first = jax.random.randint(key, (2,), 0, highest + 1)
        return jax.lax.dynamic_slice(x, (*first, 0), (height, width, x.shape[-1]))

    return jax.vmap(of_image)(x, keys)


def negative_log_likelihood(
    latents: Latents,
    *,
    per_dimension: bool,
    inside: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """-log p of each image's normalised features in nats, [B] (section 3.3, equations 2 and 3).

    Args:
      latents: see `FastFlow`.
      per_dimension: the mean over all dimensions of all scales, including the constant, which is
        comparable between input sizes; otherwise the reference's loss, the sum over all dimensions
        without the constant (of order 1e5, and negative after training: a density may exceed 1).
      inside: bool [B, h, w] per scale, False in padded locations; None if there is no padding.
    """
    energy = dimensions = jnp.zeros(())
    for i, (z, log_det) in enumerate(latents):
        counts = jnp.ones(log_det.shape) if inside is None else inside[i].astype(jnp.float32)
        energy += jnp.sum(counts * (0.5 * jnp.sum(z**2, axis=-1) - log_det), axis=(1, 2))  # [B]
        dimensions += z.shape[-1] * counts.sum((1, 2))
    if not per_dimension:
        return energy
    # A window may be all padding.
    return energy / jnp.maximum(dimensions, 1.0) + 0.5 * math.log(2 * math.pi)


def location_energies(
    z: jax.Array,
    log_det: jax.Array,
    *,
    form: str,
    log_det_weight: float,
    squares: jax.Array | None = None,
) -> jax.Array:
    """Energy of each location of one scale, [B, h, w]; higher is more anomalous.

    Args:
      z: [B, h, w, C].
      log_det: [B, h, w].
      form: "log" is (|z|^2 / 2 - log_det_weight * log_det) / C, which with a weight of 1 is -log p
        per channel without the constant. "probability" is -exp(-energy), in [-1, 0] without the
        log-determinant: the reference's map, which saturates for large z.
      log_det_weight: weight of the log-determinant; 0 in the reference.
      squares: [B, h, w], replaces |z|^2, see `bank`; None for |z|^2.
    """
    squares = jnp.sum(z**2, axis=-1) if squares is None else squares
    energy = (0.5 * squares - log_det_weight * log_det) / z.shape[-1]
    return -jnp.exp(-energy) if form == "probability" else energy
