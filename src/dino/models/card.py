"""The model card: a page beside the weights that says what they are, what they learnt from, and how to use them."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

from dino import __version__
from dino.config import Config, Preprocessing
from dino.machine.files import write_text

_FACTS = "dino: "  # Begins the line of the front matter that holds the facts as JSON (which is YAML too).
# They change the speed only (the seed is listed), or are paths.
_NOT_SETTINGS = ("run.", "data.cache", "data.workers", "adapt.init", "adapt.anchor")


@dataclass(frozen=True)
class CardFacts:
    """What a model card says. Images are described by counts alone: no path and no name of a class goes into it."""

    backbone: str  # As in ``model.backbone``.
    parameters: int
    embed_dim: int | None  # None: the network does not say.
    patch_size: int | None
    preprocessing: Preprocessing
    images: int | None = None  # Number of training images; this and what follows is None where nobody knows it.
    classes: int | None = None  # Of them; None without labels. DINO reads no label.
    side: int | None = None  # Median of their shorter sides in pixels.
    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # Those that are not the default, by their flag.
    results: Mapping[str, int | float] = field(default_factory=dict)  # As ``--json`` prints them.
    began_from: str | None = None  # The weights that training continued from.
    software: str = f"dino-ssl {__version__}, torch {torch.__version__}"

    @classmethod
    def of(
        cls,
        backbone: nn.Module,
        preprocessing: Preprocessing,
        config: Config | None = None,
        results: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> "CardFacts":
        """The facts of a backbone; ``facts``: further fields, such as ``images`` and ``recipe``."""
        settings = {} if config is None else _changed(config)
        return cls(
            backbone=config.model.backbone if config else type(backbone).__name__,
            parameters=sum(parameter.numel() for parameter in backbone.parameters()),
            embed_dim=getattr(backbone, "embed_dim", None),
            patch_size=getattr(backbone, "patch_size", None),
            preprocessing=preprocessing,
            settings=settings,
            results={name: value for name, value in (results or {}).items() if isinstance(value, int | float)},
            **facts,
        )


def write_card(path: Path, facts: CardFacts, *, usage: str | None = None, library: str = "dino-ssl") -> Path:
    """Writes a model card in Markdown, whose front matter the Hugging Face hub reads, and returns its path.

    Args:
        path: ``model_card.md`` in a run folder; ``README.md`` in a folder that is made to be published.
        usage: lines of Python that load and use the weights beside the card; by default those of this package.
        library: name of the package that opens the weights (``timm``, ``transformers``, ``onnx``, ...).
    """
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = jinja.get_template("card.md.jinja").render(
        facts=facts,
        results={name: f"{value:.4g}" for name, value in facts.results.items()},
        line=_FACTS + json.dumps(dataclasses.asdict(facts)),
        usage=usage,
        library=library,
    )
    write_text(path, text)
    return path


def read_card(path: Path) -> CardFacts:
    """The facts of a card that ``write_card`` wrote.

    Raises:
        ValueError: the file is no such card.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = next((line for line in lines if line.startswith(_FACTS)), None)
    if found is None:
        raise ValueError(
            f"{path} is not a model card of dino: its front matter has no line that begins with {_FACTS!r}"
        )
    try:
        raw = json.loads(found.removeprefix(_FACTS))
        return CardFacts(preprocessing=Preprocessing.from_dict(raw.pop("preprocessing")), **raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: the line {_FACTS!r} cannot be read, perhaps another version wrote it ({error})"
        ) from error


def _changed(config: Config) -> dict[str, Any]:
    """Settings that the result depends on and that are not the default."""
    default = Config().flat()
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.flat().items()
        if name == "run.seed" or (value != default[name] and not name.startswith(_NOT_SETTINGS))
    }
