"""``dino pretrain``: the recipe's settings are the defaults of the flags."""

import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from dino.commands.shared import Command
from dino.config import Config
from dino.recipes import RECIPES, Facts

if TYPE_CHECKING:
    from dino.data.sources import Source

RecipeName = Literal[
    "auto",
    "vits16_vanilla_100ep",
    "vits16_boost_300ep",
    "vits16_800ep",
    "vits8_800ep",
    "vitb16_400ep",
    "vitb8_300ep",
    "resnet50",
    "xcit_s12_16",
    "gldv2_vits16",
    "demo",
]


@dataclass(frozen=True)
class Pretrain(Command):
    """Trains a DINO backbone on images without labels. The same command again resumes.

    Settings that are not given come from the recipe; `auto` fits them to the data and the machine.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images: folders, archives (tar, zip, WebDataset shards), lists (txt, csv, tsv, jsonl), Parquet, videos, patterns
    of those, a torchvision data set (cifar10, ...), hf:NAME, or `shapes`. docs/data.md says what is recognised."""
    _: KW_ONLY
    out: Path
    """The run folder."""
    recipe: RecipeName = "auto"
    """Where settings come from; docs/recipes.md says what each is for."""
    quiet: bool = False
    """Show nothing while it runs."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    @functools.cached_property
    def source(self) -> "Source":
        """DATA, listed once."""
        from dino.data.sources import open_source

        return open_source(self.data, read=self.config.data)

    def run(self) -> dict[str, Any]:
        from dino.data.sources import train_and_val
        from dino.run.pretrain import pretrain

        train, val = train_and_val(self.source, self.config.data.val_fraction, self.config.run.seed)
        return pretrain(train, self.out, self.config, val=val, quiet=self.quiet or self.json)

    def with_recipe(self, prog: str, arguments: Sequence[str]) -> "Pretrain":
        """The same arguments read again, over the recipe's settings for this data and this machine."""
        flags = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
        batch_size = self.config.optim.batch_size if "--optim.batch-size" in flags else None
        config = RECIPES[self.recipe](self._facts(batch_size))
        command = tyro.cli(
            Pretrain, prog=prog, args=arguments, default=Pretrain(self.data, out=self.out, config=config)
        )
        command.__dict__["source"] = self.source  # The same words say the same DATA.
        return command

    def _facts(self, batch_size: int | None) -> Facts:
        """Looks at the data and the machine, as far as recipes need it."""
        from dino.data.sources import train_and_val
        from dino.machine.device import choose_device

        train, _ = train_and_val(self.source, self.config.data.val_fraction, self.config.run.seed)
        accelerator = choose_device(self.config.run.device).type != "cpu"
        return Facts(images=len(train), side=train.median_side(), accelerator=accelerator, batch_size=batch_size)
