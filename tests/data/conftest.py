"""Small image files in temporary directories."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """write(path, value=0, size=(height, width)) saves an image of one grey level."""

    def write(path: Path, value: int = 0, size: tuple[int, int] = (6, 8)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(size, value, np.uint8)).save(path)
        return path

    return write


@pytest.fixture
def write_mask() -> Callable[[Path, int], None]:
    """write(path, n) saves a mask of 6 x 8 pixels, n of them defective."""

    def write(path: Path, n: int) -> None:
        mask = np.zeros((6, 8), np.uint8)
        mask[0, :n] = 255
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)

    return write


@pytest.fixture
def data_config() -> Callable[..., ConfigDict]:
    """`config.data` with the given fields, the others None."""

    def make(name: str, **fields) -> ConfigDict:
        unset = dict.fromkeys(("category", "root", "manifest", "dir", "groups", "exclude"))
        unset |= dict.fromkeys(("bits", "window", "levels"))
        return ConfigDict({"name": name} | unset | fields)

    return make
