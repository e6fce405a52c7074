"""Hostile and broken input: how it is made, read under watch, and found to be harmless."""
