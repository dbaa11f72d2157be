"""Resampling, colour and blur: the reference's bytes, Pillow's bytes, numbers worked by hand, properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms import functional as TF

import reference
from dino.augment import blur, color
from dino.augment.resample import resize_and_center_crop, resize_crops, resize_taps

FACTS = reference.scalars("07_augment")
ARRAYS = reference.arrays("07_augment")
COLORS = ("brightness", "contrast", "saturation", "hue")
seeds = st.integers(0, 2**32 - 1)


def golden(key):
    return ARRAYS[key].permute(2, 0, 1)[None]


def noise(seed, *shape):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def to_pil(pixels):
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())


def from_pil(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def one_box(pixels, *box, size, flip=False, kernel="bicubic"):
    return resize_crops(pixels, torch.tensor([[box]]), torch.tensor([[flip]]), size, kernel)[0]


def assert_resized(levels, expected):
    """Pillow adds whole numbers; float32 sums fall on the other side of a tie now and then, never further."""
    difference = (levels - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 1e-3


@pytest.mark.parametrize("case", FACTS["ops"], ids=lambda case: f"{case['key'][3:]}-{case['op']}")
def test_one_operation_gives_the_reference_bytes(case):
    pixels, expected, op = golden(f"image/{case['image']}"), golden(case["key"]), case["op"]
    height, width = pixels.shape[2:]
    levels = pixels.float()
    if op == "resized_crop_bicubic":
        box = (case["top"], case["left"], case["height"], case["width"])
        assert_resized(one_box(pixels, *box, size=case["size"]), expected)
    elif op == "resize_square_bicubic":
        assert_resized(one_box(pixels, 0, 0, height, width, size=case["size"]), expected)
    elif op == "resize_short_bicubic_centercrop":
        result = resize_and_center_crop(pixels, torch.tensor([[height, width]]), case["resize"], case["crop"])
        assert_resized(result * 255, expected)
    elif op == "hflip":  # A box of the size of the result copies it.
        side = min(height, width)
        assert torch.equal(
            one_box(pixels, 0, 0, side, side, size=side, flip=True), expected[..., :side, -side:].float()
        )
    else:
        result = {
            "grayscale3": lambda: color.grayscale(levels),
            "solarize": lambda: color.solarize(levels),
            "gaussian_blur_pil": lambda: blur.gaussian_blur(levels, torch.tensor([case["radius"]]), 2.0),
        }.get(op, lambda: getattr(color, op)(levels, torch.tensor([case["factor"]])))()
        assert torch.equal(result, expected.float())


@settings(max_examples=25, deadline=None)
@given(seed=seeds, height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 40), data=st.data())
def test_crops_of_several_images_are_pillows(seed, height, width, size, data):
    pixels, boxes, flips = noise(seed, 2, 3, height, width), [], []
    for _ in range(4):
        w = data.draw(st.integers(1, width))
        # Older versions of Pillow do the rest in another order.
        h = data.draw(st.integers(1, min(height, size + max(0, 2 * (w - size)))))
        boxes.append((data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w))
        flips.append(data.draw(st.booleans()))
    kernel = data.draw(st.sampled_from(["bicubic", "bilinear"]))
    crops = resize_crops(pixels, torch.tensor(boxes).view(2, 2, 4), torch.tensor(flips).view(2, 2), size, kernel)
    for crop, box, flip, i in zip(crops.flatten(0, 1), boxes, flips, (0, 0, 1, 1), strict=True):
        expected = TF.resized_crop(to_pil(pixels[i]), *box, [size, size], InterpolationMode(kernel))
        assert (crop - from_pil(TF.hflip(expected) if flip else expected)).abs().max() <= 1


def test_tall_boxes_are_resized_columns_first():
    """The reference's Pillow 13 does; the other order is up to 26 levels off on noise."""
    pixels = noise(0, 1, 3, 83, 55)
    columns = one_box(pixels, 0, 0, 83, 55, size=49)
    turned = one_box(pixels.transpose(2, 3), 0, 0, 55, 83, size=49).transpose(2, 3)
    assert torch.equal(columns, turned)
    wide = one_box(pixels[:, :, :60], 0, 0, 60, 55, size=49)
    assert not torch.equal(wide, one_box(pixels[:, :, :60].transpose(2, 3), 0, 0, 55, 60, size=49).transpose(2, 3))


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    sizes=st.lists(st.tuples(st.integers(3, 60), st.integers(3, 60)), min_size=1, max_size=4),
    data=st.data(),
)
def test_evaluation_transform_is_torchvisions(seed, sizes, data):
    resize = data.draw(st.integers(4, 40))
    crop = data.draw(st.integers(2, resize))
    pixels = noise(seed, len(sizes), 3, 60, 60)
    result = resize_and_center_crop(pixels, torch.tensor(sizes), resize, crop)
    assert result.min() >= 0
    assert result.max() <= 1
    transform = (Resize(resize, InterpolationMode.BICUBIC), CenterCrop(crop))
    for image, (height, width), levels in zip(pixels, sizes, result * 255, strict=True):
        expected = from_pil(transform[1](transform[0](to_pil(image[:, :height, :width]))))
        assert (levels - expected).abs().max() < 1.01


def test_evaluation_transform_refuses_a_crop_that_does_not_fit():
    with pytest.raises(ValueError, match="crop must be at most resize"):
        resize_and_center_crop(noise(0, 1, 3, 8, 8), torch.tensor([[8, 8]]), 16, 17)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, height=st.integers(2, 40), width=st.integers(2, 40), channels=st.sampled_from([1, 3, 4]))
def test_padding_never_leaks(seed, height, width, channels):
    pixels, sizes = noise(seed, 1, channels, 48, 48), torch.tensor([[height, width]])
    box, flip = (
        torch.tensor([[[height // 3, width // 3, height - height // 3, width - width // 3]]]),
        torch.tensor([[True]]),
    )
    poisoned = []
    for poison in (0, 255):
        canvas = torch.full_like(pixels, poison)
        canvas[:, :, :height, :width] = pixels[:, :, :height, :width]
        poisoned.append((resize_crops(canvas, box, flip, 20), resize_and_center_crop(canvas, sizes, 24, 20)))
    assert torch.equal(poisoned[0][0], poisoned[1][0])
    assert torch.equal(poisoned[0][1], poisoned[1][1])


def test_taps_by_hand():
    one = torch.tensor([5])
    index, weight = resize_taps(one, torch.tensor([4]), torch.tensor([2]), torch.tensor([0]), 2, 4, "bilinear")
    # 4 pixels to 2: centres 1 and 3, a triangle of half-width 2, cut off at the box: .75 .75 .25 over their sum.
    assert index.tolist() == [[[5, 6, 7, 8], [6, 7, 8, 8]]]
    expected = torch.tensor([[[3, 3, 1, 0], [1, 3, 3, 0]]]) / 7
    torch.testing.assert_close(weight, expected, atol=2e-7, rtol=0)
    # Bicubic at half a pixel: -1/16 9/16 9/16 -1/16.
    index, weight = resize_taps(one, torch.tensor([4]), torch.tensor([8]), torch.tensor([3]), 1, 4)
    assert index.tolist() == [[[5, 6, 7, 8]]]
    x = torch.tensor([1.25, 0.25, 0.75, 1.75], dtype=torch.float64)  # Centre 1.75, pixels at .5, 1.5, 2.5, 3.5
    keys = torch.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
    torch.testing.assert_close(weight[0, 0].double(), keys / keys.sum(), atol=2e-7, rtol=0)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, factor=st.floats(0, 2, width=32), shift=st.floats(-0.5, 0.5, width=32), op=st.sampled_from(COLORS))
def test_colours_are_pillows(seed, factor, shift, op):
    levels = noise(seed, 2, 3, 24, 31).float()
    levels[1] = (levels[1] * 0.1 + 120).floor()  # Nearly grey
    strength = torch.tensor([shift, shift / 2] if op == "hue" else [factor, 1 + factor / 2])
    result = getattr(color, op)(levels.clone(), strength)
    for image, value, changed in zip(levels, strength.tolist(), result, strict=True):
        assert torch.equal(changed, from_pil(getattr(TF, f"adjust_{op}")(to_pil(image), value)))


def test_hue_of_every_colour_of_a_coarse_grid_and_of_ties():
    axis = torch.tensor([*range(0, 256, 9), 1, 2, 4, 85, 127, 128, 254, 255]).float()
    levels = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flatten(2)[None]
    assert torch.equal(color.hue(levels, torch.tensor([0.037]))[0], from_pil(TF.adjust_hue(to_pil(levels[0]), 0.037)))


def test_colours_by_hand():
    levels = torch.tensor([10.0, 200, 30]).view(1, 3, 1, 1)
    grey = (10 * 19595 + 200 * 38470 + 30 * 7471 + 32768) // 65536
    assert color.luma(levels).item() == grey == 124
    assert color.brightness(levels, torch.tensor([1.3])).flatten().tolist() == [13, 255, 39]
    assert color.contrast(levels, torch.tensor([0.0])).flatten().tolist() == [124, 124, 124]
    assert color.saturation(levels, torch.tensor([0.5])).flatten().tolist() == [67, 162, 77]
    assert color.solarize(levels).flatten().tolist() == [10, 55, 30]
    assert color.grayscale(levels).flatten().tolist() == [124, 124, 124]
    single = torch.tensor([10.0, 30]).view(1, 1, 2, 1)
    assert color.contrast(single, torch.tensor([0.0])).flatten().tolist() == [20, 20]


@settings(max_examples=15, deadline=None)
@given(seed=seeds, sigma=st.lists(st.floats(0.125, 4, width=32), min_size=1, max_size=3), size=st.integers(1, 30))
def test_blur_is_pillows(seed, sigma, size):
    levels = noise(seed, len(sigma), 3, size, 17).float()
    result = blur.gaussian_blur(levels, torch.tensor(sigma), 4.0)
    for image, width, blurred in zip(levels, sigma, result, strict=True):
        assert torch.equal(blurred, from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(width))))


@given(sigma=st.floats(0.1, 6))
def test_three_boxes_have_the_variance_of_the_gaussian(sigma):
    box = blur._box(torch.tensor([sigma]), reach=8)[0].double()
    assert box.sum() == pytest.approx(1, abs=1e-6)
    assert 3 * (box * torch.arange(-8, 9) ** 2).sum() == pytest.approx(sigma**2, rel=1e-4, abs=1e-5)
