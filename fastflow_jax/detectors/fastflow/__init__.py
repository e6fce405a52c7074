"""The FastFlow detector: flows, memory bank of latents, calibration and scores."""
