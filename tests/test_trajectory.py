"""Twelve steps of the real training step against the reference's own training function."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

from dino.augment.multicrop import Crops
from dino.config import Config, MethodConfig, OptimConfig
from dino.method.learner import Learner
from dino.method.loss import DINOLoss
from dino.method.network import Network, TeacherUpdate
from dino.method.optim import make_optimizer
from dino.method.schedules import Schedules
from dino.method.step import train_step
from dino.models.head import DINOHead
from dino.models.vision_transformer import VisionTransformer
from reference import FOLDER, arrays, scalars, waves

NUMBERS, ARRAYS = scalars("06_trajectory"), arrays("06_trajectory")


def make_learner(variant: dict, dtype: torch.dtype) -> Learner:
    arch = NUMBERS["arch"]
    head = DINOHead(arch["vit"]["embed_dim"], norm_last_layer=variant["norm_last_layer"], **arch["head"])
    student = Network(VisionTransformer(**arch["vit"]), head)
    student.load_state_dict(load_file(FOLDER / "06_trajectory_init.safetensors"))
    student.to(dtype)
    teacher = copy.deepcopy(student).requires_grad_(False)
    return Learner(
        network=student,
        student=student,
        teacher=teacher,
        dino_loss=DINOLoss(arch["head"]["out_dim"]).to(dtype),
        optimizer=make_optimizer(variant["optimizer"], student),
        update_teacher=TeacherUpdate(teacher, student),
        skipped=torch.zeros(2),
    )


def make_config(variant: dict) -> Config:
    return Config(
        method=MethodConfig(
            warmup_teacher_temp=variant["warmup_teacher_temp"],
            teacher_temp=variant["teacher_temp"],
            warmup_teacher_temp_for=f"{variant['warmup_teacher_temp_epochs']} epochs",
            teacher_momentum=variant["momentum_teacher"],
        ),
        optim=OptimConfig(
            length=f"{variant['epochs']} epochs",
            batch_size=NUMBERS["data"]["B"],
            optimizer=variant["optimizer"],
            base_lr=variant["lr"],
            min_lr=variant["min_lr"],
            warmup=f"{variant['warmup_epochs']} epochs",
            weight_decay=variant["weight_decay"],
            weight_decay_end=variant["weight_decay_end"],
            clip=variant["clip_grad"],
            freeze_last_layer=f"{variant['freeze_last_layer']} epochs",
        ),
    )


def crops_at(iteration: int, dtype: torch.dtype) -> Crops:
    data = NUMBERS["data"]

    def crop(number: int, size: int) -> torch.Tensor:
        s = NUMBERS["S0"] + 0.83 * iteration + 0.47 * number
        # The reference was fed float32 images in both runs.
        return waves((data["B"], 3, size, size), s, NUMBERS["formula"]).float().to(dtype)

    count = data["n_global"]
    return Crops(
        torch.stack([crop(n, data["gsize"]) for n in range(count)], 1),
        torch.stack([crop(count + n, data["lsize"]) for n in range(data["n_local"])], 1),
    )


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NUMBERS["variants"])
def test_trajectory_equals_the_reference(name, double):
    variant = NUMBERS["variants"][name]
    dtype = torch.float64 if double else torch.float32
    learner, config = make_learner(variant, dtype), make_config(variant)
    schedules = Schedules(config, variant["niter"])
    names = NUMBERS["param_names"]
    # Rounding noise of a gradient that is zero in theory: see the trap in the golden README.
    compared = torch.tensor([variant["optimizer"] != "adamw" or not n.endswith("qkv.bias") for n in names])

    def expect(key: str) -> torch.Tensor:
        return ARRAYS[f"v/{name}/{key}" + ("_f64" if double else "")]

    def norms(network: Network) -> torch.Tensor:
        parameters = dict(network.named_parameters())
        return torch.stack([parameters[n].detach().double().norm() for n in names])

    relative = 1e-9 if double else 3e-6
    for step in range(schedules.total_steps):
        now = schedules.at(step)
        for key, value in (("momentum", now.teacher_momentum), ("teacher_temp", now.teacher_temp)):
            assert value == pytest.approx(ARRAYS[f"v/{name}/{key}"][step].item(), abs=1e-12)
        assert now.lr == pytest.approx(ARRAYS[f"v/{name}/lr"][step, 0].item(), abs=1e-12)
        assert now.weight_decay == pytest.approx(ARRAYS[f"v/{name}/wd"][step, 0].item(), abs=1e-12)

        parts = [(crops_at(step, dtype), None)]
        outputs = train_step(learner, parts, 1, now, config.optim, nullcontext(), step < schedules.freeze_steps)

        loss = expect("loss")[step].item()
        assert outputs.loss.item() == pytest.approx(loss, rel=1e-9 if double else 0, abs=0 if double else 3e-5)
        center = ARRAYS[f"v/{name}/center"][step] if not double else None
        if center is not None:
            torch.testing.assert_close(learner.dino_loss.center[0].double(), center, atol=2e-6, rtol=0)
        for role, network in (("student", learner.network), ("teacher", learner.teacher)):
            torch.testing.assert_close(
                norms(network)[compared], expect(f"{role}_norms")[step][compared], rtol=relative, atol=1e-12
            )
        at_step = expect("grad_norms_at_step")[step]
        grads = {n: p.grad for n, p in learner.network.named_parameters()}
        for n, expected in zip(names, at_step.tolist(), strict=True):
            assert (grads[n] is None) == math.isnan(expected), n
            if grads[n] is not None and not n.endswith("qkv.bias"):
                bound = 1e-9 if double else 5e-5
                assert grads[n].double().norm().item() == pytest.approx(expected, rel=bound, abs=1e-9), n
    if double:
        return
    finals = {
        f"{role}.{n}": value
        for role, network in (("student", learner.network), ("teacher", learner.teacher))
        for n, value in network.named_parameters()
    }
    if name == "main":
        expected = load_file(FOLDER / "06_trajectory_final.safetensors")
        torch.testing.assert_close(learner.dino_loss.center, expected.pop("dino_loss.center"), atol=2e-6, rtol=0)
    else:
        prefix = f"v/{name}/final_"
        expected = {k.removeprefix(prefix).replace("/", "."): v for k, v in ARRAYS.items() if k.startswith(prefix)}
    assert expected
    for key, value in expected.items():
        atol = 5e-3 if key.endswith("qkv.bias") else 3e-5
        torch.testing.assert_close(finals[key].detach(), value, atol=atol, rtol=0, msg=key)


def test_accumulated_parts_equal_the_large_batch():
    """Center and teacher included: two steps in two parts end where two steps in one part end."""
    variant = NUMBERS["variants"]["train_g"]
    config, learners = make_config(variant), []
    schedules = Schedules(config, variant["niter"])
    for parts in (1, 2):
        learner = make_learner(variant, torch.float64)
        for step in range(1, 3):
            crops = crops_at(step, torch.float64)
            rows = NUMBERS["data"]["B"] // parts
            split = [(Crops(*(c[i * rows : (i + 1) * rows] for c in crops)), None) for i in range(parts)]
            train_step(learner, split, parts, schedules.at(step), config.optim, nullcontext(), freeze_last_layer=False)
        learners.append(learner)
    one, two = learners
    torch.testing.assert_close(one.dino_loss.center, two.dino_loss.center, atol=1e-12, rtol=1e-9)
    for role in ("network", "teacher"):
        for (n, a), (_, b) in zip(
            getattr(one, role).named_parameters(), getattr(two, role).named_parameters(), strict=True
        ):
            if not n.endswith("qkv.bias"):
                torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7, msg=n)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    variant = NUMBERS["variants"]["main"]
    config = make_config(variant)
    learner, schedules = make_learner(variant, torch.float32), Schedules(config, variant["niter"])
    before = copy.deepcopy(learner.network.state_dict())
    crops = crops_at(0, torch.float32)
    poisoned = Crops(crops.global_crops, crops.local_crops.clone())
    poisoned.local_crops[1, 0, 0, 3, 3] = math.inf
    for step in (1, 2):
        train_step(
            learner, [(poisoned, None)], 1, schedules.at(step), config.optim, nullcontext(), freeze_last_layer=False
        )
    assert learner.skipped.tolist() == [2, 2]
    for key, value in learner.network.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert learner.dino_loss.center.isfinite().all()
    train_step(learner, [(crops, None)], 1, schedules.at(3), config.optim, nullcontext(), freeze_last_layer=False)
    assert learner.skipped.tolist() == [0, 2]
    assert not torch.equal(learner.network.state_dict()["backbone.cls_token"], before["backbone.cls_token"])
