"""FastFlow: unsupervised anomaly detection and localization with 2D normalizing flows."""

import importlib

__version__ = "0.1.0"

# Imported on first use, so that `import fastflow_jax.flows` loads jax and flax only.
_PUBLIC = {
    "Detector": "fastflow_jax.detector",
    "InputError": "fastflow_jax.errors",
    "Prediction": "fastflow_jax.prediction",
    "Products": "fastflow_jax.detector",
    "Threshold": "fastflow_jax.decision",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastflow_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
