"""``dino attention`` on images: which files, how large, what is in them, and what is refused."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dino.commands import cli
from dino.commands.attention import Attention
from dino.config import ModelConfig
from dino.encoder.attention import mass_masks
from dino.encoder.encoder import Encoder
from dino.models.timm_backbone import TimmBackbone
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import ForwardOptions
from dino.pictures.attention import attention_pictures
from dino.pictures.inputs import MOST_PIXELS, fit, patch_at, read_images, scaled_size
from dino.pictures.sheet import colorize, mark_patch, overlay_heat

CPU = ForwardOptions(device="cpu")
PER_IMAGE = {"attention", "mean", "overlay", "mask", *(f"head{i}{m}" for i in range(3) for m in ("", "_mask"))}


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3).eval()


@pytest.fixture(scope="module")
def weights(backbone, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_backbone(backbone, path, ModelConfig("vit_tiny", patch_size=8), 32)
    return str(path)


def noise(path, width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return str(path)


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*.png")}


def test_a_query_patch_gives_its_row_of_the_whole_attention(backbone):
    images = torch.rand(2, 3, 24, 40)
    encoder = Encoder(backbone)
    with torch.no_grad():
        whole = backbone.get_last_selfattention(encoder.normalize(images))
    assert whole.shape == (2, 3, 16, 16)
    for query, token in ((None, 0), ((0, 0), 1), ((2, 4), 15), ((1, 3), 9)):
        torch.testing.assert_close(encoder.attention(images, query).flatten(2), whole[:, :, token, 1:])
    for query in ((3, 0), (0, 5), (-1, 0)):
        with pytest.raises(ValueError, match="not in the grid of 3 x 5 patches"):
            encoder.attention(images, query)


def test_every_picture_of_an_image_of_any_size(backbone, weights, tmp_path):
    path = noise(tmp_path / "odd.png", 45, 37)
    results = Attention(weights, (path,), out=tmp_path / "out", forward=CPU).run()
    assert (results["images"], results["frames"], results["broken"]) == (1, 0, 0)
    assert names(tmp_path / "out") == {f"odd_{name}.png" for name in PER_IMAGE}
    pictures = {name: Image.open(tmp_path / "out" / f"odd_{name}.png") for name in PER_IMAGE}
    assert all(picture.size == (40, 32) for name, picture in pictures.items() if name != "attention")

    # What is in them: the maps of the backbone, on squares of a patch.
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[:, :32, :40]
    maps = Encoder(backbone).attention(image[None])[0]
    for name, one in (("mean", maps.mean(0)), ("head2", maps[2])):
        expected = (255 * colorize(one)).round().permute(1, 2, 0).numpy()
        assert np.abs(np.array(pictures[name])[4::8, 4::8] - expected).max() <= 6  # A step of the colour map.
        assert len({tuple(pixel) for pixel in np.array(pictures[name])[:8, :8].reshape(-1, 3)}) == 1
    for name, one in (("mask", maps.mean(0)), ("head1_mask", maps[1])):
        mask = np.array(pictures[name])
        assert (mask == 255 * mass_masks(one, 0.6).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()).all()


def test_size_enlarges_and_shrinks_and_more_share_gives_larger_masks(weights, tmp_path):
    path = noise(tmp_path / "a.png", 60, 40)
    areas = []
    for size, share, expected in ((80, 0.3, (120, 80)), (16, 0.9, (24, 16))):
        Attention(weights, (path,), out=tmp_path, size=size, share=share, forward=CPU).run()
        mask = Image.open(tmp_path / "a_mask.png")
        assert mask.size == expected
        areas.append(np.array(mask).mean())
    assert areas[0] < areas[1]


def test_a_folder_keeps_its_subfolders_and_equal_stems_apart(weights, tmp_path, caplog):
    data = tmp_path / "data"
    for name in ("x.png", "x.bmp", "sub/x.png"):
        noise(data / name, 16, 16)
    (data / "broken.jpg").write_bytes(b"no image")
    results = Attention(weights, (str(data),), out=tmp_path / "out", forward=CPU).run()
    assert (results["images"], results["broken"]) == (3, 1)
    assert "broken.jpg cannot be read" in caplog.text
    stems = {name.removesuffix("_mean.png") for name in names(tmp_path / "out") if name.endswith("_mean.png")}
    assert stems == {"x", "x_2", "sub/x"}


def test_an_image_below_a_patch_is_left_out_of_a_folder(weights, tmp_path, caplog):
    data = tmp_path / "data"
    small, other = noise(data / "a.png", 20, 7), noise(data / "b.png", 16, 24)
    results = Attention(weights, (str(data),), out=tmp_path / "out", forward=CPU).run()
    assert (results["images"], results["broken"]) == (1, 1)
    reason = f"{small} has 7 x 20 pixels, a patch of this backbone 8: give a larger --size"
    assert f"{reason}; it is left out" in caplog.text
    assert names(tmp_path / "out") == {f"b_{name}.png" for name in PER_IMAGE}
    # Enlarged it is shown; with nothing beside it the command fails.
    assert Attention(weights, (small, other), out=tmp_path / "large", size=8, forward=CPU).run()["images"] == 2
    with pytest.raises(ValueError, match=reason):
        Attention(weights, (small,), out=tmp_path / "out", forward=CPU).run()


def test_names_in_an_archive_do_not_lead_out_of_the_folder(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in ("../../evil.png", "/root.png", "a//b.png"):
            entry = tarfile.TarInfo(name)
            entry.size = len(buffer.getvalue())
            archive.addfile(entry, io.BytesIO(buffer.getvalue()))
    assert [one.stem for one in read_images([str(tmp_path / "evil.tar")])] == ["evil", "root", "a/b"]


def test_a_query_is_marked_and_changes_the_maps(backbone, weights, tmp_path):
    path = noise(tmp_path / "a.png", 40, 24)
    Attention(weights, (path,), out=tmp_path / "cls", forward=CPU).run()
    Attention(weights, (path,), out=tmp_path / "patch", query=(33, 10), forward=CPU).run()
    assert (tmp_path / "cls" / "a_mean.png").read_bytes() != (tmp_path / "patch" / "a_mean.png").read_bytes()
    image = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    row = backbone.get_last_selfattention(Encoder(backbone).normalize(image[None]))[0, :, 1 + 1 * 5 + 4, 1:].detach()
    expected = (255 * colorize(row.mean(0).view(3, 5))).round().permute(1, 2, 0).numpy()
    assert np.abs(np.array(Image.open(tmp_path / "patch" / "a_mean.png"))[4::8, 4::8] - expected).max() <= 6
    marked = mark_patch(torch.zeros(3, 24, 40), (1, 4), 8)
    assert marked[:, 8:16, 32:40].sum() == 0
    assert marked[:, 7, 32:40].sum() > 0


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(9, 60), width=st.integers(9, 60), patch=st.integers(2, 9), size=st.none() | st.integers(9, 40),
    place=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)  # fmt: skip
def test_a_query_is_the_patch_that_shows_that_pixel(height, width, patch, size, place):
    x, y = int(place[0] * width), int(place[1] * height)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    fitted = fit(image, patch, size)
    row, column = patch_at((x, y), image, patch, size)
    h, w = fitted.shape[1] // patch, fitted.shape[2] // patch
    assert fitted.shape[1:] == (h * patch, w * patch)
    high, wide = scaled_size(height, width, size)
    assert row == min(int(y * high / height + 1e-9) // patch, h - 1)
    assert column == min(int(x * wide / width + 1e-9) // patch, w - 1)


def test_images_keep_their_size_up_to_a_limit():
    assert scaled_size(480, 854, None) == (480, 854)
    height, width = scaled_size(3000, 9000, None)
    assert height * width <= MOST_PIXELS * 1.01
    assert width / height == pytest.approx(3, rel=0.01)
    # A patch in the fitted image shows what was there in the image.
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 20:30, 40:50] = 255
    row, column = patch_at((44, 24), image, 8, 80)
    assert fit(image, 8, 80)[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].float().mean() > 200


def test_the_overlay_covers_more_where_attention_is():
    image = torch.full((3, 16, 16), 0.5)
    heat = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    shown = overlay_heat(image, heat)
    change = (shown - image).abs().sum(0)
    assert shown.shape == image.shape
    assert change[15, 15] > change[0, 0] > 0
    # With a scale the map's own range does not matter.
    assert torch.equal(overlay_heat(image, heat, (0.0, 2.0))[:, :2, :2], shown[:, :2, :2])
    assert not torch.equal(overlay_heat(image, heat, (0.0, 2.0)), shown)


def test_pictures_by_name_hold_the_share():
    attention = torch.rand(2, 4, 6)
    pictures = attention_pictures(torch.rand(3, 32, 48), attention, share=0.75)
    assert set(pictures) == {"attention", "mean", "overlay", "mask", "head0", "head0_mask", "head1", "head1_mask"}
    kept = torch.from_numpy(np.array(pictures["head1_mask"])[::8, ::8] > 0)
    assert 0.75 <= attention[1][kept].sum() / attention[1].sum() < 0.75 + 1 / 4


def test_bad_input_is_named(weights, tmp_path):
    image = noise(tmp_path / "a.png", 20, 16)
    (tmp_path / "text.png").write_text("text")
    (tmp_path / "notes.md").write_text("text")
    refused = {
        "nowhere.png does not exist": {"data": (str(tmp_path / "nowhere.png"),)},
        "text.png cannot be read: not an image": {"data": (str(tmp_path / "text.png"),)},
        "notes.md is no folder": {"data": (str(tmp_path / "notes.md"),)},
        "no images given": {"data": ()},
        r"--query 20 3 lies outside .*a.png: x from 0 to 19, y from 0 to 15": {"query": (20, 3)},
        "--query 3 -1 lies outside": {"query": (3, -1)},
        "--share 1.5": {"share": 1.5},
        "--size 0": {"size": 0},
        "a.png has 5 x 6 pixels, a patch of this backbone 8": {"size": 5},
    }
    for message, change in refused.items():
        with pytest.raises(ValueError, match=message):
            Attention(
                **({"weights": weights, "data": (image,), "out": tmp_path / "out", "forward": CPU} | change)
            ).run()
    assert not (tmp_path / "out").exists()


def test_a_convnet_has_no_attention(tmp_path):
    save_backbone(TimmBackbone("resnet10t"), tmp_path / "w.safetensors", ModelConfig("timm:resnet10t"), 64)
    command = Attention(str(tmp_path / "w.safetensors"), (noise(tmp_path / "a.png", 64, 64),), out=tmp_path / "out")
    with pytest.raises(ValueError, match="resnet10t has no attention maps: take one of the vit_"):
        command.run()


def test_from_the_command_line(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", {"attention": Attention})
    path = noise(tmp_path / "a.png", 24, 16)
    arguments = ["attention", weights, path, "--out", str(tmp_path / "out"), "--query", "20", "3", "--device", "cpu"]
    assert cli.main([*arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["images"] == 1
    assert results["settings"]["query"] == [20, 3]
    assert cli.main(["attention", weights, str(tmp_path / "no.png"), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
