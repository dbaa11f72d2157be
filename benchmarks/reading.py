"""How much must be opened to understand one thing? Runs it, and counts the files of the package that took part.

``python benchmarks/reading.py [SRC]`` prints for a training step and for one k-NN, from command to number, the files
whose functions ran and the lines of those functions; for some flags the files that name them; then the size of the
whole. SRC: a ``src`` folder of this or an earlier version (default: this one's).
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType

SRC = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "src").resolve()
sys.path.insert(0, str(SRC))
RUN = ["--model.backbone", "vit_nano", "--optim.length", "2 steps", "--optim.batch-size", "8", "--quiet"]


Ran = dict[Path, set[int]]  # Of each file the lines of the functions that ran.


def ran(work: Callable[[], object]) -> Ran:
    """The files of the package in which a function was called meanwhile, and the lines of those functions."""
    codes: set[CodeType] = set()

    def note(frame, event, _argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SRC / "dino")) and code.co_name[0] != "<":
            codes.add(code)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    found: Ran = {}
    for code in codes:
        last = max(line for *_, line in code.co_lines() if line)
        found.setdefault(Path(code.co_filename), set()).update(range(code.co_firstlineno, last + 1))
    return found


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def show(what: str, found: Ran) -> None:
    whole, read = sum(map(lines, found)), sum(map(len, found.values()))
    print(f"{what}: {read:,} lines of functions, in {len(found)} files of {whole:,} lines")
    print("   ", ", ".join(f"{path.relative_to(SRC / 'dino')} {len(found[path])}" for path in sorted(found)))


def train_step_files(main: Callable[[list[str]], int], out: str) -> Ran:
    """Of the second step of a small run, made of the names that this version gives its parts."""
    try:
        from dino.run import pretrain as module
    except ImportError:
        from dino import pretrain as module  # pyright: ignore # Version 0.1.
    step, found = module.train_step, Ran()

    def traced(learner, parts, *rest):
        parts = list(parts)  # Crops are another subject.
        found.update(ran(lambda: step(learner, iter(parts), *rest)))
        return step(learner, iter(parts), *rest)

    module.train_step = traced
    assert main(["pretrain", "shapes:40x32", "--out", out, *RUN]) == 0
    module.train_step = step
    return found


if __name__ == "__main__":
    try:
        from dino.commands.cli import main
    except ImportError:
        from dino.cli import main  # pyright: ignore # Version 0.1.
    with tempfile.TemporaryDirectory() as folder:
        show("a training step", train_step_files(main, folder))
        show("one k-NN, from command to number", ran(lambda: main(["eval", "knn", folder, "shapes:40x32"])))
    sources = sorted((SRC / "dino").rglob("*.py"))
    for flag in ("temperature", "n_last_frames", "local_count", "center_momentum"):
        pattern = re.compile(rf"\b{flag}\b")
        naming = [str(path.relative_to(SRC / "dino")) for path in sources if pattern.search(path.read_text())]
        print(f"--{flag.replace('_', '-')}: named in {len(naming)} files: {', '.join(naming)}")
    long = [f"{path.relative_to(SRC / 'dino')} {lines(path)}" for path in sources if lines(path) > 300]
    print(f"the whole: {len(sources)} files, {sum(map(lines, sources)):,} lines; over 300: {', '.join(long) or 'none'}")
