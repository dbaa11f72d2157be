"""The command line: ``dino COMMAND ...``. Exit code 0 done, 1 failed with one clear line, 2 wrong usage,
75 stopped when asked to, and saved."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tyro

from dino import __version__
from dino.commands.adapt import Adapt
from dino.commands.anomaly import AnomalyFit, AnomalyScore
from dino.commands.attention import Attention
from dino.commands.attention_segmentation import AttentionSegmentation
from dino.commands.clusters import Clusters
from dino.commands.copy_detection import CopyDetection
from dino.commands.correspond import Correspond
from dino.commands.demo import Demo
from dino.commands.discovery import Discovery
from dino.commands.duplicates import Duplicates
from dino.commands.embed import Embed
from dino.commands.explore import Explore
from dino.commands.export import Export
from dino.commands.finetune import Finetune, Predict
from dino.commands.knn import Knn
from dino.commands.linear import Linear
from dino.commands.lowshot import Lowshot
from dino.commands.neighbors import Neighbors
from dino.commands.outliers import Outliers
from dino.commands.pca import Pca
from dino.commands.plan import Plan
from dino.commands.pretrain import Pretrain, Trains
from dino.commands.retrieval import Retrieval
from dino.commands.search import Search
from dino.commands.segment import SegmentApply, SegmentTrain
from dino.commands.shared import Command
from dino.commands.submit import Submit
from dino.commands.video_segmentation import VideoSegmentation
from dino.run.interruption import EXIT_CODE, Stopped

Commands = Mapping[str, "type[Command] | Commands"]
COMMANDS: Commands = {
    "demo": Demo,
    "pretrain": Pretrain,
    "adapt": Adapt,
    "plan": Plan,
    "eval": {
        "knn": Knn,
        "linear": Linear,
        "lowshot": Lowshot,
        "retrieval": Retrieval,
        "copy-detection": CopyDetection,
        "video-segmentation": VideoSegmentation,
        "attention-segmentation": AttentionSegmentation,
        "discovery": Discovery,
    },
    "finetune": Finetune,
    "predict": Predict,
    "segment": {"train": SegmentTrain, "apply": SegmentApply},
    "anomaly": {"fit": AnomalyFit, "score": AnomalyScore},
    "embed": Embed,
    "export": Export,
    "search": Search,
    "duplicates": Duplicates,
    "clusters": Clusters,
    "outliers": Outliers,
    "explore": Explore,
    "attention": Attention,
    "pca": Pca,
    "neighbors": Neighbors,
    "correspond": Correspond,
    "submit": Submit,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen: type[Command] | Commands = COMMANDS
    words = ["dino"]
    while isinstance(chosen, Mapping):
        if not arguments or arguments[0] in ("-h", "--help"):
            print(_overview(chosen, words))
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(f"dino {__version__}")
            return 0
        word = arguments.pop(0)
        if word not in chosen:
            print(f"{' '.join(words)}: no command {word!r}; there are {', '.join(chosen)}", file=sys.stderr)
            return 2
        words.append(word)
        chosen = chosen[word]
    prog = " ".join(words)
    try:
        command = tyro.cli(chosen, prog=prog, args=arguments)
        if command.needs_data and getattr(command, "data", None) == ():  # tyro takes any number, none too.
            print(f"{prog}: no DATA given; {prog} --help says what it can be", file=sys.stderr)
            return 2
        if isinstance(command, Trains):
            command = command.with_recipe(prog, arguments)
        results = command.run()
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DINO_DEBUG"):  # For whoever works on dino itself.
            raise
        print(f"{prog}: {_one_line(error)}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError, OverflowError) as error:
        known = _way_out(error)
        if known is None or os.environ.get("DINO_DEBUG"):
            raise
        print(f"{prog}: {known}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{prog}: {stopped}", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt as error:
        print(f"{prog}: {error or 'interrupted'}", file=sys.stderr)
        return 1
    as_json = getattr(command, "json", False)
    if as_json or not command.shows_results:
        _show(results, as_json)
    return command.exit_code(results)


def _overview(commands: Commands, words: list[str]) -> str:
    name = " ".join(words)
    lines = [f"usage: {name} COMMAND ...", "", f"dino {__version__}. `{name} COMMAND --help` says more.", ""]
    for word, chosen in commands.items():
        about = ", ".join(chosen) if isinstance(chosen, Mapping) else (chosen.__doc__ or "").split("\n")[0]
        lines.append(f"  {word:<24} {about}")
    return "\n".join(lines)


def _show(results: dict[str, Any], as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # Of several processes that torchrun started, the first speaks.
        return
    if as_json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")


def _way_out(error: BaseException) -> str | None:
    """What to do about a full device or a killed worker; None for any other error, which is a defect.

    --help stays quick without torch, so its error is known by name here.
    """
    text = str(error)
    if isinstance(error, OverflowError) or "overflow" in text:
        return f"a number is too large ({text.splitlines()[0]})"
    if isinstance(error, MemoryError) or "not enough memory" in text or "allocate memory" in text:
        return "the machine's memory is full: take smaller numbers of what is worked on at once (--help says which)"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "the device's memory is full: take smaller batches (--optim.batch-size, or --run.accumulate 2 for the same "
            "result in two parts; --batch-size in evaluations), or --data.cache ram"
        )
    if text.startswith("DataLoader worker"):
        return (
            "a process that reads images was killed, most likely because memory ran out: take fewer of them "
            "(--data.workers) or smaller images (--data.canvas); the same command goes on from the last checkpoint"
        )
    return None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
