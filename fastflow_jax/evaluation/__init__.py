"""Metrics, thresholds and scores of held-out images."""
