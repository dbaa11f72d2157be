"""What makes a step fast must not change it: nothing waits for the device, and compiled code computes the same."""

import itertools
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from dino.augment.multicrop import Crops, MultiCrop
from dino.config import replace
from dino.data.decode import Canvas
from dino.machine import device as hardware
from dino.method import network
from dino.method.learner import make_learner, make_parts
from dino.method.schedules import Now
from dino.method.step import train_step
from test_network import crops

NOW = Now(1e-3, 0.04, 0.99, 0.04)


@pytest.fixture(autouse=True)
def small_backbone(monkeypatch):
    monkeypatch.setattr(network, "build_backbone", tiny.build)


class ReadsBack(TorchDispatchMode):
    """Counts operations that bring a value from the device to the host: on a GPU each one waits for all work."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "is_nonzero",
            "masked_select",
        ):
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


def step(learner, batch, optim, freeze=False):
    masks = learner.network.draw_drop_path(batch, torch.Generator().manual_seed(0))
    return train_step(learner, [(batch, masks)], 1, NOW, optim, nullcontext(), freeze_last_layer=freeze)


MORE = {"method__targets": "sinkhorn", "method__queue": 6, "method__coding_rate": 0.01}


@pytest.mark.parametrize("settings", [*({"optim__optimizer": name} for name in ("adamw", "sgd", "lars")), MORE])
def test_a_step_reads_nothing_back(settings):
    config = replace(tiny.CONFIG, **settings)
    learner = make_learner(config, torch.device("cpu"))
    for freeze in (True, False):  # The first step makes the optimizer's state.
        step(learner, crops(4), config.optim, freeze)
    with ReadsBack() as watch:
        step(learner, crops(4), config.optim)
    assert watch.seen == []
    with ReadsBack() as watch:
        learner.skipped.sum().item()
    assert len(watch.seen) == 1, "the watch would not have seen it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_step_and_its_crops_never_wait_for_the_gpu():
    device = torch.device("cuda")
    learner, multicrop = make_learner(tiny.CONFIG, device), MultiCrop(tiny.CONFIG.crops)
    canvas = Canvas(torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, device=device), torch.full((8, 2), 40))
    for i in range(3):
        if i == 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            parts = make_parts(learner, multicrop, canvas, tiny.CONFIG, i)
            train_step(learner, parts, 1, NOW, tiny.CONFIG.optim, nullcontext(), freeze_last_layer=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.parametrize(
    "backbone, backend",
    [
        ("vit_tiny", "aot_eager"),
        ("timm:test_resnet", "aot_eager"),
        pytest.param("vit_tiny", "inductor", marks=pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")),
    ],
)
def test_a_compiled_network_is_one_graph_a_block_and_computes_the_same(backbone, backend):
    """In a process of its own: the checks of shapes that the tests put into every function cannot be compiled."""
    script = Path(__file__).with_name("compiled.py")
    done = subprocess.run([sys.executable, str(script), backbone, backend], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "the same"


@pytest.mark.parametrize("backbone", ["vit_tiny", "timm:test_resnet"])
@pytest.mark.parametrize("targets", ["center", "sinkhorn"])
def test_a_bfloat16_step_is_the_float32_step_but_for_its_rounding(backbone, targets):
    """Weights, loss, center and optimizer stay in float32: only products are rounded, to 8 bits (0.4 %)."""
    config = replace(tiny.CONFIG, model__backbone=backbone, method__targets=targets, optim__clip=0.0)
    batch, found = crops(4), []
    for dtype in (torch.float32, torch.bfloat16):
        learner = make_learner(config, torch.device("cpu"))
        before = [parameter.detach().clone() for parameter in learner.network.parameters()]
        products = set()
        learner.teacher.head.mlp[0].register_forward_hook(lambda *call, seen=products: seen.add(call[2].dtype))
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
        masks = learner.network.draw_drop_path(batch, torch.Generator().manual_seed(0))
        loss = train_step(learner, [(batch, masks)], 1, NOW, config.optim, autocast, freeze_last_layer=False).loss
        assert loss.dtype == torch.float32
        assert products == {dtype}
        state = [*learner.network.parameters(), *learner.teacher.parameters(), learner.dino_loss.center]
        state += [value for kept in learner.optimizer.state.values() for value in kept.values()]
        assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in state)
        assert not all(torch.equal(a, b) for a, b in zip(before, learner.network.parameters(), strict=True))
        gradients = torch.cat([p.grad.flatten() for p in learner.network.parameters() if p.grad is not None])
        found.append((loss, gradients))
    (loss, gradients), (rounded, near) = found
    torch.testing.assert_close(rounded, loss, rtol=0.01, atol=0)
    assert not torch.equal(gradients, near), "nothing was rounded"
    assert torch.nn.functional.cosine_similarity(gradients, near, dim=0) > 0.99


@pytest.mark.parametrize(
    "device, choice, triton, expected",
    [
        ("cpu", "auto", True, False),
        ("cpu", "on", False, True),
        ("cuda", "auto", True, True),
        ("cuda", "auto", False, False),
        ("cuda", "off", True, False),
    ],
)
def test_when_a_network_is_compiled(device, choice, triton, expected, monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda _: object() if triton else None)
    assert hardware.compiles(torch.device(device), choice) is expected


@pytest.mark.parametrize(
    "avx512, amx, expected", [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]
)
def test_bfloat16_where_the_cpu_multiplies_it(avx512, amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert hardware.choose_precision(torch.device("cpu"), "auto") == expected
    assert hardware.choose_precision(torch.device("cpu"), "float32") == "float32"


def test_a_torch_that_does_not_answer_is_taken_for_no(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert hardware.choose_precision(torch.device("cpu"), "auto") == "float32"


def test_compiling_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs Triton"):
        hardware.compiles(torch.device("cuda"), "on")


def test_overlapped_on_a_cpu_makes_each_item_when_it_is_asked_for():
    made = []
    items = hardware.overlapped((made.append(i) or torch.tensor(i) for i in range(5)), torch.device("cpu"))
    assert [int(item) for item in itertools.islice(items, 2)] == [0, 1]
    assert made == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_overlapped_on_a_gpu_gives_finished_items():
    def items():
        for i in range(20):
            x = torch.full((1 << 22,), float(i), device="cuda")
            yield Crops(x.sin().asin(), [x]), None

    for i, (parts, _) in enumerate(hardware.overlapped(items(), torch.device("cuda"))):
        assert parts.local_crops[0].eq(i).all()
        assert torch.allclose(parts.global_crops.sin(), torch.tensor(float(i), device="cuda").sin(), atol=1e-3)


def test_a_run_gives_the_callers_precision_and_threads_back():
    """In a process of its own: torch does not forget which of its two names set the precision."""
    script = """
import torch
from dino.machine.device import prepared
products = torch.backends.cuda.matmul
def state():
    try:
        old = products.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        old = "set by the newer name"
    return old, products.fp32_precision, torch.backends.cudnn.allow_tf32, torch.get_num_threads()
for setup, inside in (
    (lambda: None, "tf32"),
    (lambda: torch.set_float32_matmul_precision("medium"), "tf32"),
    (lambda: setattr(products, "fp32_precision", "tf32"), "tf32"),
):
    setup()
    before = state()
    with prepared(torch.device("cuda"), threads=3):
        assert (products.fp32_precision, torch.get_num_threads()) == (inside, 3), before
    assert state() == before, (state(), before)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
