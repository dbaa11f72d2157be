"""Anomalies by the nearest patch of normal images: by hand, and by the command."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.commands import cli
from dino.config import Config
from dino.evaluation import anomaly
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone


def test_distances_equal_the_naive_formula():
    torch.manual_seed(0)
    features, bank = F.normalize(torch.randn(2, 3, 4, 5), dim=-1), F.normalize(torch.randn(7, 5), dim=-1)
    naive = torch.tensor([[[min(1 - float(f @ b) for b in bank) for f in row] for row in image] for image in features])
    torch.testing.assert_close(anomaly.distances(features, bank), naive, rtol=1e-4, atol=1e-5)


def test_patches_are_averaged_with_those_around_by_hand():
    tokens = torch.zeros(1, 2, 2, 2)
    tokens[0, 0, 0] = torch.tensor([3.0, 0.0])
    tokens[0, 1, 1] = torch.tensor([0.0, 4.0])
    # Of 2 x 2 patches each sees all: the mean is (0.75, 1), of length 1.25.
    found = anomaly.patch_features(tokens, 3)
    torch.testing.assert_close(found, torch.tensor([0.6, 0.8]).expand(1, 2, 2, 2))
    torch.testing.assert_close(anomaly.patch_features(tokens, 1)[0, 0, 0], torch.tensor([1.0, 0.0]))


def test_the_command_finds_what_is_not_normal(tmp_path, capsys):
    torch.manual_seed(0)
    weights = tmp_path / "w.safetensors"
    save_backbone(VisionTransformer(32, 8, 3, 24, 2, 2), weights, Config().model, 32)
    generator = torch.Generator().manual_seed(0)
    for part, name, count in (("train", "good", 6), ("test", "good", 4), ("test", "crack", 4)):
        folder = tmp_path / "data" / part / name
        folder.mkdir(parents=True)
        for i in range(count):
            image = (100 + 20 * torch.rand(40, 40, 3, generator=generator)).byte()
            if name == "crack":
                image[16:26, 16:26] = torch.tensor([255, 0, 0], dtype=torch.uint8)
            Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    bank, table, maps = tmp_path / "bank.safetensors", tmp_path / "scores.csv", tmp_path / "maps"
    common = ["--device", "cpu", "--json"]
    assert (
        cli.main(["anomaly", "fit", str(weights), str(tmp_path / "data"), "--out", str(bank), "--bank", "90", *common])
        == 0
    )
    fitted = json.loads(capsys.readouterr().out)
    assert (fitted["images"], fitted["patches"]) == (6, 90)  # 15 of the 16 patches of every image.
    score = ["anomaly", "score", str(weights), str(tmp_path / "data"), "--bank", str(bank)]
    assert cli.main([*score, "--out", str(table), "--maps", str(maps), *common]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["auroc"] == 100
    assert results["anomalous"] == 4
    rows = list(csv.DictReader(table.open()))
    assert all("crack" in row["image"] for row in rows[:4])
    assert len(list(maps.iterdir())) == 8
    assert cli.main([*score, "--normal", "fine", *common]) == 1
    assert "--normal fine" in capsys.readouterr().err
    assert cli.main([*score, "--resize", "64", "--crop", "64", *common]) == 1
    assert "other settings" in capsys.readouterr().err


def test_what_is_no_bank_is_refused(tmp_path):
    from dino.encoder.encoder import open_encoder

    encoder = open_encoder(VisionTransformer(32, 8, 3, 24, 2, 2), size=32)
    path = tmp_path / "bank.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no bank"):
        anomaly.load_bank(path, encoder)
    anomaly.save_bank(path, torch.eye(24), encoder, anomaly.AnomalyOptions(), 3)
    assert torch.equal(anomaly.load_bank(path, encoder)[0], torch.eye(24))
    with pytest.raises(ValueError, match="other weights"):
        anomaly.load_bank(path, open_encoder(VisionTransformer(32, 8, 3, 24, 2, 2), size=32))
