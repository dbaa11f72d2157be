"""Images with masks or boxes: the three layouts in folders and archives, and images batched at their own sizes."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data import annotated
from dino.data.davis import palette
from dino.data.mask_parts import open_classes
from dino.data.masks import boxes_around, open_boxes, open_masks
from dino.data.walk import walk
from dino.encoder.sizes import batches_of_one_size, whole_patches

BOX = "<object><name>cat</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def save(path, array, with_palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if with_palette:
        image.putpalette(palette())
    image.save(path)


def rectangles(height, width, *boxes):
    labels = np.zeros((height, width), np.uint8)
    for value, (top, left, bottom, right) in enumerate(boxes, start=1):
        labels[top:bottom, left:right] = value
    return labels


@pytest.fixture
def voc(tmp_path):
    """Three images as in PASCAL VOC 2012, two of them in the list."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name, (height, width) in {"a": (8, 12), "b": (12, 8), "c": (8, 8)}.items():
        save(root / f"JPEGImages/{name}.jpg", np.full((height, width, 3), 99))
        labels = rectangles(height, width, (0, 0, 4, 4), (4, 4, 8, 8))
        labels[4] = 255
        save(root / f"SegmentationObject/{name}.png", labels, with_palette=True)
        save(root / f"SegmentationClass/{name}.png", np.where(labels == 2, 1, labels), with_palette=True)
        (root / "Annotations").mkdir(exist_ok=True)
        boxes = BOX.format(1, 1, 4, 4) + BOX.format("5.0", 5, 8, 8)
        (root / f"Annotations/{name}.xml").write_text(f"<annotation>{boxes}</annotation>")
    for folder, lines in (("Segmentation", "a\nb\n"), ("Main", "a  1\nb -1\nc  0\n")):
        (root / "ImageSets" / folder).mkdir(parents=True)
        (root / "ImageSets" / folder / "val.txt").write_text(lines)
    return tmp_path


def test_voc(voc, tmp_path):
    items = open_masks(str(voc))
    assert [item.name for item in items] == ["a", "b"]
    pixels, labels = items[0].labelled()
    assert pixels.shape == (3, 8, 12)
    assert labels.unique().tolist() == [-1, 0, 1, 2]
    assert (labels == -1).sum() == 12
    assert open_masks(str(voc), kind="class")[0].annotation().unique().tolist() == [-1, 0, 1]
    assert [item.name for item in open_masks(str(voc), split="all")] == ["a", "b", "c"]
    boxes = open_boxes(str(voc), split="val")
    assert [item.name for item in boxes] == ["a", "c"]
    assert boxes[0].annotation().tolist() == [[0, 0, 4, 4], [4, 4, 8, 8]]

    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(voc / "VOCdevkit", "VOCdevkit")
    packed = open_masks(str(tmp_path / "voc.tar"))
    assert torch.equal(packed[1].annotation(), items[1].annotation())
    assert torch.equal(packed[1].pixels(), items[1].pixels())
    assert open_boxes(str(tmp_path / "voc.tar"), split="val")[1].annotation().shape == (2, 4)


def test_plain(tmp_path):
    save(tmp_path / "images/deep/a.jpg", np.zeros((6, 8, 3)))
    save(tmp_path / "images/b.png", np.zeros((6, 8, 3)))
    save(tmp_path / "images/without.png", np.zeros((6, 8, 3)))
    save(tmp_path / "masks/deep/a.png", 255 * rectangles(6, 8, (1, 2, 4, 5)))
    colours = np.zeros((6, 8, 3))
    colours[:2, :2], colours[3:, 3:] = (0, 0, 9), (1, 0, 0)
    save(tmp_path / "masks/b.png", colours)
    found = {item.name: item for item in open_masks(str(tmp_path))}
    assert found.keys() == {"deep/a", "b"}
    assert found["deep/a"].annotation().unique().tolist() == [0, 255]
    assert found["b"].annotation().unique().tolist() == [0, 9, 65536]
    boxes = {item.name: item.annotation().tolist() for item in open_boxes(str(tmp_path))}
    assert boxes == {"deep/a": [[1, 2, 4, 5]], "b": [[0, 0, 2, 2], [3, 3, 6, 8]]}


def test_davis(tmp_path):
    for i in range(3):
        save(tmp_path / f"JPEGImages/480p/walk/{i:05}.jpg", np.zeros((6, 8, 3)))
        save(tmp_path / f"Annotations/480p/walk/{i:05}.png", 255 * rectangles(6, 8, (0, i, 3, i + 3)))
    (tmp_path / "Annotations/480p/walk/00001.png").unlink()
    items = open_boxes(str(tmp_path))
    assert [(item.name, item.annotation().tolist()) for item in items] == [
        ("walk/00000", [[0, 0, 3, 3]]),
        ("walk/00002", [[0, 2, 3, 5]]),
    ]


def test_bad_data_is_named(voc, tmp_path):
    with pytest.raises(ValueError, match="no images with masks: it needs"):
        open_masks(str(voc / "VOCdevkit/VOC2012/ImageSets"))
    root = voc / "VOCdevkit/VOC2012"
    save(root / "JPEGImages/a.jpg", np.zeros((8, 11, 3)))
    with pytest.raises(ValueError, match=r"a.jpg of \(8, 11\) pixels has a mask of \(8, 12\)"):
        open_masks(str(voc))[0].labelled()
    (root / "JPEGImages/a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a.jpg cannot be read"):
        open_masks(str(voc))[0].pixels()
    (root / "Annotations/a.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"a.xml is not an annotation"):
        open_boxes(str(voc))[0].annotation()
    (root / "SegmentationObject/b.png").unlink()
    with pytest.raises(ValueError, match="1 of 2 have no image or no annotation, first b"):
        open_masks(str(voc))
    save(tmp_path / "soft/images/a.png", np.zeros((20, 20, 3)))
    save(tmp_path / "soft/masks/a.png", np.arange(400).reshape(20, 20) % 256)
    with pytest.raises(ValueError, match="256 different values"):
        open_masks(str(tmp_path / "soft"))[0].annotation()


def test_no_object_has_no_box():
    assert boxes_around(torch.tensor([[0, -1], [0, 0]])).shape == (0, 4)


def test_whole_patches_are_cut_or_resized():
    image = torch.arange(10 * 13).view(1, 10, 13).expand(3, -1, -1) / 130
    assert torch.equal(whole_patches(image, 4), image[:, :8, :12])
    resized = whole_patches(torch.full((3, 10, 13), 0.4), 4, resize=18)
    assert resized.shape == (3, 16, 16)
    assert torch.allclose(resized, torch.full((3, 16, 16), 0.4))
    for resize, words in ((0, "of 3 x 13 pixels"), (3, "resized to 3 pixels")):
        with pytest.raises(ValueError, match=words):
            whole_patches(image[:, :3], 4, resize)


def test_batches_hold_one_size_and_lose_nothing():
    sizes = [(2, 4), (4, 2), (2, 4), (2, 2), (2, 4), (2, 4), (4, 2)]
    pairs = [(torch.full((3, *size), float(i)), torch.tensor(i)) for i, size in enumerate(sizes)]
    seen = []
    for images, numbers in batches_of_one_size(iter(pairs), 2):
        assert len(images) == len(numbers) <= 2
        assert [int(image[0, 0, 0]) for image in images] == [int(n) for n in numbers]
        seen += [int(n) for n in numbers]
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("layout", ["voc", "plain", "davis"])
def test_data_is_listed_once(layout, tmp_path, monkeypatch):
    folders = {
        "voc": ("JPEGImages", "SegmentationObject", "SegmentationClass"),
        "plain": ("images", "masks"),
        "davis": ("JPEGImages/480p/a", "Annotations/480p/a"),
    }[layout]
    for folder in folders:
        for i in range(4):
            save(tmp_path / folder / f"0000{i}.{'jpg' if 'JPEG' in folder else 'png'}", rectangles(6, 8, (0, i, 3, 5)))
    walks = []
    monkeypatch.setattr(annotated, "walk", lambda data: walks.append(data) or walk(data))
    for opened in (open_masks, open_boxes, open_classes):
        walks.clear()
        assert opened(str(tmp_path))
        assert walks == [str(tmp_path)]
