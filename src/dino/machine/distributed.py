"""The only file that names torch.distributed. Every function works without a process group (one process).

Started by ``torchrun --nproc-per-node N -m dino pretrain ...``, each process takes its rows of every batch.
"""

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started (if it did) and gives this process's device."""
    if "RANK" not in os.environ or _active():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def all_mean(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """Mean over the processes, the same tensor when there is one."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor / world_size()


def all_gather(tensor: Shaped[Tensor, "*d"]) -> Shaped[Tensor, "w *d"]:
    """The tensors of all processes, of one shape, in their order and in every process. Stays on the device."""
    if world_size() == 1:
        return tensor[None]
    tensors = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return torch.stack(tensors)


def share(count: int) -> range:
    """This process's share of ``count`` items: the shares of all processes, one after the other, are all of them.

    >>> list(share(3))
    [0, 1, 2]
    """
    mine, processes = rank(), world_size()
    return range(mine * count // processes, (mine + 1) * count // processes)


def gather(value: T) -> list[T]:
    """What every process gives, in the order of the processes, in every process. Small things: they are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_host_group())
    return values


def gather_rows(rows: Shaped[Tensor, "r *rest"]) -> Shaped[Tensor, "n *rest"]:
    """The rows of all processes, one below the other in the order of the processes, in every process, on the CPU.

    Each process may have another number of rows, also none; the shape of a row and the type are the same in all.
    """
    if world_size() == 1:
        return rows.cpu()
    rows = rows.detach().cpu().contiguous()
    counts = gather(len(rows))
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded, group=_host_group())
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])


@functools.cache
def _group_on_the_host(_default: Any) -> Any:
    return dist.new_group(backend="gloo")


def _host_group() -> Any:
    """For what lies in host memory: gloo, also beside NCCL. Every process asks for it at the same moments."""
    return _group_on_the_host(dist.group.WORLD)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is true in any process (reads back to the host: not for every step)."""
    if world_size() == 1:
        return flag
    tensor = torch.tensor(float(flag), device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor.item())


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def parallel(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over the processes during backward."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.15 gave the argument a new name, which earlier versions do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, broadcast_buffers=False)


def share_batchnorm(module: nn.Module) -> None:
    """Makes every BatchNorm inside take its statistics over all processes (torch can do it on GPUs only)."""
    if world_size() > 1 and next(module.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)


@contextmanager
def without_sync(module: nn.Module, skip: bool) -> Iterator[None]:
    """Accumulated parts of a batch exchange gradients once, in the last part."""
    if skip and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield
