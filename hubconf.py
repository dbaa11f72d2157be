"""torch.hub entry points: ``torch.hub.load("OWNER/REPOSITORY", "dino_vits16")`` gives the released backbone."""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))

from dino.models.weights import RELEASED, load

dependencies = ["torch", "torchvision", "timm", "safetensors", "jaxtyping"]

for _name in RELEASED:
    globals()[_name] = functools.partial(load, _name)
