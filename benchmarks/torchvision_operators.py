"""Imports torchvision without the compiled operators that a CPU build of torch may lack.

Import this module before any that imports torchvision.
"""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
from torchvision_oracle import import_torchvision

import_torchvision()
