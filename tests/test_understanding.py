"""What DATA means: parts under any name, lists of any shape, stray images, names, pixel ranges, tables."""

import io
import json
import logging
import os
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import textures
from dino.config import Config, ReadConfig
from dino.data.davis import resize_bilinear
from dino.data.decode import BrokenImage, decode
from dino.data.fit import fit_to_images
from dino.data.raw import estimate_range
from dino.data.sources import open_source


def png(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root, *names):
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    return root


def class_of(source):
    return [source.classes[label] for label in source.labels]


@pytest.mark.parametrize(
    "train, val", [("Training", "Testing"), ("train_set", "dev"), ("TRAIN", "Val"), ("img_train", "img_eval")]
)
def test_parts_under_usual_names(tmp_path, train, val):
    write(tmp_path, *(f"{part}/{label}/{i}.png" for part in (train, val) for label in "ab" for i in range(2)))
    source = open_source(tmp_path)
    assert source.classes == ["a", "b"]
    assert {name: len(part) for name, part in source.parts.items()} == {"train": 4, "val": 4}


def test_classes_that_hold_the_same_folders_are_a_warning(tmp_path, caplog):
    write(tmp_path, *(f"{site}/{label}/1.png" for site in ("north", "south") for label in ("cat", "dog")))
    with caplog.at_level(logging.WARNING):
        assert open_source(tmp_path).classes == ["north", "south"]
    assert "each holds the same folders (cat, dog)" in caplog.text


@pytest.mark.parametrize("name, separator", [("l.csv", ","), ("l.csv", ";"), ("l.tsv", "\t"), ("l.txt", " ")])
@pytest.mark.parametrize("header", [True, False])
def test_lists_of_any_shape(tmp_path, caplog, name, separator, header):
    write(tmp_path, *(f"{'ab'[i % 2]}/{i}.png" for i in range(8)))
    rows = [f"{'ab'[i % 2]}/{i}.png{separator}kind{i // 4}" for i in range(8)]
    lines = [f"image{separator}label", *rows] if header else rows
    (tmp_path / name).write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path / name)
    assert class_of(source) == ["kind0"] * 4 + ["kind1"] * 4
    assert "images from column" in caplog.text
    assert "labels from column" in caplog.text


def test_blank_labels_never_become_folder_names(tmp_path, caplog):
    write(tmp_path, *(f"{'ab'[i % 2]}/{i}.png" for i in range(8)))
    text = "path,label,split\n" + "".join(
        f"{'ab'[i % 2]}/{i}.png,{f'k{i % 2}' if i else ''},{'train' if i < 4 else 'val'}\n" for i in range(8)
    )
    (tmp_path / "l.csv").write_text(text)
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path / "l.csv")
    assert source.classes == ["k0", "k1"]
    assert {name: len(part) for name, part in source.parts.items()} == {"train": 3, "val": 4}
    assert "have no class" in caplog.text
    with pytest.raises(ValueError, match="no such column; it has path, label, split"):
        open_source(tmp_path / "l.csv", read=ReadConfig(label_column="disease"))


def test_strays_are_left_out_and_unread_files_counted(tmp_path, caplog):
    write(tmp_path, *(f"{label}/{i}.png" for label in "ab" for i in range(4)), "preview.png", "1.heic", "2.heic")
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert class_of(source) == list("aaaabbbb")
    assert "1 of 9 images have no class" in caplog.text
    assert "2 files are not read: 2 .heic" in caplog.text


def test_names_fifos_and_links_to_themselves(tmp_path):
    write(tmp_path, "1.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(png())
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "self").symlink_to("self")
    source = open_source(tmp_path)
    names = [source.name(i) for i in range(len(source))]
    assert str(tmp_path / "caf\\xe9.png") in names
    "".join(names).encode("utf-8")
    with pytest.raises(BrokenImage, match="it is a FIFO"):
        source.load(names.index(str(tmp_path / "pipe.png")))


@pytest.mark.parametrize("name, mode", [("a.tar", "w"), ("a.tar", "w:gz"), ("a.tar.bz2", "w:bz2"), ("a.txz", "w:xz")])
def test_archives_by_what_they_are(tmp_path, monkeypatch, name, mode):
    monkeypatch.setenv("DINO_DATA", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / name, mode) as archive:
        for i in range(4):
            info = tarfile.TarInfo(f"../{'ab'[i % 2]}/{i}.png")
            info.size = len(png(i))
            archive.addfile(info, io.BytesIO(png(i)))
    source = open_source(tmp_path / name)
    assert [int(source.load(i)[0, 0, 0]) for i in range(4)] == [0, 1, 2, 3]
    assert class_of(source) == list("abab")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_is_read_in_place(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        for i in range(4):
            archive.writestr(f"{'ab'[i % 2]}/{i}.png", png(i))
    source = open_source(tmp_path / "a.zip")
    assert [int(source.load(i)[0, 0, 0]) for i in range(4)] == [0, 1, 2, 3]


def test_json_lines_with_parts(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(4)))
    lines = [{"file_name": f"{i}.png", "label": "ab"[i % 2], "split": ["train", "dev"][i // 2]} for i in range(4)]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_source(tmp_path / "l.jsonl")
    assert class_of(source) == list("abab")
    assert {name: len(part) for name, part in source.parts.items()} == {"train": 2, "val": 2}


def test_parquet_files_named_like_parts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    for part, first in (("train", 0), ("validation", 10)):
        rows = {"image": [{"bytes": png(first + i), "path": None} for i in range(6)], "label": ["a", "b"] * 3}
        parquet.write_table(pyarrow.table(rows), tmp_path / f"{part}-0.parquet", row_group_size=4)
    source = open_source(tmp_path)
    val = source.part("val")
    assert [int(val.load(i)[0, 0, 0]) for i in range(6)] == [10, 11, 12, 13, 14, 15]
    assert class_of(val) == list("ababab")


def counts(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(100, 401, (20, 20)).astype(np.uint16)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_camera_counts_get_one_range(tmp_path, kind):
    for i in range(6):
        Image.fromarray(counts(i)).save(tmp_path / f"{i}.{kind}")
    source = open_source(tmp_path)
    assert source.pixel_range == pytest.approx((100, 400), abs=3)
    assert len(source.load(0)[0].unique()) > 100
    given = open_source(tmp_path, read=ReadConfig(pixel_range=(0.0, 4095.0)))
    assert given.load(0)[0].flatten()[0] == round(int(counts(0)[0, 0]) * 255 / 4095)
    config, train, _ = fit_to_images(Config(), source)
    assert config.data.pixel_range == train.pixel_range
    assert config.crops.mean == pytest.approx((0.5,) * 3, abs=0.05)


@pytest.mark.parametrize("nodata", [-3.4028235e38, -9999.0, np.nan, np.inf])
def test_no_data_does_not_stretch_the_range(nodata):
    images = [np.random.default_rng(i).uniform(200, 900, (30, 30, 1)).astype(np.float32) for i in range(4)]
    for image in images:
        image[:4, :4] = nodata
    assert estimate_range(images) == pytest.approx((200, 900), abs=3)


def test_white_is_zero_in_16_bits():
    tifffile = pytest.importorskip("tifffile")
    plain, inverted = io.BytesIO(), io.BytesIO()
    tifffile.imwrite(plain, counts(0) * 100)
    tifffile.imwrite(inverted, 65535 - counts(0) * 100, photometric="miniswhite")
    assert torch.equal(decode(plain.getvalue()), decode(inverted.getvalue()))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("planar", [False, True])
def test_five_channels(tmp_path, dtype, planar):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 200, (16, 18, 5)).astype(dtype)
    for i in range(3):
        tifffile.imwrite(
            tmp_path / f"{i}.tif",
            np.moveaxis(pixels, -1, 0).copy() if planar else pixels,
            photometric="minisblack",
            planarconfig="separate" if planar else "contig",
        )
    source = open_source(tmp_path)
    assert source.load(0).shape == (5, 16, 18)
    config, train, _ = fit_to_images(Config(), source)
    assert (config.data.channels, len(config.crops.mean), config.crops.hue) == (5, 5, 0.0)
    assert train.channels == 5
    with pytest.raises(ValueError, match="have 5 channels, these weights take 3"):
        source.with_pixels(3, None)


def test_a_postscript_file_is_no_image_whatever_its_name(monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(BrokenImage, match="not an image in a format that is read"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("size", [(480, 640), (66, 94), (100, 61), (35, 140)])
def test_davis_frames_enlarged_are_opencvs_bytes(size):
    """All bytes of a frame of noise enlarged, against ``cv2.resize`` itself: rows beyond an edge keep their weights."""
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless")
    frame = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    theirs = cv2.resize(frame, size[::-1], interpolation=cv2.INTER_LINEAR)
    ours = resize_bilinear(torch.from_numpy(frame).permute(2, 0, 1), *size).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(ours, theirs)


def test_davis_frames_are_enlarged_with_the_weights_of_the_edge():
    """Worked by hand, 2 rows -> 4: row 0 lies at -0.25, so both its pixels are 255, weighted 512 and 1536 of 2048.

    255 * 2048 >> 4 is 32640; 32640 * 512 >> 16 is 255, 32640 * 1536 >> 16 is 765; (255 + 765 + 2) >> 2 is 255. Of 3:
    384 * 512 >> 16 is 3, 384 * 1536 >> 16 is 9: 3. Of 1: 128 * 512 >> 16 is 1, 128 * 1536 >> 16 is 3: 1.
    """
    frame = torch.tensor([[[0, 100], [0, 100]]], dtype=torch.uint8)
    assert resize_bilinear(frame, 4, 4)[0, 1].tolist() == [0, 25, 75, 100]


@pytest.mark.parametrize("kind", ["microscopy", "elevation", "five"])
def test_instruments_are_learnt_from_and_told_apart(kind, tmp_path):
    """k-NN of a network that has seen 4 steps; the model card holds range, mean and std."""
    pytest.importorskip("tifffile")
    from dino.encoder.encoder import open_encoder
    from dino.evaluation import knn
    from dino.options import KnnOptions
    from dino.run.pretrain import pretrain

    textures.write(kind, tmp_path / "set")
    small = {"model__backbone": "vit_nano", "model__out_dim": 64, "model__hidden_dim": 32}
    how = {"optim__length": "4 steps", "optim__batch_size": 16, "run__device": "cpu", "run__knn_every": "0 epochs"}
    out = tmp_path / "run"
    assert pretrain(tmp_path / "set", out, quiet=True, **small, **how)["steps"] == 4
    card = (out / "model_card.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["channels"] == (5 if kind == "five" else 3)
    low, high = config["data"]["pixel_range"]
    # Ends of ordinary images stay: of five channels 500 less four deviations of the loudest noise, 600 * 0.03.
    assert {"microscopy": 270 < low < 310, "elevation": 1480 < low < 1510, "five": 415 < low < 440}[kind], low
    assert high < {"microscopy": 530, "elevation": 1600, "five": 1150}[kind]
    for value in (*config["crops"]["mean"], *config["crops"]["std"], low, high):
        assert f"{value:g}" in card
    source = open_source(tmp_path / "set")
    encoder = open_encoder(out, progress=False)
    features = encoder.features(source).features
    assert float((features @ features.T).fill_diagonal_(-1).max()) < 0.99999  # No two images are alike.
    found = knn.run(encoder, source, None, KnnOptions(k=(5,)))
    assert found["knn_5_top1"] >= 55  # Chance: 25.
