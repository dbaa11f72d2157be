"""A frozen backbone and how it is shown images. ``dino.encoder(WEIGHTS)`` is ``dino.encoder.encoder.open_encoder``."""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """The folder and the function have one name, and Python puts the folder there as soon as a file in it is used."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from dino.encoder.encoder import open_encoder

        return open_encoder(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
