"""Two real processes (gloo, on the CPU) train what one trains. As a script: what each of the two runs."""

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import tiny
from dino.commands import cli
from dino.data.sources import open_source
from dino.machine import distributed
from dino.method import network
from dino.method.loss import DINOLoss
from dino.run import begin, checkpoint, pretrain
from dino.run.interruption import Interruption
from reference import arrays, scalars

CPU = torch.device("cpu")
(CASE,) = (case for case in scalars("03_loss")["cases"] if case["id"] == "world2")


def command(out: Path) -> list[str]:
    return ["pretrain", "shapes:40x32", "--out", str(out), *tiny.FLAGS, "--model.no-use-bn", "--json"]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "build_backbone", tiny.build)
        assert cli.main(command(out)) == 0
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder where two processes did the reference's case, a run and the second half of a run; their stdout."""
    folder = tmp_path_factory.mktemp("two")
    step, calls = pretrain.train_step, [0]

    def interrupted(*arguments):
        calls[0] += 1
        if calls[0] == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "build_backbone", tiny.build)
        patch.setattr(pretrain, "train_step", interrupted)
        assert cli.main(command(folder / "resumed")) == 75
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": f"{tests.parent / 'src'}:{tests}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def in_each_process(folder: Path) -> None:
    network.build_backbone = tiny.build
    with distributed.process_group(CPU):
        rank, given = distributed.rank(), arrays("03_loss")
        loss_of = DINOLoss(CASE["K"], CASE["student_temp"], CASE["center_momentum"])
        calls = []
        for n, call in enumerate(CASE["calls"]):
            get = lambda name, n=n: given[f"world2/call{n}/rank{rank}/{name}"]  # noqa: E731
            student = get("student_logits").unflatten(0, (CASE["ncrops"], CASE["B"])).transpose(0, 1).requires_grad_()
            teacher = get("teacher_logits").unflatten(0, (2, CASE["B"])).transpose(0, 1)
            loss = loss_of(student, teacher, call["teacher_temp"])
            (grad,) = torch.autograd.grad(loss, student)
            loss_of.update_center(teacher)
            calls.append({"loss": loss.item(), "grad": grad, "center": loss_of.center.clone()})
        torch.save(
            {
                "calls": calls,
                "world_size": distributed.world_size(),
                "is_main": distributed.is_main(),
                "mean": distributed.all_mean(torch.tensor([1.0 + rank, 10.0])),
                "share": [list(distributed.share(n)) for n in (0, 1, 5)],
                "gathered": distributed.gather({"rank": rank}),
                "rows": distributed.gather_rows(torch.arange(5.0)[list(distributed.share(5))][:, None]),
                "no rows": distributed.gather_rows(torch.zeros(rank, 3, dtype=torch.int64)),
                "any": distributed.any_process(False, rank == 1, True),
            },
            folder / f"rank{rank}.pt",
        )
        distributed.share_batchnorm(normed := batchnorms())
        torch.save(through(normed, slice(rank * 4, rank * 4 + 4)), folder / f"norms{rank}.pt")
        for out in (folder / "whole", folder / "resumed"):
            if cli.main(command(out)):
                sys.exit(1)


def batchnorms() -> torch.nn.Module:
    """A head with BatchNorm over rows, and timm's over images, with the activation inside."""
    from timm.layers import BatchNormAct2d

    from dino.models.head import DINOHead

    torch.manual_seed(0)
    over_images = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), BatchNormAct2d(6), torch.nn.Flatten())
    return torch.nn.Sequential(over_images, DINOHead(6 * 16, 10, use_bn=True, hidden_dim=8, bottleneck_dim=4)).double()


def through(module: torch.nn.Module, rows: slice) -> dict:
    """What these rows of a batch of 8 give, and the gradients of the mean loss over two halves."""
    images = torch.randn(8, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    output = module(images[rows])
    (output * weights[rows]).sum().backward()
    return {"output": output.detach(), "grads": [p.grad for p in module.parameters()], "buffers": [*module.buffers()]}


def test_batchnorm_of_two_processes_is_that_of_one(two):
    """Its statistics are those of the whole batch, forward and backward."""
    folder, _ = two
    whole = through(batchnorms(), slice(0, 8))
    halves = [torch.load(folder / f"norms{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([half["output"] for half in halves]), whole["output"], rtol=1e-10, atol=1e-12)
    for grad, *parts in zip(whole["grads"], *(half["grads"] for half in halves), strict=True):
        if grad is not None:
            torch.testing.assert_close(sum(parts), grad, rtol=1e-9, atol=1e-11)
    for half in halves:
        for buffer, expected in zip(half["buffers"], whole["buffers"], strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_loss_of_two_processes_equals_the_reference(two, rank):
    folder, _ = two
    given = arrays("03_loss")
    calls = torch.load(folder / f"rank{rank}.pt")["calls"]
    for n, (call, found) in enumerate(zip(CASE["calls"], calls, strict=True)):
        assert found["loss"] == pytest.approx(call["loss"][rank], abs=1e-5)
        grad = given[f"world2/call{n}/rank{rank}/grad_student"]
        torch.testing.assert_close(found["grad"].transpose(0, 1).flatten(0, 1), grad, atol=1e-6, rtol=0)
        center = given[f"world2/call{n}/rank{rank}/center_after"]
        torch.testing.assert_close(found["center"], center, atol=1e-7, rtol=0)


def test_what_processes_exchange(two):
    folder, _ = two
    for rank in (0, 1):
        found = torch.load(folder / f"rank{rank}.pt")
        assert found["world_size"] == 2
        assert found["is_main"] == (rank == 0)
        assert found["mean"].tolist() == [1.5, 10.0]
        assert found["any"] == (False, True, True)
        assert found["share"] == [[], [0] if rank else [], [[0, 1], [2, 3, 4]][rank]]
        assert found["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert found["rows"].tolist() == [[0.0], [1.0], [2.0], [3.0], [4.0]]
        assert found["no rows"].tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("name", ["whole", "resumed"])
def test_two_processes_train_what_one_trains(one, two, name):
    """Also where they go on from what one began. Drop path and crops are drawn for the whole batch."""
    folder, _ = two
    lines, expected = tiny.metrics(folder / name), tiny.metrics(one)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, of_one in zip(lines, expected, strict=True):
        if "loss" in line:
            for key in ("loss", "lr", "teacher_momentum", "teacher_temp", "center_norm", "skipped"):
                assert line[key] == pytest.approx(of_one[key], abs=1e-5), (line["step"], key)
    a, b = (checkpoint.load_latest(out / "checkpoints") for out in (folder / name, one))
    assert a is not None
    assert b is not None
    assert a["step"] == b["step"] == 6
    for role in ("student", "teacher", "dino_loss"):
        for key in a[role]:
            if not key.endswith("qkv.bias"):  # AdamW blows up the rounding of a gradient that is zero in theory.
                torch.testing.assert_close(a[role][key], b[role][key], atol=1e-5, rtol=0, msg=f"{role}.{key}")
    begun = pretrain.Config.from_json(a["config"])
    assert begun == pretrain.Config.from_json(b["config"])


def test_only_the_first_process_speaks(one, two):
    folder, stdout = two
    printed = [json.loads(line) for line in stdout.splitlines()]
    assert printed == [json.loads((folder / name / "results.json").read_text()) for name in ("whole", "resumed")]
    assert printed[0].keys() == json.loads((one / "results.json").read_text()).keys()


def test_one_process_needs_no_group():
    tensor, module = torch.rand(3), torch.nn.Linear(2, 2)
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_mean(tensor) is tensor
    assert (list(distributed.share(4)), distributed.gather(7)) == ([0, 1, 2, 3], [7])
    assert distributed.gather_rows(tensor) is tensor
    assert distributed.any_process(True, False) == (True, False)
    assert distributed.parallel(module) is module
    distributed.barrier()
    with distributed.process_group(CPU) as device, distributed.without_sync(module, skip=True):
        assert device == CPU


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="8 cannot be shared evenly among 3 processes"):
        begin.begin(open_source("shapes:40x32"), None, tmp_path, tiny.CONFIG, CPU, Interruption(), ExitStack())


if __name__ == "__main__":
    in_each_process(Path(sys.argv[1]))
