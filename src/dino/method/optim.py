"""Parameter groups, clipping and the optimizers of section 3.2 (AdamW), of the convnet runs (SGD, LARS), and Muon."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon, Optimizer

from dino.machine import private_calls, sharding


def parameter_groups(model: nn.Module) -> list[dict]:
    """Two groups: all that weight decay touches, then biases and 1-D tensors, which it does not.

    ``cls_token``, ``pos_embed`` and ``weight_v`` are decayed, as in the released code; frozen parameters are left out.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]


def make_optimizer(name: str, model: nn.Module, groups: list[dict] | None = None) -> Optimizer:
    """AdamW, SGD, LARS or Muon over the model's groups (``parameter_groups`` unless others are given); learning rate
    and weight decay are set every step (``set_schedule``).

    Raises:
        ValueError: another name; Muon for a backbone that has no matrices.
    """
    groups = parameter_groups(model) if groups is None else groups
    if name == "muon":
        return MuonAndAdamW(groups, matrices_of(getattr(model, "backbone", model)))
    groups = [{**group, "params": [sharding.of(parameter) for parameter in group["params"]]} for group in groups]
    if name == "adamw":
        return AdamW(groups, lr=0.0, fused=True)
    if name == "sgd":
        sgd = SGD(groups, lr=0.0, momentum=0.9, fused=True)
        # Fused SGD cannot start the momentum of some tensors later than that of others (the frozen last layer).
        for parameter in (p for group in groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if name == "lars":
        return LARS(groups)
    raise ValueError(f"--optim.optimizer {name!r} is not known: adamw, sgd, lars or muon")


def set_schedule(optimizer: Optimizer, lr: float, weight_decay: float, backbone_share: float = 1.0) -> None:
    """The learning rate of every group, and the weight decay of those that take it: the first, or those that say so.

    Groups of the backbone (``layered_groups``) take ``backbone_share`` of theirs.
    """
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = lr * group.get("scale", 1.0) * (backbone_share if group.get("of_backbone") else 1.0)
        if group.get("decayed", i == 0):
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter], limit: float, mode: str = "tensor"
) -> Float[Tensor, " n"] | Float[Tensor, " 0"]:
    """Scales gradients down to the norm ``limit``: each tensor by its own norm, or all together (``mode="global"``).

    Returns the norms before clipping of the parameters that have a gradient, on their device; ``limit=0`` clips
    nothing.
    """
    moved = [p for p in parameters if p.grad is not None]
    if not moved:
        return torch.zeros(0)
    grads: list[Any] = [p.grad for p in moved]
    norms = sharding.whole_norms(torch.stack(private_calls.norms(grads)), moved)  # (n,)
    if limit > 0:
        by = norms if mode == "tensor" else norms.norm().expand_as(norms)
        scales = list((limit / (by + 1e-6)).clamp(max=1.0).unbind())
        private_calls.multiply_(grads, scales)
    return norms


READ_BACK = frozenset({"mps"})  # Devices on which fused optimizers of some versions of torch ignore ``found_inf``.


def step_unless(bad: Float[Tensor, ""], optimizer: Optimizer) -> None:
    """The optimizer's step, which does nothing where ``bad`` is 1: decided on the device, without reading it back where
    that can be relied on."""
    optimizer.found_inf = bad  # torch's fused optimizers and ours look at it.  # pyright: ignore
    if bad.device.type not in READ_BACK or not bad.item():
        optimizer.step()


def matrices_of(backbone: nn.Module) -> set[Tensor]:
    """The weights of the linear layers that are trained: the matrices of a transformer's blocks."""
    layers = [module for module in backbone.modules() if isinstance(module, nn.Linear)]
    return {layer.weight for layer in layers if layer.weight.requires_grad}


class MuonAndAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for ``matrices``, AdamW for all other parameters: both torch's.

    Muon's updates are scaled to be as large as AdamW's (arXiv 2502.16982, equation 4), so that one learning rate and
    one weight decay suit both. Muon takes no ``found_inf``, so this one is read back, at every step.

    Raises:
        ValueError: there are no matrices.
    """

    def __init__(self, groups: Iterable[dict], matrices: set[Tensor]) -> None:
        if not matrices:
            raise ValueError(
                "--optim.optimizer muon is for backbones with linear layers (transformers); this one has none to "
                "train: adamw"
            )
        ours, theirs = [], []
        for i, group in enumerate(groups):
            group.setdefault("decayed", i == 0)  # Groups are numbered anew below.
            for part, is_ours in ((ours, True), (theirs, False)):
                if chosen := [p for p in group["params"] if (p in matrices) is is_ours]:
                    part.append({**group, "params": chosen, "muon": is_ours})
        self._muon, self._adamw = Muon(ours, lr=0.0, adjust_lr_fn="match_rms_adamw"), AdamW(theirs, lr=0.0, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})  # With the defaults of each.

    def step(self, closure: Callable | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if closure is not None:
            raise ValueError("MuonAndAdamW takes no closure")
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return
        for part, is_ours in ((self._muon, True), (self._adamw, False)):
            # Those of this object, whose state a checkpoint may have replaced.
            part.param_groups = [group for group in self.param_groups if group["muon"] is is_ours]
            part.state = self.state
            part.step()


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling with momentum (You et al. 2017, arXiv 1708.03888), as in the convnet runs.

    A tensor of two or more dimensions takes weight decay and is scaled by ``eta * |w| / |update|``; a 1-D tensor is
    plain SGD with momentum.
    """

    def __init__(
        self, params: Iterable, lr: float = 0.0, momentum: float = 0.9, weight_decay: float = 0.0, eta: float = 0.001
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if closure is not None:
            raise ValueError("LARS takes no closure")
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, found_inf)

    def _update(self, parameter: Tensor, update: Tensor, group: dict, found_inf: Tensor | None) -> None:
        if parameter.ndim > 1:
            update = update + group["weight_decay"] * parameter
            norms = torch.stack([parameter.norm(), update.norm()])
            size, change = sharding.whole_norms(norms, [parameter]).unbind()
            trust = torch.where((size > 0) & (change > 0), group["eta"] * size / change, torch.ones_like(size))
            update = update * trust
        state = self.state[parameter]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(parameter)
        mu = group["momentum"] * state["mu"] + update
        moved = parameter - group["lr"] * mu
        if found_inf is not None:
            bad = found_inf > 0
            mu, moved = torch.where(bad, state["mu"], mu), torch.where(bad, parameter, moved)
        state["mu"].copy_(mu)
        parameter.copy_(moved)
