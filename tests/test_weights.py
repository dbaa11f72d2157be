"""Every known weight file becomes a backbone, and nothing in a file is executed."""

import argparse
import functools
import http.server
import json
import os
import resource
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dino.config import Config, ModelConfig, Preprocessing, replace
from dino.models import weight_files
from dino.models.head import DINOHead
from dino.models.timm_backbone import TimmBackbone
from dino.models.vision_transformer import VisionTransformer, vit_tiny
from dino.models.weights import build_backbone, load, load_linear, load_with_preprocessing, save_backbone
from reference import FOLDER, scalars

LAYOUTS = scalars("14_layouts")
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """Downloads go to a folder of the test."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return VisionTransformer(**SMALL).eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# build_backbone


def test_build_backbone():
    config = ModelConfig(backbone="vit_tiny", patch_size=8, pos_offset=0.0, drop_path=0.2)
    backbone = build_backbone(config, img_size=64)
    assert backbone.pos_embed.shape == (1, 65, 192)
    assert (backbone.patch_size, backbone.pos_offset, backbone.drop_path_rates[-1]) == (8, 0.0, 0.2)
    assert isinstance(build_backbone(ModelConfig(backbone="timm:resnet10t"), img_size=64), TimmBackbone)
    with pytest.raises(ValueError, match=r"'vit_giant' is unknown: one of vit_nano, .*, or timm:NAME"):
        build_backbone(ModelConfig(backbone="vit_giant"), img_size=64)


# Our own files


@pytest.mark.parametrize("name", ["vit_tiny", "timm:resnet10t"])
@torch.no_grad()
def test_saved_and_loaded_backbones_are_the_same(name, tmp_path):
    config = ModelConfig(backbone=name, patch_size=8, pos_offset=0.0, drop_path=0.1)
    backbone = build_backbone(config, img_size=64).eval()
    save_backbone(backbone, tmp_path / "run" / "backbone.safetensors", config, 64, extra={"step": "12"})
    for source in (tmp_path / "run" / "backbone.safetensors", str(tmp_path / "run")):
        loaded = load(source)
        assert not loaded.training
        assert same(loaded.state_dict(), backbone.state_dict())
        images = torch.randn(1, 3, 48, 64)
        torch.testing.assert_close(loaded(images), backbone(images))
    with safe_open(tmp_path / "run" / "backbone.safetensors", framework="pt") as file:
        assert file.metadata()["step"] == "12"
        assert json.loads(file.metadata()["dino"])["backbone"] == name
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["backbone.safetensors"]
    if name == "vit_tiny":
        assert loaded.pos_offset == 0.0
        assert loaded.drop_path_rates[-1] == 0


def test_dimensions_are_in_the_file(tmp_path):
    odd = VisionTransformer(img_size=40, patch_size=8, in_chans=4, embed_dim=20, depth=1, num_heads=5, mlp_ratio=1.5)
    save_backbone(odd, tmp_path / "odd.safetensors", ModelConfig(), 40)
    loaded = load(tmp_path / "odd.safetensors")
    assert same(loaded.state_dict(), odd.state_dict())
    assert (loaded.num_heads, loaded.pos_offset) == (5, 0.1)


def test_a_failed_save_leaves_the_old_file(vit, tmp_path, monkeypatch):
    path = tmp_path / "b.safetensors"
    save_backbone(vit, path, ModelConfig(), 32)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        save_backbone(VisionTransformer(**SMALL), path, ModelConfig(), 32)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["b.safetensors"]


def our_checkpoint(path, config, student, teacher):
    head = DINOHead(teacher.embed_dim, 16, hidden_dim=8, bottleneck_dim=4)
    networks = {
        name: torch.nn.ModuleDict({"backbone": backbone, "head": head}).state_dict()
        for name, backbone in (("student", student), ("teacher", teacher))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": config.to_json(), "step": 3, **networks}, path)


def test_our_checkpoints_and_run_folders(tmp_path):
    config = replace(Config(), model__backbone="vit_tiny", crops__global_size=32, model__pos_offset=0.0)
    student, teacher, later = (build_backbone(config.model, 32) for _ in range(3))
    first, second = tmp_path / "run/checkpoints/1.pt", tmp_path / "run/checkpoints/2.pt"
    our_checkpoint(first, config, student, teacher)
    our_checkpoint(second, config, student, later)
    os.utime(first, (1, 1))
    loaded = load(first)
    assert same(loaded.state_dict(), teacher.state_dict())
    assert (loaded.pos_offset, loaded.drop_path_rates[-1], loaded.training) == (0.0, 0.0, False)
    assert same(load(first, checkpoint_key="student").state_dict(), student.state_dict())
    assert same(load(tmp_path / "run").state_dict(), later.state_dict())
    save_backbone(teacher, tmp_path / "run/backbone.safetensors", config.model, 32)
    assert same(load(tmp_path / "run").state_dict(), teacher.state_dict())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds neither backbone\.safetensors nor checkpoints"):
        load(tmp_path / "empty")


# How they are shown images


def strip_preprocessing(path):
    """The file as version 0.1 wrote it."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dino"])
    del header["preprocessing"]
    save_file(load_file(path), path, metadata={"dino": json.dumps(header)})


def test_preprocessing_travels_with_the_weights(vit, tmp_path):
    config = replace(
        Config(), crops__global_size=48, crops__mean=(0.1,), crops__std=(0.2, 0.3, 0.4), model__backbone="vit_nano"
    )
    expected = Preprocessing(48, 55, (0.1, 0.1, 0.1), (0.2, 0.3, 0.4))
    assert Preprocessing.of(config) == expected
    path = tmp_path / "run/backbone.safetensors"
    save_backbone(vit, path, ModelConfig(), expected)
    assert load_with_preprocessing(tmp_path / "run")[1] == expected
    nano = build_backbone(config.model, 48)
    our_checkpoint(tmp_path / "c.pt", config, nano, nano)
    assert load_with_preprocessing(tmp_path / "c.pt")[1] == expected
    odd = Preprocessing(32, 40, (0.1,) * 5, (0.2,) * 5, channels=5, pixel_range=(100.0, 4095.0))
    save_backbone(VisionTransformer(in_chans=5, **SMALL), path, ModelConfig(), odd)
    assert load_with_preprocessing(path)[1] == odd
    with pytest.raises(ValueError, match=r"mean \(0\.5,\) has 1 values for images of 3 channels"):
        Preprocessing(mean=(0.5,))


def test_preprocessing_of_files_that_do_not_say_it(vit, tmp_path):
    path = tmp_path / "run/backbone.safetensors"
    save_backbone(vit, path, ModelConfig(), 32)
    strip_preprocessing(path)
    assert load_with_preprocessing(path)[1] == Preprocessing(32, 37)
    config = replace(Config(), crops__global_size=64, crops__mean=(0.3,) * 3)
    (tmp_path / "run/config.json").write_text(config.to_json())
    assert load_with_preprocessing(path)[1] == Preprocessing(64, 73, (0.3,) * 3)
    torch.save(vit_tiny().state_dict(), tmp_path / "dino_vit.pth")
    assert load_with_preprocessing(tmp_path / "dino_vit.pth")[1] == Preprocessing(224, 256)


# The reference's files


def test_reference_checkpoint_with_all_it_holds(tmp_path):
    """As golden topic 14 describes it: prefixes, Namespace, optimiser with numpy learning rates."""
    spec = next(c for c in LAYOUTS["checkpoints"] if c["id"] == "bn_head")
    student, teacher = (
        {name: torch.randn(shape) if shape else torch.tensor(1) for name, shape in spec[part]}
        for part in ("student", "teacher")
    )
    args = argparse.Namespace(**dict.fromkeys(LAYOUTS["argument_names_in_args"], 1))
    args.arch, args.patch_size, args.global_crops_scale = spec["arch"], spec["patch"], (0.4, 1.0)
    group = {"lr": np.float64(0.0005), "weight_decay": np.float64(0.04), "betas": (0.9, 0.999), "params": [0]}
    state = {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(1, 1, 192)}}
    content = {
        "student": student,
        "teacher": teacher,
        "optimizer": {"state": state, "param_groups": [group]},
        "epoch": 7,
        "args": args,
        "dino_loss": {name: torch.zeros(shape) for name, shape in spec["dino_loss"]},
    }
    assert list(content) == spec["top_level_keys"][:6]
    torch.save(content, tmp_path / "checkpoint.pth")
    for key, part in (("teacher", teacher), ("student", student)):
        loaded = load(tmp_path / "checkpoint.pth", checkpoint_key=key)
        expected = {
            name.removeprefix("module.backbone."): t for name, t in part.items() if name.startswith("module.backbone.")
        }
        assert same(loaded.state_dict(), expected)
        assert (loaded.num_heads, loaded.patch_size, loaded.pos_offset, loaded.training) == (3, 16, 0.1, False)
    with pytest.raises(ValueError, match=r"has no 'ema' \(it holds student\.module\.backbone, .*checkpoint_key \(--"):
        load(tmp_path / "checkpoint.pth", checkpoint_key="ema")
    # What was allowed for this file is not allowed for the rest of the process.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("form", ["plain", "safetensors", "teacher without module.", "with a classifier"])
def test_reference_backbone_only_files(form, vit, tmp_path):
    state, path = vit.state_dict(), tmp_path / "dino_vit.pth"
    if form == "safetensors":
        path = tmp_path / "dino_vit.safetensors"
        save_file(state, path)
    elif form == "plain":
        torch.save(state, path)
    elif form == "with a classifier":
        torch.save(state | {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}, path)
    else:
        head = {"head.mlp.0.weight": torch.zeros(3, 3)}
        torch.save({"teacher": {f"backbone.{name}": t for name, t in state.items()} | head}, path)
    assert same(load(path).state_dict(), state)


def test_heads_that_are_not_64_wide(tmp_path):
    state = load_file(FOLDER / "01_vit_m0.safetensors")
    torch.save({"teacher": state, "args": argparse.Namespace(num_heads=3)}, tmp_path / "a.pth")
    assert load(tmp_path / "a.pth").num_heads == 3
    torch.save({"teacher": state}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="does not say how many heads its 48 channels have"):
        load(tmp_path / "b.pth")


@torch.no_grad()
def test_resnet50_of_torchvision(tmp_path):
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.resnet50().eval()
    torch.save(theirs.state_dict(), tmp_path / "dino_resnet50_pretrain.pth")
    ours = load(tmp_path / "dino_resnet50_pretrain.pth")
    images = torch.randn(1, 3, 64, 64)
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(ours(images).cls_token, theirs(images))


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "xcit_nano_12_p8_224"])
def test_xcit_of_its_authors(name, tmp_path):
    ours = TimmBackbone(name)
    theirs = {}
    for key, tensor in ours.model.state_dict().items():
        key = key.replace("pos_embed.", "pos_embeder.")
        if "cls_attn_blocks" in key and ".attn.q." in key:
            parts = [ours.model.state_dict()[key.replace(".q.", f".{letter}.")] for letter in "qkv"]
            theirs[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not ("cls_attn_blocks" in key and (".attn.k." in key or ".attn.v." in key)):
            theirs[key] = tensor
    assert "cls_attn_blocks.1.attn.qkv.weight" in theirs
    assert "pos_embeder.token_projection.weight" in theirs
    torch.save(theirs, tmp_path / "xcit.pth")
    loaded = load(tmp_path / "xcit.pth")
    assert loaded.name == name
    assert same(loaded.state_dict(), ours.state_dict())


# Files that do not fit


def test_wrong_keys_and_shapes_are_listed(vit, tmp_path):
    state = vit.state_dict()
    state["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
    state["surprise"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit its model") as error:
        load(tmp_path / "w.pth")
    assert "1 missing: norm.bias; 1 unexpected: surprise" in str(error.value)
    assert "1 of another shape: blocks.1.mlp.fc1.bias (3,) for (256,)" in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["whole file", "args"])
def test_a_pickle_that_executes_code_is_refused(where, protocol, vit, tmp_path):
    trap = tmp_path / "touched"
    path = tmp_path / "evil.pth"
    content = Malicious(trap) if where == "whole file" else {"teacher": vit.state_dict(), "args": Malicious(trap)}
    torch.save(content, path, pickle_protocol=protocol)
    with pytest.raises(
        ValueError, match=r"evil\.pth is (refused: reading it would execute code|not a file of)"
    ) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert not trap.exists()
    torch.load(path, weights_only=False)  # The trap works.
    assert trap.exists()


@pytest.mark.parametrize("name", ["text.pth", "empty.pt", "cut.pth", "text.safetensors"])
def test_files_that_are_not_weights(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"" if "empty" in name else b"These are not weights.")
    if "cut" in name:
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"is not a (file of weights|safetensors file)") as error:
        load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, vit, tmp_path):
    with torch.no_grad():
        vit.blocks[1].attn.qkv.weight[:2, 3] = value
    save_backbone(vit, tmp_path / "b.safetensors", ModelConfig(), 32)
    torch.save({"teacher": vit.state_dict()}, tmp_path / "c.pth")
    for name in ("b.safetensors", "c.pth"):
        with pytest.raises(ValueError, match=r"2 of 12288 numbers in blocks\.1\.attn\.qkv\.weight are not finite"):
            load(tmp_path / name)
    torch.save({"weight": torch.full((2, 3), value), "bias": torch.zeros(2)}, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="6 of 6 numbers in weight are not finite"):
        load_linear(tmp_path / "linear.pth")


@pytest.mark.parametrize(
    "claim, message",
    [
        ({"depth": 10**9}, "header says depth 1000000000, not 2"),
        ({"embed_dim": 400_000}, "header says embed_dim 400000, not 64"),
        ({"backbone": "timm:vit_small_patch16_224(embed_dim=9000, depth=40, num_heads=1)"}, "does not fit its model"),
        ({"backbone": "timm:vit_small_patch16_224(depth=1000000000)"}, "depth 1000000000 is not a size of a network"),
        ({"backbone": "timm:resnet50(__import__('os'))"}, r"is not timm:NAME or timm:NAME\(option=value"),
        ({"num_heads": 7}, "embed_dim 64 is not divisible by num_heads 7"),
        ({"surprise": 7}, "describes no vision transformer: .*surprise"),
        ({"backbone": 7}, "damaged header"),
    ],
)
def test_headers_are_believed_as_far_as_the_tensors_go(claim, message, vit, tmp_path):
    """A header that claims 120 GB allocates nothing."""
    path = tmp_path / "b.safetensors"
    save_backbone(vit, path, ModelConfig(), 32)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dino"])
    save_file(load_file(path), path, metadata={"dino": json.dumps(header | claim)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB.


def test_tensors_that_are_larger_than_their_file(vit, tmp_path):
    state = vit.state_dict()
    state["pos_embed"] = torch.zeros(1).expand(1, 1 + 30_000**2, 64)
    torch.save(state, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 1_000_000
    with pytest.raises(ValueError, match="pos_embed claims 57600000064 numbers that the file does not hold"):
        load(tmp_path / "w.pth")


def test_weights_of_something_else(tmp_path):
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"holds no known backbone .*its keys: conv\.weight"):
        load(tmp_path / "a.pth")
    torch.save([torch.zeros(2)], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="holds a list, not weights"):
        load(tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"'dino_vits17' is neither a file, .* nor released weights: dino_vits16"):
        load("dino_vits17")


# Downloads


@pytest.fixture
def served(tmp_path):
    """A folder and its address on this computer."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_released_weights_are_downloaded_once(served, hub, monkeypatch):
    folder, address = served
    monkeypatch.setattr(weight_files, "RELEASED_URL", address)
    backbone = vit_tiny(img_size=32)
    (folder / "dino_deitsmall16_pretrain").mkdir()
    file = folder / "dino_deitsmall16_pretrain" / "dino_deitsmall16_pretrain.pth"
    torch.save(backbone.state_dict(), file)
    assert same(load("dino_vits16").state_dict(), backbone.state_dict())
    file.unlink()
    assert same(load("dino_vits16").state_dict(), backbone.state_dict())
    assert os.listdir(hub) == ["dino_deitsmall16_pretrain.pth"]
    with pytest.raises(ConnectionError, match=r"could not download http\S+dino_vitbase8_pretrain.pth \(.*404") as error:
        load("dino_vitb8")
    assert str(error.value).endswith(f"put the file at {hub / 'dino_vitbase8_pretrain.pth'} by hand")
    assert os.listdir(hub) == ["dino_deitsmall16_pretrain.pth"]


def test_urls(served, vit, tmp_path):
    folder, address = served
    for run, model in (("a", vit), ("b", VisionTransformer(**SMALL))):  # One file name, two addresses.
        save_backbone(model, folder / run / "backbone.safetensors", ModelConfig(), 32)
        assert same(load(f"{address}{run}/backbone.safetensors?download=true").state_dict(), model.state_dict())
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    assert same(load((tmp_path / "x.pth").as_uri()).state_dict(), vit.state_dict())
