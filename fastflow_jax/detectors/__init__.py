"""Detectors: from features to image scores and anomaly maps."""
