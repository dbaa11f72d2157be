"""What a checkpoint costs the run: how long the training thread waits for it, and its CPU time in all.

    python benchmarks/saving.py [--saves 5]

The whole state (student, teacher, optimizer's moments, loss) of two networks is copied, checked and written as a run
does; shares are of a minute, as if one were saved every minute.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dino import recipes
from dino.augment.multicrop import Crops
from dino.config import Config
from dino.data.sources import open_source
from dino.machine import device
from dino.method.learner import make_learner
from dino.method.schedules import Now
from dino.method.step import train_step
from dino.run.checkpoint import Saver
from dino.run.resume import Images, state_of
from side_by_side import save


def made(config: Config) -> dict[str, Any]:
    """The state of a learner that has made one step, on two images, as a run saves it."""
    learner = make_learner(config, torch.device("cpu"))
    c = config.crops
    sizes = ((c.global_count, c.global_size), (c.local_count, c.local_size))
    crops = Crops(*(torch.randn(2, count, 3, size, size) for count, size in sizes))
    off = torch.autocast("cpu", enabled=False)
    train_step(learner, [(crops, None)], 1, Now(1e-4, 0.04, 0.99, 0.04), config.optim, off, False)
    return state_of(learner, config, 1, Images.of(open_source("shapes:4x32", "train")), {}, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    facts = recipes.Facts(images=10_000, side=128, accelerator=False)
    device.prepare(torch.device("cpu"))
    results = {}
    for name, config in {"auto": recipes.auto(facts), "ViT-S/16": recipes.vits16_vanilla_100ep(facts)}.items():
        state, waited, spent = made(config), [], []
        with tempfile.TemporaryDirectory() as folder:
            saver = Saver(Path(folder), minutes=1.0, steps=1, keep=2, milestones=0, warn=print)
            for step in range(args.saves + 1):
                began, cpu = time.perf_counter(), time.process_time()
                saver.save(step, state)
                waited.append(time.perf_counter() - began)
                saver.wait()
                spent.append(time.process_time() - cpu)
            size = max(path.stat().st_size for path in Path(folder).glob("step_*"))
            saver.close()
        wait, cpu = statistics.median(waited[1:]), statistics.median(spent[1:])  # The first makes its memory.
        results[name] = {
            "MiB": round(size / 2**20),
            "training_waits_seconds": round(wait, 3),
            "of_a_minute": f"{100 * wait / 60:.2f} %",
            "cpu_seconds": round(cpu, 2),
            "of_a_minute_of_all_cores": f"{100 * cpu / 60 / (os.cpu_count() or 1):.2f} %",
        }
        print(name, results[name], flush=True)
    save("saving", results, "cpu")


if __name__ == "__main__":
    main()
