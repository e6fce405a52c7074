"""Writes backbone_zip.pth and backbone_legacy.pth: PyTorch's two formats, small but varied.

    python tests/goldens/make_backbone_files.py        # needs torch

`tests/backbones/test_torch_pickle.py` knows the numbers: arange, seen in several ways.
"""

from pathlib import Path

import torch

HERE = Path(__file__).parent
numbers = torch.arange(24.0)
grid = numbers.reshape(2, 3, 4)
state = torch.nn.Sequential(torch.nn.Linear(2, 3)).state_dict()  # an OrderedDict with _metadata
state["0.weight"], state["0.bias"] = grid[0, :, :2], numbers[5:8]
state |= {
    "transposed": grid.permute(2, 0, 1),
    "slice": grid[1, ::2, 1:3],
    "parameter": torch.nn.Parameter(numbers[:3].clone()),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(7),
    "half": numbers[:5].half(),
    "bfloat16": numbers[:5].bfloat16(),
    "double": numbers[:5].double(),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
}
checkpoint = {
    "state_dict": state,
    "epoch": 3,
    "rate": 0.1,
    "best": [None, True, (1, "x", -(2**40))],
}
for name, zipped in (("backbone_zip", True), ("backbone_legacy", False)):
    torch.save(checkpoint, HERE / f"{name}.pth", _use_new_zipfile_serialization=zipped)
