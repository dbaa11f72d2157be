"""Processes that train together. With ``sharding.py`` the only file that names torch.distributed.

Every function works without a process group (one process).

Started by ``torchrun --nproc-per-node N -m dino pretrain ...``, each process takes its rows of every batch.
"""

import functools
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]
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
    """Joins the processes that torchrun started (if it did) and gives this process's device.

    An error in one process ends all of them within seconds, each with the message of the one that failed.

    Raises:
        ValueError: another process failed; says which, where and why.
    """
    if "RANK" not in os.environ or _active():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store, mine, processes = next(iter(rendezvous("env://")))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        # torchrun's store outlives a restart: with the addresses of processes that are gone.
        store=PrefixStore(f"group of start {_start()}", store),
        rank=mine,
        world_size=processes,
    )
    failure = _Failure(store)
    try:
        yield device
    except Exception as error:
        if (other := failure.of_another(error)) is not None:
            raise ValueError(other) from error
        failure.tell(f"process {mine} of {processes} on {socket.gethostname()} ended: {error or type(error).__name__}")
        raise
    finally:
        failure.stop()
        dist.destroy_process_group()


def _start() -> str:
    """Which start of this run by torchrun it is: "0" is the first."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


class _Failure:
    """The first failure of any process, told to all of them through the store that they met in.

    gloo notices at once when a process is gone. NCCL may wait for it for ten minutes: so a thread looks every second,
    and ends this process if it has not ended by itself soon after.
    """

    def __init__(self, store: Any) -> None:
        self._store, self._key = PrefixStore("dino", store.clone()), f"failure of start {_start()}"
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, message: str) -> None:
        with suppress(RuntimeError):  # Whoever held the store may be gone.
            self._store.compare_set(self._key, "", message)

    def told(self) -> str | None:
        with suppress(RuntimeError):
            return self._store.get(self._key).decode() if self._store.check([self._key]) else None
        return None

    def of_another(self, error: Exception) -> str | None:
        """What ended another process, if that is why this one failed in an exchange."""
        if not isinstance(error, RuntimeError) or not re.search(r"gloo|[Cc]onnection|NCCL|peer", str(error)):
            return None
        for _ in range(20):  # Its message may come a moment later than its end.
            if message := self.told():
                return message
            time.sleep(0.1)
        return "another process of this run ended without a message (killed, out of memory, or its machine was lost)"

    def stop(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(1):
            if message := self.told():
                if not self._over.wait(10):
                    print(message, file=sys.stderr, flush=True)
                    os._exit(1)
                return


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


def any_process(*flags: bool) -> tuple[bool, ...]:
    """For each flag whether it is true in any process. Host memory alone: no accelerator is waited for."""
    if world_size() == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=_host_group())
    return tuple(map(bool, tensor.tolist()))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier(group=_host_group())


def parallel(module: nn.Module) -> nn.Module:
    """The module with gradients averaged over the processes during backward."""
    if world_size() == 1:
        return module
    with warnings.catch_warnings():  # torch 2.15 gave the argument a new name, which earlier versions do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, broadcast_buffers=False)


def share_batchnorm(module: nn.Module) -> None:
    """Makes every BatchNorm inside take its statistics over the batch of all processes, on any device."""
    if world_size() == 1:
        return
    if next(module.parameters()).is_cuda:
        from timm.layers.norm_act import convert_sync_batchnorm

        convert_sync_batchnorm(module)  # torch's own drops the activations inside timm's norms.
        return
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.forward = functools.partial(_global_batchnorm, norm)  # pyright: ignore[reportAttributeAccessIssue]


class _AllSum(torch.autograd.Function):
    """The sum over all processes; what each does with it comes back to every one, summed alike."""

    @staticmethod
    def forward(_ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        return _AllSum.forward(None, grad.contiguous())


def all_sum(tensor: Shaped[Tensor, "*d"]) -> Shaped[Tensor, "*d"]:
    """The sum over the processes, through which gradients come back; the same tensor when there is one."""
    return tensor if world_size() == 1 else _AllSum.apply(tensor)  # pyright: ignore[reportReturnType]


def _global_batchnorm(norm: Any, x: Tensor) -> Tensor:
    """BatchNorm over the rows of all processes, each of which has as many (torch has this for GPUs alone)."""
    if not norm.training:
        return type(norm).forward(norm, x)
    values = x if x.dtype == torch.float64 else x.float()
    dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    count = values.numel() // values.shape[1] * world_size()
    mean = _AllSum.apply(values.sum(dims)) / count  # pyright: ignore[reportOptionalOperand]
    centered = values - mean.view(shape)
    variance = _AllSum.apply(centered.square().sum(dims)) / count  # pyright: ignore[reportOptionalOperand]
    if norm.track_running_stats:
        with torch.no_grad():
            norm.num_batches_tracked += 1
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * count / max(count - 1, 1), norm.momentum)
    result = centered * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        result = result * norm.weight.view(shape) + norm.bias.view(shape)
    for after in ("drop", "act"):  # Inside timm's norms.
        result = getattr(norm, after, nn.Identity())(result)
    return result.to(x.dtype)


@contextmanager
def without_sync(module: nn.Module, skip: bool) -> Iterator[None]:
    """Accumulated parts of a batch exchange gradients once, in the last part."""
    if skip and isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    for part in module.modules():
        if hasattr(part, "set_requires_gradient_sync"):  # Shared out (``sharding``).
            part.set_requires_gradient_sync(not skip, recurse=False)  # pyright: ignore[reportCallIssue]
    yield
