"""FastFlow: unsupervised anomaly detection and localization with 2D normalizing flows."""
