"""Runs: one configuration, its trainings, and the directory that keeps them."""
