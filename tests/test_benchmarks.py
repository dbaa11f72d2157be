"""The benchmarks are fair: the plain form computes what ours does, and the harness counts right."""

import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import plain  # noqa: E402
import scaling  # noqa: E402
import side_by_side  # noqa: E402
import step  # noqa: E402
from contenders import TASKS  # noqa: E402
from dino.method.loss import DINOLoss  # noqa: E402
from dino.models.vision_transformer import VisionTransformer  # noqa: E402


def our_name(name: str) -> str:
    for theirs, ours in (("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"), (".qkv", ".attn.qkv"), (".proj", ".attn.proj")):
        name = name.replace(theirs, ours)
    return f"patch_embed.{name}" if name.startswith("proj.") else name


@torch.no_grad()
def test_the_plain_network_is_ours():
    torch.manual_seed(0)
    theirs = plain.ViT(32, 8, 24, 3, 2, rate=0.0)
    ours = VisionTransformer(32, 8, 3, 24, 3, 2)
    ours.load_state_dict({our_name(name): tensor for name, tensor in theirs.state_dict().items()})
    for size in (32, 16):
        images = torch.randn(2, 3, size, size)
        torch.testing.assert_close(theirs(images), ours(images).cls_token, rtol=1e-4, atol=1e-5)


def test_the_plain_loss_is_ours():
    b, s, k = 3, 5, 20
    student, teacher = torch.randn(s * b, k), torch.randn(2 * b, k)
    trainer = plain.Trainer(torch.nn.Linear(2, 2), k, "cpu")
    ours = DINOLoss(k)(
        student.unflatten(0, (s, b)).transpose(0, 1), teacher.unflatten(0, (2, b)).transpose(0, 1), teacher_temp=0.04
    )
    torch.testing.assert_close(trainer.loss(student, teacher, s), ours)


def wait(name: str, _options: dict):
    def run() -> int:
        time.sleep({"a": 0.02, "b": 0.06}[name])
        return 2

    return run


def fail(_name: str, _options: dict):
    raise ValueError("no such thing")


def test_the_harness_takes_turns_and_counts():
    rows = side_by_side.compare(wait, ["a", "b"], {"device": "cpu"}, runs=3)
    assert 60 < rows["a"]["images_per_second"] <= 100
    assert rows["a"]["times_as_long"] == 1
    assert 2 < rows["b"]["times_as_long"] < 4
    with pytest.raises(SystemExit, match="a failed: ValueError: no such thing"):
        side_by_side.compare(fail, ["a"], {"device": "cpu"}, runs=1)


def test_exponents_and_flops_by_hand():
    assert scaling.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2)
    # ViT-S/16: 4.6 GFLOP forward at 224 px (twice the 2.3 G multiply-adds quoted for 196 patches and qkv, proj, MLP).
    assert step.gflop_per_image(TASKS["vits16"]) == pytest.approx(114, abs=1)


def test_damaged_files_are_decoded_or_listed(tmp_path):
    """130 of the 10,000 that ``benchmarks/mutated.py`` makes, ten of every format."""
    import mutated
    from dino.data.loader import iterate_once
    from dino.data.sources import open_source

    mutated.make(tmp_path, 130, seed=1)
    broken = {}
    decoded = [
        i for batch in iterate_once(open_source(tmp_path), 16, workers=0, broken=broken) for i in batch.indices.tolist()
    ]
    assert len(set(decoded)) + len(broken) == 130
    assert len(decoded) > 10
    assert all(reason and "\n" not in reason for reason in broken.values())
