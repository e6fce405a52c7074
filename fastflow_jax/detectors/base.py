"""Protocols of detectors and scorers, the registry of detectors, and compiled scorers.

A detector is a module with a `Method` named `METHOD`. To add one, write such a module and add its
name to `DETECTORS`; see docs/adding_a_detector.md.
"""

import dataclasses
import functools
import importlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from fastflow_jax import parallel
from fastflow_jax.data.dataset import check_choice
from fastflow_jax.features.extract import Features, TrainingFeatures
from fastflow_jax.training.context import FitContext

# Modules of the detectors, by name.
DETECTORS = {
    "fastflow": "fastflow_jax.detectors.fastflow.scorer",
    "knn": "fastflow_jax.detectors.knn",
    "gaussian": "fastflow_jax.detectors.gaussian",
    "subspace": "fastflow_jax.detectors.subspace",
    "patchcore": "fastflow_jax.detectors.patchcore",
    "spade": "fastflow_jax.detectors.spade",
    "cflow": "fastflow_jax.detectors.cflow",
    "vae": "fastflow_jax.detectors.vae",
    "gan": "fastflow_jax.detectors.gan",
}


class Scorer(Protocol):
    """Image scores and anomaly maps from features; higher is more anomalous.

    Scorers are frozen dataclasses.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def config(self) -> Any:
        """The filled configuration; its `batch_size` is the largest batch of `score`."""
        ...

    def score(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores features.

        Args:
          features: [B, h, w, C] per scale, as `extract.extractor` returns them, with B up to the
            batch size of the configuration.
          valid: bool [B, H, W], False in pixels that do not count (padding, and pixels outside of
            the region of interest), or None if all do. Their locations neither train nor score; in
            anomaly maps they have the lowest value of the others.
          size: (H, W) of the anomaly maps; the input size of the configuration by default.

        Returns:
          Image scores [B] and anomaly maps [B, H, W], float32.
        """
        ...

    def state_dict(self) -> dict[str, np.ndarray]:
        """Arrays by name, from which `Method.load` rebuilds the scorer.

        Saved detectors consist of them: names, shapes and types must not change.
        """
        ...


@runtime_checkable
class InvertibleScorer(Scorer, Protocol):
    """A scorer with invertible flows."""

    def latents(self, features: Features) -> tuple[np.ndarray, ...]:
        """Latents of features, [B, h, w, C] per scale; standard normal under the model.

        Args:
          features: features [B, h, w, C] per scale.
        """
        ...

    def invert(self, latents: Features) -> tuple[np.ndarray, ...]:
        """Features of latents, [B, h, w, C] per scale.

        Args:
          latents: latents [B, h, w, C] per scale.

        Raises:
          InputError: the features were normalised in a way that cannot be inverted.
        """
        ...


@runtime_checkable
class CalibratedScorer(Scorer, Protocol):
    """A scorer that is calibrated on held-out normal images."""

    def location_maps(
        self, features: Features, valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Energies per location before the calibration, [B, h, w] per map.

        Args:
          features: features [B, h, w, C] per scale.
          valid: see `Scorer.score`.
        """
        ...

    def score_maps(
        self, maps: tuple[np.ndarray, ...], valid: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `score` returns for features with these `location_maps` and `valid`.

        Args:
          maps: energies [B, h, w] per map, from `location_maps`.
          valid: see `Scorer.score`.
        """
        ...

    def recalibrated(
        self, maps: tuple[np.ndarray, ...], valid: np.ndarray | None = None
    ) -> "CalibratedScorer":
        """A copy that is calibrated on other held-out images, given `location_maps` and `valid`.

        Args:
          maps: energies [n, h, w] per map of the held-out images.
          valid: see `Scorer.score`.
        """
        ...


Rows = Mapping[str, np.ndarray]  # by the name of the memory bank that they are for


@runtime_checkable
class TeachableScorer(Scorer, Protocol):
    """A scorer that compares new images with stored ones, and can store more of them.

    The image score of an image never rises when more are stored.
    """

    def new_rows(self, features: Features, valid: np.ndarray | None, share: float) -> Rows:
        """Chooses what to store of new normal images: what the memory banks lack most.

        Args:
          features: [n, h, w, C] per scale, with any n.
          valid: bool [n, H, W], False in padded pixels, or None if there is no padding.
          share: largest number of rows for a bank, over the size of a bank in training.

        Raises:
          InputError: this scorer has no memory banks, or its scores could rise.
        """
        ...

    def extended(self, rows: Sequence[Rows]) -> "TeachableScorer":
        """A copy that stores these rows as well.

        Args:
          rows: results of `new_rows`.

        Raises:
          InputError: a memory bank would be too large.
        """
        ...


def _nothing(config: ConfigDict, spec: Any) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Method:
    """A detector: how it is trained, read and rebuilt, and its part of the configuration."""

    title: str  # its name in reports
    # Trains, or continues an interrupted training. Raises Interrupted after SIGTERM or SIGINT, and
    # InputError if the configuration does not suit the detector or training diverged.
    fit: Callable[[FitContext], Scorer]
    # (filled configuration, directory of the training) -> the state dict of the scorer that `fit`
    # returned. Raises InputError if files are missing or damaged.
    read: Callable[[ConfigDict, pathlib.Path], Mapping[str, np.ndarray]]
    # (filled configuration, (h, w, C) of each scale, state dict) -> the scorer with this state
    # dict. Raises InputError if it does not fit, see `state.check`.
    load: Callable[[ConfigDict, Sequence[tuple[int, ...]], Mapping[str, np.ndarray]], Scorer]
    # (configuration, specification of a backbone) -> the feature maps that it takes by default
    layers: Callable[[ConfigDict, Any], tuple[str, ...]]
    # Sections of the configuration with the defaults of their fields; a type stands for a field of
    # that type that is None until `fill` sets it.
    fields: Mapping[str, Mapping[str, Any]]
    # (context, features of each product): trains the part that the products of one model share, or
    # continues it. Features of the context are `joined`. Each product is then fitted with
    # `FitContext.shared`. None if the products share nothing but the backbone.
    fit_shared: Callable[[FitContext, Sequence[TrainingFeatures]], None] | None = None
    # Differences of its runs from the default configuration.
    recipe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Sections and fields that it reads, in addition to those that all detectors read.
    reads: Sequence[str] = ()
    # Fields that it reads after `fit` only: runs that differ in them share a training.
    scoring: Sequence[str] = ()
    # Lowest and highest values of its numbers, by field.
    bounds: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    # Possible values of its strings, by field.
    choices: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    # Sets fields of its own sections that depend on the backbone, for runs of any detector, and
    # checks fields that depend on each other, for runs of its own.
    fill: Callable[[ConfigDict, Any], None] = _nothing


def method(name: str) -> Method:
    """The detector of a name.

    Args:
      name: name of the detector, one of `DETECTORS`.

    Raises:
      InputError: there is no detector of this name.
    """
    check_choice("the detector", name, DETECTORS)
    return importlib.import_module(DETECTORS[name]).METHOD


def recipe(name: str) -> dict[str, Any]:
    """Fields of the configuration that make a run use this detector, with its recipe.

    Args:
      name: name of the detector, one of `DETECTORS`.
    """
    return {"detector": name, **method(name).recipe}


class PickledByFields:
    """Mixin of dataclasses whose pickles and copies hold their fields only.

    Compiled programs and other cached values are left out, and made again on first use. JAX pickles
    its arrays as numpy arrays and puts them on the default device again.
    """

    def __getstate__(self) -> dict[str, Any]:
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]  of subclasses
        return {field.name: getattr(self, field.name) for field in fields}


@parallel.cached_program
def compiled(function: Callable, config: FrozenConfigDict, *arguments: Any) -> Callable:
    """Compiles `function(config, *arguments, state, batch)` to a function (state, batch).

    Args:
      function: a pure function. State and results are trees of arrays; each array of the batch and
        of the results has the images on its first axis.
      config: the filled configuration.
      *arguments: hashable values, passed to `function` after the configuration.
    """
    bound = functools.partial(function, config, *arguments)
    return parallel.per_example(bound, config.parallel, config.batch_size)


class CompiledScorer(PickledByFields):
    """Base of scorers whose work is done by pure functions of a configuration and arrays.

    A subclass is a dataclass with the field `config`. It defines `state_dict`, and `function` and
    `arrays`; or `score`, if that cannot be one pure function.
    """

    config: Any  # filled
    # (config, size, state, (features, valid)) -> scores [B] and anomaly maps [B, *size]
    function: ClassVar[Callable | None] = None
    # The same, and log-likelihoods [B] in nats per dimension; None without a likelihood.
    with_likelihood: ClassVar[Callable | None] = None

    def arrays(self) -> Any:
        """The tree of arrays that `function` gets as its state."""
        raise NotImplementedError

    def score(
        self,
        features: Features,
        valid: np.ndarray | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores features, see `Scorer.score`.

        Args:
          features: see `Scorer.score`.
          valid: see `Scorer.score`.
          size: see `Scorer.score`.
        """
        function = type(self).function
        assert function is not None
        run = self._program(function, tuple(size or self.config.image_size))
        return run(self._state, (features, valid))

    @functools.cached_property
    def _state(self) -> Any:
        """`arrays` on the devices: sending them takes longer than scoring an image."""
        return parallel.on_devices(self.arrays())

    @functools.cached_property
    def _program(self) -> Callable[..., Callable]:
        """(function, *arguments) -> the compiled function of a state and a batch."""
        config = FrozenConfigDict(self.config)  # not `self`: a reference cycle is freed late
        return functools.cache(lambda function, *arguments: compiled(function, config, *arguments))
