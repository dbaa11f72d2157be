import copy

import pytest
import torch
from torch import nn

from dino.method import optim
from dino.method.network import Network
from dino.method.optim import LARS, clip_gradients, make_optimizer, parameter_groups, set_schedule
from dino.models.head import DINOHead
from dino.models.vision_transformer import VisionTransformer
from reference import arrays, scalars

NUMBERS, ARRAYS = scalars("05_optim"), arrays("05_optim")


@pytest.mark.parametrize("case", NUMBERS["param_groups"], ids=lambda case: case["id"])
def test_groups_equal_the_reference(case):
    network = Network(VisionTransformer(**case["vit"]), DINOHead(case["vit"]["embed_dim"], **case["head"]))
    names = {id(p): n for n, p in network.named_parameters()}
    decayed, free = ([names[id(p)] for p in group["params"]] for group in parameter_groups(network))
    assert decayed == case["group0_decayed"]
    assert free == case["group1_not_decayed"]
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == case["not_in_any_group"]
    last_layer = [f"head.last_layer.{n}" for n, _ in network.head.last_layer.named_parameters()]
    assert last_layer == case["last_layer_grads_cancelled"]


@pytest.mark.parametrize("case", NUMBERS["clip"], ids=lambda case: case["id"])
def test_clip_equals_the_reference(case):
    parameters = {}
    for name in case["names"] + case["no_grad"]:
        grad = ARRAYS.get(f"{case['id']}/before/{name}")
        parameters[name] = nn.Parameter(torch.zeros(2) if grad is None else torch.zeros_like(grad))
        parameters[name].grad = None if grad is None else grad.clone()
    norms = clip_gradients(parameters.values(), case["clip"])
    assert norms.tolist() == pytest.approx(case["norm_before"], rel=1e-6)
    for name in case["names"]:
        torch.testing.assert_close(parameters[name].grad, ARRAYS[f"{case['id']}/after/{name}"], atol=1e-6, rtol=0)
    assert parameters[case["no_grad"][0]].grad is None


def test_global_clip_by_hand():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    clip_gradients([a, b], limit=1.0, mode="global")
    assert [a.grad.item(), b.grad.item()] == pytest.approx([0.6, 0.8], abs=1e-5)


def bag(prefix: str, case: dict, late: dict[str, int]):
    """A module-like bag of parameters, and a function that gives the gradients of one step."""
    names = case["group0"] + case["group1"]
    parameters = {n: nn.Parameter(ARRAYS[f"{prefix}/init/{n}"].clone()) for n in names}

    def set_gradients(step: int) -> None:
        for name, parameter in parameters.items():
            grad = ARRAYS.get(f"{prefix}/grad{step}/{name}")
            parameter.grad = None if grad is None or step < late.get(name, 0) else grad.clone()

    return parameters, set_gradients


def test_lars_equals_the_reference():
    case = NUMBERS["lars"]
    parameters, set_gradients = bag("lars", case, {})
    groups = [{"params": [parameters[n] for n in case[g]]} for g in ("group0", "group1")]
    optimizer = LARS(groups, momentum=case["momentum"], eta=case["eta"])
    for step in range(case["steps"]):
        set_gradients(step)
        set_schedule(optimizer, case["lr"][step], case["weight_decay"][step])
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.data, ARRAYS[f"lars/step{step}/{name}"], atol=2e-6, rtol=0)
            mu = ARRAYS.get(f"lars/mu{step}/{name}")
            if mu is not None:
                torch.testing.assert_close(optimizer.state[parameter]["mu"], mu, atol=2e-6, rtol=0)


def test_adamw_equals_the_reference():
    case = NUMBERS["adamw"]
    parameters, set_gradients = bag("adamw", case, {"last": case["last_has_gradient_from_step"]})
    model = nn.Module()
    for name in case["group0"] + case["group1"]:
        model.register_parameter(name, parameters[name])
    optimizer = make_optimizer("adamw", model)
    for step in range(case["steps"]):
        set_gradients(step)
        set_schedule(optimizer, case["lr"][step], case["weight_decay"][step])
        optimizer.step()
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.data, ARRAYS[f"adamw/step{step}/{name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "muon"])
def test_a_bad_step_changes_nothing(name):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(name, model)
    set_schedule(optimizer, 0.1, 0.1)

    def step(value: float, bad: float) -> dict:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"]})

    good = step(0.5, 0.0)
    after = step(float("nan"), 1.0)
    for before, now in zip(torch.utils._pytree.tree_leaves(good), torch.utils._pytree.tree_leaves(after), strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0)
    step(0.5, 0.0)
    assert not torch.equal(model.weight, good["model"]["weight"])


def test_where_found_inf_is_ignored_a_bad_step_still_changes_nothing(monkeypatch):
    """As on MPS with some versions of torch."""

    class Ignores(torch.optim.SGD):
        def step(self):
            del self.found_inf
            super().step()

    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.full((3,), torch.nan)
    optimizer = Ignores([parameter], lr=1.0)
    monkeypatch.setattr(optim, "READ_BACK", frozenset({"cpu"}))
    optim.step_unless(torch.tensor(1.0), optimizer)
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    parameter.grad = torch.ones(3)
    optim.step_unless(torch.tensor(0.0), optimizer)
    assert parameter.tolist() == [0.0, 0.0, 0.0]


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3, bias=False), nn.LayerNorm(3))
        self.head = nn.Linear(3, 5)


def draw_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_turns_matrices_by_orthogonal_steps_and_leaves_the_rest_to_adamw():
    """The first step by hand: of the singular values of a gradient nothing is left but their signs (within what five
    iterations in bfloat16 give, 0.6 to 1.3), times 0.2 sqrt(larger side), as arXiv 2502.16982 scales it."""
    torch.manual_seed(0)
    model = Blocks()
    other = copy.deepcopy(model)
    optimizer, adamw = make_optimizer("muon", model), make_optimizer("adamw", other)
    before = copy.deepcopy(model.state_dict())
    for one, by in ((model, optimizer), (other, adamw)):
        draw_gradients(one, 0)
        set_schedule(by, 0.1, 0.5)
        by.step()
    for name in ("backbone.0.weight", "backbone.1.weight"):
        after, start = model.state_dict()[name], before[name]
        moved = (start * (1 - 0.1 * 0.5) - after) / (0.1 * 0.2 * max(start.shape) ** 0.5)
        values = torch.linalg.svdvals(moved)
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert (moved * model.get_parameter(name).grad).sum() > 0  # Downhill.
    for name, expected in other.state_dict().items():
        if not name.startswith("backbone") or not name.endswith("weight") or name == "backbone.2.weight":
            torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=0, msg=name)


def test_muon_goes_on_from_its_state():
    """Four steps are two, saved and put into a new one, and two."""
    torch.manual_seed(0)
    whole = Blocks()
    begun, parts = copy.deepcopy(whole), []
    for model, steps in ((whole, range(4)), (begun, range(2))):
        parts.append(make_optimizer("muon", model))
        for step in steps:
            draw_gradients(model, step)
            set_schedule(parts[-1], 0.1 / (step + 1), 0.5)
            parts[-1].step()
    resumed = copy.deepcopy(begun)
    optimizer = make_optimizer("muon", resumed)
    optimizer.load_state_dict(parts[1].state_dict())
    for step in range(2, 4):
        draw_gradients(resumed, step)
        set_schedule(optimizer, 0.1 / (step + 1), 0.5)
        optimizer.step()
    for name, expected in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], expected, rtol=0, atol=0, msg=name)


def test_muon_has_nothing_to_do_in_a_convnet():
    model = nn.Module()
    model.backbone, model.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
    with pytest.raises(ValueError, match="muon is for backbones with linear layers"):
        make_optimizer("muon", model)
