"""Metrics, thresholds and the scores of held-out images."""
