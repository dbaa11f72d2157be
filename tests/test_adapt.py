"""Training that begins from weights that are there: what moves, how fast, how far, and what is kept."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dino
import tiny
from dino.config import AdaptConfig, Config, replace
from dino.data.sources import open_source
from dino.method import learner, network
from dino.method.layers import layer_numbers, layered_groups, train_last
from dino.method.optim import make_optimizer, parameter_groups, set_schedule
from dino.method.schedules import Schedules
from dino.method.terms import Pull
from dino.models.timm_backbone import TimmBackbone
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import load, name_of, save_backbone

TRAIN, VAL = open_source("shapes:40x32", "train"), open_source("shapes:40x32", "val")
CPU = torch.device("cpu")


def vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(32, 8, 3, 24, 3, 2, 2.0)


@pytest.fixture
def weights(tmp_path) -> Path:
    """Weights that are nobody's initial ones."""
    path = tmp_path / "begin.safetensors"
    save_backbone(vit(seed=7), path, Config().model, 32)
    return path


def adapting(weights: Path, **settings) -> Config:
    return replace(tiny.CONFIG, adapt__init=str(weights), model__drop_path=0.0, **settings)


# The layers, by hand.


def test_layers_by_hand():
    numbers = layer_numbers(vit())
    assert {numbers[name] for name in ("cls_token", "pos_embed", "patch_embed.proj.weight")} == {0}
    assert [numbers[f"blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [1, 2, 3]
    assert numbers["norm.weight"] == 3
    timm = layer_numbers(TimmBackbone("vit_tiny_patch16_224", img_size=32, depth=3))
    assert {name.removeprefix("model."): n for name, n in timm.items()}["blocks.1.attn.qkv.weight"] == 2
    assert set(timm.values()) == {0, 1, 2, 3}


def test_each_layer_learns_slower_than_the_next():
    net = nn.Module()
    net.backbone, net.head = vit(), nn.Linear(24, 5)
    optimizer = make_optimizer("adamw", net, layered_groups(net, 0.5))
    set_schedule(optimizer, lr=1.0, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    of = {name: found[id(p)] for name, p in net.named_parameters()}
    assert of["head.weight"] == (1.0, 0.1)
    assert of["head.bias"] == (1.0, 0.0)
    assert of["backbone.blocks.2.attn.qkv.weight"] == (0.5, 0.1)
    assert of["backbone.norm.bias"] == (0.5, 0.0)
    assert of["backbone.blocks.0.attn.qkv.weight"] == (0.125, 0.1)
    assert of["backbone.cls_token"] == (0.0625, 0.1)
    set_schedule(optimizer, lr=1.0, weight_decay=0.1, backbone_share=0.5)
    assert found.keys() == {id(p) for p in net.parameters()}
    assert {g["lr"] for g in optimizer.param_groups if g["of_backbone"]} == {0.25, 0.125, 0.0625, 0.03125}
    assert {g["lr"] for g in optimizer.param_groups if not g["of_backbone"]} == {1.0}


def test_ordinary_groups_keep_their_schedule():
    optimizer = make_optimizer("adamw", vit())
    set_schedule(optimizer, lr=0.3, weight_decay=0.2)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.3, 0.2), (0.3, 0.0)]


def test_train_last_blocks():
    backbone = vit()
    train_last(backbone, 1)
    moving = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert moving == {name for name in backbone.state_dict() if name.startswith(("blocks.2.", "norm."))}
    assert len([p for g in parameter_groups(backbone) for p in g["params"]]) == len(moving)
    with pytest.raises(ValueError, match=r"last 4.*3 blocks"):
        train_last(backbone, 4)


def test_head_warms_up_alone_by_hand():
    config = replace(tiny.CONFIG, adapt__warm_head="2 steps", adapt__init="x", optim__length="8 steps")
    shares = [Schedules(config, 5).at(step).backbone_share for step in range(6)]
    assert shares == [0, 0, 0, 0.5, 1, 1]
    assert Schedules(tiny.CONFIG, 5).at(0).backbone_share == 1


def test_pull_equals_the_naive_formula():
    torch.manual_seed(0)
    initial, crops = vit(1), torch.randn(3, 2, 3, 32, 32)
    student = torch.randn(3, 4, 24, requires_grad=True)
    pull = Pull(initial, 2.5)
    naive = torch.zeros(())
    with torch.no_grad():
        for b in range(3):
            for t in range(2):
                token = initial.eval()(crops[b, t][None]).cls_token[0]
                naive += 1 - F.cosine_similarity(student[b, t], token, dim=0)
    torch.testing.assert_close(pull(crops, student), 2.5 * naive / 6)
    pull(crops, student).backward()
    assert student.grad is not None
    assert student.grad[:, 2:].abs().sum() == 0  # Local crops are free.
    same = initial(crops.flatten(0, 1)).cls_token.unflatten(0, (3, 2))
    assert abs(pull(crops, same).item()) < 1e-5


# The name of a backbone builds one like it.


@pytest.mark.parametrize(
    "backbone",
    [VisionTransformer(40, 8, 4, 24, 2, 3, 2.0, pos_offset=0), TimmBackbone("resnet18")],
    ids=["vit", "timm"],
)
def test_a_backbone_is_built_by_its_name(backbone):
    config = replace(Config(), model__backbone=name_of(backbone), model__drop_path=0.0)
    again = network.build_backbone(config.model, 224)
    again.load_state_dict(backbone.state_dict())
    assert name_of(again) == name_of(backbone)


# LoRA.


def lora_learner() -> learner.Learner:
    pytest.importorskip("peft")
    config = replace(tiny.CONFIG, adapt__init="x", adapt__train="lora 4", model__backbone=name_of(vit()))
    return learner.make_learner(replace(config, model__drop_path=0.0), CPU, initial=vit(3).state_dict())


def test_lora_begins_as_the_network_and_reaches_every_block():
    made = lora_learner()
    images = torch.randn(2, 3, 32, 32)
    want = vit(3).eval().cls_tokens([images])[0]
    torch.testing.assert_close(made.network.backbone.eval().cls_tokens([images])[0], want)
    made.network.backbone.cls_tokens([images])[0].square().sum().backward()
    names = {name for name, p in made.network.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n in names if "lora_" not in n} == set()
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"blocks.{i}.{layer}.lora_B.default.weight" for i in range(3) for layer in layers}


def test_the_teacher_of_lora_follows_the_merged_student():
    made = lora_learner()
    torch.manual_seed(1)
    for name, parameter in made.network.backbone.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    images = torch.randn(2, 3, 32, 32)
    before = made.teacher.backbone.eval().cls_tokens([images])[0]
    want = made.network.backbone.eval().cls_tokens([images])[0]
    assert not torch.allclose(before, want, atol=1e-3)
    made.update_teacher(0.0)  # At momentum 0 the teacher is the student.
    assert isinstance(made.teacher.backbone, VisionTransformer)
    assert made.teacher.backbone.state_dict().keys() == vit().state_dict().keys()
    torch.testing.assert_close(made.teacher.backbone.cls_tokens([images])[0], want, rtol=1e-4, atol=1e-5)


# A run.


@pytest.fixture
def adapts(monkeypatch, weights, tmp_path):
    """Runs ``dino.pretrain`` from the weights, in a folder of its own."""
    monkeypatch.setattr(network, "build_backbone", tiny.build)

    def run(folder: str, val=VAL, **settings) -> dict:
        return dino.pretrain(TRAIN, tmp_path / folder, adapting(weights, **settings), val=val, quiet=True)

    return run


def test_the_backbone_stands_still_while_the_head_learns(adapts, weights, tmp_path):
    adapts("a", val=None, optim__length="2 steps", adapt__warm_head="1 steps", optim__warmup="0 steps")
    before = load(weights).state_dict()
    tiny.assert_same(dict(load(tmp_path / "a").state_dict()), dict(before))  # Steps 0 and 1: shares 0 and 0.
    adapts("b", val=None, optim__length="3 steps", adapt__warm_head="1 steps", optim__warmup="0 steps")
    after = load(tmp_path / "b").state_dict()
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model"]["backbone"].startswith("vit(img_size=32, patch_size=8")
    checkpoints = list((tmp_path / "b" / "checkpoints").iterdir())
    tiny.assert_same(dict(load(checkpoints[-1]).state_dict()), dict(after))


def test_a_run_that_goes_on_is_the_same_run(adapts, weights, tmp_path, monkeypatch):
    settings = {
        "adapt__pull": 1.0,
        "adapt__layer_decay": 0.7,
        "adapt__warm_head": "1 steps",
        "optim__length": "4 steps",
    }
    whole = adapts("whole", val=None, **settings)
    from test_pretrain import interrupt

    interrupt(monkeypatch, tmp_path / "parts", 2, adapting(weights, **settings))
    moved = weights.rename(tmp_path / "moved.safetensors")  # The same weights under another name.
    parts = dino.pretrain(TRAIN, tmp_path / "parts", adapting(moved, **settings), quiet=True)
    assert parts["loss"] == whole["loss"]
    tiny.assert_same(dict(load(tmp_path / "parts").state_dict()), dict(load(tmp_path / "whole").state_dict()))
    assert all("pull" in line for line in tiny.metrics(tmp_path / "parts") if "loss" in line)
    save_backbone(vit(seed=8), moved, Config().model, 32)
    with pytest.raises(ValueError, match="began from other weights"):
        dino.pretrain(TRAIN, tmp_path / "parts", adapting(moved, **settings), quiet=True)
    card = (tmp_path / "parts" / "model_card.md").read_text()
    assert "moved.safetensors" in card
    assert str(tmp_path) not in card


def test_the_guard_keeps_the_best_teacher_and_ends_the_run(adapts, tmp_path, monkeypatch):
    """Whatever the images say: the anchor's numbers are given here."""
    from dino.run import adapt as module

    values = {0: 80.0, 1: 79.5, 2: 78.0, 3: 77.0, 4: 76.0, 5: 79.0, 6: 79.0}
    taken = []

    def anchor(_, encoder) -> float:
        taken.append(copy.deepcopy(encoder.backbone.state_dict()))
        return values[len(taken) - 1]

    monkeypatch.setattr(module, "SHARES", ())
    monkeypatch.setattr(module.Anchor, "__call__", anchor)
    monkeypatch.setattr(module.knn, "run", lambda *_: {"knn_20_top1": 50.0})
    settings = {"run__knn_every": "1 steps", "adapt__anchor": "shapes:20x32", "adapt__max_loss": 1.0}
    results = adapts("run", **settings, optim__warmup="0 steps")
    assert results["steps"] == 4  # 78, 77, 76: three falls in a row, all below 79.
    assert results["kept_step"] == 1
    assert (results["anchor_before"], results["anchor"], results["anchor_at_the_end"]) == (80.0, 79.5, 76.0)
    tiny.assert_same(dict(load(tmp_path / "run").state_dict()), dict(taken[1]))
    warning = (tmp_path / "run" / "warnings.txt").read_text()
    assert "stopped after step 4 of 6" in warning
    assert adapts("run", **settings, optim__warmup="0 steps") == results  # The same command again: nothing to do.
    assert len(taken) == 5


def test_of_a_teacher_that_lost_too_much_a_part_is_kept(adapts, weights, tmp_path, monkeypatch):
    """Of the second teacher three quarters lose too much, a half does not; nothing of the first is good enough."""
    from dino.run import adapt as module

    anchors = iter([80.0, *[70.0] * 5, 78.0, 78.5, 79.2])
    scores = iter([50.0, 51.0, 53.0, 52.0])  # At the beginning, of both teachers, and of the half.
    taken = []

    def anchor(_, encoder) -> float:
        taken.append(copy.deepcopy(encoder.backbone.state_dict()))
        return next(anchors)

    plain = adapts("plain", optim__length="2 steps")
    teacher = dict(load(tmp_path / "plain").state_dict())
    monkeypatch.setattr(module.Anchor, "__call__", anchor)
    monkeypatch.setattr(module.knn, "run", lambda *_: {"knn_20_top1": next(scores)})
    settings = {"run__knn_every": "1 steps", "adapt__anchor": "shapes:20x32", "adapt__max_loss": 1.0}
    results = adapts("run", **settings, optim__length="2 steps")
    assert (results["kept_step"], results["kept_share"]) == (2, 0.5)
    assert (results["anchor"], results["knn_20_top1"], results["anchor_at_the_end"]) == (79.2, 52.0, 78.0)
    assert results["loss"] == plain["loss"]  # Measuring mixes changes nothing of the run.
    tiny.assert_same(dict(taken[6]), teacher)
    initial = load(weights).state_dict()
    half = {name: torch.lerp(initial[name], teacher[name], 0.5) for name in teacher}
    tiny.assert_same(dict(load(tmp_path / "run").state_dict()), half)
    tiny.assert_same(dict(taken[8]), half)


def test_without_a_good_teacher_the_initial_one_is_kept(adapts, weights, tmp_path, monkeypatch):
    from dino.run import adapt as module

    values = iter([80.0] + [10.0] * 20)
    monkeypatch.setattr(module.Anchor, "__call__", lambda *_: next(values))
    results = adapts("run", val=None, adapt__anchor="shapes:20x32", optim__length="2 steps")
    assert results["kept_step"] == 0
    tiny.assert_same(dict(load(tmp_path / "run").state_dict()), dict(load(weights).state_dict()))


def test_an_anchor_measures_what_it_says():
    from dino.encoder.encoder import open_encoder
    from dino.run.adapt import Anchor, best, keeps_falling, kept_neighbors

    encoder = open_encoder(vit(1), size=32, progress=False)
    labelled = Anchor("shapes:40x32", encoder)
    assert labelled.labelled
    assert labelled(encoder) == pytest.approx(dino.evaluate.knn(encoder, "shapes:40x32", k=(20,))["knn_20_top1"])
    torch.manual_seed(0)
    features = F.normalize(torch.randn(30, 8), dim=1)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    assert kept_neighbors(features, features @ turn) == 100
    # Two neighbours each of four points on a line: 1 2 | 0 2 | 1 3 | 2 1; then points 0 and 3 change places.
    line = torch.tensor([0.0, 0.1, 0.22, 0.35])
    circle = torch.stack([line.cos(), line.sin()], 1)
    # By hand: after the change the rows' neighbours are 1 2 | 3 2 | 1 0 | 2 1.
    # Common: row 0 both; row 1 only 2; row 2 only 1; row 3 both: 6 of 8.
    assert kept_neighbors(circle, circle[[3, 1, 2, 0]], k=2) == pytest.approx(75)

    def history(*values, start=80.0):
        return [{"step": i, "anchor": a} for i, a in enumerate([start, *values])]

    assert not keeps_falling(history(78.0, 77.0), 1.0)
    assert keeps_falling(history(79.5, 78.0, 77.0, 76.0), 1.0)
    assert not keeps_falling(history(78.0, 77.0, 77.0), 1.0)
    assert not keeps_falling(history(79.9, 79.5, 79.1), 1.0)
    assert best(history(79.0, 79.5, 78.9), 1.0)["step"] == 2


def test_settings_for_weights_need_weights(tmp_path):
    with pytest.raises(ValueError, match="--pull 1 is not allowed"):
        dino.pretrain(TRAIN, tmp_path / "x", replace(tiny.CONFIG, adapt__pull=1.0), quiet=True)
    for value in ("most", "last 0", "last", "lora x"):
        with pytest.raises(ValueError, match="--train"):
            AdaptConfig(train=value)


def test_the_command(weights, tmp_path, capsys):
    from dino.commands import cli

    pairs = zip(tiny.FLAGS[::2], tiny.FLAGS[1::2], strict=True)  # The backbone is that of the weights.
    own = ("--model.backbone", "--model.patch-size", "--model.drop-path")
    flags = [word for pair in pairs if pair[0] not in own for word in pair]
    command = ["adapt", str(weights), "shapes:40x32", "--out", str(tmp_path / "run"), "--json", *flags]
    assert cli.main([*command, "--train", "last 1", "--anchor", "shapes:20x32", "--max-loss", "100"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["steps"] == 6
    before, after = load(weights).state_dict(), load(tmp_path / "run").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert moved <= {name for name in before if name.startswith(("blocks.2.", "norm."))}
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["adapt"]["pull"] == 1.0  # The recipe's.
    assert config["adapt"]["init"] == str(weights)
    assert cli.main(["adapt", str(tmp_path / "nothing"), "shapes:40x32", "--out", str(tmp_path / "x")]) == 1
    assert "nothing" in capsys.readouterr().err


def command_for(weights: Path, out: Path) -> list[str]:
    """A guarded run of six steps that measures every two."""
    pairs = zip(tiny.FLAGS[::2], tiny.FLAGS[1::2], strict=True)
    own = ("--model.backbone", "--model.patch-size", "--model.drop-path", "--run.knn-every")
    flags = [word for pair in pairs if pair[0] not in own for word in pair]
    guard = ["--anchor", "shapes:20x32", "--max-loss", "30", "--run.knn-every", "2 steps"]
    return ["adapt", str(weights), "shapes:40x32", "--out", str(out), "--json", *flags, *guard]


def test_two_processes_guard_what_one_does(weights, tmp_path):
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{tests.parent / 'src'}:{tests}", "OMP_NUM_THREADS": "1"}
    start = {
        "one": [sys.executable],
        "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    }
    said = {}
    for name, words in start.items():
        call = [*words, str(tests / "tiny.py"), *command_for(weights, tmp_path / name)]
        done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        said[name] = json.loads(done.stdout.splitlines()[-1])
    assert said["one"]["kept_step"] == said["two"]["kept_step"]
    for name in ("anchor_before", "anchor_at_the_end", "knn_20_top1", "loss"):
        assert said["two"][name] == pytest.approx(said["one"][name], rel=1e-4), name
    measured = [[line for line in tiny.metrics(tmp_path / name) if "anchor" in line] for name in start]
    assert [line["step"] for line in measured[0]] == [line["step"] for line in measured[1]] == [0, 2, 4, 6]
    one, two = (load(tmp_path / name).state_dict() for name in start)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5)


def test_from_a_timm_folder_with_the_layout_of_dinov2_and_out_again(tmp_path, capsys):
    """Random weights: that they load, train and leave, not what they are worth."""
    from dino.commands import cli

    begin = tmp_path / "begin.safetensors"
    torch.manual_seed(0)
    options = {"img_size": 42, "embed_dim": 64, "depth": 2, "num_heads": 1}
    save_backbone(TimmBackbone("vit_small_patch14_reg4_dinov2", **options), begin, Config().model, 28)
    assert cli.main(["export", str(begin), "--to", "timm", "--out", str(tmp_path / "timm"), "--json"]) == 0
    assert (
        json.loads((tmp_path / "timm" / "config.json").read_text())["architecture"] == "vit_small_patch14_reg4_dinov2"
    )
    settings = {"crops__global_size": 28, "crops__local_size": 14, "adapt__pull": 1.0, "adapt__layer_decay": 0.75}
    config = adapting(tmp_path / "timm", **settings, adapt__warm_head="1 steps")
    results = dino.pretrain(TRAIN, tmp_path / "run", config, quiet=True)
    assert results["steps"] == 6
    before, after = load(begin).state_dict(), load(tmp_path / "run").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.blocks.0.attn.qkv.weight"], after["model.blocks.0.attn.qkv.weight"])
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path / "run"), "--to", "timm", "--out", str(tmp_path / "out"), "--json"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["difference_28x28"] < 1e-5


@pytest.mark.parametrize("to", ["reference", "hf", "onnx"])
def test_an_adapted_run_leaves_for_every_tool(to, tmp_path):
    for package in {"hf": ["transformers"], "onnx": ["onnx", "onnxruntime", "onnxscript"]}.get(to, []):
        pytest.importorskip(package)
    begin = tmp_path / "begin.safetensors"  # 64 numbers a head, as the released layout takes for granted.
    save_backbone(VisionTransformer(32, 8, 3, 64, 3, 1, 2.0), begin, Config().model, 32)
    dino.pretrain(TRAIN, tmp_path / "run", adapting(begin, optim__length="2 steps"), quiet=True)
    out = tmp_path / {"reference": "w.pth", "onnx": "w.onnx"}.get(to, to)
    # In a process of its own: the checks of shapes that the tests put into every function cannot be traced.
    call = [sys.executable, "-m", "dino", "export", str(tmp_path / "run"), "--to", to, "--out", str(out), "--json"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent / "src")}
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    exported = json.loads(done.stdout.splitlines()[-1])
    assert exported["opened_with"]
    assert exported["difference_32x32"] < 1e-5 < exported["largest_output"]
