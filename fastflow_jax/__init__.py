"""FastFlow: unsupervised anomaly detection and localization with 2D normalizing flows."""

__version__ = "0.1.0"
