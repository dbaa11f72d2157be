"""The backbone inside the package: it opens without a network, in every command, and has learnt something."""

import json
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

import dino
from dino.commands import cli
from dino.evaluation.knn import knn_classify
from dino.models.card import read_card
from dino.models.weight_files import EXAMPLE

VAL = Path(__file__).parents[2] / "shared" / "data" / "imagenette-val.tar"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("reached for the network"))


def test_it_is_small_and_described():
    assert EXAMPLE.stat().st_size <= 4 * 2**20
    card = EXAMPLE.with_name("model_card.md").read_text("utf-8")
    facts = read_card(EXAMPLE.with_name("model_card.md"))
    backbone = dino.load("example")
    assert facts.parameters == sum(parameter.numel() for parameter in backbone.parameters())
    assert "license: apache-2.0" in card
    assert "imagenette" in card
    assert "ImageNet" in card
    assert "replace `unknown`" not in card


def test_it_computes_in_single_precision():
    backbone = dino.load("example")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in backbone.state_dict().values())


def test_a_photo_becomes_features(tmp_path):
    torch.manual_seed(0)
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8), size=(300, 400), mode="bicubic")[0]
    photo = (pixels.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    for i in range(2):
        Image.fromarray(photo[:, :: 1 - 2 * i]).save(tmp_path / f"{i}.jpg")  # And its mirror image.
    features = dino.encoder("example").features(dino.open_source(str(tmp_path))).features
    assert features.shape == (2, dino.load("example").embed_dim)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    assert features[0] @ features[1] > 0.9


def test_commands_take_its_name(tmp_path, capsys):
    assert cli.main(["eval", "knn", "example", "shapes:80x64", "--k", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["settings"]["weights"] == "example"
    assert found["settings"]["crop"] == 64
    assert cli.main(["embed", "example", "shapes:20x64", "--out", str(tmp_path / "features.npz")]) == 0


@pytest.mark.skipif(not VAL.exists(), reason="without ../shared/data/imagenette-val.tar")
def test_it_knows_photos_it_never_saw():
    """400 photos name 400 others by their 10 nearest: by chance a tenth is right."""
    val = dino.open_source(str(VAL), "val")
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:800]
    chosen = val.subset(order.tolist())
    features, labels = dino.encoder("example").features(chosen).features, chosen.labels
    assert labels is not None
    found = knn_classify(features[:400], labels[:400], features[400:], labels[400:], ks=(10,))["knn_10_top1"]
    assert found > 60  # 66 when it was made; 31 of the same network untrained.
