"""Pictures: sizes, colours at known places, and that each sheet shows what it was given."""

import pytest
import torch
from PIL import Image

from dino.pictures.attention import attention_sheet, head_sheet
from dino.pictures.crops import crop_sheet, draw_boxes
from dino.pictures.neighbors import neighbor_sheet
from dino.pictures.sheet import RIGHT, WRONG, Tile, colorize, overlay_mask, resize, sheet, shorten, to_pil

SOLID = {name: torch.tensor(rgb).view(3, 1, 1).expand(3, 24, 32) for name, rgb in
         {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0), "mauve": (0.7, 0.2, 0.9)}.items()}  # fmt: skip


def colors(picture):
    """{(r, g, b): number of pixels}."""
    return {rgb: count for count, rgb in picture.convert("RGB").getcolors(1 << 24)}


def rgb(text):
    return tuple(int(text[i : i + 2], 16) for i in (1, 3, 5))


def test_to_pil_rounds_and_clips():
    image = torch.tensor([-1.0, 0.5, 2.0]).view(3, 1, 1)
    assert to_pil(image).getpixel((0, 0)) == (0, 128, 255)
    assert to_pil(torch.full((1, 2, 3), 0.2)).size == (3, 2)
    assert to_pil(torch.full((1, 2, 3), 0.2)).getpixel((0, 0)) == (51, 51, 51)


def test_resize_keeps_leading_dimensions_and_squares():
    maps = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    assert resize(maps, (4, 4)).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    assert resize(maps.expand(5, 6, 2, 2), (4, 8), smooth=True).shape == (5, 6, 4, 8)


def test_colorize_spans_the_map_and_survives_a_constant_one():
    colored = colorize(torch.tensor([[3.0, 5.0, 4.0]]), "viridis")
    # Ends of viridis: dark violet and yellow.
    assert colored[:, 0, 0].tolist() == pytest.approx([0.267, 0.005, 0.329], abs=1e-3)
    assert colored[:, 0, 1].tolist() == pytest.approx([0.993, 0.906, 0.144], abs=1e-3)
    assert colorize(torch.ones(2, 2)).isfinite().all()


def test_overlay_keeps_the_inside_dims_the_outside_and_outlines():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:30, 10:30] = True
    image = torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1).expand(3, 40, 40)
    shown = overlay_mask(image, mask, color="#00ff00")
    assert shown[:, 20, 20].tolist() == [1.0, 0.5, 0.0]
    assert shown[:, 2, 2].tolist() == pytest.approx([0.35 * 0.5 + 0.05] * 3)
    assert shown[:, 20, 10].tolist() == [0, 1, 0]
    assert torch.allclose(overlay_mask(image, torch.ones(40, 40, dtype=torch.bool)), image)


def test_a_sheet_shows_every_tile_with_its_border_on_white():
    tiles = [
        Tile(to_pil(image), name, border)
        for (name, image), border in zip(SOLID.items(), (RIGHT, WRONG, None), strict=True)
    ]
    page = sheet([tiles[:2], tiles[2:]], tile=64, columns=["one", "two"], title="Title", note="how to read " * 10)
    found = colors(page)
    assert page.getpixel((0, 0)) == (255, 255, 255)
    assert found[(178, 51, 230)] == 64 * 48  # No border: the whole tile, at the aspect ratio of the image.
    assert found[(255, 0, 0)] == found[(0, 0, 255)] == 58 * 42
    assert found[rgb(RIGHT)] >= 64 * 48 - 58 * 42
    assert rgb(WRONG) in found
    assert sheet([tiles], tile=64).width == 2 * 12 + 3 * 64 + 2 * 6


def test_a_sheet_without_tiles_is_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        sheet([[]])


def test_long_captions_are_cut_in_the_middle():
    text = shorten("a-very-long-file-name-0001.jpeg", 80, 12)
    assert "…" in text
    assert text.startswith("a-")
    assert text.endswith("g")
    assert shorten("short", 80, 12) == "short"


def test_neighbors_of_the_same_class_are_green_and_others_red_and_named():
    queries, neighbors = [SOLID["red"]], [[SOLID["blue"], SOLID["mauve"]]]
    similarities = torch.tensor([[0.9, 0.1]])
    plain = colors(neighbor_sheet(queries, neighbors, similarities))
    assert rgb(RIGHT) not in plain
    one = {"query_classes": ["fish"], "neighbor_classes": [["fish", "dog"]]}
    mixed = colors(neighbor_sheet(queries, neighbors, similarities, **one))
    assert {rgb(RIGHT), rgb(WRONG), (255, 0, 0), (0, 0, 255), (178, 51, 230)} <= mixed.keys()
    same = colors(neighbor_sheet(queries, neighbors, similarities, query_classes=["a"], neighbor_classes=[["a", "a"]]))
    assert rgb(WRONG) not in same


def test_boxes_are_drawn_where_they_are():
    image = torch.zeros(3, 50, 100)
    drawn = draw_boxes(image, torch.tensor([[10.0, 20.0, 30.0, 40.0]]), ["g1"], ["#0072b2"], bold=1, size=200)
    assert drawn.size == (200, 100)
    assert drawn.getpixel((100, 20)) == drawn.getpixel((119, 50)) == rgb("#0072b2")  # Top edge, right edge.
    assert drawn.getpixel((80, 70)) == drawn.getpixel((150, 50)) == (0, 0, 0)  # Inside, outside.


def test_crop_sheet_undoes_the_normalisation():
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [2.0, 2.0, 8.0, 8.0]])
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    crops = SOLID["mauve"][None, :, :, :24]
    page = crop_sheet(SOLID["red"], boxes, (crops - 0.5) / 0.25, (crops - 0.5) / 0.25, mean=mean, std=std)
    assert colors(page)[(178, 51, 230)] > 2 * 100 * 100
    with pytest.raises(ValueError, match="2 boxes for 1 crops"):
        crop_sheet(SOLID["red"], boxes, crops, torch.zeros(0, 3, 8, 8))


def test_attention_sheet_shows_the_columns_it_has_data_for():
    images, attention = torch.rand(2, 3, 16, 24), torch.rand(2, 3, 2, 3)
    masks, truth = attention > 0.5, torch.rand(2, 16, 24) > 0.5
    widths = [
        attention_sheet(images, attention, tile=64).width,
        attention_sheet(images, attention, masks=masks, tile=64).width,
        attention_sheet(images, attention, untrained=attention, masks=masks, true_masks=truth, tile=64).width,
    ]
    assert [(w - widths[0]) // 70 for w in widths] == [0, 1, 3]
    assert isinstance(head_sheet(images[0], attention[0]), Image.Image)


def test_attention_sheet_takes_the_head_that_fits_the_true_mask():
    # Head 1 is concentrated but wrong, head 2 is spread and right: its mask leaves the lower half in colour.
    attention = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.1, 0.1], [0.4, 0.4]]]])
    truth = torch.zeros(1, 64, 64, dtype=torch.bool)
    truth[:, 32:] = True
    images = SOLID["mauve"][None, :, :1, :1].expand(1, 3, 64, 64)
    fitting = colors(attention_sheet(images, attention, masks=attention > 0.3, true_masks=truth, tile=64))
    concentrated = colors(attention_sheet(images, attention, masks=attention > 0.3, tile=64))
    whole, bright = 64 * 64, (178, 51, 230)
    assert fitting[bright] > whole + 2 * 0.4 * whole  # Image, mask and true mask.
    assert concentrated[bright] < whole + 0.3 * whole  # Image and a quarter.
