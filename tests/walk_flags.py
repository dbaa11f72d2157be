"""Every flag of every command at values that make no sense: each run ends with exit code 0, 1 or 2, never a traceback.

``python tests/walk_flags.py FOLDER [SHARE [PREFIX]]`` prints each run that does otherwise (or takes over ``LIMIT``
seconds) and a count; SHARE takes every so-manieth run, as the test suite does, PREFIX the flags that begin with it.
FOLDER is empty, and holds what the runs leave.
"""

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image

from dino.commands import cli
from dino.commands.cli import COMMANDS

HUGE = "1000000000000"
VALUES = ("0", "-1", "-8", HUGE, "1e30", "nan", "inf", "word", "")
LIMIT = 120  # Seconds: far more than any needs, but on a busy machine.
TINY = "--model.backbone vit_nano --model.out-dim 16 --model.hidden-dim 8 --optim.length 2steps --optim.batch-size 4"
DATA = "shapes:12x32"
# Flags that ask for work, which at the huge value goes on until it is stopped.
ENDLESS = {("eval", "linear"): "--epochs", ("eval", "lowshot"): "--subsets", ("segment", "train"): "--epochs"}
SOON = 5  # Seconds after which those are stopped.


class TooLong(BaseException):
    """Of no kind that a command may catch."""


SKIPPED = {"demo"}  # Has nothing to set but a folder and a seed.


def arguments(words: tuple[str, ...]) -> list[str] | None:
    """A small call of the command that works, below the current folder; None for one that this file does not know."""
    run, image = "../run", "../masks/images/0.png"
    known = {
        ("anomaly", "fit"): [run, DATA, "--out", "b.safetensors", "--normal", "star"],
        ("anomaly", "score"): [run, DATA, "--bank", "../bank.safetensors", "--normal", "star"],
        ("pretrain",): [DATA, "--out", "made", *TINY.split(), "--quiet"],
        ("submit",): ["--local", "--gpus", "0", "--", "--version"],
        ("eval", "retrieval"): [run, DATA, "--side", "32"],
        ("eval", "copy-detection"): [run, "../copydays", "--side", "32"],
        ("eval", "video-segmentation"): [run, "../davis", "--size", "64"],
        ("eval", "attention-segmentation"): [run, "../masks"],
        ("eval", "discovery"): [run, "../masks"],
        ("eval", "linear"): [run, DATA, "--epochs", "1", "--cached"],
        ("eval", "lowshot"): [run, DATA, "--per-class", "1", "--subsets", "1"],
        ("eval", "knn"): [run, DATA],
        ("embed",): [run, DATA, "--out", "x.npz"],
        ("attention",): [run, image, "--out", "made"],
        ("pca",): [run, image, "--out", "made"],
        ("neighbors",): [run, DATA, "--query", "0", "--out", "n.png"],
        ("correspond",): [run, image, image, "--out", "c.png"],
        ("export",): [run, "--to", "safetensors", "--out", "made"],
        ("plan",): [DATA, *TINY.split(), "--no-measure"],  # The steps are those of pretrain.
        ("search",): ["../x.npz", "0", "--weights", run],
        ("duplicates",): ["../x.npz"],
        ("clusters",): ["../x.npz"],
        ("outliers",): ["../x.npz"],
        ("explore",): [run, DATA, "--out", "page.html"],
        ("adapt",): [run, DATA, "--out", "made", "--optim.length", "2steps", "--optim.batch-size", "4", "--quiet"],
        ("finetune",): [run, DATA, "--out", "made", "--epochs", "1", "--batch-size", "4", "--crop", "16", "--quiet"],
        ("predict",): ["../tuned", DATA],
        ("segment", "train"): [run, "../masks", "--out", "h.safetensors", "--epochs", "1"],
        ("segment", "apply"): [run, "../masks", "--head", "../head.safetensors", "--out", "made"],
    }
    return known.get(words)


def make(at: Path) -> None:
    """The data that the calls read, a run of a small network, and its features."""
    for folder in ("masks/images", "masks/masks", "copydays/original", "copydays/strong"):
        (at / folder).mkdir(parents=True)
    for folder in ("JPEGImages", "Annotations"):
        (at / "davis" / folder / "480p" / "a").mkdir(parents=True)
    for i in range(3):
        picture = Image.effect_noise((64, 64), 60).convert("RGB")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (10, 10, 40, 40))
        for name, image in (
            (f"masks/images/{i}.png", picture),
            (f"masks/masks/{i}.png", mask),
            (f"copydays/original/{i}{i}{i}{i}00.jpg", picture),
            (f"copydays/strong/{i}{i}{i}{i}01.jpg", picture),
            (f"davis/JPEGImages/480p/a/{i:05}.jpg", picture),
            (f"davis/Annotations/480p/a/{i:05}.png", mask),
        ):
            image.save(at / name)
    assert cli.main(["pretrain", DATA, "--out", str(at / "run"), *TINY.split(), "--quiet"]) == 0
    assert cli.main(["embed", str(at / "run"), DATA, "--out", str(at / "x.npz")]) == 0
    call = ["finetune", str(at / "run"), DATA, "--out", str(at / "tuned"), "--epochs", "1", "--crop", "16", "--quiet"]
    assert cli.main(call) == 0
    bank = str(at / "bank.safetensors")
    assert cli.main(["anomaly", "fit", str(at / "run"), DATA, "--out", bank, "--normal", "star"]) == 0
    head = str(at / "head.safetensors")
    assert cli.main(["segment", "train", str(at / "run"), str(at / "masks"), "--out", head, "--epochs", "1"]) == 0


def commands(chosen: Mapping, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for word, inside in chosen.items():
        if isinstance(inside, Mapping):
            yield from commands(inside, (*words, word))
        else:
            yield (*words, word)


def flags(words: tuple[str, ...]) -> list[str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    found = re.findall(r"^\W+(--[a-z][a-z0-9.-]*)", text.getvalue(), re.M)
    return [flag for flag in dict.fromkeys(found) if flag not in ("--help", "--json", "--quiet", "--out")]


def wrong_with(call: list[str], endless: bool) -> str | None:
    """What is wrong with how a call ends; None: nothing. ``endless``: what it asks for has no end."""

    def too_long(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    seconds = SOON if endless else LIMIT
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)  # Again: what is raised in a destructor is dropped.
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = cli.main(call)
    except SystemExit as stopped:  # tyro's, for wrong usage.
        code = stopped.code
    except BaseException as error:
        if endless and isinstance(error, TooLong):
            return None
        where = traceback.format_exc(limit=-2).strip().replace("\n", " | ")
        return f"{type(error).__name__}: {str(error)[:200]}: {where[:600]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if code not in (0, 1, 2, 3):  # 3: duplicates were found.
        return f"exit code {code}"
    if code == 1 and len(said.getvalue().strip().splitlines()) > 3:
        return f"{len(said.getvalue().splitlines())} lines on stderr: {said.getvalue()[-300:]}"
    return None


def main(at: Path, share: int, prefix: str = "") -> int:
    torch.set_num_threads(1)
    make(at)
    calls: list[tuple[list[str], bool]] = []
    unknown = []
    for words in commands(COMMANDS):
        base = arguments(words)
        if base is None:
            unknown += [" ".join(words)] if words[0] not in SKIPPED else []
            continue
        end = base.index("--") if "--" in base else len(base)
        for flag in filter(lambda flag: flag.startswith(prefix), flags(words)):
            for value in VALUES:
                endless = value == HUGE and ENDLESS.get(words) == flag
                calls.append(([*words, *base[:end], f"{flag}={value}", *base[end:]], endless))
    bad = 0
    here = Path.cwd()
    for i, (call, endless) in enumerate(calls):
        if i % share == 0:
            made = at / f"made{i}"  # A folder of its own: nothing resumes what another began.
            made.mkdir()
            os.chdir(made)
            if wrong := wrong_with(call, endless):
                bad += 1
                print(f"{' '.join(call)}\n    {wrong}", flush=True)
    os.chdir(here)
    print(f"{bad} of {len(calls[::share])} calls end otherwise than they should; commands not walked: {unknown}")
    return bad


if __name__ == "__main__":
    share, prefix = int((sys.argv[2:3] or ["1"])[0]), (sys.argv[3:4] or [""])[0]
    sys.exit(min(main(Path(sys.argv[1]).resolve(), share, prefix), 100))
