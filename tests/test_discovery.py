"""Object discovery: both methods against their formulas written out, tiny graphs by hand, and the whole command."""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.commands import cli
from dino.commands.discovery import Discovery
from dino.config import ModelConfig
from dino.encoder.encoder import Encoder
from dino.evaluation.discovery import component, lost, run, tokencut
from dino.models.backbone import Tokens
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import DiscoveryOptions

# An object (two patches), another patch like it elsewhere, and a background that is at odds with both.
OBJECT, BACKGROUND = [1.0, 0.2], [-1.0, 0.3]
SCENE = torch.tensor(
    [
        [OBJECT, OBJECT, BACKGROUND, BACKGROUND],
        [BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND],
        [BACKGROUND, BACKGROUND, BACKGROUND, OBJECT],
    ]
)
FOUND = [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_both_find_the_small_region_and_leave_what_is_not_connected():
    assert lost(SCENE).int().tolist() == FOUND
    found = tokencut(SCENE).int().tolist()
    # All three patches of the object have the same entry of the eigenvector: either region is right.
    assert found in (FOUND, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])


def test_lost_worked_by_hand():
    # Correlations of 4 patches in a row: 0 with itself alone, 1 with itself, 2 and 3, and so on.
    features = torch.tensor([[[1.0, 0.0], [-0.1, 1.0], [-0.2, 1.0], [-0.3, 1.0]]])
    assert lost(features, k=1).int().tolist() == [[1, 0, 0, 0]]
    # With the seed and patch 1, whose degree is 2 here, the sum of correlations takes patch 1 in.
    features = torch.tensor([[[1.0, -0.5], [0.5, 0.1], [-1.0, 1.0], [-1.0, 2.0]]])
    assert (features[0] @ features[0].T >= 0).sum(1).tolist() == [2, 2, 2, 2]
    assert lost(features, k=1).int().tolist() == [[1, 1, 0, 0]]


def naive_lost(features, k):
    """Algorithm of section 3 patch by patch; the region before it is cut to what is connected, and the seed."""
    flat = features.flatten(0, 1).double()
    n = len(flat)
    degree = [sum(float(flat[p] @ flat[q]) >= 0 for q in range(n)) for p in range(n)]
    order = sorted(range(n), key=lambda p: degree[p])
    seeds = [q for q in order[:k] if float(flat[q] @ flat[order[0]]) >= 0]
    region = [sum(float(flat[q] @ flat[s]) for s in seeds) >= 0 for q in range(n)]
    return torch.tensor(region).view(features.shape[:2]), divmod(order[0], features.shape[1])


def naive_tokencut(features, threshold):
    """The region before it is cut to what is connected, its seed, and by how much every decision was clear."""
    flat = torch.nn.functional.normalize(features.flatten(0, 1).double(), dim=1)
    graph = ((flat @ flat.T) >= threshold).double().clamp_min(1e-5)
    degree = graph.sum(1).diag()
    values, vectors = torch.linalg.eig(torch.linalg.inv(degree) @ (degree - graph))  # (D - E) x = lambda D x
    values, order = values.real.sort()
    vector = torch.nn.functional.normalize(vectors.real[:, order[1]], dim=0)
    strongest = vector.abs().sort(descending=True)
    side, seed = vector > vector.mean(), int(strongest.indices[0])
    clear = min(values[2] - values[1], strongest.values[0] - strongest.values[1], (vector - vector.mean()).abs().min())
    return (side == side[seed]).view(features.shape[:2]), divmod(seed, features.shape[1]), float(clear)


@given(h=st.integers(2, 5), w=st.integers(2, 5), k=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_lost_equals_its_formula(h, w, k, seed):
    features = torch.randn(h, w, 3, generator=torch.Generator().manual_seed(seed))
    region, start = naive_lost(features, k)
    assert torch.equal(lost(features, k), component(region, start))


@given(h=st.integers(2, 5), w=st.integers(2, 5), seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_tokencut_equals_its_formula(h, w, seed):
    features = torch.randn(h, w, 3, generator=torch.Generator().manual_seed(seed))
    region, start, clear = naive_tokencut(features, 0.2)
    assume(clear > 1e-6)
    assert torch.equal(tokencut(features, 0.2), component(region, start))


def test_component_turns_corners_but_does_not_cross_diagonals():
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 1], [1, 0, 1, 1]]).bool()
    assert component(mask, (0, 0)).int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert component(mask, (2, 2)).int().tolist() == [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 1, 1]]


def test_keys_are_those_of_the_attention():
    backbone = VisionTransformer(32, 8, 3, 24, 2, 3).eval()
    images = torch.rand(2, 3, 32, 24)
    keys = Encoder(backbone, mean=(0.0,) * 3, std=(1.0,) * 3).keys(images)
    assert keys.shape == (2, 4, 3, 24)
    # The attention of the last block from its input, with these keys.
    seen = []
    backbone.blocks[-1].norm1.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        attention = backbone.get_last_selfattention(images)[:, :, 0]
        queries = backbone.blocks[-1].attn.qkv(seen[0])[:, :1, :24].unflatten(-1, (3, 8)).transpose(1, 2)
    logits = (queries * keys.flatten(1, 2).unflatten(-1, (3, 8)).transpose(1, 2)).sum(-1) * 8**-0.5
    expected = attention[:, :, 1:] / attention[:, :, 1:].sum(-1, keepdim=True)
    assert torch.allclose(logits.softmax(-1), expected, atol=1e-5)


class Bright(torch.nn.Module):
    """Patches of 4 pixels: bright ones point one way, dark ones the other."""

    patch_size = 4

    def forward(self, images):
        light = torch.nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        return Tokens(light.mean((1, 2)), light)


def scene(top, left, bottom, right):
    image = torch.zeros(3, 17, 24)
    image[:, top:bottom, left:right] = 1
    return image


def test_corloc_counts_images_with_a_right_box():
    truth = torch.tensor([[4, 8, 12, 16]])
    exact, elsewhere = scene(4, 8, 12, 16), scene(12, 0, 16, 4)
    both = torch.tensor([[0, 0, 3, 3], [4, 8, 12, 16]])  # One of them is enough.
    none = torch.zeros(0, 4, dtype=torch.int64)
    samples = [(exact, truth), (elsewhere, truth), (exact, both), (exact, none)]
    encoder = Encoder(Bright(), batch_size=2)
    results = run(encoder, iter(samples))
    assert results["corloc_lost"] == pytest.approx(200 / 3)
    assert results["corloc_tokencut"] == pytest.approx(200 / 3)
    assert results["corloc_whole_image"] == 0
    assert run(encoder, [(exact, torch.tensor([[0, 0, 16, 24]]))])["corloc_whole_image"] == 100
    # An overlap of exactly one half counts, a little less does not.
    assert run(encoder, [(exact, torch.tensor([[4, 8, 12, 24]]))])["corloc_lost"] == 100
    assert run(encoder, [(exact, torch.tensor([[4, 8, 12, 25]]))])["corloc_lost"] == 0


def test_command_on_boxes_and_on_masks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"discovery": Discovery}})
    weights = tmp_path / "backbone.safetensors"
    save_backbone(VisionTransformer(32, 8, 3, 24, 2, 3), weights, ModelConfig(patch_size=8), 32)
    box = "<bndbox><xmax>20</xmax><xmin>5</xmin><ymin>5</ymin><ymax>12</ymax></bndbox>"
    for i in range(3):
        labels = np.zeros((24, 32), np.uint8)
        labels[4:12, 4:20] = 255
        for path, array in (
            (f"voc/JPEGImages/{i}.png", np.repeat(labels[..., None], 3, 2)),
            (f"plain/images/{i}.png", np.repeat(labels[..., None], 3, 2)),
            (f"plain/masks/{i}.png", labels),
        ):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / path)
        (tmp_path / "voc/Annotations").mkdir(exist_ok=True)
        (tmp_path / f"voc/Annotations/{i}.xml").write_text(f"<annotation><object>{box}</object></annotation>")
    printed = []
    for layout in ("voc", "plain"):
        assert cli.main(["eval", "discovery", str(weights), str(tmp_path / layout), "--json", "--k", "5"]) == 0
        printed.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert printed[0] == printed[1]  # The same boxes.
    assert printed[0]["settings"] | {"images": 3, "features": "keys", "k": 5} == printed[0]["settings"]
    assert printed[0].keys() == {"corloc_lost", "corloc_tokencut", "corloc_whole_image", "settings"}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no image has a box"):
        run(Encoder(Bright()), [(torch.zeros(3, 8, 8), torch.zeros(0, 4, dtype=torch.int64))])
    with pytest.raises(ValueError, match="--k 0"):
        DiscoveryOptions(k=0)
    with pytest.raises(ValueError, match=r"--threshold 2\.0"):
        DiscoveryOptions(threshold=2.0)
