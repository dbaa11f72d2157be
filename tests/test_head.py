"""The projection head against the reference's numbers (golden topic 02)."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import reference
from dino.models.head import DINOHead

SPEC = reference.scalars("02_head")
CASES = {case["id"]: case for case in SPEC["cases"]}


@pytest.fixture(scope="module")
def golden():
    return reference.arrays("02_head")


@pytest.fixture(scope="module")
def weights():
    return load_file(reference.FOLDER / "02_head.safetensors")


def golden_head(case, weights):
    dims = {key: SPEC["dims"][key] for key in ("in_dim", "out_dim", "hidden_dim", "bottleneck_dim")}
    options = {key: case[key] for key in ("nlayers", "use_bn", "norm_last_layer")}
    head = DINOHead(**dims, **options)
    assert [[name, list(t.shape)] for name, t in head.state_dict().items()] == case["keys"]
    prefix = case["id"] + "."
    head.load_state_dict({k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)}, strict=True)
    return head


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, mode, golden, weights):
    case = CASES[name]
    expected = case["modes"][mode]
    x = golden[f"{name}/input"].clone().requires_grad_()
    head = golden_head(case, weights)
    head.train(mode == "train")
    out = head(x)
    loss = out.square().sum()
    loss.backward()

    np.testing.assert_allclose(out.detach(), golden[f"{name}/{mode}/out"], atol=5e-6, rtol=0)
    assert loss.item() == pytest.approx(expected["sum_sq"], rel=1e-5)
    np.testing.assert_allclose(x.grad, golden[f"{name}/{mode}/grad_input"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(head.last_layer.weight_v.grad, golden[f"{name}/{mode}/grad_weight_v"], atol=2e-5, rtol=0)
    if case["norm_last_layer"]:
        assert head.last_layer.weight_g.grad is None
    else:
        expected_g = golden[f"{name}/{mode}/grad_weight_g"]
        np.testing.assert_allclose(head.last_layer.weight_g.grad, expected_g, atol=2e-5, rtol=0)
    for parameter, norm in expected["grad_norms"].items():
        grad = head.get_parameter(parameter).grad
        assert (grad is None) == (norm is None), parameter
        if grad is not None and norm is not None:
            assert grad.norm().item() == pytest.approx(norm, rel=1e-5, abs=2e-5), parameter
    for key in golden:
        if mode == "train" and key.startswith(f"{name}/train/buffer/"):
            np.testing.assert_allclose(head.get_buffer(key.rsplit("/", 1)[1]), golden[key], atol=1e-6, rtol=0)

    out64 = golden_head(case, weights).double().train(mode == "train")(x.detach().double())
    assert out64.dtype == torch.float64
    assert out64.square().sum().item() == pytest.approx(expected["sum_sq_f64"], rel=1e-9)


def test_initialisation_equals_the_reference():
    torch.manual_seed(0)
    head = DINOHead(384, 4096)
    for name, expected in SPEC["init_stats"].items():
        parameter = head.get_parameter(name)
        assert list(parameter.shape) == expected["shape"]
        assert parameter.requires_grad == expected["requires_grad"]
        assert parameter.mean().item() == pytest.approx(expected["mean"], abs=3e-4)
        assert parameter.std().item() == pytest.approx(expected["std"], rel=5e-3)
    # Uniform, not normal: the prototypes keep the default of a linear layer.
    assert head.last_layer.weight_v.abs().max().item() == pytest.approx(1 / 16, rel=1e-4)


def test_a_zero_bottleneck_gives_zero():
    head = DINOHead(8, 20, nlayers=1)
    assert SPEC["zero_bottleneck_output_all_zero"]
    assert (head(torch.zeros(3, 8)) == 0).all()
    head(torch.zeros(3, 8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters() if p.grad is not None)


def test_logits_are_cosines_by_hand():
    head = DINOHead(2, 2, nlayers=1, bottleneck_dim=2)
    with torch.no_grad():
        head.mlp.weight.copy_(torch.eye(2))
        head.last_layer.weight_v.copy_(torch.tensor([[5.0, 0.0], [3.0, 4.0]]))
    torch.testing.assert_close(head(torch.tensor([[0.0, 7.0]])), torch.tensor([[0.0, 0.8]]))


@pytest.mark.parametrize("use_bn", [False, True])
def test_leading_dimensions_are_one_batch(use_bn):
    head, x = DINOHead(6, 9, use_bn=use_bn, hidden_dim=8, bottleneck_dim=4), torch.randn(3, 5, 6)
    torch.testing.assert_close(head(x), head(x.flatten(0, 1)).view(3, 5, 9))


def test_the_tail_is_float32_under_autocast():
    head = DINOHead(16, 32, nlayers=1, bottleneck_dim=16)
    with torch.no_grad():
        head.mlp.weight.copy_(torch.eye(16))
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.float16):
        # So small that the squares underflow in half precision.
        logits = head(1e-6 * x.half().float())
        large = head(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(x), atol=0.05, rtol=0)
    torch.testing.assert_close(large, head(x), atol=2e-3, rtol=0)


def test_bad_number_of_layers():
    with pytest.raises(ValueError, match="nlayers=0 is not allowed"):
        DINOHead(4, 8, nlayers=0)
