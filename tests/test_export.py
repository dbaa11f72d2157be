"""Weights for other tools, opened with them: the same outputs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from dino.commands.cli import main
from dino.config import ModelConfig, Preprocessing
from dino.models.card import CardFacts, read_card, write_card
from dino.models.export import export
from dino.models.exported import difference, outputs
from dino.models.timm_backbone import TimmBackbone
from dino.models.vision_transformer import VisionTransformer, vit_small
from dino.models.weights import load, load_with_preprocessing, open_weights, save_backbone

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
SHOWN = Preprocessing(32, 40, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
FILES = {"reference": "w.pth", "safetensors": "w.safetensors", "timm": "timm", "hf": "hf"}


def randomised(network):
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.05 * (torch.rand_like(tensor) - 0.3)
    return network.eval()


@pytest.fixture
def saved(tmp_path):
    """Writes weights as a run does, and gives their path."""

    def save(backbone, name="vit"):
        path = tmp_path / "run" / "backbone.safetensors"
        save_backbone(backbone, path, ModelConfig(backbone=name), SHOWN)
        facts = CardFacts.of(backbone, SHOWN, images=1234, classes=None, recipe="short")
        write_card(path.parent / "model_card.md", facts)
        return path

    return save


def images(height=32, width=32, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def exported(capsys, path, to, out, *flags):
    """Runs the command and gives its results."""
    code = main(["export", str(path), "--to", to, "--out", str(out), "--json", *flags])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out.splitlines()[-1])


@pytest.mark.parametrize("to", FILES)
def test_the_command_measures_what_it_wrote(to, saved, tmp_path, capsys):
    pytest.importorskip("transformers" if to == "hf" else "timm")
    out, vit = tmp_path / FILES[to], randomised(VisionTransformer(**SMALL))
    results = exported(capsys, saved(vit), to, out)
    assert results["difference_32x32"] < 1e-5 < results["largest_output"]
    assert results["opened_with"]
    assert results["read"] == "dino: 30 tensors read, 0 left"
    elsewhere = results["difference_96x160"]
    resized = [note for note in results["notes"] if "resizes the table of positions" in note]
    if to in ("timm", "hf"):
        assert elsewhere > 1e-3
        assert f"outputs differ by up to {elsewhere:.2g} at 96 x 160" in resized[0]
    else:
        assert elsewhere == 0
        assert not resized
    card = out / "README.md" if to in ("timm", "hf") else tmp_path / "w_card.md"
    assert results["files"][-1] == str(card)
    assert (read_card(card).images, read_card(card).recipe) == (1234, "short")
    assert f'"{out.name}"' in card.read_text() or f"local-dir:{out.name}" in card.read_text()
    # What was written is read here too, with how images are shown.
    backbone, preprocessing = load_with_preprocessing(out)
    assert type(backbone) is VisionTransformer
    if to != "reference":
        assert preprocessing == SHOWN
    again = outputs(backbone, images(48, 64))
    if to != "hf":  # Its layout does not say how positions are resized.
        assert difference(outputs(vit, images(48, 64)), again) < 1e-5


def test_timm_opens_the_folder(tmp_path, capsys):
    vit = randomised(VisionTransformer(**SMALL, in_chans=4, pos_offset=0.0))
    path = tmp_path / "b.safetensors"
    save_backbone(vit, path, ModelConfig(), Preprocessing(32, 40, (0.1,) * 4, (0.2,) * 4, 4))
    exported(capsys, path, "timm", tmp_path / "out")
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images(channels=4)), vit(images(channels=4)).cls_token)
    config = timm.data.resolve_model_data_config(network)
    assert (config["input_size"], tuple(config["mean"]), config["crop_pct"]) == ((4, 32, 32), (0.1,) * 4, 0.8)
    assert config["interpolation"] == "bicubic"


@pytest.mark.parametrize("name", ["resnet10t", "vit_small_patch14_reg4_dinov2", "convnext_atto"])
def test_networks_of_timm_to_timm(name, saved, tmp_path, capsys):
    options = {"img_size": 42, "embed_dim": 64, "depth": 1, "num_heads": 1} if "vit" in name else {}
    backbone = randomised(TimmBackbone(name, **options))
    results = exported(capsys, saved(backbone), "timm", tmp_path / "out")
    assert results["difference_32x32" if not options else "difference_28x28"] < 1e-5
    assert results["notes"] == []
    again = load(tmp_path / "out")
    assert difference(outputs(backbone, images(42, 42)), outputs(again, images(42, 42))) < 1e-5


def test_segmentation_models_take_the_timm_folder(saved, tmp_path, capsys):
    smp = pytest.importorskip("segmentation_models_pytorch")
    exported(capsys, saved(randomised(TimmBackbone("resnet10t"))), "timm", tmp_path / "resnet")
    unet = smp.Unet(f"tu-local-dir:{tmp_path / 'resnet'}", encoder_weights="imagenet", classes=2)
    ours = load_file(tmp_path / "resnet" / "model.safetensors")
    theirs = {name.removeprefix("model."): tensor for name, tensor in unet.encoder.state_dict().items()}
    assert torch.equal(theirs["layer1.0.conv1.weight"], ours["layer1.0.conv1.weight"])
    exported(capsys, saved(randomised(vit_small(img_size=32, patch_size=8))), "timm", tmp_path / "vit")
    dpt = smp.DPT(f"tu-local-dir:{tmp_path / 'vit'}", encoder_weights="imagenet", encoder_depth=4, classes=2)
    with torch.no_grad():
        assert dpt.eval()(images()).shape == (2, 2, 32, 32)


def test_the_image_processor_of_hugging_face_is_ours(saved, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    exported(capsys, saved(randomised(VisionTransformer(**SMALL))), "hf", tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((180, 120), Image.Resampling.BICUBIC)
    shown = processor(image, return_tensors="pt")["pixel_values"]
    small = image.resize((60, 40), Image.Resampling.BICUBIC).crop((14, 4, 46, 36))
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (SHOWN.mean, SHOWN.std))
    assert shown.shape == (1, 3, 32, 32)
    assert ((shown * std + mean) - expected).abs().max() <= 1.5 / 255


def test_resnets_to_torchvision(saved, tmp_path, capsys):
    import torchvision

    backbone = randomised(TimmBackbone("resnet18"))
    exported(capsys, saved(backbone), "reference", tmp_path / "w.pth")
    network = torchvision.models.resnet18()
    network.fc = torch.nn.Identity()
    network.load_state_dict(torch.load(tmp_path / "w.pth"))
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images()), backbone(images()).cls_token)


def test_what_a_layout_cannot_hold_is_refused(saved, tmp_path, capsys):
    def refused(to, out, message, *flags, backbone=None):
        path = saved(backbone or VisionTransformer(**SMALL))
        assert main(["export", str(path), "--to", to, "--out", str(tmp_path / out), *flags]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    refused("hf", "a", "is no plain vision transformer, which --to hf writes", backbone=TimmBackbone("resnet10t"))
    refused("reference", "b.pth", "timm:convnext_atto has no released layout", backbone=TimmBackbone("convnext_atto"))
    two = VisionTransformer(**{**SMALL, "num_heads": 2})
    refused("reference", "b.pth", "does not say the number of heads: readers would take 1, this network", backbone=two)
    refused("onnx", "c.onnx", "--size 30 32 is not allowed: multiples of the patch of 8 pixels", "--size", "30", "32")
    refused("onnx", "c.onnx", "--batch -1 is not allowed", "--batch", "-1")
    refused("timm", "d", "--size and --batch are of --to onnx", "--size", "32", "32")
    (tmp_path / "file").write_text("")
    refused("timm", "file", "is a file: --to timm writes a folder")
    refused("safetensors", "run", "is a folder: --to safetensors writes a file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]


def test_weights_of_others_get_no_card_that_claims_dino(tmp_path):
    torch.save({"model": timm.create_model("deit_tiny_patch16_224", img_size=32).state_dict()}, tmp_path / "deit.pth")
    assert main(["export", str(tmp_path / "deit.pth"), "--to", "timm", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_notes_say_what_is_lost(tmp_path):
    vit = randomised(VisionTransformer(**SMALL, pos_offset=0.0))
    vit.norm.eps = 1e-12
    shown = Preprocessing(32, 40, pixel_range=(100.0, 4095.0))
    save_backbone(vit, tmp_path / "b.safetensors", ModelConfig(), shown)
    weights = open_weights(tmp_path / "b.safetensors")
    notes = export(weights, "reference", tmp_path / "w.pth").notes
    assert "raw values from 100 to 4095" in notes[0]
    assert "readers add 0.1, this network 0" in notes[1]
    assert "config.json cannot say it" in export(weights, "timm", tmp_path / "out").notes[1]


ONNX = """
import sys, pathlib, torch, onnxruntime
from dino.commands.cli import main
folder = pathlib.Path(sys.argv[1])
for flags in (["--size", "24", "40"], ["--batch", "1"]):
    assert main(["export", str(folder / "run"), "--to", "onnx", "--out", str(folder / "w.onnx"), "--json", *flags]) == 0
    session = onnxruntime.InferenceSession(folder / "w.onnx")
    print([(i.name, i.shape) for i in [*session.get_inputs(), *session.get_outputs()]])
"""


def test_onnx(saved, tmp_path):
    """In a process of its own: torch's exporter and the shape checks of these tests do not go together."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    saved(randomised(VisionTransformer(**SMALL)))
    done = subprocess.run([sys.executable, "-c", ONNX, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("{", "["))]
    free, fixed = json.loads(lines[0]), json.loads(lines[2])
    assert free["difference_24x40"] < 1e-5  # Three images, where two were used to write it; a table of 3 x 5 positions.
    assert fixed["difference_32x32"] < 1e-5
    assert lines[1] == (
        "[('images', ['batch', 3, 24, 40]), ('cls_token', ['batch', 64]), ('patch_tokens', ['batch', 3, 5, 64])]"
    )
    assert lines[3] == "[('images', [1, 3, 32, 32]), ('cls_token', [1, 64]), ('patch_tokens', [1, 4, 4, 64])]"
    assert read_card(tmp_path / "w_card.md").images == 1234
