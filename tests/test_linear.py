"""Linear probes: the reference's numbers, torch's own SGD, many at once like each alone, files, the whole protocol."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import reference
from dino.commands import cli
from dino.commands.linear import Linear
from dino.config import ModelConfig
from dino.data.classes import numbered_as, same_classes
from dino.data.sources import open_source
from dino.encoder.encoder import Encoder, condense
from dino.evaluation import linear
from dino.evaluation.probes import (
    Labelled,
    Probe,
    accuracies,
    cosine_lr,
    linear_features,
    probe_step,
    read_probe,
    save_probe,
    train_probes,
)
from dino.models.backbone import Tokens
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import LinearOptions

FACTS = reference.scalars("09_linear")
PLAIN = {"resize": 16, "size": 16, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def golden_layers():
    arrays = reference.arrays("09_linear")
    return [arrays[f"tokens/{block}"] for block in range(FACTS["depth"])]


def test_features_equal_the_reference():
    arrays = reference.arrays("09_linear")
    compared = 0
    for facts in FACTS["layouts"]:
        features = linear_features(condense(golden_layers()), facts["n_last_blocks"], facts["avgpool_patchtokens"])
        if "key" in facts:
            assert features.shape == (FACTS["B"], facts["dim"])
            torch.testing.assert_close(features, arrays[facts["key"]], rtol=0, atol=1e-6)
            compared += 1
        else:  # The reference fails; here older blocks come before the alternating pair.
            plain = linear_features(condense(golden_layers()), facts["n_last_blocks"])
            pair = linear_features(condense(golden_layers()), 1, avgpool=True)
            assert torch.equal(features, torch.cat([plain[:, : -FACTS["D"]], pair], 1))
    assert compared == 4


def test_features_of_the_last_blocks_alone_are_the_same():
    all_blocks = condense(golden_layers())
    for n in (1, 2, 4):
        alone = condense(golden_layers()[-n:])
        assert torch.equal(linear_features(alone, n, True), linear_features(all_blocks, n, True))
    with pytest.raises(ValueError, match="n_last_blocks 5 is not allowed: there are 4"):
        linear_features(all_blocks, 5)


def test_training_equals_the_reference():
    arrays, facts = reference.arrays("09_linear"), FACTS["probe"]
    features, labels = arrays["probe/features"], arrays["probe/labels"]
    weight = torch.cat([arrays["probe/init_weight"], arrays["probe/init_bias"][:, None]], 1)[None]
    velocity = torch.zeros_like(weight)
    judged = Labelled(features[:, None], labels)
    for epoch in range(facts["epochs"]):
        log = facts["epochs_log"][epoch]
        lr = cosine_lr(facts["effective_lr"], epoch, facts["epochs"])
        assert lr == pytest.approx(log["train"]["lr"], abs=1e-12)
        losses = [
            probe_step(weight, velocity, x, y, torch.tensor([lr]), facts["momentum"])
            for x, y in zip(features.split(facts["batch"]), labels.split(facts["batch"]), strict=True)
        ]
        assert float(torch.stack(losses).mean()) == pytest.approx(log["train"]["loss"], abs=3e-6)
        expected = arrays[f"probe/weight_after_epoch{epoch}"], arrays[f"probe/bias_after_epoch{epoch}"]
        torch.testing.assert_close(weight[0, :, :-1], expected[0], rtol=0, atol=3e-6)
        torch.testing.assert_close(weight[0, :, -1], expected[1], rtol=0, atol=3e-6)
        (accuracy,) = accuracies([Probe(1.0, 1, False)], [weight[0]], judged, tile=5)
        assert accuracy.tolist() == pytest.approx([log["val"]["acc1"], log["val"]["acc5"]], abs=1e-4)
        loss = F.cross_entropy(F.linear(features, weight[0, :, :-1], weight[0, :, -1]), labels)
        assert float(loss) == pytest.approx(log["val"]["loss"], abs=3e-6)


def random_tokens(n=24, m=5, d=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(n, m, d, generator=generator, dtype=torch.float64)
    return Labelled(tokens, torch.randint(classes, (n,), generator=generator))


@given(seed=st.integers(0, 1000), batch=st.sampled_from([6, 12]), epochs=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_probes_trained_together_are_torchs_sgd_alone(seed, batch, epochs):
    data = random_tokens(seed=seed)
    probes = [Probe(lr, n, pool) for lr in (10.0, 0.1) for n in (1, 4) for pool in (False, True)]
    steps = len(data.labels) // batch
    batches = [Labelled(data.tokens[i : i + batch], data.labels[i : i + batch]) for i in range(0, steps * batch, batch)]
    *_, together = train_probes(
        batches * epochs,
        probes,
        epochs=epochs,
        steps_per_epoch=steps,
        batch_size=batch,
        num_classes=4,
        seed=seed,
    )
    # The first weights: what is left after one epoch in which nothing is learned.
    still = [probe._replace(lr=0.0) for probe in probes]
    (first,) = train_probes(batches, still, epochs=1, steps_per_epoch=steps, batch_size=batch, num_classes=4, seed=seed)
    for probe, initial, got in zip(probes, first, together, strict=True):
        assert torch.equal(initial[:, -1], torch.zeros(4, dtype=torch.float64))
        layer = torch.nn.Linear(initial.shape[1] - 1, 4, dtype=torch.float64)
        layer.load_state_dict({"weight": initial[:, :-1], "bias": initial[:, -1]})
        optimizer = torch.optim.SGD(layer.parameters(), probe.lr * batch / 256, momentum=0.9, weight_decay=0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
        for _ in range(epochs):
            for tokens, labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(layer(linear_features(tokens, *probe[1:])), labels).backward()
                optimizer.step()
            schedule.step()
        torch.testing.assert_close(got[:, :-1], layer.weight.data, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got[:, -1], layer.bias.data, rtol=1e-9, atol=1e-12)


def test_the_first_weights_are_as_released():
    data = Labelled(torch.zeros(1, 2, 500), torch.zeros(1, dtype=torch.long))
    (first,) = train_probes([data], [Probe(0.0, 1, False)], epochs=1, steps_per_epoch=1, batch_size=1, num_classes=40)
    assert float(first[0][:, :-1].std()) == pytest.approx(0.01, rel=0.03)


def test_accuracies_by_hand():
    tokens = torch.eye(3)[:, None]  # Three images, three features; class scores are the rows themselves.
    weight = torch.cat([torch.eye(3), torch.zeros(3, 1)], 1)
    biased = weight.clone()
    biased[2, -1] = 5.0  # Says class 2 whatever it sees.
    probes = [Probe(1.0, 1, False), Probe(2.0, 1, False)]
    got = accuracies(probes, [weight, biased], Labelled(tokens, torch.tensor([0, 1, 1])), tile=2)
    assert got.flatten().tolist() == pytest.approx([200 / 3, 100, 0, 100])


class Blocks(torch.nn.Module):
    """Three blocks: noise, the mean colour, and little of it; so the features that are chosen show in the result."""

    embed_dim, patch_size = 3, 8

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images):
        return Tokens(self.get_intermediate_layers(images)[0][:, 0], torch.zeros(len(images), 2, 2, 3))

    def get_intermediate_layers(self, images, n=1):
        assert not self.training
        colors = F.avg_pool2d(images, 8).flatten(2).mT * self.scale  # (b, 4, 3)
        layers = [torch.cat([colors.mean(1, keepdim=True) * s, colors], 1) for s in (0.0, 1.0, 0.0)]
        return layers[-n:]


class Pooled(torch.nn.Module):
    """A convnet: no blocks to look into."""

    embed_dim, patch_size = 3, 8

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, images):
        maps = F.avg_pool2d(images, 8).permute(0, 2, 3, 1) * self.scale
        return Tokens(maps.mean((1, 2)), maps)


def test_what_a_probe_may_look_at():
    images = torch.rand(2, 3, 16, 16)
    model = VisionTransformer(16, 8, 3, 12, 3, 2).eval()
    layers = model.get_intermediate_layers(images, 2)
    tokens = Encoder(model, **PLAIN).last_blocks(images, 2)
    assert torch.equal(tokens[:, 0], layers[0][:, 0])
    assert torch.equal(tokens[:, 1], model(images).cls_token)
    torch.testing.assert_close(tokens[:, 2], model(images).patch_tokens.mean((1, 2)))
    assert Encoder(Pooled(), **PLAIN).last_blocks(images, 4).shape == (2, 1, 3)


def make_folder(folder, counts, offset=0):
    """Classes of plain colours, some noise in each."""
    colors = {"blue": (0, 0, 250), "green": (0, 250, 0), "red": (250, 0, 0)}
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            color = tuple(max(0, c - 7 * ((i + offset) % 9)) for c in colors[name])
            Image.new("RGB", (18 + i % 3, 20), color).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "train", {"blue": 8, "green": 8, "red": 8})
    make_folder(tmp_path / "val", {"blue": 3, "green": 2, "red": 3}, offset=4)
    return tmp_path


# Six probes: a learning rate that changes nothing, one that learns, the paper's; the last block, which says nothing,
# and the last two. So one alone can learn the colours.
SIX = {"lr": (1e-12, 300.0, 0.001), "n_last_blocks": (1, 2), "avgpool": "off"}
GOOD = {**SIX, "lr": (300.0,), "n_last_blocks": (2,)}


@pytest.mark.parametrize("cached", [False, True])
def test_the_whole_protocol_chooses_on_validation_images(folder, cached, tmp_path):
    source = open_source(folder)
    train, val = source.part("train").split(0.25, 0)
    file = tmp_path / "probe.safetensors"
    encoder = Encoder(Blocks(), **PLAIN)
    options = LinearOptions(**SIX, epochs=8, batch_size=9, cached=cached, out=file)
    assert len(linear.probes_of(encoder, options)) == 6
    got = linear.run(encoder, train, source.part("val"), val, options)
    assert (got["linear_top1"], got["linear_top5"], got["linear_val_top1"]) == (100, 100, 100)
    assert (got["linear_lr"], got["linear_n_last_blocks"], got["linear_avgpool"]) == (300, 2, 0)
    assert (got["linear_best_top1"], got["linear_best_lr"], got["linear_best_val_top1"]) == (100, 300, 100)
    assert 1 <= got["linear_best_epoch"] <= 8
    assert got["linear_n2_lr300_top1"] == 100
    assert got["linear_n1_lr1e-12_top1"] < 70  # The last block of this backbone says nothing.
    assert got["linear_n1_lr300_top1"] < 70
    again = linear.run(Encoder(Blocks(), **PLAIN), train, source.part("val"), val, options)
    assert got == again, "the same seed, the same numbers"

    # The file gives the number of the best probe again, and belongs to these weights.
    again = linear.run_saved(encoder, source.part("val"), file)
    assert again["linear_top1"] == got["linear_best_top1"]
    probe, weight, description = read_probe(file, 3)
    assert (probe, weight.shape) == (Probe(300.0, 2, False), (3, 7))
    assert description["classes"] == ["blue", "green", "red"]
    assert description["epoch"] == got["linear_best_epoch"]
    other = Blocks()
    other.scale.data += 1e-3
    with pytest.raises(ValueError, match="trained on other weights"):
        linear.run_saved(Encoder(other, **PLAIN), source.part("val"), file)


def test_test_images_choose_nothing(folder):
    """Labels of the test images are turned round: all that is chosen stays as it was."""
    source = open_source(folder)
    train, val = source.part("train").split(0.25, 0)
    test = source.part("val")
    lying = test.subset(range(len(test)))
    lying.labels.copy_((lying.labels + 1) % 3)
    encoder, options = Encoder(Blocks(), **PLAIN), LinearOptions(**SIX, epochs=4, batch_size=9)
    a, b = (linear.run(encoder, train, judged, val, options) for judged in (test, lying))
    assert (a["linear_top1"], b["linear_top1"]) == (100, 0)
    for name in ("linear_lr", "linear_best_epoch", "linear_best_lr", "linear_val_top1"):
        assert a[name] == b[name]


def test_one_probe_needs_no_validation(folder, tmp_path):
    source = open_source(folder)
    parts = source.part("train"), source.part("val")
    encoder, file = Encoder(Blocks(), **PLAIN), tmp_path / "p.safetensors"
    got = linear.run(encoder, *parts, options=LinearOptions(**GOOD, epochs=8, batch_size=8, out=file))
    assert got["linear_top1"] == got["linear_n2_lr300_top1"] == 100
    assert not any("best" in name or "val" in name for name in got)
    assert linear.run_saved(encoder, source.part("val"), file)["linear_top1"] == 100
    with pytest.raises(ValueError, match="6 probes and no validation images"):
        linear.run(encoder, *parts, options=LinearOptions(**SIX, epochs=1, out=file))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"out": Path("p.pth")}, r"--out p\.pth is not allowed: a probe is written as \.safetensors"),
        ({"epochs": 0}, "--epochs 0 is not allowed: at least 1"),
        ({"batch_size": 0}, "--batch-size 0 is not allowed: at least 1 image"),
        ({"lr": (0.1, 0.0)}, r"--lr .*0\.1.*0\.0.* is not allowed: numbers above 0"),
        ({"n_last_blocks": (1, 0)}, "--n-last-blocks .*1.*0.* is not allowed: at least 1 each"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LinearOptions(**options)


def test_a_convnet_shows_its_pooled_features(folder, caplog):
    source = open_source(folder)
    options = LinearOptions(lr=(100.0,), n_last_blocks=(1, 4), avgpool="both", epochs=8, batch_size=8)
    encoder = Encoder(Pooled(), **PLAIN)
    assert linear.probes_of(encoder, options) == [Probe(100.0, 1, False)]
    got = linear.run(encoder, source.part("train"), source.part("val"), options=options)
    assert got["linear_top1"] == 100
    assert "no blocks to look into" in caplog.text


def test_augmented_features_differ_from_step_to_step_and_are_of_the_images(folder):
    train = open_source(folder).part("train")
    loader = linear.Loader(train, 8, data=linear.DataConfig(), seed=0, device="cpu")
    made = list(linear._augmented(Encoder(Blocks(), batch_size=3, **PLAIN), train, loader, 2, 6, seed=0))
    assert [len(labels) for _, labels in made] == [8] * 6
    for tokens, labels in made:  # Plain images: whatever the crop, the class shows in the colour.
        assert torch.equal(tokens[:, 0].argmax(1), 2 - labels)
    assert sorted(torch.cat([labels for _, labels in made[:3]]).tolist()) == sorted(train.labels.tolist())


def test_broken_train_images_are_replaced_or_left_out(folder, caplog):
    (folder / "train" / "red" / "0.png").write_bytes(b"no image")
    source = open_source(folder)
    for cached in (False, True):
        options = LinearOptions(**GOOD, epochs=8, batch_size=8, cached=cached)
        got = linear.run(Encoder(Blocks(), **PLAIN), source.part("train"), source.part("val"), options=options)
        assert got["linear_top1"] == 100
    assert "1 train images cannot be read, others stood in" in caplog.text
    assert "1 of 24 images cannot be read and are left out" in caplog.text


def test_classes_are_compared_by_name(folder, tmp_path):
    train = open_source(folder).part("train")
    some = open_source(make_folder(tmp_path / "some", {"green": 2, "red": 2}))
    assert some.labels.tolist() == [0, 0, 1, 1]
    assert same_classes(train, some, "test").labels.tolist() == [1, 1, 2, 2]
    few = open_source(make_folder(tmp_path / "few", {"blue": 9, "green": 9}))
    with pytest.raises(ValueError, match="1 classes of the test images have no train images: red"):
        linear.run(Encoder(Blocks(), **PLAIN), few, train)
    with pytest.raises(ValueError, match="needs labels"):
        same_classes(train, open_source(next((tmp_path / "few").iterdir())), "test")
    assert numbered_as(train, ["red"]).labels.tolist() == [1] * 8 + [2] * 8 + [0] * 8


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_released_classifiers_load(tmp_path, suffix, folder):
    """A ViT-B's: 1000 x 1536, names with ``module.``, [CLS] and mean patch token channel by channel."""
    weight, bias = torch.randn(5, 1536), torch.randn(5)
    state = {"module.linear.weight": weight, "module.linear.bias": bias}
    path = tmp_path / f"linear{suffix}"
    if suffix == ".pth":
        torch.save({"epoch": 100, "state_dict": state, "best_acc": 78.1, "scheduler": {"T_max": 100}}, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    probe, matrix, description = read_probe(path, 768)
    assert probe[1:] == (1, True)
    assert description == {}
    assert torch.equal(matrix, torch.cat([weight, bias[:, None]], 1))
    assert read_probe(path, 384)[0][1:] == (4, False)  # A ViT-S's has the same width.
    assert read_probe(path, 1536)[0][1:] == (1, False)  # A convnet's.
    with pytest.raises(ValueError, match="classifies 1536 features: no backbone of width 500"):
        read_probe(path, 500)
    # Evaluated: class 0 for what is red, by [CLS] (columns 0, 2, 4) and mean patch token (1, 3, 5).
    state = {"module.linear.weight": torch.tensor([[0.0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0]])}
    torch.save({"state_dict": state | {"module.linear.bias": torch.zeros(3)}}, tmp_path / "colors.pth")
    test = open_source(folder).part("val")
    got = linear.run_saved(Encoder(Blocks(), **PLAIN), test, tmp_path / "colors.pth")
    assert got == {"linear_top1": 100, "linear_top5": 100, "linear_n_last_blocks": 1, "linear_avgpool": 1}


def test_files_that_are_no_classifier_are_named(tmp_path):
    save_probe(tmp_path / "p.safetensors", Probe(0.1, 1, True), torch.arange(10.0).view(2, 5), {"classes": ["a", "b"]})
    probe, weight, description = read_probe(tmp_path / "p.safetensors", 2)
    assert (probe, description) == (Probe(0.1, 1, True), {"classes": ["a", "b"]})
    assert torch.equal(weight, torch.arange(10.0).view(2, 5))
    torch.save({"state_dict": {"fc.weight": torch.ones(2, 2)}}, tmp_path / "no.pth")
    with pytest.raises(ValueError, match=r"holds no linear classifier .*fc\.weight"):
        read_probe(tmp_path / "no.pth", 2)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_probe(tmp_path / "no.safetensors", 2)


def test_the_papers_probes_and_the_grid():
    assert linear.paper_probes(384) == [Probe(0.001, 4, False)]
    assert linear.paper_probes(768) == [Probe(0.001, 1, True)]
    grid = linear.paper_probes(384, linear.GRID, (1, 4), (False, True))
    assert len(grid) == 28
    assert {*linear.paper_probes(384), *linear.paper_probes(768)} <= set(grid)
    assert math.isclose(cosine_lr(1.0, 50, 100), 0.5)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    save_backbone(VisionTransformer(16, 8, 3, 24, 4, 3), tmp_path / "b.safetensors", ModelConfig(), 16)
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"linear": Linear}})
    sizes = ["--resize", "16", "--crop", "16", "--device", "cpu", "--json"]
    common = ["eval", "linear", str(tmp_path / "b.safetensors"), str(folder), "--epochs", "6", "--batch-size", "8"]
    probe = str(tmp_path / "probe.safetensors")
    assert cli.main([*common, "--grid", "--cached", "--out", probe, *sizes]) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(name.startswith("linear_n") and name.endswith("_top1") for name in got) == 28
    assert got["settings"]["chosen_by"] == "0.1 of every class of the train images, held out by seed 0"
    assert (got["settings"]["train_images"], got["settings"]["val_images"], got["settings"]["test_images"]) == (
        21,
        3,
        8,
    )

    assert cli.main(["eval", "linear", str(tmp_path / "b.safetensors"), str(folder), "--probe", probe, *sizes]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["linear_top1"] == got["linear_best_top1"]

    # One probe: nothing is held out, nothing chosen.
    assert cli.main([*common, "--n-last-blocks", "2", *sizes]) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert got["linear_lr"] == 0.001
    assert got["settings"]["train_images"] == 24
    assert got["settings"]["chosen_by"].startswith("nothing")
    assert cli.main([*common, "--test", str(folder / "val"), "--n-last-blocks", "2", *sizes]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["settings"]["chosen_by"] == "the val part of DATA"
    assert cli.main([*common, "--val-fraction", "1.5", *sizes]) == 1
    assert "--val-fraction 1.5 is not allowed" in capsys.readouterr().err
