"""Targets by Sinkhorn-Knopp: the formula of SwAV, chunked and in parts, by 1, 2 and 4 processes."""

import multiprocessing
import os
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from dino.augment.multicrop import Crops
from dino.config import replace
from dino.machine import distributed
from dino.method import learner as module
from dino.method import loss as loss_module
from dino.method import network
from dino.method.learner import Learner, make_learner
from dino.method.loss import DINOLoss, RecentLogits, sinkhorn_center, teacher_distribution
from dino.method.schedules import Now
from dino.method.step import train_step
from dino.models.products import Product
from dino.run.pretrain import _what_is_wanted

CONFIG = replace(tiny.CONFIG, method__targets="sinkhorn", model__drop_path=0.0)


def sinkhorn(scores, iterations=3):
    """(crops, prototypes) -> targets, as SwAV's algorithm is written: a table scaled by columns and rows in turns."""
    table = scores.exp()
    table = table / table.sum()
    for _ in range(iterations):
        table = table / table.sum(0, keepdim=True) / table.shape[1]
        table = table / table.sum(1, keepdim=True) / table.shape[0]
    return table * table.shape[0]


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 6), t=st.integers(1, 3), k=st.integers(2, 9), seed=st.integers(0, 99), parts=st.integers(1, 3))
def test_equals_the_formula(b, t, k, seed, parts):
    logits = draw(b, t, k, seed=seed, scale=0.5)
    center = sinkhorn_center(logits.tensor_split(min(parts, b)), 0.1)
    ours = teacher_distribution(logits, center, 0.1)
    torch.testing.assert_close(ours.flatten(0, 1), sinkhorn(logits.flatten(0, 1) / 0.1), atol=1e-9, rtol=1e-9)


def test_by_hand():
    """Two crops that agree, two prototypes: the first is wanted by both and gets its share only."""
    logits = torch.tensor([[[3.0, 0.0]], [[3.0, 0.0]]]).double()
    torch.testing.assert_close(
        teacher_distribution(logits, sinkhorn_center([logits], 0.1), 0.1), torch.full((2, 1, 2), 0.5).double()
    )


def test_float32_at_the_sharpest_temperature_in_use():
    """Unit vectors over 0.01: scores up to 100 either way, where a plain exp would overflow."""
    logits = torch.nn.functional.normalize(draw(32, 2, 64), dim=-1) * 8
    exact, single = (sinkhorn_center([x], 0.01) for x in (logits, logits.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, atol=1e-5, rtol=0)


def test_prototypes_are_used_alike():
    logits = draw(64, 2, 16, scale=0.05) + torch.linspace(0, 1, 16)
    mean = lambda center: teacher_distribution(logits, center, 0.1).mean((0, 1))  # noqa: E731
    assert mean(torch.zeros(1, 16)).max() > 5 / 16
    torch.testing.assert_close(
        mean(sinkhorn_center([logits], 0.1, 50)), torch.full((16,), 1 / 16).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("images", [1, 3])
def test_the_chunked_loss_takes_the_same_targets(images, monkeypatch):
    product = Product(draw(5, 4, 6).requires_grad_(), draw(7, 6, seed=1).requires_grad_(), torch.ones(7, 1).double())
    teacher, loss_of = draw(5, 2, 7, seed=2), DINOLoss(7, targets="sinkhorn").double()
    whole = loss_of(product.logits(), teacher, 0.2)
    expected = torch.autograd.grad(whole, product[:2])
    monkeypatch.setattr(loss_module, "chunk_of_images", lambda *_: images)
    chunked = loss_of(product, teacher, 0.2)
    torch.testing.assert_close(chunked, whole, atol=1e-12, rtol=0)
    for ours, theirs in zip(torch.autograd.grad(chunked, product[:2]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_there_is_no_center_to_move():
    loss_of = DINOLoss(7, targets="sinkhorn")
    loss_of.update_center(torch.ones(1, 1, 7))
    assert not loss_of.center.any()


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 4), queue=st.integers(1, 11), steps=st.integers(1, 5), parts=st.integers(1, 2))
def test_with_a_queue_equals_the_formula_on_all_rows(b, queue, steps, parts):
    """The batch on top of the ``queue`` images before it, and no more than there were."""
    loss_of = DINOLoss(5, targets="sinkhorn", queue=queue).double()
    batches = [draw(b, 2, 5, seed=step, scale=0.5) for step in range(steps)]
    for logits in batches[:-1]:
        loss_of.remember(logits.tensor_split(min(parts, b)))
    before = torch.cat([*reversed(batches[:-1]), torch.zeros(0, 2, 5).double()])[:queue]
    expected = sinkhorn(torch.cat([batches[-1], before]).flatten(0, 1) / 0.1)[: 2 * b]
    center = loss_of.center_of(batches[-1].tensor_split(min(parts, b)), 0.1)
    ours = teacher_distribution(batches[-1], center, 0.1)
    torch.testing.assert_close(ours.flatten(0, 1), expected, atol=1e-9, rtol=1e-9)


def test_a_queue_by_hand():
    """Two prototypes, and one image that wants the first. The image before it wanted the first as well: they share
    both. Alone it would get both halves; beside one that wanted the second it gets what it wants."""
    loss_of = DINOLoss(2, targets="sinkhorn", queue=1).double()
    wants = {i: torch.eye(2)[i].mul(9.0).view(1, 1, 2).double() for i in (0, 1)}
    for before, expected in ((None, [0.5, 0.5]), (0, [0.5, 0.5]), (1, [1.0, 0.0])):
        if before is not None:
            loss_of.remember([wants[before]])
        found = teacher_distribution(wants[0], loss_of.center_of([wants[0]], 0.1), 0.1)
        torch.testing.assert_close(found.flatten(), torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_a_queue_is_loaded_at_any_length():
    full, fresh = (DINOLoss(5, targets="sinkhorn", queue=4) for _ in range(2))
    for step in range(3):
        state = full.state_dict()
        fresh.load_state_dict(state)
        assert len(fresh.recent.rows) == min(3 * step, 4)
        tiny.assert_same(dict(fresh.state_dict()), dict(state))
        full.remember([draw(3, 2, 5, seed=step).float()])
    assert "recent.rows" not in DINOLoss(5, targets="sinkhorn").state_dict()


def test_a_queue_is_of_sinkhorn_alone():
    """A recipe may bring the one, and a flag change the other: neither is an error."""
    assert make_learner(replace(tiny.CONFIG, method__queue=8), torch.device("cpu")).dino_loss.recent is None
    chosen = {"method__targets": "center", "optim__batch_size": 16, "optim__length": "1 steps"}
    _, _, config, _ = _what_is_wanted("shapes:1200x16", "auto", None, None, chosen)
    assert (config.method.queue, config.method.targets) == (512, "center")
    _, _, config, _ = _what_is_wanted("shapes:1200x16", "auto", None, None, {"method__queue": 300})
    assert (config.method.queue, config.method.targets) == (300, "sinkhorn")


def test_a_loss_without_a_queue_is_loaded_into_one_with():
    loss_of = DINOLoss(5, targets="sinkhorn", queue=4)
    loss_of.remember([draw(3, 2, 5).float()])
    loss_of.load_state_dict(DINOLoss(5, targets="sinkhorn").state_dict())
    assert loss_of.recent is not None
    assert not len(loss_of.recent.rows)


def test_a_loss_of_ones_own_needs_no_queue():
    class Mine(DINOLoss):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    Mine().remember([draw(3, 2, 5)])


def test_a_queue_has_a_length():
    with pytest.raises(ValueError, match=r"--method.queue -1 is not allowed"):
        replace(CONFIG, method__queue=-1)


def test_what_is_not_finite_is_remembered_as_nothing():
    recent = RecentLogits(4)
    recent.add([torch.tensor([[[1.0, torch.nan], [torch.inf, 2.0]]])])
    assert recent.rows.tolist() == [[[1.0, 0.0], [0.0, 2.0]]]


def test_logits_that_are_not_finite_do_no_lasting_harm():
    learner = build(QUEUE)
    crops = batch(0)
    poisoned = Crops(crops.global_crops.clone(), crops.local_crops)
    poisoned.global_crops[0, 0, 0, 0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in learner.network.state_dict().items()}
    step(learner, poisoned, parts=2)
    assert learner.skipped.tolist() == [1, 1]
    tiny.assert_same(dict(learner.network.state_dict()), before)
    assert step(learner, crops, parts=2).loss.isfinite()


QUEUE = 12  # One batch and a half.


def build(queue: int = 0) -> Learner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "build_backbone", tiny.build)
        patch.setattr(module, "build_networks", lambda *given: [n.double() for n in network.build_networks(*given)])
        learner = make_learner(replace(CONFIG, method__queue=queue), torch.device("cpu"))
    learner.dino_loss.double()
    return learner


def batch(number: int) -> Crops:
    return Crops(draw(8, 2, 3, 32, 32, seed=2 * number), draw(8, 2, 3, 16, 16, seed=2 * number + 1))


def step(learner: Learner, crops: Crops, parts: int):
    """A step on this process's rows, in parts."""
    rows = 8 // distributed.world_size()
    mine = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    split = zip(*(group[mine].split(rows // parts) for group in crops), strict=True)
    now = Now(lr=1e-3, weight_decay=0.04, teacher_momentum=0.9, teacher_temp=0.05)
    return train_step(learner, [(Crops(*p), None) for p in split], parts, now, CONFIG.optim, nullcontext(), False)


def trained(parts: int) -> dict:
    """Without a queue, and with one."""
    found: dict = {"losses": []}
    for queue in (0, QUEUE):
        learner = build(queue)
        found["losses"] += [step(learner, batch(number), parts).loss.item() for number in range(3)]
        found |= {f"{queue} teacher.{k}": v for k, v in learner.teacher.state_dict().items()}
        found |= {f"{queue} loss.{k}": v for k, v in learner.dino_loss.state_dict().items()}
    return found


@pytest.fixture(scope="module")
def one():
    return trained(parts=1)


def assert_equal(found: dict, expected: dict) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-10)
    for name, tensor in expected.items():
        if name != "losses" and not name.endswith("qkv.bias"):  # AdamW blows up a gradient that is zero in theory.
            torch.testing.assert_close(found[name], tensor, atol=1e-8, rtol=0, msg=name)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_train_what_the_whole_batch_trains(one, parts):
    assert_equal(trained(parts), one)


def in_a_process(rank: int, processes: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with distributed.process_group(torch.device("cpu")):
        torch.save(trained(parts=2), folder / f"{rank}.pt")


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_what_one_trains(one, processes, tmp_path):
    """In two parts each, so exchanged over both."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # Imports torch once, not once a process.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        context.Process(target=in_a_process, args=(rank, processes, port, tmp_path)) for rank in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    for rank, process in enumerate(running):
        assert process.exitcode == 0, rank
        assert_equal(torch.load(tmp_path / f"{rank}.pt"), one)
