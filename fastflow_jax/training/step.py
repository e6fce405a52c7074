"""The training step as a pure function of state and batch, and the order of batches in an epoch."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from fastflow_jax import parallel
from fastflow_jax.features.extract import Features
from fastflow_jax.state import Slot


class Objective(NamedTuple):
    """Initialisation and losses of a model, as pure functions.

    Features are [B, h, w, C] per scale; `valid` is bool [B, H, W], False in padded pixels, or None
    if there is no padding.
    """

    # (key, features of one image, all zero) -> variables: "params", and collections that are saved
    # with them but not trained
    init: Callable[[jax.Array, Features], dict]
    # (variables, features, valid, keys [B]) -> training losses [B]
    loss: Callable[..., jax.Array]
    # (variables, features, valid) -> losses of held-out images [B], without random numbers
    validation: Callable[..., jax.Array]


def variable_slots(objective: Objective, shapes: Sequence[tuple[int, ...]]) -> dict[str, Slot]:
    """The slots of the variables of an objective in a state dict; computes nothing.

    Args:
      objective: of a training.
      shapes: (h, w, C) of each scale.
    """
    features = tuple(jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in shapes)
    variables = jax.eval_shape(objective.init, jax.random.key(0), features)
    leaves: dict[str, Any] = flatten_dict(variables, sep="/")
    return {name: Slot(leaf.shape, leaf.dtype.type) for name, leaf in leaves.items()}


class TrainState(flax.struct.PyTreeNode):
    """State of a training, including collections of variables that are not trained."""

    step: jax.Array  # int32
    params: Any
    constants: Any  # collections such as "permutations" and "statistics"
    optimizer: Any
    epoch_loss: jax.Array  # sum over the images of this epoch so far
    epoch_images: jax.Array  # their number

    @property
    def variables(self) -> dict:
        """The variables, as the functions of an `Objective` take them."""
        return {"params": self.params, **self.constants}


def create_optimizer(config, steps: int) -> optax.GradientTransformation:
    """Creates the optimiser for a training.

    Weight decay is added to the gradient before Adam's scaling, as in torch's Adam and the
    reference (L2 regularisation, not AdamW).

    Args:
      config: the section `train` of the configuration.
      steps: number of steps of the training.
    """
    warmup = min(round(config.warmup * steps), max(steps, 1) - 1)
    if config.schedule == "cosine":
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(steps, 1))
    else:
        rate = optax.linear_schedule(0.0, config.learning_rate, warmup)
        rate = rate if warmup else optax.constant_schedule(config.learning_rate)
    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.add_decayed_weights(config.weight_decay) if config.weight_decay else optax.identity(),
        optax.scale_by_adam(b2=config.beta2) if config.optimizer == "adam" else optax.identity(),
        optax.scale_by_learning_rate(rate),
    )


def create_state(
    objective: Objective, optimizer: optax.GradientTransformation, shapes, seed: int
) -> TrainState:
    """Creates the initial state.

    Args:
      objective: of the training.
      optimizer: see `create_optimizer`.
      shapes: (h, w, C) of each scale.
      seed: seed of `objective.init`.
    """
    features = tuple(np.zeros((1, *shape), np.float32) for shape in shapes)
    constants = dict(objective.init(jax.random.key(seed), features))
    params = constants.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        constants=jax.tree.map(jnp.asarray, constants),
        optimizer=jax.jit(optimizer.init)(params),
        epoch_loss=jnp.zeros(()),
        epoch_images=jnp.zeros(()),
    )


def train_step(
    state: TrainState,
    images: tuple[Features, jax.Array | None],
    rows: jax.Array,
    weight: jax.Array,
    *,
    loss: Callable,
    optimizer: optax.GradientTransformation,
    seed: int | jax.Array,
    axis_name: str | None = None,
) -> TrainState:
    """Performs one step on the mean loss over the global batch.

    Args:
      state: before the step.
      images: features [B, h, w, C] per scale, and `valid` as in `Objective`.
      rows: int32 [B], indices of the images. The random keys of the loss depend on seed, step and
        index, so that they do not depend on the number of devices.
      weight: [B], 0 for examples that pad the batch.
      loss: see `Objective`.
      optimizer: see `create_optimizer`.
      seed: of the random keys.
      axis_name: named axis that the batch is split over, or None.

    Returns:
      The state after the step.
    """
    total_weight = parallel.total(weight.sum(), axis_name)
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)

    def mean_loss(params):
        losses = loss({"params": params, **state.constants}, *images, keys)  # [B]
        return jnp.sum(weight * losses) / total_weight

    # Gradients are summed over the devices after differentiation.
    value, grads = parallel.total(jax.value_and_grad(mean_loss)(state.params), axis_name)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
    return state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        optimizer=optimizer_state,
        epoch_loss=state.epoch_loss + value * total_weight,
        epoch_images=state.epoch_images + total_weight,
    )


def epoch_order(
    n: int, batch_size: int, *, seed: int, epoch: int, drop_last: bool, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shuffles the images of one epoch into batches.

    The order depends on seed and epoch only, so that a resumed training is exact.

    Args:
      n: number of images.
      batch_size: of the training.
      seed: of the training.
      epoch: number of the epoch, from 0 on.
      drop_last: drops a short last batch, unless it is the only one.
      multiple: number of devices; the batch size is rounded up to a multiple of it.

    Returns:
      Indices of images int32 and weights float32, both [steps, B], where B is the rounded batch
      size. Padding of a batch has weight 0.
    """
    order = np.random.default_rng((seed, epoch)).permutation(n)
    steps = n // batch_size if drop_last and n >= batch_size else -(-n // batch_size)
    order = order[: steps * batch_size]
    width = -(-batch_size // multiple) * multiple
    index = np.zeros((steps, width), np.int32)
    weight = np.zeros((steps, width), np.float32)
    for row in range(steps):
        batch = order[row * batch_size : (row + 1) * batch_size]
        index[row, : len(batch)] = batch
        weight[row, : len(batch)] = 1.0
    return index, weight


def train_epoch(
    state: TrainState,
    cache: tuple[Features, jax.Array | None],
    index: jax.Array,
    weight: jax.Array,
    *,
    step: Callable,
    axis_name: str | None = None,
) -> TrainState:
    """Performs all steps of an epoch in one program, on features that are in device memory.

    Args:
      state: before the epoch.
      cache: features of all images, [N, h, w, C] per scale, and `valid` as in `Objective`.
      index: [steps, B], indices into the cache.
      weight: [steps, B], see `train_step`.
      step: `train_step` with its keyword arguments bound, except for the axis.
      axis_name: see `train_step`.

    Returns:
      The state after the epoch.
    """

    def body(state, batch):
        rows, weight = batch
        images = jax.tree.map(lambda array: jnp.take(array, rows, axis=0), cache)
        return step(state, images, rows, weight, axis_name=axis_name), None

    return jax.lax.scan(body, state, (index, weight))[0]
