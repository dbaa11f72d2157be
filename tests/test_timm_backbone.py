"""timm models as backbones: the tokens are the right ones, at any size."""

import copy

import pytest
import torch
from torch import nn

from dino.machine import distributed
from dino.models.timm_backbone import TimmBackbone

CONVNETS = ["resnet10t", "resnet18", "convnext_atto"]
WITH_CLS = ["xcit_nano_12_p16_224", "vit_tiny_patch16_224", "vit_small_patch16_dinov3"]
SIZES = [(64, 64), (96, 160), (100, 70)]


@pytest.fixture(scope="module")
def backbones():
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = TimmBackbone(name).eval()
        return made[name]

    return get


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CONVNETS)
@torch.no_grad()
def test_convnets_give_pooled_features_and_the_last_map(name, size, backbones):
    backbone, images = backbones(name), torch.randn(2, 3, *size)
    tokens = backbone(images)
    assert backbone.patch_size == 32
    torch.testing.assert_close(tokens.cls_token, backbone.model(images))
    assert tokens.patch_tokens.shape[-1] == backbone.embed_dim == tokens.cls_token.shape[1]
    # Stride 32: rows and columns are the sides over 32, rounded by the model.
    for cells, pixels in zip(tokens.patch_tokens.shape[1:3], size, strict=True):
        assert pixels // 32 <= cells <= -(-pixels // 32)
    if name.startswith("resnet"):
        torch.testing.assert_close(tokens.patch_tokens.mean((1, 2)), tokens.cls_token)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", WITH_CLS)
@torch.no_grad()
def test_transformers_give_the_cls_token_and_the_grid(name, size, backbones):
    backbone, images = backbones(name), torch.randn(2, 3, *size)
    tokens = backbone(images)
    h, w = size[0] // 16, size[1] // 16
    assert backbone.patch_size == 16
    assert tokens.patch_tokens.shape == (2, h, w, backbone.embed_dim)
    sequence = backbone.model.forward_features(images[..., : h * 16, : w * 16])
    torch.testing.assert_close(tokens.cls_token, sequence[:, 0])
    torch.testing.assert_close(tokens.patch_tokens.flatten(1, 2), sequence[:, -h * w :])
    assert sequence.shape[1] - h * w == (5 if "dinov3" in name else 1)  # dinov3: four registers, dropped.


@torch.no_grad()
def test_the_grid_is_row_by_row(backbones):
    backbone = backbones("vit_tiny_patch16_224")
    images = torch.zeros(1, 3, 64, 128)
    images[..., 16:32, 96:112] = 1
    backbone = copy.deepcopy(backbone)
    backbone.model.blocks = nn.Sequential()  # Without mixing, only the changed patch differs.
    changed = (backbone(images).patch_tokens - backbone(torch.zeros_like(images)).patch_tokens).abs().sum(-1)[0] > 1e-4
    assert changed.nonzero().tolist() == [[1, 6]]


@torch.no_grad()
def test_a_vit_without_cls_token_gives_its_pooled_features():
    backbone = TimmBackbone("vit_tiny_patch16_224", class_token=False, global_pool="avg", fc_norm=False).eval()
    tokens = backbone(torch.randn(2, 3, 64, 96))
    assert tokens.patch_tokens.shape == (2, 4, 6, 192)
    torch.testing.assert_close(tokens.cls_token, tokens.patch_tokens.mean((1, 2)))
    assert not backbone.has_blocks


@torch.no_grad()
def test_intermediate_layers_where_timm_has_them(backbones):
    backbone, images = backbones("vit_small_patch16_dinov3"), torch.randn(2, 3, 64, 100)
    assert backbone.has_blocks
    older, last = backbone.get_intermediate_layers(images, n=2)
    tokens = backbone(images)
    torch.testing.assert_close(last, torch.cat([tokens.cls_token[:, None], tokens.patch_tokens.flatten(1, 2)], dim=1))
    assert older.shape == last.shape
    assert not torch.allclose(older, last)


def test_what_a_model_cannot_do_is_said(backbones):
    for name in ("resnet18", "xcit_nano_12_p16_224"):
        backbone, images = backbones(name), torch.zeros(1, 3, 64, 64)
        assert (backbone.has_blocks, backbone.has_attention, backbone.has_keys) == (False, False, False)
        with pytest.raises(ValueError, match=f"{name} has no blocks to look into: take a vision transformer"):
            backbone.get_intermediate_layers(images)
        with pytest.raises(ValueError, match=f"{name} has no attention maps: take one of the vit_"):
            backbone.get_last_selfattention(images)


def test_drop_path_reaches_timm():
    assert any(type(m).__name__ == "DropPath" for m in TimmBackbone("resnet10t", drop_path_rate=0.2).modules())
    # Swin drops paths by default; a teacher must not.
    swin = TimmBackbone("swin_tiny_patch4_window7_224", drop_path_rate=0.0, depths=(1, 1, 1, 1))
    assert not any(type(m).__name__ == "DropPath" for m in swin.modules())
    with pytest.raises(ValueError, match="timm:vgg11 has no drop path: use a rate of 0"):
        TimmBackbone("vgg11", drop_path_rate=0.1)


def test_an_unknown_name_gives_close_ones():
    with pytest.raises(ValueError, match=r"timm has no model 'resnet_50'; close names: .*resnet50"):
        TimmBackbone("resnet_50")


def test_sizes_that_do_not_fit(backbones):
    with pytest.raises(ValueError, match="8 x 64 pixels is smaller than one patch of 16"):
        backbones("vit_tiny_patch16_224")(torch.zeros(1, 3, 8, 64))
    with pytest.raises(ValueError, match=r"timm:mixer_s32_224 does not take images of \(3, 96, 96\)"):
        TimmBackbone("mixer_s32_224")(torch.zeros(1, 3, 96, 96))


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="no_such_option"):
        TimmBackbone("resnet10t", no_such_option=1)


@torch.no_grad()
def test_norms_over_several_processes_keep_their_activations(monkeypatch):
    """torch's own conversion strips them from timm's norms."""
    backbone = TimmBackbone("efficientnet_b0").eval()
    images = torch.randn(1, 3, 64, 64)
    before = backbone(images)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    on_gpu = type("Parameter", (), {"is_cuda": True})()
    monkeypatch.setattr(backbone, "parameters", lambda: iter([on_gpu]))
    distributed.share_batchnorm(backbone)
    assert sum(isinstance(module, torch.nn.SyncBatchNorm) for module in backbone.modules()) == 49
    torch.testing.assert_close(backbone(images), before)
