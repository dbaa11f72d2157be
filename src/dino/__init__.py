"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

>>> import dino
>>> encode = dino.encoder("runs/demo")  # doctest: +SKIP
>>> found = encode.features(dino.open_source("photos"))  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from dino import evaluate, pictures
    from dino.augment.multicrop import Crops, MultiCrop
    from dino.config import Config, Preprocessing
    from dino.data.decode import Canvas
    from dino.data.sources import Source, open_source
    from dino.encoder.encoder import Encoder
    from dino.encoder.encoder import open_encoder as encoder
    from dino.method.loss import DINOLoss
    from dino.models.backbone import Backbone, Tokens
    from dino.models.head import DINOHead
    from dino.models.timm_backbone import TimmBackbone
    from dino.models.vision_transformer import (
        VisionTransformer,
        vit_base,
        vit_large,
        vit_nano,
        vit_small,
        vit_tiny,
    )
    from dino.models.weights import load, load_classifier
    from dino.run.finetune import finetune
    from dino.run.pretrain import pretrain

# Imported at first use: ``import dino`` and ``dino --help`` need no torch.
_HOME = {
    "Backbone": "dino.models.backbone",
    "Canvas": "dino.data.decode",
    "Config": "dino.config",
    "Crops": "dino.augment.multicrop",
    "DINOHead": "dino.models.head",
    "DINOLoss": "dino.method.loss",
    "Encoder": "dino.encoder.encoder",
    "MultiCrop": "dino.augment.multicrop",
    "Preprocessing": "dino.config",
    "Source": "dino.data.sources",
    "TimmBackbone": "dino.models.timm_backbone",
    "Tokens": "dino.models.backbone",
    "VisionTransformer": "dino.models.vision_transformer",
    "finetune": "dino.run.finetune",
    "load": "dino.models.weights",
    "load_classifier": "dino.models.weights",
    "open_source": "dino.data.sources",
    "pretrain": "dino.run.pretrain",
    "vit_base": "dino.models.vision_transformer",
    "vit_large": "dino.models.vision_transformer",
    "vit_nano": "dino.models.vision_transformer",
    "vit_small": "dino.models.vision_transformer",
    "vit_tiny": "dino.models.vision_transformer",
}
_MODULES = {"encoder", "evaluate", "pictures"}  # ``encoder`` is called like a function: see its folder.

__all__ = [
    "Backbone",
    "Canvas",
    "Config",
    "Crops",
    "DINOHead",
    "DINOLoss",
    "Encoder",
    "MultiCrop",
    "Preprocessing",
    "Source",
    "TimmBackbone",
    "Tokens",
    "VisionTransformer",
    "encoder",
    "evaluate",
    "finetune",
    "load",
    "load_classifier",
    "open_source",
    "pictures",
    "pretrain",
    "vit_base",
    "vit_large",
    "vit_nano",
    "vit_small",
    "vit_tiny",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"dino.{name}")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dino' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
