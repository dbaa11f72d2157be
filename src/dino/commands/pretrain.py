"""``dino pretrain``: the recipe's settings are the defaults of the flags."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from dino.commands.shared import Command, Flat
from dino.config import AdaptConfig, Config
from dino.recipes import RECIPES, Facts

if TYPE_CHECKING:
    from dino.data.sources import Source

T = TypeVar("T")
RecipeName = Literal[
    "auto",
    "adapt",
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
class Settings(Config):
    """A configuration as flags: what concerns the weights that training begins from has no prefix."""

    adapt: Annotated[AdaptConfig, Flat] = field(default_factory=AdaptConfig)


class Trains(Command):
    """A command about a run, whose recipe says what is not given."""

    data: tuple[str, ...]
    recipe: str
    config: Settings

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings under ``adapt`` that the command itself decides."""
        return {}

    @property
    def plain_config(self) -> Config:
        """The configuration of the run."""
        return as_kind(Config, self.config, adapt=as_kind(AdaptConfig, self.config.adapt, **self.fixed))

    @functools.cached_property
    def source(self) -> "Source":
        """DATA, listed once."""
        from dino.data.sources import open_source

        return open_source(self.data, read=self.config.data)

    def parts(self) -> "tuple[Source, Source | None]":
        """The images to learn from, and those to judge by."""
        from dino.data.sources import train_and_val

        return train_and_val(self.source, self.config.data.val_fraction, self.config.run.seed)

    def with_recipe(self, prog: str, arguments: Sequence[str]) -> Command:
        """The same arguments read again, over the recipe's settings for this data and this machine."""
        flags = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
        batch_size = self.config.optim.batch_size if "--optim.batch-size" in flags else None
        made = RECIPES[self.recipe](self.facts(batch_size))
        config = as_kind(type(self.config), made, adapt=as_kind(type(self.config.adapt), made.adapt))
        default = replace(self, config=config)  # pyright: ignore[reportArgumentType]
        command = tyro.cli(type(self), prog=prog, args=arguments, default=default)
        if "source" in self.__dict__:
            command.__dict__["source"] = self.source  # The same words say the same DATA.
        return command

    def facts(self, batch_size: int | None) -> Facts:
        """Looks at the data, the machine and the weights to begin from, as far as recipes need it."""
        from dino.machine.device import choose_device

        train, _ = self.parts()
        accelerator = choose_device(self.config.run.device).type != "cpu"
        facts = Facts(images=len(train), side=train.median_side(), accelerator=accelerator, batch_size=batch_size)
        init = self.fixed.get("init", self.config.adapt.init)
        if not init:
            return facts
        from dino.run.adapt import Beginning

        return facts._replace(**Beginning.of(init).facts)


def as_kind(kind: type[T], values: Any, **changes: Any) -> T:
    """A dataclass as another one of the same fields."""
    return kind(**{entry.name: getattr(values, entry.name) for entry in dataclasses.fields(values)} | changes)


@dataclass(frozen=True)
class WithRecipe(Trains):
    """A command about a run: DATA, a recipe, and every setting as a flag over those of the recipe."""

    data: tyro.conf.Positional[tuple[str, ...]] = ()
    """Images: folders, archives (tar, zip, WebDataset shards), lists (txt, csv, tsv, jsonl), Parquet, videos, patterns
    of those, a torchvision data set (cifar10, ...), hf:NAME, or `shapes`. docs/data.md says what is recognised."""
    _: KW_ONLY
    recipe: RecipeName = "auto"
    """Where settings come from; docs/recipes.md says what each is for."""
    config: Annotated[Settings, Flat] = field(default_factory=Settings)


@dataclass(frozen=True)
class Pretrain(WithRecipe):
    """Trains a DINO backbone on images without labels. The same command again resumes.

    Settings that are not given come from the recipe; `auto` fits them to the data and the machine.
    """

    _: KW_ONLY
    out: Path
    """The run folder."""
    quiet: bool = False
    """Show nothing while it runs."""

    def run(self) -> dict[str, Any]:
        from dino.run.pretrain import pretrain

        train, val = self.parts()
        return pretrain(train, self.out, self.plain_config, val=val, quiet=self.quiet or self.json)
