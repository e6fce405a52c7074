"""Four host devices for everybody, and no waiting for absl to parse flags."""

import os

# Before jax starts: the multi-device tests need several devices in one process.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
