"""What a run will cost, before it begins: counted where it can be counted, measured over its first steps where not."""

import contextlib
import math
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dino.augment.multicrop import Crops
from dino.config import Config, Preprocessing, parse_minutes, replace
from dino.data.sources import Source
from dino.machine import private_calls
from dino.machine.device import choose_device, peak_rss_gib
from dino.method.learner import in_one_piece, make_learner
from dino.method.schedules import Schedules
from dino.method.step import train_step
from dino.run.pretrain import pretrain
from dino.run.report import read_metrics

STEPS = 20  # That are measured.
_LINE = 1000  # Bytes of one reading in metrics.jsonl and TensorBoard together.


class _Counted(NamedTuple):
    backbone: int  # Parameters.
    head: int
    flop: float  # Of one image in training.
    checkpoint: int  # Bytes.
    weights: int  # Bytes of the backbone.
    in_parts: bool  # Whether a batch can be worked on in parts.


def plan(config: Config, images: int, train: Source | None = None) -> dict[str, Any]:
    """Parameters, steps, floating-point operations and disk of a run on ``images`` images; with ``train`` also what
    its first ``STEPS`` steps show in a process of their own: images a second, peak memory, and so the hours.

    An operation is a multiplication or an addition; matrix products, convolutions and attention are counted, forward
    and backward. Memory is that of one process, with the images that it keeps decoded. Hours are those of the training
    steps: k-NN evaluations come on top.

    Raises:
        ValueError: settings that do not fit, or a measurement that was killed (most likely memory ran out).
    """
    batch = config.optim.batch_size
    if batch > images:
        raise ValueError(f"--optim.batch-size {batch} is more than the {images} images there are to train on")
    schedules = Schedules(config, images // batch)
    steps = schedules.total_steps
    counted = _count(config)
    kept = config.run.keep
    if parse_minutes(config.run.save_every) is None:
        kept = min(kept, math.ceil(steps / max(schedules.steps(config.run.save_every, "run.save-every"), 1)))
    if milestones := schedules.steps(config.run.keep_every, "run.keep-every"):
        kept += steps // milestones
    written = counted.checkpoint * (kept + 1) + counted.weights + steps // config.run.log_every * _LINE
    result = {
        "backbone_parameters": counted.backbone,
        "head_parameters": counted.head,
        "images": images,
        "epochs": round(steps * batch / images, 2),
        "steps": steps,
        "images_seen": steps * batch,
        "gflop_an_image": counted.flop / 1e9,
        "pflop": counted.flop * steps * batch / 1e15,
        "checkpoint_gib": counted.checkpoint / 2**30,
        "disk_gib": written / 2**30,  # One checkpoint more than are kept, while it is written.
    }
    if train is not None:
        result |= _measured(config, train, counted.in_parts)
        result["hours"] = steps * batch / result["images_per_second"] / 3600
    return result


def _count(config: Config) -> _Counted:
    """By one step on two images, on the CPU."""
    learner = make_learner(config, torch.device("cpu"))
    crops = config.crops
    shapes = [(crops.global_count, crops.global_size), (crops.local_count, crops.local_size)]
    channels = Preprocessing.of(config).channels
    views = Crops(*(torch.rand(2, count, channels, size, size) for count, size in shapes))
    now = Schedules(config, 1).at(0)
    ours = {torch.ops.mkldnn._linear_pointwise: _linear_flop} if private_calls.onednn_linear.usable else None
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        train_step(learner, [(views, None)], 1, now, config.optim, contextlib.nullcontext(), False)
    with FlopCounterMode(display=False) as optimizer:  # Of a step, not of an image: Muon multiplies too.
        learner.optimizer.step()
    moments = [t for state in learner.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    networks = [*learner.network.state_dict().values(), *learner.teacher.state_dict().values()]
    backbone = learner.network.backbone
    return _Counted(
        _parameters(backbone),
        _parameters(learner.network.head),
        (counter.get_total_flops() - optimizer.get_total_flops()) / 2,
        sum(tensor.nbytes for tensor in [*networks, *moments])
        + (4 * config.method.queue * crops.global_count * config.model.out_dim if learner.dino_loss.recent else 0),
        sum(tensor.nbytes for tensor in backbone.state_dict().values()),
        not in_one_piece(learner.network, config.method),
    )


def _linear_flop(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _measured(config: Config, train: Source, in_parts: bool) -> dict[str, float]:
    """The first steps, in a new process: nothing that this one has used counts."""
    # Spawned, for CUDA does not survive a fork.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_first_steps, config, train).result()
        except BrokenProcessPool as error:
            less = f"--run.accumulate {2 * config.run.accumulate}" if in_parts else "--run.recompute"
            raise ValueError(
                "the measurement was killed, most likely because memory ran out: take a smaller --optim.batch-size, or "
                f"for the same result in less memory {less}"
            ) from error


def _first_steps(config: Config, train: Source) -> dict[str, float]:
    short = replace(
        config,
        optim__length=f"{STEPS} steps",
        optim__freeze_last_layer="0 steps",  # While it is frozen it has no moments, which take memory later.
        run__log_every=5,
        run__knn_every="0 epochs",
    )
    with tempfile.TemporaryDirectory() as folder:
        pretrain(train, Path(folder), short, quiet=True)
        readings = read_metrics(Path(folder) / "metrics.jsonl")["images_per_second"]
    found = {
        "images_per_second": statistics.median(value for _, value in readings[1:]),  # The first is warm-up too.
        "peak_memory_gib": peak_rss_gib(),
    }
    if choose_device(config.run.device).type == "cuda":
        found["peak_device_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found
