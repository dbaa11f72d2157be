import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dino.augment.multicrop import Crops
from dino.config import replace
from dino.method import network
from dino.method.learner import make_learner
from dino.method.network import Network, TeacherUpdate, build_networks, update_teacher


@pytest.fixture(autouse=True, scope="module")
def small_backbone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "build_backbone", tiny.build)
        yield


def crops(b: int, local_count: int = 2, seed: int = 0) -> Crops:
    generator = torch.Generator().manual_seed(seed)
    return Crops(
        torch.randn(b, 2, 3, 32, 32, generator=generator),
        torch.randn(b, local_count, 3, 16, 16, generator=generator),
    )


def logits(net: Network, *groups: torch.Tensor, **options) -> torch.Tensor:
    return net(*groups, **options).logits()


@pytest.mark.parametrize("backbone", ["vit_tiny", "timm:test_resnet"])
def test_the_teacher_begins_as_the_student(backbone):
    config = replace(tiny.CONFIG, model__backbone=backbone, model__drop_path=0.2, model__use_bn=True)
    torch.manual_seed(3)
    student, teacher = build_networks(config)
    assert len(student.state_dict()) > 30
    tiny.assert_same(dict(student.state_dict()), dict(teacher.state_dict()))
    assert any(name.startswith("head.") for name in teacher.state_dict())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert not any(p.requires_grad for p in teacher.parameters())
    assert any(p.requires_grad for p in student.parameters())


def test_only_the_student_drops_paths():
    student, teacher = build_networks(replace(tiny.CONFIG, model__drop_path=0.3))
    images = crops(6).global_crops
    student.train(), teacher.train()
    assert torch.equal(logits(teacher, images), logits(teacher, images))
    assert not torch.equal(logits(student, images), logits(student, images))
    assert teacher.draw_drop_path((images,), torch.Generator()) == [None]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.996, 1.0])
def test_the_update_of_the_teacher_is_the_formula(momentum):
    torch.manual_seed(0)
    student, teacher = build_networks(tiny.CONFIG)
    for p in student.parameters():
        p.data.add_(torch.randn_like(p))
    before = {n: p.clone() for n, p in teacher.named_parameters()}
    now = dict(student.named_parameters())
    update_teacher(teacher, student, momentum)
    for name, p in teacher.named_parameters():
        expected = momentum * before[name].double() + (1 - momentum) * now[name].detach().double()
        torch.testing.assert_close(p.double(), expected, atol=1e-6, rtol=1e-6, msg=name)
        if momentum == 1.0:
            assert torch.equal(p, before[name])
    update_teacher(teacher, student, 0.0)
    tiny.assert_same({n: p.data for n, p in teacher.named_parameters()}, {n: p.data for n, p in now.items()})


def test_the_update_sees_weights_that_are_loaded_later():
    """As when a run resumes: the lists of tensors are made once."""
    student, teacher = build_networks(tiny.CONFIG)
    update = TeacherUpdate(teacher, student)
    other, _ = build_networks(replace(tiny.CONFIG, run__seed=1))
    student.load_state_dict(other.state_dict())
    update(0.0)
    tiny.assert_same(dict(teacher.state_dict()), dict(other.state_dict()))


def test_buffers_are_each_networks_own_and_both_stay_in_train_mode():
    learner = make_learner(replace(tiny.CONFIG, model__backbone="timm:test_resnet"), torch.device("cpu"))
    student, teacher = learner.network, learner.teacher
    norms = [m for net in (student, teacher) for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 4
    assert all(m.training for m in norms)
    student.get_buffer(first(student)).fill_(7.0)
    before = copy.deepcopy(dict(teacher.named_buffers()))
    learner.update_teacher(0.5)
    tiny.assert_same(dict(teacher.named_buffers()), before)
    teacher(crops(4).global_crops)  # In train mode its own statistics move.
    name = first(teacher)
    assert not torch.equal(teacher.get_buffer(name), before[name])
    assert not torch.equal(teacher.get_buffer(name), student.get_buffer(name))


def first(net: Network) -> str:
    return next(name for name, _ in net.named_buffers() if name.endswith("running_mean"))


@settings(max_examples=20, deadline=None)
@given(b=st.integers(1, 4), world_size=st.integers(1, 4), local_count=st.integers(0, 3), seed=st.integers(0, 99))
def test_all_processes_together_drop_what_one_drops(b, world_size, local_count, seed):
    student, _ = build_networks(replace(tiny.CONFIG, model__drop_path=0.4))

    def draw(rows, rank=0, world=1):
        return student.draw_drop_path(crops(rows, local_count), torch.Generator().manual_seed(seed), rank, world)

    whole = draw(world_size * b)
    parts = [draw(b, rank, world_size) for rank in range(world_size)]
    assert len(whole) == 2
    for i, mask in enumerate(whole):
        if mask is None:
            assert local_count == 0
            assert all(part[i] is None for part in parts)
        else:
            assert mask.shape == (3, 2, world_size * b * (2, local_count)[i])
            assert torch.equal(torch.cat([part[i] for part in parts], -1), mask)


def test_a_drawn_mask_is_what_is_dropped():
    """Rows keep their image: the same crops in two halves, each with its rows, give the same logits."""
    student, _ = build_networks(replace(tiny.CONFIG, model__drop_path=0.4))
    batch = crops(4)
    whole = logits(student, *batch, drop_path=student.draw_drop_path(batch, torch.Generator().manual_seed(1)))
    halves = []
    for rank in (0, 1):
        half = Crops(*(group[2 * rank : 2 * rank + 2] for group in batch))
        masks = student.draw_drop_path(half, torch.Generator().manual_seed(1), rank, 2)
        halves.append(logits(student, *half, drop_path=masks))
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(student.eval(), *batch), whole, atol=1e-3)


def test_every_crop_has_its_place():
    """Logits (b, s, k): image by image, global crops first; a crop's logits do not depend on the others."""
    _, teacher = build_networks(tiny.CONFIG)
    batch = crops(3, local_count=4)
    found = logits(teacher, *batch)
    assert found.shape == (3, 6, 64)
    torch.testing.assert_close(logits(teacher, batch.global_crops[1:2, 1:2])[0, 0], found[1, 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits(teacher, batch.local_crops[2:3, 3:4])[0, 0], found[2, 5], atol=1e-5, rtol=1e-4)
    assert logits(teacher, *crops(3, local_count=0)).shape == (3, 2, 64)
    assert math.isfinite(found.sum().item())
