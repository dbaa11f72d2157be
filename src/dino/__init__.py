"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

>>> import dino
>>> backbone = dino.load("runs/demo")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dino.augment.multicrop import Crops, MultiCrop
    from dino.data.decode import Canvas
    from dino.method.loss import DINOLoss
    from dino.models.head import DINOHead
    from dino.models.layers import Tokens
    from dino.models.timm_backbone import TimmBackbone
    from dino.models.vision_transformer import VisionTransformer, vit_base, vit_large, vit_small, vit_tiny
    from dino.models.weights import load

# Imported at first use: ``import dino`` and ``dino --help`` need no torch.
_HOME = {
    "Canvas": "dino.data.decode",
    "Crops": "dino.augment.multicrop",
    "DINOHead": "dino.models.head",
    "DINOLoss": "dino.method.loss",
    "MultiCrop": "dino.augment.multicrop",
    "TimmBackbone": "dino.models.timm_backbone",
    "Tokens": "dino.models.layers",
    "VisionTransformer": "dino.models.vision_transformer",
    "load": "dino.models.weights",
    "vit_base": "dino.models.vision_transformer",
    "vit_large": "dino.models.vision_transformer",
    "vit_small": "dino.models.vision_transformer",
    "vit_tiny": "dino.models.vision_transformer",
}

__all__ = [
    "Canvas",
    "Crops",
    "DINOHead",
    "DINOLoss",
    "MultiCrop",
    "TimmBackbone",
    "Tokens",
    "VisionTransformer",
    "load",
    "vit_base",
    "vit_large",
    "vit_small",
    "vit_tiny",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dino' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
