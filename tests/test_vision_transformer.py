"""The vision transformer against the reference's numbers (golden topic 01), and facts that are easy to get wrong."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import reference
from dino.models.layers import Block, attend, residual, sample_keep
from dino.models.vision_transformer import VisionTransformer, vit_large, vit_tiny

SPEC = reference.scalars("01_vit")
CASES = {case["id"]: case for case in SPEC["cases"]}
OFFSETS = {"official": 0.1, "size_rule": 0.0}


@pytest.fixture(scope="module")
def golden():
    return {name: array.numpy() for name, array in reference.arrays("01_vit").items()}


def images_of(case):
    return reference.waves(tuple(case["shape"]), case["s"], SPEC["formula"]).float()


def golden_model(name, rule):
    model = VisionTransformer(**SPEC["models"][name], pos_offset=OFFSETS[rule])
    model.load_state_dict(load_file(reference.FOLDER / f"01_vit_{name}.safetensors"), strict=True)
    return model.eval()


def close(actual, expected, atol=0.0, rtol=0.0):
    np.testing.assert_allclose(actual.detach().numpy(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("rule", OFFSETS)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_the_reference(case, rule, golden):
    spec, model = CASES[case], golden_model(CASES[case]["model"], rule)
    images = images_of(spec)
    expected = {key.split("/", 2)[2]: golden[key] for key in golden if key.startswith(f"{case}/{rule}/")}
    token, query, key = (golden[f"{case}/{name}_idx"] for name in ("token", "attn_q", "attn_k"))

    tokens = model(images)
    close(tokens.cls_token, expected["cls"], atol=1e-5)
    assert list(tokens.patch_tokens.shape[1:3]) == spec["grid"]

    layers = model.get_intermediate_layers(images, n=2)
    for i, layer in enumerate(layers):
        close(layer[:, token], expected[f"inter{i}_tokens"], atol=3e-5)
        close(layer.double().abs().sum((1, 2)), expected[f"inter{i}_abs_sum"], rtol=1e-5)
    # Both ways to the last layer give the same tokens, in the same order.
    torch.testing.assert_close(torch.cat([tokens.cls_token[:, None], tokens.patch_tokens.flatten(1, 2)], 1), layers[-1])

    attention = model.get_last_selfattention(images)
    assert list(attention.shape) == spec["attn_shape"]
    close(attention[:, :, query][..., key], expected["attn"], atol=3e-6)
    close(attention[:, :, 0].double().square().sum(-1), expected["attn_cls_sq_sum"], rtol=1e-5)

    positions = model._positions(*spec["shape"][2:])
    close(positions[:, token], expected["pos_tokens"], atol=1e-5)
    close(positions.double().abs().sum(), expected["pos_abs_sum"], rtol=1e-5)

    close(model.double()(images.double()).cls_token, expected["cls_f64"], atol=1e-9)


@pytest.mark.parametrize("rule", OFFSETS)
def test_gradients_equal_the_reference(rule, golden):
    case, expected = CASES[SPEC["grad"]["case"]], SPEC["grad"][rule]
    model = golden_model(case["model"], rule)
    loss = model(images_of(case)).cls_token.square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    close(grads["cls_token"], golden[f"grad/{rule}/cls_token"], atol=1e-4)
    close(grads["pos_embed"][:, :: SPEC["grad"]["pos_embed_token_stride"]], golden[f"grad/{rule}/pos_embed"], atol=1e-4)
    close(grads["patch_embed.proj.bias"], golden[f"grad/{rule}/patch_bias"], atol=1e-4)
    assert list(grads) == list(expected["grad_norm"])
    largest = max(expected["grad_norm"].values())
    for name, norm in expected["grad_norm"].items():
        tolerance = {"rel": 1e-5} if norm > 1e-3 * largest else {"rel": 0, "abs": 1e-4}
        assert grads[name].norm().item() == pytest.approx(norm, **tolerance), name


@pytest.mark.parametrize("case", SPEC["drop_path"], ids=lambda case: case["id"])
def test_drop_path_equals_the_reference(case, golden):
    x = torch.cos(0.37 * torch.arange(np.prod(case["shape"]), dtype=torch.float64)).float().view(case["shape"])
    torch.manual_seed(case["torch_manual_seed"])
    keep = sample_keep(case["shape"][0], case["drop_prob"])
    assert ((keep > 0).numpy() == golden[f"drop_path/{case['id']}/kept"].astype(bool)).all()
    rows = x.flatten(1).shape[1]
    dropped = residual(torch.zeros(x.numel(), 1), x.view(-1, 1), keep.repeat_interleave(rows)).view(x.shape)
    close(dropped, golden[f"drop_path/{case['id']}/out"], atol=1e-6)


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 3}


def test_drop_path_rate_grows_linearly_and_keeps_the_mean():
    model = VisionTransformer(**TINY, drop_path_rate=0.4)
    keep = model.sample_drop_path(20000, torch.Generator().manual_seed(0))
    assert keep.shape == (3, 2, 20000)
    for rate, row in zip([0, 0, 0.2, 0.2, 0.4, 0.4], keep.flatten(0, 1), strict=True):
        assert (row == 0).float().mean().item() == pytest.approx(rate, abs=0.02)
        assert row.max().item() == pytest.approx(1 / (1 - rate))
    assert not torch.equal(keep[2, 0], keep[2, 1])  # Each branch draws its own.
    again = model.sample_drop_path(20000, torch.Generator().manual_seed(0))
    assert torch.equal(keep, again)
    assert VisionTransformer(**TINY).sample_drop_path(4) is None


def test_drop_path_given_is_used_and_drawn_only_in_train_mode():
    model, images = VisionTransformer(**TINY, drop_path_rate=0.5), torch.randn(4, 3, 32, 32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    keep = model.sample_drop_path(4, torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    drawn = model.train()(images).cls_token
    assert not torch.allclose(drawn, model.eval()(images).cls_token)
    torch.testing.assert_close(model.train()(images, keep).cls_token, model.eval()(images, keep).cls_token)
    torch.testing.assert_close(model.eval()(images, torch.ones(3, 2, 4)).cls_token, model(images).cls_token)


def test_a_block_with_both_branches_dropped_is_the_identity():
    block, x, shapes = Block(12, 3, 4.0), torch.randn(2 * 5, 12), [(2, 5)]
    keep = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).repeat_interleave(5, 1)
    out = block(x, shapes, keep)
    torch.testing.assert_close(out[:5], x[:5], rtol=0, atol=0)
    torch.testing.assert_close(out[5:], block(x, shapes)[5:])


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_the_cls_tokens_of_several_sizes_at_once_are_those_of_each_size_alone(rate):
    """Values and gradients, in float64: the last block works on the [CLS] token alone, and nothing is lost by it."""
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, drop_path_rate=rate).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    groups = [
        torch.randn(2, 3, 32, 32).double(),
        torch.randn(3, 3, 16, 24).double(),
        torch.randn(1, 3, 16, 16).double(),
    ]
    drawn = [model.sample_drop_path(len(group), torch.Generator().manual_seed(7)) for group in groups]
    masks = None if rate == 0 else [mask.double() for mask in drawn]

    together = model.cls_tokens(groups, masks)
    torch.cat(together).sin().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(g, None if masks is None else masks[i]).cls_token for i, g in enumerate(groups)]
    torch.cat(alone).sin().sum().backward()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_cls_tokens_in_train_mode_draw_their_own_drop_path():
    model = VisionTransformer(**TINY, drop_path_rate=0.5)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    groups = [torch.randn(4, 3, 32, 32), torch.randn(4, 3, 16, 16)]
    first, second = model.cls_tokens(groups), model.cls_tokens(groups)
    assert not any(torch.allclose(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=15, deadline=None)
@given(height=st.integers(8, 70), width=st.integers(8, 70), offset=st.sampled_from([0.0, 0.1]))
@torch.no_grad()
def test_any_size_and_unfilled_borders_do_not_count(height, width, offset):
    model = VisionTransformer(**TINY, pos_offset=offset).eval()
    torch.nn.init.normal_(model.pos_embed)
    images = torch.randn(2, 3, height, width)
    tokens = model(images)
    assert tokens.patch_tokens.shape == (2, height // 8, width // 8, 12)
    noisy = images.clone()
    noisy[..., height // 8 * 8 :, :] = 100
    noisy[..., width // 8 * 8 :] = 100
    torch.testing.assert_close(model(noisy).patch_tokens, tokens.patch_tokens)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_positions_of_another_size_by_hand(offset):
    # One row of ones: cell o reads the source position (o + 0.5) * 32 / (48 + offset) - 0.5, so it gets Keys' cubic
    # kernel (a = -0.75) at the distance from there to the row.
    model = VisionTransformer(img_size=32 * 8, patch_size=8, embed_dim=3, depth=1, num_heads=1, pos_offset=offset)
    with torch.no_grad():
        model.pos_embed[0, 1:] = (torch.arange(32) == 16).float().repeat_interleave(32)[:, None]
    rows = model._positions(48 * 8, 32 * 8)[0, 1:, 0].view(48, 32)[:, 7]
    x = ((torch.arange(48) + 0.5) * 32 / (48 + offset) - 0.5 - 16).abs()
    near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
    torch.testing.assert_close(rows, torch.where(x <= 1, near, torch.where(x < 2, far, 0.0)), atol=1e-5, rtol=0)


def test_initialisation():
    torch.manual_seed(0)
    model = vit_tiny()
    for name, p in model.named_parameters():
        if name.endswith("bias") and "patch_embed" not in name:
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        elif p.ndim == 2 or name in ("cls_token", "pos_embed"):
            assert p.std().item() == pytest.approx(0.02, rel=0.2 if name == "cls_token" else 0.02), name
    # torch's default for a convolution: uniform within 1 / sqrt(fan in).
    bound = (3 * 16 * 16) ** -0.5
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_vit_large_has_the_known_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in vit_large().parameters()) == 303_301_632


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"embed_dim": 50}, "embed_dim 50 is not divisible by num_heads 12"),
        ({"img_size": 8}, "img_size 8 is smaller than patch_size 16"),
        ({"drop_path_rate": 1.0}, "drop_path_rate 1.0 is not allowed"),
        ({"pos_offset": 1.0}, "pos_offset 1.0 is not allowed"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VisionTransformer(**arguments)


def test_bad_images_and_depths():
    model = VisionTransformer(**TINY)
    with pytest.raises(ValueError, match="have 1 channels, this model takes 3"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="7 x 32 pixels is smaller than one patch of 8"):
        model(torch.zeros(1, 3, 7, 32))
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n={n} is not allowed: this model has 3 blocks"):
            model.get_intermediate_layers(torch.zeros(1, 3, 32, 32), n=n)


def test_attention_under_autocast_is_that_of_float32_up_to_the_rounding_of_its_inputs():
    """Value and gradients, also of the last block; the attention itself works in float32."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    images, found = torch.randn(4, 3, 32, 32), []
    for enabled in (False, True):
        vit.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = vit.cls_tokens([images])[0]
        out.float().square().sum().backward()
        found.append((out.detach().float(), vit.blocks[0].attn.qkv.weight.grad.clone()))
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (exact - rounded).norm() / exact.norm() < 0.02


def test_attention_takes_float32_on_a_cpu():
    q, k, v = (torch.randn(2, 2, 5, 4).bfloat16() for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attend(q, k, v)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float()))
