"""`Detector.update`: teaches new normal images to a trained detector."""

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastflow_jax.data.arrays import Images, as_dataset, each
from fastflow_jax.data.groups import labels_of
from fastflow_jax.data.inputs import Inputs, Outputs, stacked
from fastflow_jax.data.profile import Profile, profile_of
from fastflow_jax.data.transforms import normalise
from fastflow_jax.decision import Threshold, rounded_down
from fastflow_jax.detectors.base import TeachableScorer
from fastflow_jax.errors import InputError
from fastflow_jax.evaluation.held_out import HeldOut
from fastflow_jax.evaluation.teaching import Lesson, reinforce, teach
from fastflow_jax.evaluation.thresholds import fewest
from fastflow_jax.features.extract import image_means, in_batches
from fastflow_jax.prediction import Prediction

_log = logging.getLogger(__name__)

TEACHABLE = ("fastflow", "knn", "patchcore", "spade")
_MOST = 1000  # images of one update, whose features are in memory
_FEW = 8  # images; among fewer, no score is far from the others
_FAR = 3.0  # interquartile ranges above the upper quartile, from which a score is far
_NAMED = 10  # images in a message


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """A detector after new normal images were taught."""

    detector: Any  # without a folder
    n: int  # number of images, without copies
    # Images that may be defective. Scores and maps are those before an image itself is stored,
    # with the other images stored; decisions are those of the detector before.
    suspects: tuple[Prediction, ...]
    messages: tuple[tuple[int, str], ...]  # level of `logging`, and what users should know

    def log(self) -> None:
        """Logs the messages."""
        for level, message in self.messages:
            _log.log(level, message)


@dataclasses.dataclass(frozen=True, eq=False)
class _New:
    """New images as model inputs, without copies."""

    inputs: list[Inputs]
    lesson: Lesson
    profile: Profile | None

    @property
    def names(self) -> list[str]:
        return [each.name for each in self.inputs]


def update(
    detector: Any,
    images: Images,
    *,
    groups: Sequence[Any] | None = None,
    keep_threshold: bool = False,
) -> Update:
    """Teaches new normal images, see `Detector.update`.

    Raises:
      InputError: see `Detector.update`.
    """
    check_teachable(detector)
    new = _read(detector, images, groups)
    limit: Threshold | None = detector.image_threshold
    held_out: HeldOut | None = detector.held_out
    level = np.inf if limit is None else float(rounded_down(limit.value))
    taught = teach(detector.scorer, new.lesson, level)
    image, pixel = limit, detector.pixel_threshold
    is_kind = held_out is not None and not keep_threshold and taught.held_out.n_parts > 1
    if held_out is not None and is_kind:
        held_out = held_out.with_kind(taught.held_out)
        image, pixel = _again(image, held_out.image_threshold), _again(pixel, _quiet(held_out))
    scorer, still = taught.scorer, np.zeros(len(new.lesson), bool)
    if image is not None:
        above = taught.held_out.scores > rounded_down(image.value)  # no others can be
        scorer, still[above] = reinforce(scorer, new.lesson[above], image.value)
    suspects = _far_above(taught.held_out, level)
    after = dataclasses.replace(
        detector,
        scorer=scorer,
        held_out=held_out,
        image_threshold=image,
        pixel_threshold=pixel,
        folder=None,
        **_usual(detector, new, as_kind=is_kind),
    )
    messages = [
        *_on_the_rate(limit, image, taught.held_out, is_kind=is_kind, keep=keep_threshold),
        *_on_suspects(new.names, suspects, still),
    ]
    return Update(
        detector=after,
        n=len(new.lesson),
        suspects=tuple(
            _prediction(detector, new, i, taught.held_out.scores[i], taught.maps[i])
            for i in np.flatnonzero(suspects | still).tolist()
            if i in taught.maps
        ),
        messages=tuple(messages),
    )


def check_teachable(detector: Any) -> None:
    """Raises InputError for detectors that store no normal images, or those of tiles."""
    if detector.tiling is not None:
        raise InputError(
            "This detector was trained on tiles of images, and cannot be taught. Train again with "
            "the new images."
        )
    if not isinstance(detector.scorer, TeachableScorer):
        raise InputError(
            f"The detector {detector.config.detector} stores no normal images, and cannot be "
            "taught. Train again with the new images, or fit one of the detectors "
            f"{', '.join(TEACHABLE)}."
        )
    if detector.needs_masks:
        raise InputError(
            "A detector with a mask per image (config.data.roi_dir) cannot be taught. Train again "
            "with the new images and their masks."
        )


def _read(detector: Any, images: Images, groups: Sequence[Any] | None) -> _New:
    """Reads images and computes their features."""
    given = list(each(images, detector.levels))
    if not given:
        raise InputError("There are no images to teach. Pass at least one.")
    source = as_dataset(given, groups, detector.levels).train
    if len(source) > _MOST:
        raise InputError(
            f"{len(source)} images are more than {_MOST}. Teach some of them, or train again with "
            "all of them."
        )
    labels = source.groups or labels_of(source.names, detector.config.data.groups)
    inputs = []
    for _, found in detector.inputs(given):
        if isinstance(found, InputError):
            raise found
        inputs.append(found)
    rows = _without_copies(inputs)
    inputs = [inputs[i] for i in rows]
    pixels, valid = stacked([part for found in inputs for part in found.parts])

    def features(batch):
        spec = detector.backbone.spec
        return detector.extract(normalise(batch[0], spec.mean, spec.std, batch[1]))

    maps = in_batches(features, (pixels, valid), detector.config.batch_size)
    valid = detector.counted(maps, valid)
    parts = None
    if labels is not None:
        parts = np.unique(np.asarray(labels)[rows], return_inverse=True)[1]
    return _New(inputs, Lesson(maps, valid, parts), profile_of(source, rows))


def _usual(detector: Any, new: _New, *, as_kind: bool) -> dict[str, Any]:
    """Fields of the detector by which it recognises images unlike those of the training."""
    profile, reference, lesson = detector.training_images, detector.reference, new.lesson
    if profile is not None and new.profile is not None:
        profile = profile.merged(new.profile)
    if reference is not None:
        means = image_means(lesson.features, lesson.valid)
        reference = reference.extended(means, lesson.groups, as_kind=as_kind)
    return {"training_images": profile, "reference": reference}


def _without_copies(inputs: list[Inputs]) -> np.ndarray:
    """Rows of the first image of each content; logs how many are left out."""
    first: dict[bytes, int] = {}
    for i, found in enumerate(inputs):
        (part,) = found.parts
        first.setdefault(part.image.tobytes(), i)
    if copies := len(inputs) - len(first):
        _log.warning("%d of %d images are copies of others, and are left out.", copies, len(inputs))
    return np.array([*first.values()])


def _again(limit: Threshold | None, of_rate: Callable[[float], Threshold]) -> Threshold | None:
    """The threshold of the same false-alarm rate; `limit` itself if it was not chosen by one."""
    if limit is None or limit.rate is None:
        return limit
    with warnings.catch_warnings():  # see `_on_the_rate`
        warnings.simplefilter("ignore")
        return of_rate(limit.rate)


def _quiet(held_out: HeldOut) -> Callable[[float], Threshold]:
    return lambda rate: held_out.pixel_threshold(rate, warn=False)


def _far_above(held_out: HeldOut, level: float) -> np.ndarray:
    """Whether a cross-fitted score is above a level and far above the other scores, bool [n]."""
    scores, least = held_out.scores, level
    if held_out.n_parts >= _FEW:
        low, high = np.quantile(scores, [0.25, 0.75])
        least = max(level, high + _FAR * (high - low))
    return scores > least


def _prediction(
    detector: Any, new: _New, i: int, image_score: np.ndarray, anomaly_map: np.ndarray
) -> Prediction:
    outputs, valid = Outputs(new.inputs[i]), new.lesson.valid
    (part,) = new.inputs[i].parts
    region = valid[i] if detector.region_inside and valid is not None else None
    outputs.add(part, image_score, anomaly_map, region=region)
    return detector.prediction(outputs)


def _on_the_rate(
    before: Threshold | None, after: Threshold | None, new: HeldOut, *, is_kind: bool, keep: bool
) -> list[tuple[int, str]]:
    """Messages on the threshold and on the rate of other images like the new ones."""
    if before is None or after is None:
        return []
    above = int((new.scores > rounded_down(before.value)).sum())
    found = [
        (
            logging.INFO,
            f"With the other images taught, {above} of {len(new.scores)} are above the earlier "
            f"threshold of {before.value:.4g}.",
        )
    ]
    if before.rate is None:
        text = "The threshold was not chosen by a false-alarm rate, and stays. Check it."
        return [*found, (logging.WARNING, text)]
    rate, needed = before.rate, fewest(before.rate)
    if keep:
        return [*found, (logging.INFO, "The threshold stays.")]
    if not is_kind:
        text = (
            f"The threshold stays. One image or part says nothing on others like it: teach at "
            f"least {needed} for a false-alarm rate of {rate:.3g} on these."
        )
        return [*found, (logging.WARNING, text)]
    change = "stays" if after.value == before.value else f"rises to {after.value:.4g}"
    if new.n_parts >= needed:
        text = f"The threshold {change}, for a false-alarm rate of {rate:.3g} on images like these."
        return [*found, (logging.INFO, text)]
    text = (
        f"The threshold {change}. {new.n_parts} images cannot support a false-alarm rate of "
        f"{rate:.3g} on other images like these: it is {1 / (new.n_parts + 1):.3g} on average. "
        f"Teach at least {needed}."
    )
    return [*found, (logging.WARNING, text)]


def _on_suspects(
    names: list[str], suspects: np.ndarray, still: np.ndarray
) -> list[tuple[int, str]]:
    """Warnings about images that may be defective, and about those that are still flagged."""
    found = []
    if suspects.any():
        text = (
            f"{int(suspects.sum())} images may be defective, because they are unlike normal images "
            f"even with the other images taught: {_listed(names, suspects)}. Look at them. If they "
            "are defective, take the update back, and repeat it without them."
        )
        found.append((logging.WARNING, text))
    if still.any():
        text = (
            f"{int(still.sum())} taught images are still flagged: "
            f"{_listed(names, still)}. Teach fewer images at a time, or train "
            "again with them."
        )
        found.append((logging.WARNING, text))
    return found


def _listed(names: list[str], chosen: np.ndarray) -> str:
    rows = np.flatnonzero(chosen)
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return ", ".join(names[i] for i in rows[:_NAMED]) + more
