"""Pictures of what a frozen backbone sees. In a notebook: ``dino.pictures.show_attention(WEIGHTS, IMAGE)``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dino.pictures.show import show_attention, show_correspondence, show_crops, show_neighbors, show_pca

__all__ = ["show_attention", "show_correspondence", "show_crops", "show_neighbors", "show_pca"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("dino.pictures.show"), name)
    raise AttributeError(f"module 'dino.pictures' has no attribute {name!r}")
