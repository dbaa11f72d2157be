"""The built-in shapes: reproducible, all different, well separated from their background, too hard for raw pixels."""

import pytest
import torch

from dino.data.shapes import CLASSES, make_shapes


@pytest.fixture(scope="module")
def shapes():
    return make_shapes(600, 48, seed=3)


def test_an_image_depends_on_seed_and_index_only(shapes):
    images, labels, masks = make_shapes(25, 48, seed=3)
    assert torch.equal(images, shapes[0][:25])
    assert torch.equal(masks, shapes[2][:25])
    assert labels.tolist() == [i % 10 for i in range(25)]
    assert not torch.equal(images, make_shapes(25, 48, seed=4)[0])
    assert len({image.numpy().tobytes() for image in shapes[0]}) == 600


def test_the_same_on_every_machine():
    """Pinned means; libraries round differently, so single pixels may be a grey level apart."""
    means = make_shapes(4, 32, seed=0)[0].float().mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor([190.690, 198.538, 201.964, 223.138]), atol=0.02, rtol=0)


def test_objects_are_whole_and_of_the_size_that_is_promised(shapes):
    masks = shapes[2]
    border = masks[:, 0].any() | masks[:, -1].any() | masks[:, :, 0].any() | masks[:, :, -1].any()
    assert not border
    for label in range(len(CLASSES)):
        area = masks[label::10].float().mean((1, 2))
        assert area.min() > 0.02
        assert area.max() < 0.45


def test_object_and_background_differ_in_grey_too(shapes):
    """Grey levels, so that the object survives random grayscale; measured away from the soft edge. The triangle is
    plain."""
    images, _, masks = (tensor[2::10] for tensor in shapes)
    grey = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1) / 255
    pool = torch.nn.functional.max_pool2d
    inside = -pool(-masks[:, None].float(), 3, 1, 1)[:, 0]
    outside = 1 - pool(masks[:, None].float(), 7, 1, 3)[:, 0]
    contrast = (grey * inside).sum((1, 2)) / inside.sum((1, 2)) - (grey * outside).sum((1, 2)) / outside.sum((1, 2))
    assert contrast.abs().min() > 0.18
    spread = (grey - (grey * outside).sum((1, 2), keepdim=True) / outside.sum((1, 2), keepdim=True)).abs() * outside
    assert spread.max() < 0.08  # Plain: only a light gradient.


def test_a_kind_has_its_hue_and_its_pattern(shapes):
    """The two tones of an object have the kind's hue, and cover it in the kind's share."""
    images, labels, masks = shapes
    shares = []
    for label in range(10):
        image, mask = images[labels == label].float() / 255, masks[labels == label]
        top, low = image.amax(1), image.amin(1)
        red, green, blue = image.unbind(1)
        u, v = red - (green + blue) / 2, (green - blue) * 3**0.5 / 2
        angle = torch.atan2((v * mask).sum((1, 2)), (u * mask).sum((1, 2))) / (2 * torch.pi)
        away = (angle - (label * 0.3) % 1 + 0.5) % 1 - 0.5
        assert away.abs().max() < 0.06, label
        grey = (top + low) / 2
        middle = (grey.where(mask, torch.inf).amin((1, 2)) + grey.where(mask, -torch.inf).amax((1, 2))) / 2
        share = ((grey > middle[:, None, None]) & mask).sum((1, 2)) / mask.sum((1, 2))
        shares.append(torch.minimum(share, 1 - share).median().item())
    assert shares[0] > 0.25  # Stripes: half and half.
    assert shares[8] > 0.15  # Dots.


def test_edges_are_soft(shapes):
    """On the outline of a plain object there are pixels between the two colours."""
    image, mask = shapes[0][2].float(), shapes[2][2]
    inside, outside = image[:, mask].median(1).values, image[:, ~mask].median(1).values
    share = ((image - outside[:, None, None]) / (inside - outside)[:, None, None]).mean(0)
    assert ((share > 0.25) & (share < 0.75)).sum() > 10


def test_raw_pixels_are_a_poor_classifier():
    images, labels, _ = make_shapes(3000, 24, seed=0)
    rows = images.flatten(1).float()
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    best = (rows[2500:] @ rows[:2500].T).topk(20).indices
    assert (labels[best].mode(1).values == labels[2500:]).float().mean() < 0.7


def test_classes_can_be_told_apart_by_shape():
    """Upright, centred and of one size, the silhouettes have different areas or outlines: a mask's moments classify."""
    images, labels, masks = make_shapes(4000, 48, seed=1)
    assert images.dtype == torch.uint8
    rows = torch.stack([_moments(mask) for mask in masks])
    rows = (rows - rows.mean(0)) / rows.std(0)
    best = torch.cdist(rows[3500:], rows[:3500]).topk(5, largest=False).indices
    assert (labels[best].mode(1).values == labels[3500:]).float().mean() > 0.85


def _moments(mask: torch.Tensor) -> torch.Tensor:
    """Numbers that do not depend on place, size and turn: how far the pixels and their hull's are from the middle."""
    y, x = mask.nonzero().float().T
    area = len(x) ** 0.5
    radius = torch.hypot(x - x.mean(), y - y.mean()) / area
    quantiles = torch.quantile(radius, torch.linspace(0, 1, 11))
    spread = torch.linalg.eigvalsh(torch.cov(torch.stack([x, y]))) / area**2
    return torch.cat([quantiles, spread])
