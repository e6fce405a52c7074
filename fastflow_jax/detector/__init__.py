"""Detectors as applications use them: `Detector` of one product, `Products` of several."""

from fastflow_jax.detector.detector import Detector
from fastflow_jax.detector.products import Products

__all__ = ["Detector", "Products"]
