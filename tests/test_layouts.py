"""Names, shapes, order and counts of parameters are those of the released code (golden topic 14)."""

import inspect

import pytest
import torch

from dino.models import vision_transformer
from dino.models.head import DINOHead
from reference import scalars

SPEC = scalars("14_layouts")
HEAD_OPTIONS = set(inspect.signature(DINOHead).parameters)


def layout(module):
    return [[name, list(tensor.shape)] for name, tensor in module.state_dict().items()]


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("spec", SPEC["backbones"], ids=lambda spec: f"{spec['arch']}/{spec['patch']}")
def test_backbone(spec):
    with torch.device("meta"):
        backbone = getattr(vision_transformer, spec["arch"])(patch_size=spec["patch"])
    assert layout(backbone) == spec["state_dict"]
    assert count(backbone.parameters()) == spec["parameters"]
    assert (backbone.embed_dim, len(backbone.blocks), backbone.num_heads) == (
        spec["embed_dim"],
        spec["depth"],
        spec["num_heads"],
    )
    assert {m.eps for m in backbone.modules() if isinstance(m, torch.nn.LayerNorm)} == {spec["ln_eps"]}


@pytest.mark.parametrize("spec", SPEC["heads"], ids=lambda spec: f"{spec['in_dim']}-{spec['out_dim']}")
def test_head(spec):
    with torch.device("meta"):
        head = DINOHead(**{key: value for key, value in spec.items() if key in HEAD_OPTIONS})
    assert layout(head) == spec["state_dict"]
    assert count(head.parameters()) == spec["parameters"]
    assert count(p for p in head.parameters() if p.requires_grad) == spec["trainable_parameters"]
    assert {name: p.requires_grad for name, p in head.named_parameters()} == spec["requires_grad"]


@pytest.mark.parametrize("spec", SPEC["checkpoints"], ids=lambda spec: spec["id"])
def test_network_in_a_checkpoint(spec):
    # A reference checkpoint holds the backbone, then the head, under these prefixes; our parameters come in that order.
    with torch.device("meta"):
        backbone = getattr(vision_transformer, spec["arch"])(patch_size=spec["patch"])
        head = DINOHead(
            backbone.embed_dim,
            spec["out_dim"],
            use_bn=spec["use_bn_in_head"],
            norm_last_layer=spec["norm_last_layer"],
        )
    network = torch.nn.ModuleDict({"backbone": backbone, "head": head})
    assert [[f"module.{name}", shape] for name, shape in layout(network)] == spec["student"]
    prefix = "module." if spec["use_bn_in_head"] else ""
    assert [[f"{prefix}{name}", shape] for name, shape in layout(network)] == spec["teacher"]
