"""``dino demo``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dino.commands.shared import Command


@dataclass(frozen=True)
class Demo(Command):
    """Trains a small ViT on built-in images in a few minutes: no data, no network, no GPU needed."""

    shows_results: ClassVar[bool] = True
    out: Path = Path("runs/demo")
    """Folder for the pictures, the report and results.json."""
    seed: int = 0
    """Another seed, another run."""

    def run(self) -> dict[str, Any]:
        from dino.run.demo import demo

        return demo(self.out, seed=self.seed, quiet=self.json)
