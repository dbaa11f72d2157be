"""Segmentation by a head on patch tokens: worked by hand, round trip, layouts, and the commands."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.commands import cli
from dino.config import Config
from dino.data.mask_parts import open_classes
from dino.encoder.encoder import open_encoder
from dino.evaluation import segmentation
from dino.evaluation.segmentation_heads import LinearHead, soft_cross_entropy, train_linear
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import SegmentOptions


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


def picture(rng, side=32, value=255):
    """Grey noise with a red rectangle, and its mask."""
    image, mask = rng.integers(90, 130, (side, side, 3)), np.zeros((side, side))
    top, left = rng.integers(0, side // 16, 2) * 8
    image[top : top + 16, left : left + 16] = (250, 20, 20)
    mask[top : top + 16, left : left + 16] = value
    return image, mask


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "w.safetensors"
    save_backbone(VisionTransformer(32, 8, 3, 24, 4, 2), path, Config().model, 32)
    return path


@pytest.fixture
def plain(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(15):
        image, mask = picture(rng)
        save(tmp_path / f"plain/images/{i}.png", image)
        save(tmp_path / f"plain/masks/{i}.png", mask)
    return tmp_path / "plain"


def test_shares_of_classes_by_hand():
    labels = torch.tensor([[0, 0, 1, 1], [0, 1, 1, -1]])
    found = segmentation.shares(labels, 2, (1, 2))
    torch.testing.assert_close(found, torch.tensor([[[0.75, 0.25], [0.0, 0.75]]]))


def test_the_loss_of_shares_is_that_of_all_pixels():
    torch.manual_seed(0)
    labels, logits = torch.randint(-1, 3, (8, 12)), torch.randn(2, 3, 3)
    pixels = logits.repeat_interleave(4, 0).repeat_interleave(4, 1)
    naive = F.cross_entropy(pixels.flatten(0, 1), labels.flatten(), ignore_index=-1)
    shares = segmentation.shares(labels, 3, (2, 3))
    torch.testing.assert_close(soft_cross_entropy(logits.flatten(0, 1), shares.flatten(0, 1)), naive)


def test_iou_by_hand():
    predicted, true = torch.tensor([[0, 0, 1], [1, 1, 0]]), torch.tensor([[0, 1, 1], [1, -1, 0]])
    counts = segmentation.confusion(predicted, true, 3)
    assert counts.tolist() == [[2, 0, 0], [1, 2, 0], [0, 0, 0]]
    each = segmentation.intersection_over_union(counts)
    torch.testing.assert_close(each[:2], torch.tensor([200 / 3, 200 / 3]))
    assert each[2].isnan()


def test_the_standardisation_goes_into_the_weights():
    torch.manual_seed(0)
    features = 5 + 3 * torch.randn(400, 4)
    shares = F.one_hot((features[:, 1] > 5).long(), 2).float()
    head = LinearHead(4, 2)
    train_linear(head, features, shares, SegmentOptions(epochs=40, lr=0.05, batch_size=1))
    said = head([features.T.view(1, 4, 20, 20)])[0].argmax(0).flatten()
    assert (said == shares.argmax(1)).float().mean() > 0.97


def test_parts_of_every_layout(tmp_path, plain):
    train, val = open_classes(str(plain), 0.2, 0)
    assert (len(train), len(val)) == (12, 3)
    assert {item.name for item in train}.isdisjoint(item.name for item in val)
    blank, mask = np.zeros((8, 8, 3)), np.eye(8)
    for part in ("train", "valid"):
        for name in ("a", "b"):
            save(tmp_path / f"around/{part}/images/{part}_{name}.png", blank)
            save(tmp_path / f"around/{part}/masks/{part}_{name}.png", mask)
            save(tmp_path / f"inside/images/{part}/{name}.png", blank)
            save(tmp_path / f"inside/masks/{part}/{name}.png", mask)
            save(tmp_path / f"voc/JPEGImages/{part}_{name}.jpg", blank)
            save(tmp_path / f"voc/SegmentationClass/{part}_{name}.png", mask)
            save(tmp_path / f"davis/JPEGImages/480p/{part}/{name}.jpg", blank)
            save(tmp_path / f"davis/Annotations/480p/{part}/{name}.png", 2 * mask)
    lists = tmp_path / "voc/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("train_a\ntrain_b\n")
    (lists / "val.txt").write_text("valid_a\n")
    names = lambda data: [sorted(i.name for i in part) for part in open_classes(str(tmp_path / data))]  # noqa: E731
    assert names("around") == [["train_a", "train_b"], ["valid_a", "valid_b"]]
    assert names("inside") == [["train/a", "train/b"], ["valid/a", "valid/b"]]
    assert names("voc") == [["train_a", "train_b"], ["valid_a"]]
    # Whole videos, and all objects are one.
    assert sorted(names("davis")) == [["train/a", "train/b"], ["valid/a", "valid/b"]]
    assert segmentation.values_of(open_classes(str(tmp_path / "davis"))[0]) == [0, 1]


@pytest.mark.parametrize("decoder", ["linear", "dpt"])
def test_the_commands(tmp_path, weights, plain, capsys, decoder):
    if decoder == "dpt":
        pytest.importorskip("segmentation_models_pytorch", reason="DPT is segmentation_models_pytorch's")
    head, out = tmp_path / "head.safetensors", tmp_path / "masks"
    train = ["segment", "train", str(weights), str(plain), "--out", str(head), "--device", "cpu", "--json"]
    head_flags = {
        "linear": ["--epochs", "60", "--lr", "0.01", "--batch-size", "1"],
        "dpt": ["--epochs", "20", "--batch-size", "4"],
    }
    assert cli.main([*train, "--decoder", decoder, *head_flags[decoder]]) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["miou"] > 80
    assert results["miou"] == pytest.approx((results["iou_0"] + results["iou_255"]) / 2)
    apply = ["segment", "apply", str(weights), "--head", str(head), "--out", str(out), "--device", "cpu", "--json"]
    assert cli.main([*apply, str(plain / "images")]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 15
    _, val = open_classes(str(plain), 0.2, 0)
    counts = torch.zeros(2, 2, dtype=torch.long)
    for item in val:
        with Image.open(out / f"{item.name}.png") as mask:
            assert mask.mode == "P"
            said = torch.from_numpy(np.array(mask)).long()
        values = item.annotation()
        counts += segmentation.confusion((said > 0).long(), (values > 0).long(), 2)
    assert segmentation.intersection_over_union(counts).mean().item() == pytest.approx(results["miou"], abs=1e-3)
    assert cli.main([*apply, str(plain)]) == 0
    assert json.loads(capsys.readouterr().out)["miou"] > 80


def test_a_head_read_again_says_the_same(tmp_path, weights, plain):
    encoder = open_encoder(weights, progress=False)
    train, _ = open_classes(str(plain))
    made = segmentation.fit(encoder, train, [0, 255], SegmentOptions(epochs=2, blocks=3))
    again = segmentation.fit(encoder, train, [0, 255], SegmentOptions(epochs=2, blocks=3))
    path = tmp_path / "head.safetensors"
    segmentation.save_head(path, made, encoder)
    loaded = segmentation.load_head(path, encoder)
    assert (loaded.values, loaded.options) == (made.values, made.options)
    for name, tensor in made.head.state_dict().items():
        assert torch.equal(tensor.cpu(), loaded.head.state_dict()[name].cpu())
        assert torch.equal(tensor, again.head.state_dict()[name])
    other = open_encoder(VisionTransformer(32, 8, 3, 24, 4, 2), size=32)
    with pytest.raises(ValueError, match="other weights"):
        segmentation.load_head(path, other)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no head"):
        segmentation.load_head(path, encoder)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--epochs", "0"], "--epochs 0 is not allowed"),
        (["--void", "255"], "the masks hold one value"),
        (["--blocks", "9"], "9"),
        (["--val-fraction", "2"], "--val-fraction 2.0 is not allowed"),
    ],
)
def test_bad_input_gives_one_line(tmp_path, weights, plain, capsys, flags, said):
    call = ["segment", "train", str(weights), str(plain), "--out", str(tmp_path / "h.safetensors"), *flags]
    assert cli.main(call) == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_convnets_have_no_blocks():
    encoder = open_encoder(torch.nn.Identity(), size=32)
    object.__setattr__(encoder.backbone, "embed_dim", 3)
    with pytest.raises(ValueError, match="--decoder dpt is not allowed"):
        segmentation.make_head(encoder, SegmentOptions(decoder="dpt"), 2)
