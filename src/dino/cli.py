"""The command line: ``dino COMMAND ...``. Exit code 0 done, 1 failed with one clear line, 2 wrong usage."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dino import __version__
from dino.config import Config
from dino.recipes import RECIPES, Facts

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
class Demo:
    """Trains a small ViT on built-in images in a few minutes: no data, no network, no GPU needed."""

    out: Path = Path("runs/demo")
    """Folder for the pictures, the report and results.json."""
    seed: int = 0
    """Another seed, another run."""
    json: bool = False
    """End with one JSON object on stdout."""


@dataclass(frozen=True)
class Pretrain:
    """Trains a DINO backbone on images without labels. The same command again resumes.

    Settings not given come from the recipe; `auto` fits them to the data and the machine.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """A folder of images, tar archives or WebDataset shards, a text or CSV file of paths, a torchvision data set
    (cifar10, imagenette, ...), or `shapes`."""
    out: Path
    """The run folder."""
    recipe: RecipeName = "auto"
    """Where settings come from; docs/recipes.md says what each is for."""
    json: bool = False
    """End with one JSON object on stdout."""
    quiet: bool = False
    """Write files only."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


@dataclass(frozen=True)
class EvalKnn:
    """Weighted k-NN classification with frozen features (section 4.1 of the paper)."""

    weights: tyro.conf.Positional[str]
    """A run folder, a weights file, a URL, or the name of a released model (dino_vits16, ...)."""
    data: tyro.conf.Positional[tuple[str, ...]]
    """Labelled images. With train and val parts, val is classified by train; with one part, each image by the others."""
    test: str | None = None
    """Images to classify, when they are not part of DATA."""
    resize: int = 256
    """Shorter side in pixels before the center crop."""
    crop: int = 224
    """Side of the center crop in pixels."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours."""
    temperature: float = 0.07
    """Of the vote exp(similarity / temperature)."""
    batch_size: int = 128
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    json: bool = False
    """End with one JSON object on stdout."""


def run_demo(args: Demo) -> dict[str, Any]:
    from dino.demo import demo

    return demo(args.out, seed=args.seed, quiet=args.json)


def run_pretrain(args: Pretrain) -> dict[str, Any]:
    from dino.data.sources import open_source, train_and_val
    from dino.pretrain import pretrain

    train, val = train_and_val(open_source(args.data), args.config.data.val_fraction, args.config.run.seed)
    return pretrain(train, args.out, args.config, val=val, quiet=args.quiet or args.json)


def run_eval_knn(args: EvalKnn) -> dict[str, Any]:
    from dino.data.sources import open_source
    from dino.evaluation import knn
    from dino.hardware import choose_device
    from dino.pretrained import load

    device = choose_device(args.device)
    source = open_source(args.data)
    if args.test is not None:
        train, test = source, open_source(args.test)
    elif {"train", "val"} <= set(source.parts):
        train, test = source.part("train"), source.part("val")
    else:
        train, test = source, None
    results = knn.run(
        load(args.weights, device),
        train,
        test,
        ks=args.k,
        temperature=args.temperature,
        resize=args.resize,
        crop=args.crop,
        batch_size=args.batch_size,
        device=device,
    )
    settings = {
        "train_images": len(train),
        "test_images": len(test if test is not None else train),
        "protocol": "test part" if test is not None else "leave one out",
        "resize": args.resize,
        "crop": args.crop,
        "temperature": args.temperature,
    }
    return {**results, "settings": settings}


Command = tuple[type, Callable[[Any], dict[str, Any]]]
COMMANDS: dict[str, Command | dict[str, Command]] = {
    "demo": (Demo, run_demo),
    "pretrain": (Pretrain, run_pretrain),
    "eval": {"knn": (EvalKnn, run_eval_knn)},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands, words = COMMANDS, ["dino"]
    while True:
        if arguments[:1] in ([], ["-h"], ["--help"]):
            print(_overview(commands, words))
            return 0 if arguments else 2
        if arguments[:1] == ["--version"]:
            print(f"dino {__version__}")
            return 0
        word = arguments.pop(0)
        if word not in commands:
            print(f"{' '.join(words)}: no command {word!r}; there are {', '.join(commands)}", file=sys.stderr)
            return 2
        words.append(word)
        chosen = commands[word]
        if not isinstance(chosen, dict):
            break
        commands = chosen
    kind, run = chosen
    try:
        args = _parse(kind, " ".join(words), arguments)
        results = run(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DINO_DEBUG"):  # For whoever works on dino itself.
            raise
        print(f"dino: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"dino: {error or 'interrupted'}", file=sys.stderr)
        return 1
    _show(results, as_json=args.json)
    return 0


def _parse(kind: type, prog: str, arguments: list[str]) -> Any:
    """Arguments as an instance of ``kind``; for pretraining, the recipe's configuration is the default for the flags."""
    args = tyro.cli(kind, prog=prog, args=arguments)
    if isinstance(args, Pretrain):
        flags = [a.partition("=")[0].replace("_", "-") for a in arguments]
        batch_size = args.config.optim.batch_size if "--optim.batch-size" in flags else None
        config = RECIPES[args.recipe](_facts(args, batch_size))
        args = tyro.cli(kind, prog=prog, args=arguments, default=Pretrain(args.data, args.out, config=config))
    return args


def _facts(args: Pretrain, batch_size: int | None) -> Facts:
    """Looks at the data and the machine, as far as recipes need it."""
    from dino.data.sources import median_side, open_source, train_and_val
    from dino.hardware import choose_device

    train, _ = train_and_val(open_source(args.data), args.config.data.val_fraction, args.config.run.seed)
    accelerator = choose_device(args.config.run.device).type != "cpu"
    return Facts(images=len(train), side=median_side(train), accelerator=accelerator, batch_size=batch_size)


def _overview(commands: dict[str, Any], words: list[str]) -> str:
    lines = [f"usage: {' '.join(words)} COMMAND ...   (dino {__version__}; {' '.join(words)} COMMAND --help says more)", ""]
    for name, chosen in commands.items():
        about = ", ".join(chosen) if isinstance(chosen, dict) else (chosen[0].__doc__ or "").split("\n")[0]
        lines.append(f"  {name:<12} {about}")
    return "\n".join(lines)


def _show(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__

