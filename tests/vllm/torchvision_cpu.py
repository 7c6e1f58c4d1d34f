"""Goes into the environment's site-packages where torchvision is built for CUDA and torch is not.

PyPI has such a torchvision only. Its library cannot be loaded then, and it fails at import for want
of two operators that no processor calls; this declares them when torchvision is imported first.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec

BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Declaring:
    """Finds nothing; is asked before those who do."""

    library: object = None

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "torchvision" and self.library is None:
            import torch

            self.library = library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + BOXES)
        return None


sys.meta_path.insert(0, Declaring())
