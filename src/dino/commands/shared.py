"""What the commands share: flags that several have, and how they open weights and data. Imports torch only when run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from dino.config import ReadConfig
from dino.options import CropOptions, ForwardOptions, quoted

if TYPE_CHECKING:
    from dino.data.source import Source
    from dino.encoder.encoder import Encoder

Flat = tyro.conf.arg(name="")
"""Marks a field whose own fields are flags without a prefix."""


@dataclass(frozen=True)
class Command:
    """A command: its fields are its flags, its docstring is its help, ``run`` does it and gives what ``--json``
    prints."""

    shows_results: ClassVar[bool] = False
    """Whether ``run`` itself shows them, when not asked for JSON."""
    needs_data: ClassVar[bool] = True
    """Whether DATA, where it is a field, must be given."""

    _: KW_ONLY
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        raise NotImplementedError

    def exit_code(self, results: dict[str, Any]) -> int:  # noqa: ARG002 - for those whose results say more than "done"
        """What the process ends with when ``run`` has done its work."""
        return 0


@dataclass(frozen=True)
class WithWeights(Command):
    """A command on a frozen backbone."""

    weights: tyro.conf.Positional[str]
    """A run folder, a weights file, a folder of timm or Hugging Face, a URL, timm:NAME, the name of a released model
    (dino_vits16, dino_vitb8, ...), or example: a small convnet inside the package, to try things with."""
    _: KW_ONLY
    checkpoint_key: str = "teacher"
    """Which network, where a file holds several: teacher, student, or the name of the part wanted."""

    def open(self, forward: ForwardOptions, **options: Any) -> "Encoder":
        """The encoder of the weights, with the options of the command line over what the weights bring."""
        from dino.encoder.encoder import open_encoder

        given = dataclasses.asdict(forward)
        if "crop" in given:
            given["size"] = given.pop("crop")
        return open_encoder(self.weights, checkpoint_key=self.checkpoint_key, **given, **options)

    def report(self, results: dict[str, Any], encoder: "Encoder", *options: Any, **facts: Any) -> dict[str, Any]:
        """The results with all that they depend on, so that no number is quoted without it."""
        shown = encoder.settings
        if not any(isinstance(option, CropOptions) for option in options):
            del shown["resize"], shown["crop"]  # Images keep a size of their own.
        settings = {"weights": self.weights, **facts}
        for option in options:
            if not isinstance(option, ForwardOptions):
                settings |= quoted(option)
        return {**results, "settings": {**settings, **shown}}


@dataclass(frozen=True)
class WithData(WithWeights):
    """A command on a frozen backbone and the images of DATA."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images."""
    _: KW_ONLY
    read: Annotated[ReadConfig, tyro.conf.arg(name="data")] = ReadConfig()

    def source(self) -> "Source":
        """DATA."""
        return self._opened(self.data)

    def other(self, data: str | None) -> "Source | None":
        """Other images than DATA, read as it is; None where none are given."""
        return None if data is None else self._opened(data)

    def _opened(self, data: str | Sequence[str]) -> "Source":
        from dino.data.sources import open_source

        return open_source(data, read=self.read)


Cropped = Annotated[CropOptions, Flat]
Forward = Annotated[ForwardOptions, Flat]
