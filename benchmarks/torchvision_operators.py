"""Import this before what imports torchvision, whose operators a CPU build of torch may lack."""

import pathlib
import sys

sys.path.append(str(pathlib.Path(__file__).parent.parent / "tests"))
from torchvision_oracle import import_torchvision

import_torchvision()
