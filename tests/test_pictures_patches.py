"""``dino pca``, ``dino correspond`` and ``dino neighbors``: patch tokens as colours, pairs and nearest images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.commands.correspond import Correspond
from dino.commands.neighbors import Neighbors
from dino.commands.pca import Pca
from dino.config import ModelConfig
from dino.models.timm_backbone import TimmBackbone
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import CropOptions, ForwardOptions
from dino.pictures.correspond import Matches, correspondence_picture, distinct_colors, mutual_nearest, spread
from dino.pictures.neighbors import neighbor_sheet, without_self
from dino.pictures.pca import patch_colors, pca_sheet, principal_components, two_groups
from dino.pictures.sheet import RIGHT, WRONG

CPU = ForwardOptions(device="cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    save_backbone(backbone, path, ModelConfig("vit_tiny", patch_size=8), 32)
    return str(path)


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "convnet.safetensors"
    save_backbone(TimmBackbone("resnet10t"), path, ModelConfig("timm:resnet10t"), 64)
    return str(path)


def noise(path, width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


# Principal components.


@settings(max_examples=20, deadline=None)
@given(n=st.integers(4, 40), d=st.integers(3, 12), seed=st.integers(0, 99))
def test_components_are_those_of_the_svd_with_fixed_signs(n, d, seed):
    tokens = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    found = principal_components(tokens)
    centred = tokens.double() - tokens.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.abs(), (u * s)[:, :3].abs(), atol=1e-6, rtol=1e-6)
    weights = torch.linalg.lstsq(centred, found).solution if n > d else None
    if weights is not None:
        assert (weights.gather(0, weights.abs().argmax(0, keepdim=True)) > 0).all()
    # The order of the tokens changes nothing.
    torch.testing.assert_close(principal_components(tokens.flip(0)), found.flip(0))


def test_fewer_dimensions_than_colours_are_zero():
    assert principal_components(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))[:, 1:].abs().max() < 1e-12
    assert [c.rgb.isfinite().all().item() for c in patch_colors([torch.ones(2, 3, 5)], foreground=True)] == [True]


@settings(max_examples=20, deadline=None)
@given(low=st.lists(st.floats(0, 1), min_size=1, max_size=20), high=st.lists(st.floats(5, 6), min_size=1, max_size=20))
def test_two_groups_that_are_far_apart_are_found(low, high):
    assert two_groups(torch.tensor(low + high)).tolist() == [False] * len(low) + [True] * len(high)


def test_one_basis_for_all_images():
    a, b = torch.randn(4, 5, 16), 3 * torch.randn(3, 6, 16)
    first, second, again = patch_colors([a, b, a])
    assert torch.equal(first.rgb, again.rgb)
    assert first.rgb.shape == (3, 4, 5)
    assert second.rgb.shape == (3, 3, 6)
    assert not torch.allclose(patch_colors([a])[0].rgb, first.rgb, atol=0.05)
    swapped = patch_colors([b, a, a])
    torch.testing.assert_close(swapped[0].rgb, second.rgb)
    # Over all images, every colour goes from 0 to 1.
    every = torch.cat([one.rgb.flatten(1) for one in (first, second)], dim=1)
    assert every.amin(1).tolist() == [0, 0, 0]
    assert every.amax(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_group_away_from_the_border(sign):
    tokens = torch.randn(8, 9, 16, generator=torch.Generator().manual_seed(0))
    tokens[2:6, 3:7] += sign * 20  # The object; on either side of the first component.
    expected = torch.zeros(8, 9, dtype=torch.bool)
    expected[2:6, 3:7] = True
    (colors,) = patch_colors([tokens], foreground=True)
    assert torch.equal(colors.foreground, expected)
    assert colors.rgb[:, ~expected].abs().max() == 0
    assert colors.rgb[:, expected].std(1).min() > 0.1  # Its parts differ: the components are those of it alone.
    assert patch_colors([tokens])[0].foreground.all()


def test_pca_writes_a_picture_an_image_and_a_sheet(weights, tmp_path):
    images = (noise(tmp_path / "a.png", 45, 37), noise(tmp_path / "b.png", 24, 50, seed=1))
    results = Pca(weights, images, out=tmp_path / "out", foreground=True, forward=CPU).run()
    assert results["images"] == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["a_foreground.png", "a_pca.png", "b_foreground.png", "b_pca.png", "pca.png"]
    )
    for name, size in (("a", (40, 32)), ("b", (24, 48))):
        mask = Image.open(tmp_path / "out" / f"{name}_foreground.png")
        colors = Image.open(tmp_path / "out" / f"{name}_pca.png")
        assert mask.size == colors.size == size
        assert set(np.unique(np.array(mask))) <= {0, 255}
        assert (np.array(colors)[np.array(mask) == 0] == 0).all()


def test_pca_leaves_out_an_image_below_a_patch(weights, tmp_path, caplog):
    small, other = noise(tmp_path / "data" / "a.png", 7, 20), noise(tmp_path / "data" / "b.png", 24, 16)
    results = Pca(weights, (str(tmp_path / "data"),), out=tmp_path / "out", forward=CPU).run()
    assert (results["images"], results["broken"]) == (1, 1)
    assert f"{small} has 20 x 7 pixels, a patch of this backbone 8: give a larger --size; it is left out" in caplog.text
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b_pca.png", "pca.png"]
    # Enlarged it is shown; two images that must both be there, or nothing beside it: the command fails.
    assert Pca(weights, (small, other), out=tmp_path / "large", size=8, forward=CPU).run()["images"] == 2
    for command in (
        Pca(weights, (small,), out=tmp_path / "none", forward=CPU),
        Correspond(weights, other, small, out=tmp_path / "none" / "c.png", forward=CPU),
    ):
        with pytest.raises(ValueError, match=r"a.png has 20 x 7 pixels"):
            command.run()
    assert not (tmp_path / "none").exists()


def test_pca_and_correspond_take_convnets(convnet, tmp_path):
    a, b = noise(tmp_path / "a.png", 100, 70), noise(tmp_path / "b.png", 64, 64, seed=1)
    Pca(convnet, (a, b), out=tmp_path / "out", forward=CPU).run()
    assert Image.open(tmp_path / "out" / "a_pca.png").size == (96, 64)
    assert Correspond(convnet, a, b, out=tmp_path / "c.png", forward=CPU).run()["pairs"] >= 1


def test_a_sheet_of_several_images_has_two_a_row():
    colors = patch_colors([torch.randn(2, 3, 8) for _ in range(5)])
    images = [torch.rand(3, 16, 24)] * 5
    one, five = pca_sheet(images[:1], colors[:1]), pca_sheet(images, colors)
    assert one.width < five.width
    assert five.height - one.height > 2 * 180  # Two more rows.
    assert pca_sheet(images, colors, foreground=True).width > 1.3 * five.width


# Correspondences.


def test_a_shifted_image_corresponds_to_itself():
    tokens = torch.randn(6, 8, 16, generator=torch.Generator().manual_seed(1))
    matches = mutual_nearest(tokens[:5, :6], tokens[1:, 2:])
    shifted = {(r, c): (r - 1, c - 2) for r in range(1, 5) for c in range(2, 6)}
    pairs = {tuple(a): tuple(b) for a, b in zip(matches.first.tolist(), matches.second.tolist(), strict=True)}
    assert shifted.items() <= pairs.items()
    assert matches.similarities[: len(shifted)] == pytest.approx(torch.ones(len(shifted)), abs=1e-5)
    assert (matches.similarities.diff() <= 0).all()
    assert len(set(pairs.values())) == len(pairs)


@settings(max_examples=20, deadline=None)
@given(h=st.integers(2, 12), w=st.integers(2, 12), count=st.integers(1, 30), seed=st.integers(0, 99))
def test_chosen_pairs_are_as_many_as_wanted_and_lie_apart(h, w, count, seed):
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    order = torch.randperm(h * w, generator=torch.Generator().manual_seed(seed))
    matches = Matches(places[order], places[order], torch.linspace(1, 0, h * w))
    chosen = spread(matches, count, (h, w))
    assert len(chosen.first) == min(count, h * w)
    assert len({tuple(place) for place in chosen.first.tolist()}) == len(chosen.first)
    assert chosen.first[0].tolist() == matches.first[0].tolist()  # The most similar one is always there.


def test_pairs_are_not_all_taken_from_where_they_are_most_similar():
    places = torch.cartesian_prod(torch.arange(12), torch.arange(12))  # The most similar ones in the first rows.
    chosen = spread(Matches(places, places, torch.linspace(1, 0, 144)), 9, (12, 12))
    assert torch.pdist(chosen.first.double()).min() > 2
    assert chosen.first[:, 0].max() > 6


def test_colours_of_lines_are_distinct():
    for count in (2, 3, 10, 20, 24):
        colors = torch.tensor(distinct_colors(count)).double()
        assert torch.pdist(colors).min() > 30
        assert (colors[1:] - colors[:-1]).norm(dim=1).min() > 100  # Neighbours are far apart.
    assert distinct_colors(1)
    assert distinct_colors(0) == []


def test_lines_end_in_their_patches():
    images = torch.zeros(2, 3, 40, 40)
    matches = Matches(torch.tensor([[0, 0], [4, 4]]), torch.tensor([[4, 0], [2, 2]]), torch.tensor([0.9, 0.8]))
    page = np.array(correspondence_picture(images[0], images[1], matches, 8, width=800)).astype(int)
    colors = distinct_colors(2)
    margin, gap = 800 // 60, 800 // 40
    side = (800 - 2 * margin - gap) / 2
    top = ((page.sum(2) < 30).sum(1) > 300).argmax()  # First row of the images, which are black.
    for number, (first, second) in enumerate(zip(matches.first.tolist(), matches.second.tolist(), strict=True)):
        for (row, column), left in ((first, margin), (second, margin + side + gap)):
            y, x = round(top + (row + 0.5) * side / 5), round(left + (column + 0.5) * side / 5)
            assert np.abs(page[y, x] - colors[number]).max() < 12


def test_correspond_on_a_moved_image(weights, tmp_path):
    pixels = Image.open(noise(tmp_path / "whole.png", 80, 64))
    pixels.crop((0, 0, 64, 64)).save(tmp_path / "a.png")
    pixels.crop((16, 0, 80, 64)).save(tmp_path / "b.png")
    command = Correspond(weights, *(str(tmp_path / f"{n}.png") for n in "ab"), out=tmp_path / "new" / "c.png", count=9)
    results = command.run()
    assert results["pairs"] == 9
    assert results["mutual_pairs"] > 9
    page = Image.open(tmp_path / "new" / "c.png")
    assert page.width == pytest.approx(1600, abs=4)
    assert page.height > 700


# Neighbours.


def test_the_sheet_names_classes_that_are_known():
    image = torch.full((3, 16, 16), 0.5)
    similarities = torch.tensor([[0.9, 0.5]])

    def borders(own):
        page = neighbor_sheet(
            [image], [[image, image]], similarities, query_classes=[own], neighbor_classes=[["a", "b"]], names=["q.png"]
        )
        shown = {"#%02x%02x%02x" % rgb for _, rgb in page.getcolors(1 << 24)}  # noqa: UP031
        return {RIGHT, WRONG} & shown

    assert borders("a") == {RIGHT, WRONG}
    assert borders("") == set()


def test_no_query_is_its_own_neighbour():
    similarities = torch.tensor([[0.9, 0.8, 0.7], [0.9, 0.8, 0.7]])
    found = without_self(similarities, torch.tensor([[4, 5, 6], [4, 5, 6]]), [5, -1], k=2)
    assert found[1].tolist() == [[4, 6], [4, 5]]
    assert found[0].flatten().tolist() == pytest.approx([0.9, 0.7, 0.9, 0.8])
    # Only three images: the one that is its own neighbour has two left.
    assert without_self(similarities, torch.tensor([[4, 5, 6], [4, 5, 6]]), [5, -1], k=5)[1].shape == (2, 2)


def test_neighbors_of_files_and_numbers(weights, tmp_path):
    rng = np.random.default_rng(0)
    for name, color in (("red", (220, 30, 30)), ("blue", (20, 40, 230))):
        for i in range(4):
            pixels = (np.array(color) + rng.integers(-20, 20, (32, 40, 3))).clip(0, 255).astype(np.uint8)
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    Image.new("RGB", (50, 32), (225, 25, 28)).save(tmp_path / "new.png")
    queries = ("0", str(tmp_path / "new.png"), str(tmp_path / "data" / "red" / "2.png"))
    command = Neighbors(weights, (str(tmp_path / "data"),), query=queries, out=tmp_path / "sheets" / "n.png", k=3,
                        shown=CropOptions(resize=32, crop=32, device="cpu"))  # fmt: skip
    results = command.run()
    found = {
        query.split("data/")[-1]: [n.split("data/")[-1] for n in near] for query, near in results["neighbors"].items()
    }
    assert list(found) == ["blue/0.png", str(tmp_path / "new.png"), "red/2.png"]
    assert sorted(found["blue/0.png"]) == [f"blue/{i}.png" for i in (1, 2, 3)]
    assert all(name.startswith("red/") for name in found[str(tmp_path / "new.png")])
    assert sorted(found["red/2.png"]) == [f"red/{i}.png" for i in (0, 1, 3)]
    for near in results["neighbors"].values():
        assert list(near.values()) == sorted(near.values(), reverse=True)
    page = Image.open(tmp_path / "sheets" / "n.png")
    assert page.width > 4 * 200
    assert page.height > 3 * 160


def test_bad_input_is_named(weights, tmp_path):
    a = noise(tmp_path / "a.png", 20, 16)
    (tmp_path / "text.png").write_text("text")
    where = {"out": tmp_path / "out.png", "forward": CPU}
    nearest = {"out": tmp_path / "out.png", "shown": CropOptions(device="cpu")}
    refused = {
        "nowhere.png does not exist": Correspond(weights, a, str(tmp_path / "nowhere.png"), **where),
        "text.png cannot be read": Correspond(weights, a, str(tmp_path / "text.png"), **where),
        "--count 0": Correspond(weights, a, a, count=0, **where),
        "--out .*folder is no name of a picture": Correspond(weights, a, a, out=tmp_path / "folder"),
        "--query 7: .* has images 0 to 0": Neighbors(weights, (a,), query=("7",), **nearest),
        "no_file.png does not exist": Neighbors(weights, (a,), query=("no_file.png",), **nearest),
        "none of the 1 images can be read": Neighbors(weights, (a,), query=(str(tmp_path / "text.png"),), **nearest),
        "at least one query": Neighbors(weights, (a,), query=(), **nearest),
        "nowhere does not exist": Pca(weights, (str(tmp_path / "nowhere"),), out=tmp_path / "out"),
        "--size 0": Pca(weights, (a,), out=tmp_path / "out", size=0),
    }
    for message, command in refused.items():
        with pytest.raises(ValueError, match=message):
            command.run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "text.png"]
