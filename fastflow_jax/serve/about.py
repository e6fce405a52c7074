"""Descriptions of the served models, for programs and for the page."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastflow_jax.decision import Decision, p_values
from fastflow_jax.serve.false_alarms import FalseAlarms
from fastflow_jax.serve.models import Model

_STEPS = 200


def describe(model: Model, false_alarms: Mapping[str, FalseAlarms]) -> dict[str, Any]:
    """Describes a model.

    Args:
      model: the model.
      false_alarms: marked images by model; empty if they are not stored.
    """
    loaded, marked = model.current, false_alarms.get(model.name)
    pixels = loaded.decision.pixel_threshold
    return {
        "name": model.name,
        "version": loaded.version,
        "ready": loaded.is_ready,
        "image_size": list(loaded.image_size),
        "threshold": loaded.threshold,
        "pixel_threshold": None if pixels is None else pixels.value,
        "colour_range": loaded.colour_range,
        "held_out": false_alarm_rates(loaded.decision),
        "false_alarms": None
        if marked is None
        else {"images": len(marked), "command": marked.command},
        "metadata": {key: value for key, value in loaded.metadata.items() if key != "held_out"},
    }


def false_alarm_rates(decision: Decision) -> dict[str, Any] | None:
    """Returns false-alarm rates by threshold, from held-out images; None if there are none.

    Returns:
      "images", the number of held-out images; "thresholds", ascending; and "rates", the largest
      expected share of normal images above each. Between two thresholds the rate of the lower one
      holds. There are at most `_STEPS`.
    """
    scores = decision.held_out
    if scores is None:
        return None
    steps = np.unique(scores)
    if len(steps) > _STEPS:
        steps = steps[np.linspace(0, len(steps) - 1, _STEPS).astype(int)]
    # Flagged images have scores above the threshold.
    lowest_flagged = np.nextafter(steps, np.float32(np.inf))
    rates = p_values(lowest_flagged, scores, decision.groups, decision.kinds)
    return {"images": len(scores), "thresholds": steps.tolist(), "rates": rates.tolist()}
