"""Parameters, gradients and optimizer state shared out over the processes: torch's FSDP2 (arXiv 2304.11277).

Every process keeps some rows of each parameter, its *shard*; the whole parameter is there only while its module works.
Optimizers are given the shards, which are ordinary tensors, so that each works on its own rows as on any network.
"""

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.optim import Optimizer

from dino.machine import distributed


def shard(module: nn.Module, *methods: str) -> None:
    """Shares out the parameters of a module, but for those of modules inside that are shared out already.

    They are put together for ``forward`` and for the ``methods`` named, and until the backward pass is over.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # Nothing here works in place on what a network gives.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    fully_shard(module, mesh=_mesh(next(module.parameters()).device.type))
    for method in methods:
        register_fsdp_forward_method(module, method)
    for parameter in module.parameters():
        if not hasattr(parameter, "shard"):
            # The same memory, for good: FSDP2 puts the whole parameter together out of it.
            local = nn.Parameter(parameter.to_local(), requires_grad=parameter.requires_grad)  # pyright: ignore
            parameter.shard = local  # pyright: ignore[reportAttributeAccessIssue]
            local.is_shard = True  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _mesh(device_type: str) -> Any:
    """All processes: they are the same as long as this one lives."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (distributed.world_size(),))


def of(parameter: nn.Parameter) -> nn.Parameter:
    """This process's shard of a parameter, the same object at every call; the parameter itself if it is not shared."""
    return getattr(parameter, "shard", parameter)


def take_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """After the backward pass: each shard is given the gradient of its rows."""
    for parameter in parameters:
        if (part := of(parameter)) is not parameter:
            part.grad = None if parameter.grad is None else rows(parameter.grad)  # pyright: ignore
            parameter.grad = None


def whole(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """A parameter put together, in every process, all of which ask for it; anything else as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore


def rows(tensor: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    """This process's rows of a parameter; anything else as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore


def whole_norms(norms: Float[Tensor, " n"], parameters: Sequence[Tensor]) -> Float[Tensor, " n"]:
    """The norms of whole tensors from those of this process's rows."""
    if not any(getattr(parameter, "is_shard", False) for parameter in parameters):
        return norms
    squares = norms.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """``state_dict`` with every parameter whole. All processes ask for it; the first one alone keeps what was put
    together, the others get empty tensors in its place."""
    return {name: _for_the_first(tensor) for name, tensor in module.state_dict().items()}


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of whole parameters."""
    own = module.state_dict()
    module.load_state_dict({name: _like(tensor, own.get(name)) for name, tensor in state.items()})


def optimizer_state_of(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """The optimizer's ``state_dict`` with what belongs to each parameter whole, as ``state_of``."""
    state, order = optimizer.state_dict(), _in_order(optimizer, module)
    return state | {
        "state": {
            i: {name: _for_the_first(_joined(value, order[i])) for name, value in entries.items()}
            for i, entries in state["state"].items()
        }
    }


def load_optimizer_state(optimizer: Optimizer, module: nn.Module, state: Mapping[str, Any]) -> None:
    """``load_state_dict`` of what ``optimizer_state_of`` gives, made by any number of processes."""
    order = _in_order(optimizer, module)
    parts = {
        i: {
            name: _split(value, len(of(order[i]))) if _belongs_to_a_share(value, order[i]) else value
            for name, value in entries.items()
        }
        for i, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _in_order(optimizer: Optimizer, module: nn.Module) -> list[nn.Parameter]:
    """The module's parameters in the order in which the optimizer numbers them."""
    wholes = {of(parameter): parameter for parameter in module.parameters()}
    return [wholes[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _for_the_first(tensor: Any) -> Any:
    if not hasattr(tensor, "full_tensor"):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if distributed.is_main() else full.new_empty(0)


def _joined(value: Any, parameter: nn.Parameter) -> Any:
    """The rows that belong to a shard, as a part of the whole."""
    if not _belongs_to_a_share(value, parameter):
        return value
    from torch.distributed.tensor import DTensor

    like: Any = parameter
    return DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def _like(tensor: Tensor, own: Any) -> Tensor:
    """A whole tensor as the shared-out one that it is to be put into."""
    if not hasattr(own, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor

    mine = _split(tensor, len(rows(own))).to(own.device)
    return DTensor.from_local(mine, own.device_mesh, own.placements, shape=own.shape, stride=own.stride())


def _belongs_to_a_share(value: Any, parameter: nn.Parameter) -> bool:
    """Whether a value of an optimizer's state has a row for each of a shared-out parameter (a count of steps has
    none)."""
    return of(parameter) is not parameter and isinstance(value, Tensor) and value.ndim > 0


def _split(tensor: Shaped[Tensor, "n ..."], count: int) -> Shaped[Tensor, "m ..."]:
    """This process's ``count`` rows, as FSDP2 shares them out: all but the last processes have equally many."""
    begin = min(distributed.rank() * -(-len(tensor) // distributed.world_size()), len(tensor))
    return tensor[begin : begin + count].contiguous()
