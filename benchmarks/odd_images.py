"""Every file of a folder of odd images, decoded: none may crash or hang, each gives pixels or a reason in one line.

    python benchmarks/odd_images.py FOLDER [WEIGHTS]

FOLDER: Pillow's own, ``Tests/images`` of its source archive (``pip download --no-binary :all: --no-deps pillow``).
Every file is decoded in a process of its own, whatever its name says; then those that ``open_source`` takes for images
go through the loader and, with WEIGHTS, through ``dino embed``. Prints counts, and how often each reason was given.
"""

import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import PIL
import torch

from dino.config import DataConfig
from dino.data.decode import BrokenImage, decode
from dino.data.loader import Loader
from dino.data.sources import open_source

LIMIT = 30  # Seconds after which a file counts as hanging.


def apart(path: Path) -> str:
    """What becomes of one file in a process of its own: ``decoded``, ``crashed``, ``hung``, ``traceback``, a reason."""
    read, write = os.pipe()
    if not (child := os.fork()):
        said = "traceback"
        try:
            said = "decoded" if decode(path.read_bytes()).dtype == torch.uint8 else "traceback"
        except BrokenImage as error:
            said = f"reason: {error}"
        except BaseException as error:
            said = f"traceback: {type(error).__name__}: {error}"
        os.write(write, said.encode(errors="replace")[:2000])
        os._exit(0)
    os.close(write)
    if not select.select([read], [], [], LIMIT)[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        return "hung"
    said = os.read(read, 4000).decode()
    os.close(read)
    os.waitpid(child, 0)
    return said or "crashed"


def main(folder: Path, weights: str | None) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    became = {path: apart(path) for path in files}
    kinds = Counter(said.partition(":")[0] for said in became.values())
    print(f"Pillow {PIL.__version__}, torch {torch.__version__}: {len(files)} files: {dict(kinds)}")
    for path, said in became.items():
        if said.partition(":")[0] not in ("decoded", "reason"):
            print(f"  {path.relative_to(folder)}: {said}")
    reasons = Counter(re.sub(r"\d+", "N", said[8:])[:90] for said in became.values() if said.startswith("reason"))
    for reason, count in reasons.most_common():
        print(f"  {count:4} {reason}")

    source = open_source(folder)
    loader = Loader(
        source, 8, data=DataConfig(cache="none", max_broken=0.99, canvas=64, workers=2), seed=0, device="cpu"
    )
    steps = sum(1 for _ in loader.batches(0, loader.steps_per_epoch))
    print(f"loader: {len(source)} images, {steps} batches of 8, {len(loader.broken)} listed as broken")
    if weights is None:
        return kinds["crashed"] + kinds["hung"] + kinds["traceback"]
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "dino", "embed", weights, str(folder), "--out", f"{out}/x.npz", "--json"]
        ran = subprocess.run(command, capture_output=True, text=True)
        print(f"dino embed: exit code {ran.returncode}, traceback: {'Traceback' in ran.stderr}")
        print("  " + re.sub(r'"settings".*', "...", (ran.stdout or ran.stderr).strip().splitlines()[-1])[:300])
    return kinds["crashed"] + kinds["hung"] + kinds["traceback"] + ran.returncode


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None), 100))
