"""Attention masks: the reference's masks, values worked by hand, and the whole protocol on a stub backbone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import reference
from dino.evaluation.attention_segmentation import best_head_jaccard, mass_masks, run, upsample_masks
from dino.features import attention_maps
from dino.models.vision_transformer import VisionTransformer

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
        pixels = upsample_masks(masks, case["patch"])
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
        assert (attention_maps(model, batch)[0].flatten(1) - expected).abs().max() <= 1e-6


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
    assert upsample_masks(masks[:1], 2)[0].int().tolist() == [[0, 0, 1, 1]] * 4


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
    assert run(backbone, images, [bright, dark]) == {"attention_jaccard": pytest.approx(100)}
    assert backbone.training
    assert run(backbone, images, [bright, ~dark])["attention_jaccard"] < 99


def test_attention_maps_drop_the_cls_column():
    maps = attention_maps(Bright(), torch.zeros(1, 3, 8, 13))
    assert maps.shape == (1, 2, 2, 3)
    assert torch.allclose(maps.sum((-2, -1)), torch.ones(1, 2))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="1 images and 0 masks"):
        run(Bright(), [torch.zeros(3, 8, 8)], [])
    with pytest.raises(ValueError, match="sizes must agree"):
        run(Bright(), [torch.zeros(3, 8, 8)], [torch.zeros(8, 9, dtype=torch.bool)])
    with pytest.raises(ValueError, match="smaller than a patch"):
        run(Bright(), [torch.zeros(3, 3, 8)], [torch.zeros(3, 8, dtype=torch.bool)])
    with pytest.raises(ValueError, match="no attention maps"):
        attention_maps(torch.nn.Identity(), torch.zeros(1, 3, 8, 8))
