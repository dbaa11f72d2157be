"""``dino adapt``: a pretraining run that begins from weights that are there."""

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from dino.commands.pretrain import Settings, Trains
from dino.commands.shared import Flat
from dino.config import AdaptConfig


@dataclass(frozen=True)
class _Flags(AdaptConfig):
    init: tyro.conf.Suppress[str] = ""  # WEIGHTS.


@dataclass(frozen=True)
class _Settings(Settings):
    adapt: Annotated[_Flags, Flat] = field(default_factory=_Flags)  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True)
class Adapt(Trains):
    """Goes on from good weights on other images, without labels, and keeps them from getting worse at what they could.

    Settings that are not given come from the recipe `adapt`. The same command again resumes. With --anchor the run
    measures before, during and after what the backbone could do on those images, and backbone.safetensors holds the
    best one that lost at most --max-loss points.
    """

    weights: tyro.conf.Positional[str]
    """What training begins from: a run folder, a weights file, a folder of timm or Hugging Face, the name of a released
    model."""
    data: tyro.conf.Positional[tuple[str, ...]]
    """The images to adapt to, as for pretrain."""
    _: KW_ONLY
    out: Path
    """The run folder."""
    quiet: bool = False
    """Show nothing while it runs."""
    config: Annotated[_Settings, Flat] = field(default_factory=_Settings)

    def run(self) -> dict[str, Any]:
        from dino.run.pretrain import pretrain

        train, val = self.parts()
        return pretrain(train, self.out, self.plain_config, val=val, quiet=self.quiet or self.json)

    recipe: ClassVar[str] = "adapt"  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def fixed(self) -> dict[str, Any]:
        return {"init": self.weights}
