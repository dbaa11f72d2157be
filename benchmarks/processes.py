"""What is trained does not depend on how it is shared: 1, 2 and 4 processes (gloo) x accumulate 1, 2 and 4, each
process with the whole student (DDP) or a share of it (FSDP2).

    python benchmarks/processes.py [--steps 20] [--counts 1 2 4] [--networks vit resnet] [--out FILE]

Prints, for a vision transformer and for a ResNet and a head with BatchNorm, how far losses and monitors
are from those of one process and one part: the largest difference of a step, relative. In float64 the
crops are made image by image, for a batched resampling rounds by the size of its batch.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {"model__backbone": "vit_tiny", "model__drop_path": 0.1},
    "resnet": {"model__backbone": "timm:test_resnet", "model__drop_path": 0.0, "model__use_bn": True},
}
LIMITS = {"float64": 1e-9, "float32": 1e-4}
BATCH = 16
# Processes come from one that has imported all and run nothing: autograd does not survive a fork after it was used.
_fresh = multiprocessing.get_context("forkserver")
_fresh.set_forkserver_preload(["dino.run.pretrain", "torch.distributed.fsdp"])


def train(network: str, dtype: str, steps: int, out: Path, **settings: Any) -> None:
    """One run, in one of its processes."""
    import torch

    import tiny
    from dino.augment.multicrop import Crops, MultiCrop
    from dino.config import replace
    from dino.data.decode import Canvas
    from dino.data.sources import open_source
    from dino.method import network as networks
    from dino.run.pretrain import pretrain

    networks.build_backbone = tiny.build
    settings = {**NETWORKS[network], **settings, "optim__length": f"{steps} steps"}
    config = replace(tiny.CONFIG, optim__batch_size=BATCH, optim__base_lr=0.002, **settings)
    augment, images = MultiCrop(config.crops), open_source("shapes:64x32", "train")  # Alone: no k-NN in float64.

    def one_by_one(canvas: Canvas, generator: torch.Generator, *, rank: int, world_size: int) -> Crops:
        torch.set_default_dtype(torch.float32)
        state, count = generator.get_state(), len(canvas.sizes)
        made = []
        for i in range(count):
            one = Canvas(*(tensor[i : i + 1] for tensor in canvas))
            generator.set_state(state)
            made.append(augment(one, generator, rank=rank * count + i, world_size=world_size * count))
        torch.set_default_dtype(torch.float64)
        return Crops(*(torch.cat(crops).double() for crops in zip(*made, strict=True)))

    if dtype == "float64":
        torch.set_default_dtype(torch.float64)
        pretrain(images, out, config, augment=one_by_one, quiet=True)
    else:
        pretrain(images, out, config, quiet=True)


def train_at(place: dict[str, str], call: dict[str, Any]) -> None:
    os.environ |= place
    train(**call)


def run(
    network: str, dtype: str, processes: int, accumulate: int, steps: int, out: Path, **settings: Any
) -> list[dict[str, float]]:
    """The lines of a run's logbook."""
    import tiny

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        call = {
            "network": network,
            "dtype": dtype,
            "steps": steps,
            "out": out,
            "run__accumulate": accumulate,
            **settings,
        }
        started.append(_fresh.Process(target=train_at, args=(place if processes > 1 else {}, call)))
        started[-1].start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError(f"a run of {processes} processes and {accumulate} parts failed")
    return tiny.metrics(out)


def farthest(lines: list[dict[str, float]], expected: list[dict[str, float]]) -> dict[str, float]:
    """For every number that a step logs, the largest relative difference between two runs."""
    assert len(lines) == len(expected)
    found: dict[str, float] = {}
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            difference = abs(line[key] - other[key]) / max(abs(other[key]), 1e-12)
            found[key] = max(found.get(key, 0.0), difference)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--dtypes", nargs="*", default=list(LIMITS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from side_by_side import RESULTS, environment

    file = args.out or RESULTS / "processes-cpu.json"
    facts = {"environment": environment("cpu"), "steps": args.steps, "batch": BATCH, "limits": LIMITS}
    rows = []
    print("network  dtype    student  processes  accumulate  loss     monitors")
    shares = [(shard, *of) for shard in (False, True) for of in itertools.product(args.counts, args.counts)]
    shares = [(shard, processes, parts) for shard, processes, parts in shares if processes > 1 or not shard]
    for dtype, network in itertools.product(args.dtypes, args.networks):
        expected = None
        for shard, processes, accumulate in shares:
            with tempfile.TemporaryDirectory() as folder:
                lines = run(network, dtype, processes, accumulate, args.steps, Path(folder) / "run", run__shard=shard)
            expected = expected or lines
            differences = farthest(lines, expected)
            loss = differences.pop("loss")
            name = max(differences, key=lambda key: differences[key])
            student = "shared" if shard else "whole"
            row = {"network": network, "dtype": dtype, "student": student}
            row |= {"processes": processes, "accumulate": accumulate}
            rows.append({**row, "loss": loss, "monitors": differences, "within": loss <= LIMITS[dtype]})
            shown = f"{network:8} {dtype:8} {student:7}  {processes:9}  {accumulate:10}  {loss:.1e}"
            print(f"{shown}  {differences[name]:.1e} ({name})", flush=True)
            file.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    if not all(row["within"] for row in rows):
        sys.exit("some losses are further apart than allowed")


if __name__ == "__main__":
    main()
