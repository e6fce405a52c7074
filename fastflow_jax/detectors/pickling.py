"""Pickling and copying of detectors and their scorers."""

import dataclasses


class PickledByFields:
    """Mixin of a dataclass whose pickles and copies hold its fields alone.

    Compiled programs and what else is cached are left out: a copy makes its own on first use. JAX
    pickles its arrays as numpy arrays and puts them on the default device again.
    """

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
