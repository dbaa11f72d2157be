"""DAVIS: frames and masks read as the reference reads them, its scores, its layout and its palette."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import reference
from dino.data.davis import frame_size, open_davis, palette, resize_bilinear, write_mask
from dino.encoder.encoder import Encoder
from dino.evaluation.boundary import boundaries, boundary_f, dilate, statistics
from dino.evaluation.metrics import jaccard
from dino.evaluation.video_segmentation import RELEASED_STD, PatchColors, one_hot, score, summarize

FACTS = reference.scalars("12_video")
ARRAYS = reference.arrays("12_video")
REAL = Path(__file__).parents[2] / "shared" / "data" / "davis2016-4seq.tar"


@pytest.mark.parametrize("facts", FACTS["reading"], ids=lambda facts: str(facts["id"]))
def test_frames_and_first_masks_equal_the_reference(facts):
    (height, width), name = facts["in_hw"], f"reading/{facts['id']}"
    image = reference.waves((1, 3, height, width), facts["image_s"], reference.scalars("01_vit")["formula"])[0]
    frame = (127.5 + 90 * image).floor().clamp(0, 255).to(torch.uint8)
    size = frame_size(height, width, facts["scale_size"], patch_size=8)
    assert list(size) == facts["out_hw"]
    got = Encoder(PatchColors(), std=RELEASED_STD).normalize(resize_bilinear(frame, *size)[None])[0]
    assert (got[:, ::5, ::5] - ARRAYS[f"{name}/frame_every5"]).abs().max() <= 2e-6
    labels = (torch.arange(height)[:, None] // 23 + torch.arange(width) // 31) % 4
    small = one_hot(labels, 4, size[0] // 8, size[1] // 8)
    assert list(small.permute(2, 0, 1)[None].shape) == facts["seg_onehot_shape"]
    assert torch.equal(small.argmax(-1), ARRAYS[f"{name}/seg_argmax"].long())


@pytest.mark.parametrize("facts", FACTS["sizes_at_480"], ids=lambda facts: "x".join(map(str, facts["in_hw"])))
def test_frame_sizes_equal_the_reference(facts):
    size = frame_size(*facts["in_hw"])
    assert list(size) == facts["out_hw"]
    grid = [side // 16 for side in size]
    # Of a square frame the reference gives the mask another shape than the frame; ours has the frame's.
    assert grid == (
        facts["seg_grid_patch16"][::-1] if facts["in_hw"][0] == facts["in_hw"][1] else facts["seg_grid_patch16"]
    )


def masks_of(facts):
    shape = facts["shape"]
    names = ["pred", "gt"] + ["void"] * facts["has_void"]
    packed = [ARRAYS[f"davis/{facts['id']}/{name}"].numpy() for name in names]
    masks = [
        torch.from_numpy(np.unpackbits(one, count=shape[0] * shape[1]).reshape(shape).astype(bool)) for one in packed
    ]
    return [mask & ~masks[2] for mask in masks[:2]] if facts["has_void"] else masks


@pytest.mark.parametrize("facts", FACTS["davis_pairs"], ids=lambda facts: facts["id"])
def test_j_and_f_equal_the_reference(facts):
    predicted, true = masks_of(facts)
    j, f = jaccard(predicted, true, torch.float64).item(), boundary_f(predicted, true).item()
    assert j == pytest.approx(facts["J"], abs=1e-9)
    assert f == pytest.approx(facts["F"], abs=1e-9)
    assert (j + f) / 2 == pytest.approx(facts["J_and_F"], abs=1e-9)


def test_statistics_equal_the_reference():
    expected = FACTS["davis_sequences"]
    tables = {"J": [], "F": []}
    for name in expected["order"]:
        true, predicted = (ARRAYS[f"davis_seq/{name}/{kind}"] for kind in ("gt", "pred"))
        true = true.long().masked_fill(true == 255, -1)
        objects = int(true[0].max())
        scores = torch.stack([torch.stack(score(predicted[i], true[i], objects)) for i in range(1, len(true) - 1)], -1)
        tables["J"].append(scores[0])
        tables["F"].append(scores[1])
    for measure, of_videos in tables.items():
        for letter, kind in (("M", "mean"), ("R", "recall"), ("D", "decay")):
            values = torch.cat([getattr(statistics(table), kind) for table in of_videos])
            assert values.tolist() == pytest.approx(expected[measure][letter], abs=1e-9)
        by_object = list(expected[measure]["per_object"].values())
        assert torch.cat([table.mean(-1) for table in of_videos]).tolist() == pytest.approx(by_object, abs=1e-9)
    overall = summarize(tables["J"], tables["F"])
    names = {"J&F-Mean": "j_and_f"} | {
        f"{m}-{k}": f"{m.lower()}_{k.lower()}" for m in "JF" for k in ("Mean", "Recall", "Decay")
    }
    assert overall.keys() == set(names.values())
    for official, name in names.items():
        assert overall[name] / 100 == pytest.approx(expected["global_"][official], abs=1e-9)


@given(st.integers(0, 5), st.integers(1, 7), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_dilation_reaches_what_is_near_enough(radius, h, w, seed):
    masks = torch.rand(2, h, w, generator=torch.Generator().manual_seed(seed)) > 0.9
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    near = (y.reshape(-1, 1) - y.reshape(1, -1)) ** 2 + (x.reshape(-1, 1) - x.reshape(1, -1)) ** 2 <= radius**2
    expected = (near & masks.flatten(1)[:, None]).any(-1).view(2, h, w)
    assert torch.equal(dilate(masks, radius), expected)


def test_boundary_worked_by_hand():
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2, 2] = True  # It differs from its left, upper and diagonal neighbours' points of view, and its own.
    assert boundaries(mask).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert not boundaries(torch.ones(3, 4, dtype=torch.bool)).any()
    # Diagonal 7.07 pixels: 0.008 of it, rounded up, is 1 pixel. A shift of 1 is forgiven, one of 3 is not.
    shifted, far = mask.roll(1, 1), torch.zeros_like(mask)
    assert boundary_f(shifted, mask).item() == 1
    far[4, 4] = True
    assert boundary_f(far, mask).item() < 0.5


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette(palette())
    image.save(path)


@pytest.fixture
def root(tmp_path):
    for name, values, mode in (("binary", [0, 255], None), ("objects", [0, 1, 2, 255], "P")):
        for i in range(3):
            save(tmp_path / f"D/JPEGImages/480p/{name}/{i:05}.jpg", np.full((6, 8, 3), 40 * i, np.uint8))
            save(
                tmp_path / f"D/Annotations/480p/{name}/{i:05}.png", np.resize(np.array(values, np.uint8), (6, 8)), mode
            )
    return tmp_path / "D"


def test_masks_of_both_years(root):
    binary, objects = open_davis(str(root))
    assert (binary.name, len(binary), binary.objects) == ("binary", 3, 1)
    assert binary.labels(1).unique().tolist() == [0, 1]
    assert objects.labels(0)[0].tolist() == [0, 1, 2, -1] * 2  # 255 is void beside other objects.
    assert binary.frame(2).float().mean() == 80
    merged = open_davis(str(root), year="2016", only=["objects"])[0]
    assert merged.labels(0)[0].tolist() == [0, 1, 1, -1] * 2
    (root / "Annotations/480p/objects/00001.png").unlink()
    with pytest.raises(ValueError, match=r"00001.jpg has no mask"):
        open_davis(str(root))[1].labels(1)


@pytest.mark.parametrize("name", ["2016", "480p"])
def test_lists_of_both_kinds(root, name):
    lists = root / "ImageSets"
    (lists / name).mkdir(parents=True)
    line = "/JPEGImages/480p/objects/{0}.jpg /Annotations/480p/objects/{0}.png"
    (lists / name / "val.txt").write_text("\n".join(line.format(f"{i:05}") for i in range(3)))
    (found,) = open_davis(str(root))
    assert (found.name, found.one_object) == ("objects", True)
    (lists / "2017").mkdir()
    (lists / "2017" / "val.txt").write_text("binary\n\n")
    assert [(v.name, v.one_object) for v in open_davis(str(root))] == [("binary", False)]
    assert [v.name for v in open_davis(str(root), "2016")] == ["objects"]
    assert [v.name for v in open_davis(str(root), only=["objects"])] == ["objects"]  # Though not listed.


def test_archive_and_parent_folder_give_the_same(root, tmp_path):
    archive = tmp_path / "davis.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root, "outer/DAVIS")
        info = tarfile.TarInfo("outer/DAVIS/JPEGImages/480p/binary/._00000.jpg")  # What macOS leaves in archives.
        info.size = 3
        tar.addfile(info, io.BytesIO(b"mac"))
    expected = open_davis(str(root))
    for data in (archive, tmp_path):
        videos = open_davis(str(data))
        assert [(v.name, len(v)) for v in videos] == [(v.name, len(v)) for v in expected]
        assert all(torch.equal(v.labels(1), e.labels(1)) for v, e in zip(videos, expected, strict=True))
        assert torch.equal(videos[0].frame(1), expected[0].frame(1))


def test_bad_data_is_named(root, tmp_path):
    with pytest.raises(ValueError, match=r"no video walrus; it has binary, objects"):
        open_davis(str(root), only=["walrus"])
    with pytest.raises(ValueError, match="layout of DAVIS"):
        open_davis(str(root / "Annotations"))
    with pytest.raises(ValueError, match="does not exist"):
        open_davis(str(tmp_path / "nowhere"))
    (tmp_path / "half.tar").write_bytes(b"half")
    with pytest.raises(ValueError, match="not a whole"):
        open_davis(str(tmp_path / "half.tar"))
    (root / "JPEGImages/480p/binary/00001.jpg").write_bytes(b"")
    (root / "Annotations/480p/binary/00001.png").write_bytes(b"torn")
    video = open_davis(str(root))[0]
    with pytest.raises(ValueError, match=r"00001.jpg cannot be read"):
        video.frame(1)
    with pytest.raises(ValueError, match=r"00001.png cannot be read as a mask"):
        video.labels(1)
    again = root.parent / "E" / "JPEGImages" / "480p" / "more"
    save(again / "00000.jpg", np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="several folders hold JPEGImages"):
        open_davis(str(root.parent))


def test_masks_in_colour(root):
    white = np.zeros((6, 8, 3), np.uint8)
    white[:2] = 255
    for name, array in (("binary", white), ("objects", white // 2)):
        save(root / f"Annotations/480p/{name}/00001.png", array)
    binary, objects = open_davis(str(root))
    assert binary.labels(1).sum() == 16
    with pytest.raises(ValueError, match=r"00001.png holds colours"):
        objects.labels(1)


def test_palette_and_written_masks(tmp_path):
    colours = np.array(palette()).reshape(256, 3)
    assert len({tuple(colour) for colour in colours}) == 256
    assert colours[[1, 2, 3, 8, 255]].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [64, 0, 0], [224, 224, 192]]
    labels = torch.arange(12, dtype=torch.uint8).view(3, 4)
    write_mask(tmp_path / "new" / "mask.png", labels)
    with Image.open(tmp_path / "new" / "mask.png") as image:
        assert np.array_equal(np.asarray(image), labels.numpy())


@pytest.mark.skipif(not REAL.exists(), reason="the DAVIS sample is not beside the project")
def test_real_archive_is_read_in_place():
    videos = open_davis(str(REAL))
    assert [(v.name, len(v)) for v in videos] == [
        ("car-shadow", 40),
        ("kite-surf", 50),
        ("libby", 49),
        ("motocross-jump", 40),
    ]
    assert videos[0].frame(0).shape == (3, 480, 854)
    assert all(v.labels(len(v) - 1).unique().tolist() == [0, 1] for v in videos)
