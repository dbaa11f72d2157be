"""Few labels: the objective's optimum by its gradient, subsets, the whole protocol."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.commands import cli
from dino.commands.lowshot import Lowshot
from dino.config import ModelConfig
from dino.data.sources import open_source
from dino.encoder.encoder import Encoder
from dino.evaluation import lowshot
from dino.evaluation.lowshot import logistic_regression, stratified_subset
from dino.models.backbone import Tokens
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import LowshotOptions

PLAIN = {"resize": 16, "size": 16, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def random_set(n, d, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (n - classes,), generator=generator)])
    centres = torch.randn(classes, d, generator=generator, dtype=torch.float64)
    features = centres[labels] + 1.5 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=1), labels


def objective(weight, features, labels, strength):
    """As the authors' solver states it: mean of the losses, plus half lambda times the squared weights."""
    n = len(labels)
    total = 0.0
    for x, y in zip(features, labels.tolist(), strict=True):
        scores = weight @ x
        total = total + torch.logsumexp(scores, 0) - scores[y]
    return total / n + strength / n / 2 * (weight**2).sum()


@given(
    seed=st.integers(0, 1000),
    classes=st.integers(2, 5),
    strength=st.sampled_from([0.01, 0.1, 1.0]),
    n=st.integers(6, 40),
)
@settings(max_examples=8, deadline=None)
def test_the_gradient_of_the_objective_is_zero_at_the_solution(seed, classes, strength, n):
    features, labels = random_set(n, 6, classes, seed)
    weight = logistic_regression(features, labels, classes, strength).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(weight, features, labels, strength), weight)
    assert gradient.abs().max() < 2e-5
    # The check sees a penalty that is off by a factor of two.
    (wrong,) = torch.autograd.grad(objective(weight, features, labels, 2 * strength), weight)
    assert wrong.abs().max() > 1e-4


def test_two_classes_worked_by_hand():
    """One feature, x = 1 of class 1 and x = -1 of class 0: margin m = 2 w, and 2 sigma(-m) = lambda m by symmetry."""
    weight = logistic_regression(torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0]), 2)
    assert weight[0] == -weight[1]
    margin, penalty = float(weight[1] - weight[0]), 0.1 / 2
    assert 2 / (1 + math.exp(margin)) == pytest.approx(penalty * margin, abs=1e-5)


def test_classes_without_images_get_no_weight():
    features, labels = random_set(20, 4, 3, 0)
    weight = logistic_regression(features, 2 * labels, 6)
    assert (weight[1::2] == 0).all()
    assert torch.equal(weight[::2], logistic_regression(features, labels, 3))
    with pytest.raises(ValueError, match="at least two classes"):
        logistic_regression(features, labels * 0, 3)


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    fraction=st.floats(0.001, 1),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_subsets_are_stratified_and_nested(counts, fraction, seed):
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order]
    rows = stratified_subset(labels, fraction=fraction, seed=seed)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert labels[rows].bincount().tolist() == [max(1, round(fraction * count)) for count in counts]
    assert set(rows.tolist()) >= set(stratified_subset(labels, fraction=fraction / 2, seed=seed).tolist())
    few = stratified_subset(labels, per_class=3, seed=seed)
    assert labels[few].bincount().tolist() == [min(3, count) for count in counts]


def test_subsets_differ_by_seed_and_bad_ones_are_named():
    labels = torch.arange(3).repeat(100)
    drawn = {tuple(stratified_subset(labels, per_class=5, seed=seed).tolist()) for seed in range(5)}
    assert len(drawn) == 5
    for arguments in ({}, {"fraction": 0.1, "per_class": 2}):
        with pytest.raises(ValueError, match="either a fraction"):
            stratified_subset(labels, **arguments)
    for arguments in ({"fraction": 0.0}, {"fraction": 1.5}, {"per_class": 0}):
        with pytest.raises(ValueError, match=r"above 0 to 1, or at least 1"):
            stratified_subset(labels, **arguments)


class MeanColor(torch.nn.Module):
    embed_dim, patch_size = 3, 8

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, images):
        self.images += len(images)
        patches = F.avg_pool2d(images, 8).permute(0, 2, 3, 1)
        return Tokens(patches.mean((1, 2)), patches)


@pytest.fixture
def folder(tmp_path):
    """Colours from red to blue; one in five is nearer to the other class, and a subset of those misleads."""
    for part, count in (("train", 40), ("val", 20)):
        for name in ("blue", "red"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                much, little = 250 - 150 * i // count, 10 + 150 * i // count
                color = (little, 0, much) if name == "blue" else (much, 0, little)
                Image.new("RGB", (16, 16), color).save(tmp_path / part / name / f"{i:02}.png")
    return tmp_path


def test_the_whole_protocol(folder):
    source = open_source(folder)
    train, test = source.part("train"), source.part("val")
    backbone = MeanColor()
    encoder = Encoder(backbone, **PLAIN)
    got = lowshot.run(encoder, train, test, LowshotOptions(per_class=1, subsets=6))
    assert backbone.images <= 6 * 2 + 40, "features of images that no subset holds"
    alone = [lowshot.run(encoder, train, test, LowshotOptions(per_class=1, subsets=1, seed=s)) for s in range(6)]
    values = torch.tensor([a["lowshot_top1"] for a in alone])
    assert got["lowshot_top1"] == pytest.approx(float(values.mean()))
    assert got["lowshot_top1_std"] == pytest.approx(float(values.std()), abs=1e-4)
    assert got["lowshot_top1_std"] > 0
    assert {a["lowshot_top1_std"] for a in alone} == {0.0}
    assert (got["lowshot_top5"], got["lowshot_images"]) == (100, 2)
    full = lowshot.run(encoder, train, test, LowshotOptions(fraction=1.0, subsets=1))
    assert full["lowshot_top1"] == pytest.approx(80, abs=6)
    assert full["lowshot_top1"] > got["lowshot_top1"]


def test_broken_images_and_unknown_classes(folder, caplog):
    (folder / "train" / "red" / "07.png").write_bytes(b"no image")
    source = open_source(folder)
    encoder = Encoder(MeanColor(), **PLAIN)
    got = lowshot.run(encoder, source.part("train"), source.part("val"), LowshotOptions(fraction=1.0, subsets=1))
    assert got["lowshot_images"] == 79
    assert got["lowshot_top1"] == pytest.approx(80, abs=6)
    assert "1 of 80 images" in caplog.text
    blue = source.part("train").subset(range(40))
    with pytest.raises(ValueError, match="1 classes of the test images have no train images: red"):
        lowshot.run(encoder, blue, source.part("val"), LowshotOptions(per_class=1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"subsets": 0}, "--subsets 0 is not allowed: at least 1"),
        ({"strength": 0.0}, "--strength 0.0 is not allowed: a number above 0"),
        ({"fraction": 1.5}, "--fraction 1.5 is not allowed: above 0, at most 1"),
        ({"fraction": 0.0}, "--fraction 0.0 is not allowed: above 0, at most 1"),
        ({"per_class": 0}, "--per-class 0 is not allowed: at least 1 image"),
        ({"fraction": 0.1, "per_class": 2}, "--fraction 0.1 --per-class 2 is not allowed: one of the two"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LowshotOptions(**options)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    save_backbone(VisionTransformer(16, 8, 3, 24, 1, 3), tmp_path / "b.safetensors", ModelConfig(), 16)
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"lowshot": Lowshot}})
    arguments = [str(tmp_path / "b.safetensors"), str(folder), "--resize", "16", "--crop", "16", "--json"]
    assert cli.main(["eval", "lowshot", *arguments, "--fraction", "0.1", "--subsets", "2", "--device", "cpu"]) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert got["lowshot_images"] == 8
    assert (got["settings"]["labels"], got["settings"]["strength"]) == ("0.1 of every class", 0.1)
    train_only = [arguments[0], str(folder / "train"), *arguments[2:]]
    assert cli.main(["eval", "lowshot", *train_only, "--per-class", "3", "--device", "cpu"]) == 0
    settings = json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]
    assert (settings["labels"], settings["test_images"], settings["train_images"]) == ("3 per class", 8, 72)
