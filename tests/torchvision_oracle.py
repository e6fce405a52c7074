"""torchvision with the CPU build of torch, where its compiled operators do not load."""

import importlib
import sys
import warnings
from types import ModuleType


def import_torchvision() -> ModuleType:
    """The module; nothing that calls the missing operators, nms and qnms, works."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("torchvision")
        except RuntimeError:
            # Declared, the operators need not be there to be named. The declaration lives as long
            # as its handle does, and may be made once in a process.
            import_torchvision.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                import_torchvision.library.define(schema)
            for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
                del sys.modules[module]
            return importlib.import_module("torchvision")
