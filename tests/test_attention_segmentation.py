"""Attention masks: the reference's masks, values worked by hand, and the whole protocol on a stub backbone."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import reference
from dino.commands import cli
from dino.commands.attention_segmentation import AttentionSegmentation
from dino.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from dino.data.davis import palette
from dino.encoder.attention import mass_masks
from dino.encoder.encoder import Encoder
from dino.evaluation.attention_segmentation import at_size, best_head_jaccard, jaccard_of_objects, run, shuffled
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import AttentionSegmentationOptions

AS_GIVEN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
CASES = reference.scalars("13_attention")["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_masks_equal_the_reference(case):
    heads, h, w = case["heads"], case["h"], case["w"]
    arrays = reference.arrays("13_attention")
    attention = arrays[f"{case['id']}/attention"].view(heads, h, w)
    for row in case["thresholds"]:
        masks = mass_masks(attention, share=row["threshold"])
        expected = np.unpackbits(arrays[row["key"]].numpy(), count=heads * h * w).reshape(heads, h, w).astype(bool)
        assert np.array_equal(masks.numpy(), expected)
        assert masks.sum((1, 2)).tolist() == row["kept"]
        pixels = at_size(masks, (h * case["patch"], w * case["patch"]))
        assert list(pixels.shape) == row["upsampled_shape"]
        assert pixels.sum() == row["upsampled_sum"]


@pytest.mark.parametrize("case", [case for case in CASES if "model" in case], ids=lambda case: case["id"])
def test_attention_equals_the_reference(case):
    spec = reference.scalars("01_vit")
    model = VisionTransformer(**spec["models"][case["model"]])
    model.load_state_dict(load_file(reference.FOLDER / f"01_vit_{case['model']}.safetensors"))
    height, width = case["input_hw"]  # Not a multiple of the patch: the border is ignored.
    images = reference.waves((1, 3, height, width), case["s"], spec["formula"]).float()
    cut = images[..., : case["cropped_hw"][0], : case["cropped_hw"][1]]
    expected = reference.arrays("13_attention")[f"{case['id']}/attention"]
    for batch in (images, cut):
        assert (Encoder(model, **AS_GIVEN).attention(batch)[0].flatten(1) - expected).abs().max() <= 1e-6


@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_masks_hold_the_share_and_no_patch_too_many(seed, share):
    attention = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(seed)).double().pow(3)
    masks = mass_masks(attention, share)
    for one, mask in zip(attention / attention.sum((1, 2), keepdim=True), masks, strict=True):
        kept = one[mask]
        assert kept.sum() >= share - 1e-9
        assert kept.sum() - kept.min() <= share + 1e-9  # Without its weakest patch it holds less.
        assert mask.all() or kept.min() >= one[~mask].max()


def test_masks_and_best_head_worked_by_hand():
    attention = torch.tensor([[[0.1, 0.5], [0.1, 0.3]], [[4.0, 3.0], [2.0, 1.0]]])
    masks = mass_masks(attention, 0.6)
    assert masks.tolist() == [[[False, True], [False, True]], [[True, True], [False, False]]]
    truth = torch.tensor([[True, True], [True, False]])
    assert best_head_jaccard(masks, truth).item() == pytest.approx(2 / 3)  # Heads: 1/4 and 2/3.
    assert at_size(masks[:1], (4, 4))[0].int().tolist() == [[0, 0, 1, 1]] * 4


def test_bad_share_is_named():
    with pytest.raises(ValueError, match=r"1\.5"):
        mass_masks(torch.ones(2, 2), share=1.5)


class Bright(torch.nn.Module):
    """Two heads: one attends to bright patches, the other to dark ones. The first token is [CLS]."""

    patch_size = 4

    def get_last_selfattention(self, images, queries):
        assert not self.training
        assert queries == slice(0, 1)  # The [CLS] token.
        patches = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)
        rows = torch.stack([(40 * patches).softmax(1), (-40 * patches).softmax(1)], dim=1)  # (b, heads, patches)
        return torch.nn.functional.pad(rows, (1, 0), value=0.25)[:, :, None]


def test_protocol_takes_the_best_head_of_each_image_and_cuts_borders():
    bright, dark = torch.zeros(8, 12, dtype=torch.bool), torch.zeros(10, 9, dtype=torch.bool)
    bright[:4, 4:8] = True  # One patch.
    dark[4:, :4] = True  # One patch of 4 x 4 in the part of 8 x 8 that is kept.
    images = [bright.float().expand(3, -1, -1), 1 - dark.float().expand(3, -1, -1)]
    backbone = Bright().train()
    encoder = Encoder(backbone)
    results = run(encoder, zip(images, [bright, dark], strict=True))
    assert results["attention_jaccard"] == results["attention_jaccard_images"] == pytest.approx(100)
    assert results["attention_jaccard_shuffled"] < 90
    assert backbone.training
    assert run(encoder, zip(images, [bright, ~dark], strict=True))["attention_jaccard"] < 99


def test_every_object_has_its_own_best_head_and_void_counts_nowhere():
    masks = torch.tensor([[[True, True, False, False]], [[False, False, False, True]]])
    assert jaccard_of_objects(masks, torch.tensor([[5, 5, 0, 7]])).tolist() == [1, 1]
    assert jaccard_of_objects(masks, torch.tensor([[5, 0, 0, 7]])).tolist() == [0.5, 1]
    assert jaccard_of_objects(masks, torch.tensor([[5, -1, 0, 7]])).tolist() == [1, 1]


def two_objects(height=16, width=16):
    """An image with a bright patch and a dark one, and labels of both."""
    labels = torch.zeros(height, width, dtype=torch.long)
    labels[:4, 4:8], labels[8:12, 8:12] = 3, 9
    image = torch.full((3, height, width), 0.5)
    return image.masked_fill(labels == 3, 1).masked_fill(labels == 9, 0), labels


def test_means_over_objects_and_over_images_in_any_batches():
    image, labels = two_objects()
    half = labels.clone()
    half[:, 6:] = 0  # Half of the bright patch is left: Jaccard 1/2.
    nothing = torch.zeros_like(labels)
    wide = torch.nn.functional.pad(image, (0, 4), value=0.5), torch.nn.functional.pad(labels, (0, 4))
    for batch_size in (1, 2, 16):
        samples = iter([(image, labels), wide, (image, half), (image, nothing)])
        results = run(Encoder(Bright(), batch_size=batch_size), samples)
        assert results["attention_jaccard"] == pytest.approx(100 * (4 + 0.5) / 5)
        assert results["attention_jaccard_images"] == pytest.approx(100 * (1 + 1 + 0.5) / 3)


def test_resized_images_are_compared_at_full_size():
    image, labels = two_objects()
    twice = (
        image.repeat_interleave(2, 1).repeat_interleave(3, 2),
        labels.repeat_interleave(2, 0).repeat_interleave(3, 1),
    )
    encoder, options = Encoder(Bright()), AttentionSegmentationOptions(resize=18)  # 16 x 16: whole patches.
    assert run(encoder, [twice], options)["attention_jaccard"] == pytest.approx(100)
    assert run(encoder, [twice])["attention_jaccard"] < 100


def test_shuffled_masks_keep_their_size():
    masks = mass_masks(torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)))
    moved = shuffled(masks, torch.Generator().manual_seed(1))
    assert torch.equal(moved.sum((1, 2)), masks.sum((1, 2)))
    assert not torch.equal(moved, masks)
    assert torch.equal(moved, shuffled(masks, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("layout", ["voc", "plain", "davis"])
def test_command_on_every_layout(layout, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"attention-segmentation": AttentionSegmentation}})
    weights = tmp_path / "backbone.safetensors"
    save_backbone(VisionTransformer(32, 8, 3, 24, 2, 3), weights, ModelConfig(patch_size=8), 32)
    images, masks = {
        "voc": ("JPEGImages/{}.jpg", "SegmentationObject/{}.png"),
        "plain": ("images/{}.jpg", "masks/{}.png"),
        "davis": ("JPEGImages/480p/v/{}.jpg", "Annotations/480p/v/{}.png"),
    }[layout]
    for i in range(3):
        labels = np.zeros((24, 32 + 8 * (i % 2)), np.uint8)
        labels[4:12, 4:20] = 1
        for path, array in ((images, 255 - 200 * np.repeat(labels[..., None], 3, 2)), (masks, labels)):
            file = tmp_path / "data" / path.format(f"{i:05}")
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(array)
            if path is masks:
                picture.putpalette(palette())
            picture.save(file)
    arguments = ["eval", "attention-segmentation", str(weights), str(tmp_path / "data"), "--json"]
    assert cli.main(arguments) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["settings"] == {
        "weights": str(weights),
        "images": 3,
        "split": "val",
        "masks": "object",
        "share": 0.6,
        "resize": 0,
        "seed": 0,
        "mean": [*IMAGENET_MEAN],
        "std": [*IMAGENET_STD],
        "precision": "float32",
    }
    assert 0 < results["attention_jaccard"] == pytest.approx(results["attention_jaccard_images"])
    assert cli.main([*arguments, "--share", "0.9", "--resize", "32"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["attention_jaccard"] != results["attention_jaccard"]
    assert cli.main([*arguments, "--share", "1.5"]) == 1
    assert "1.5" in capsys.readouterr().err


def test_attention_maps_drop_the_cls_column():
    maps = Encoder(Bright()).attention(torch.zeros(1, 3, 8, 13))
    assert maps.shape == (1, 2, 2, 3)
    assert torch.allclose(maps.sum((-2, -1)), torch.ones(1, 2))


def test_bad_input_is_named():
    encoder = Encoder(Bright())
    with pytest.raises(ValueError, match="no image has an object"):
        run(encoder, [])
    with pytest.raises(ValueError, match="sizes must agree"):
        run(encoder, [(torch.zeros(3, 8, 8), torch.zeros(8, 9, dtype=torch.bool))])
    with pytest.raises(ValueError, match="smaller than a patch"):
        run(encoder, [(torch.zeros(3, 3, 8), torch.zeros(3, 8, dtype=torch.bool))])
    with pytest.raises(ValueError, match="no attention maps"):
        Encoder(torch.nn.Identity()).attention(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"--share 1\.5 is not allowed: between 0 and 1"):
        AttentionSegmentationOptions(share=1.5)
    with pytest.raises(ValueError, match="--resize -1"):
        AttentionSegmentationOptions(resize=-1)
