"""A file of ``dino embed`` read back, and the commands on it: search, duplicates, clusters, outliers."""

import csv
import importlib.util
import json
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.commands import cli
from dino.config import ModelConfig
from dino.data.sources import open_source
from dino.encoder.embeddings import read_embeddings
from dino.encoder.encoder import open_encoder
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")
SIDE = 24


def picture(seed: int, side: int = SIDE) -> Image.Image:
    """Coloured squares: unlike each other, and the same at any size."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """24 images of two classes; 5 has a larger copy, 7 an equal one; embedded as Parquet (with thumbnails) and .npz."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    folder = tmp_path_factory.mktemp("stored")
    for i in range(22):
        path = folder / "data" / ("ant" if i < 11 else "bee") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    picture(5, 2 * SIDE).save(folder / "data" / "bee" / "large [bold]5.png")
    picture(7).save(folder / "data" / "bee" / "same7.png")
    torch.manual_seed(0)
    save_backbone(VisionTransformer(16, 8, 3, 24, 2, 3), folder / "w.safetensors", ModelConfig(), 16)
    here = os.getcwd()
    os.chdir(folder)  # DATA is given relative to here, and read from elsewhere.
    try:
        for name, more in (("x.parquet", ["--thumbnails", "--neighbors", "3"]), ("x.npz", [])):
            assert cli.main(["embed", "w.safetensors", "data", "--out", name, "--device", "cpu", *more]) == 0
    finally:
        os.chdir(here)
    return folder


def call(capsys, *arguments):
    code = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if out.strip() else err


@pytest.mark.parametrize("name", ["x.parquet", "x.npz"])
def test_what_is_read_is_what_the_encoder_gives(made, name):
    kept = read_embeddings(made / name)
    source = open_source(made / "data")
    expected = open_encoder(str(made / "w.safetensors")).features(source)
    torch.testing.assert_close(kept.features, expected.features, atol=1e-5, rtol=0)
    assert kept.names == [f"data/{source.name(i).split('/data/')[1]}" for i in range(24)]
    assert [kept.class_of(i) for i in (0, 23)] == ["ant", "bee"]
    assert kept.size(kept.find("large [bold]5.png")) == (2 * SIDE, 2 * SIDE)
    assert kept.image(3).equal(source.load(3))
    assert kept.encoder().features(source.subset([4])).features[0] @ kept.features[4] == pytest.approx(1, abs=1e-5)


def test_names_find_rows(made, tmp_path):
    kept = read_embeddings(made / "x.parquet")
    assert kept.find("data/ant/03.png") == kept.find("03.png") == kept.find("03") == kept.find("ant/03.png") == 3
    assert kept.find(str(made / "data" / "ant" / "03.png")) == 3
    assert kept.find("3.png") is None
    assert kept.find("nothing") is None
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "b").mkdir()
    for part in "ab":
        picture(ord(part)).save(tmp_path / "d" / part / "same.png")
    assert cli.main(["embed", str(made / "w.safetensors"), str(tmp_path / "d"), "--out", str(tmp_path / "y.npz")]) == 0
    with pytest.raises(ValueError, match=r"same\.png names 2 images"):
        read_embeddings(tmp_path / "y.npz").find("same.png")
    assert read_embeddings(tmp_path / "y.npz").find("b/same.png") == 1


def test_the_parquet_opens_elsewhere(made):
    """What pandas, faiss, LanceDB and embedding-atlas need: plain columns, lists of fixed size, zero-based rows."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = parquet.read_table(made / "x.parquet")
    kept = read_embeddings(made / "x.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 24)
    assert table["class"].to_pylist() == [kept.class_of(i) for i in range(24)]
    assert table["path"].to_pylist() == kept.names
    similarities = (kept.features @ kept.features.mT).fill_diagonal_(-9)
    for row, neighbors in enumerate(table["neighbors"].to_pylist()):
        assert len(neighbors["ids"]) == 3
        assert row not in neighbors["ids"]
        best = similarities[row].topk(3).values
        np.testing.assert_allclose(1 - np.array(neighbors["distances"]), best, atol=1e-5)
        np.testing.assert_allclose(similarities[row][neighbors["ids"]], best, atol=1e-5)
    for name in "xy":
        assert table[name].type == pa.float32()
        assert np.isfinite(table[name].to_numpy()).all()
    assert all(one["bytes"][:2] == b"\xff\xd8" for one in table["thumbnail"].to_pylist())
    assert json.loads(table.schema.metadata[b"dino"])["made_from"]["data"] == ["data"]


@needs_pyarrow
def test_files_of_the_first_version_are_read(made, tmp_path):
    import pyarrow.parquet as parquet

    table = parquet.read_table(made / "x.parquet", columns=["path", "label", "embedding"])
    extra = json.loads(table.schema.metadata[b"dino"])
    del extra["made_from"]
    table = table.rename_columns(["path", "label", "cls_token"]).replace_schema_metadata({"dino": json.dumps(extra)})
    parquet.write_table(table, tmp_path / "old.parquet")
    old, new = read_embeddings(tmp_path / "old.parquet"), read_embeddings(made / "x.parquet")
    assert old.features.equal(new.features)
    assert old.names == new.names
    with pytest.raises(ValueError, match="does not say which weights"):
        old.encoder()


def test_search_by_row_name_and_file(made, capsys, tmp_path):
    kept = read_embeddings(made / "x.parquet")
    code, got = call(capsys, "search", made / "x.parquet", "7", "05.png", "--k", "3", "--out", tmp_path / "s.csv")
    assert code == 0
    first = got["neighbors"]["data/ant/07.png"]
    assert first[0]["path"] == "data/bee/same7.png"
    assert first[0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert first[0]["class"] == "bee"
    assert "data/ant/07.png" not in [one["path"] for one in first]
    assert got["neighbors"]["data/ant/05.png"][0]["path"] == "data/bee/large [bold]5.png"
    rows = list(csv.DictReader((tmp_path / "s.csv").open()))
    assert len(rows) == 6
    assert rows[0]["path"] == "data/bee/same7.png"

    picture(7).save(tmp_path / "new.png")  # Not in the set: the weights are found by what the file says.
    code, got = call(capsys, "search", made / "x.parquet", tmp_path / "new.png", "--k", "2", "--device", "cpu",
                     "--sheet", tmp_path / "s.png")  # fmt: skip
    assert [one["path"] for one in got["neighbors"][str(tmp_path / "new.png")]] in (
        ["data/ant/07.png", "data/bee/same7.png"],
        ["data/bee/same7.png", "data/ant/07.png"],
    )
    assert Image.open(tmp_path / "s.png").width > 300
    # A file that is a row of the set is not its own neighbour.
    code, got = call(capsys, "search", made / "x.parquet", made / "data" / "ant" / "07.png", "--k", "1")
    assert [one["path"] for one in got["neighbors"]["data/ant/07.png"]] == ["data/bee/same7.png"]
    assert len(kept) == 24


def test_search_refuses(made, capsys, tmp_path):
    picture(99).save(tmp_path / "new.png")
    torch.manual_seed(1)
    save_backbone(VisionTransformer(16, 8, 3, 24, 2, 3), tmp_path / "other.safetensors", ModelConfig(), 16)
    for arguments, message in (
        (["24"], "rows 0 to 23"),
        (["none.png"], "no image file, no row number and no name"),
        ([tmp_path / "new.png", "--weights", tmp_path / "other.safetensors"], "are not the weights that made"),
        (["0", "--k", "0"], "at least one query and one neighbour"),
        (["0", "--out", tmp_path / "x.txt"], r"written as .csv"),
        (["0", "--sheet", tmp_path / "x.txt"], r"--sheet .* end it in .png"),
    ):
        assert cli.main(["search", *map(str, [made / "x.parquet", *arguments])]) == 1
        err = capsys.readouterr().err
        assert len(err.strip().splitlines()) == 1
        assert re.search(message, err), err
    for name, content in (("a.parquet", b"nothing"), ("a.npz", b"nothing")):
        (tmp_path / name).write_bytes(content)
        assert cli.main(["outliers", str(tmp_path / name)]) == 1
        assert "is no file that dino embed wrote" in capsys.readouterr().err
    assert cli.main(["outliers", str(tmp_path / "missing.parquet")]) == 1
    assert "does not exist: dino embed" in capsys.readouterr().err


def test_duplicates_are_found_and_the_largest_is_kept(made, capsys, tmp_path):
    more = ["--threshold", "0.999", "--out", tmp_path / "d.csv", "--sheet", tmp_path / "d.png"]
    code, got = call(capsys, "duplicates", made / "x.parquet", *more)
    assert code == 3
    assert got["groups"] == [
        {"keep": "data/bee/large [bold]5.png", "copies": ["data/ant/05.png"]},
        {"keep": "data/ant/07.png", "copies": ["data/bee/same7.png"]},
    ]
    assert got["copies"] == 2
    rows = list(csv.DictReader((tmp_path / "d.csv").open()))
    assert [(row["group"], row["which"], row["pixels"]) for row in rows] == [
        ("0", "keep", "48 x 48"), ("0", "copy", "24 x 24"), ("1", "keep", "24 x 24"), ("1", "copy", "24 x 24"),
    ]  # fmt: skip
    assert (tmp_path / "d.png").stat().st_size > 1000
    # The default limit: a twentieth of the median distance to the tenth neighbour.
    kept = read_embeddings(made / "x.parquet")
    tenth = (1 - kept.features @ kept.features.mT).sort(1).values[:, 10].median().item()
    code, got = call(capsys, "duplicates", made / "x.parquet")
    assert got["usual_distance"] == pytest.approx(tenth, abs=1e-5)
    assert got["threshold"] == pytest.approx(1 - tenth / 20, abs=1e-5)
    # In words, with names that look like markup as they are.
    assert cli.main(["duplicates", str(made / "x.parquet"), "--threshold", "0.999"]) == 3
    out = capsys.readouterr().out
    assert "2 copies in 2 groups among 24 images" in out
    assert "large [bold]5.png" in out


def test_no_duplicates_end_with_0(made, capsys, tmp_path):
    ants = str(made / "data" / "ant")
    assert cli.main(["embed", str(made / "w.safetensors"), ants, "--out", str(tmp_path / "a.npz")]) == 0
    capsys.readouterr()
    assert cli.main(["duplicates", str(tmp_path / "a.npz"), "--threshold", "0.9999"]) == 0
    assert "no copies among 11 images" in capsys.readouterr().out
    for arguments in (["--threshold", "1.5"], ["--share", "0"], ["--share", "0.1", "--threshold", "0.9"]):
        assert cli.main(["duplicates", str(tmp_path / "a.npz"), *arguments]) == 1


def test_clusters_and_outliers(made, capsys, tmp_path):
    code, got = call(capsys, "clusters", made / "x.parquet", "--k", "3", "--out", tmp_path / "c.csv", "--sheet",
                     tmp_path / "c.png")  # fmt: skip
    assert code == 0
    assert sum(one["images"] for one in got["clusters"]) == 24
    assert sum(sum(one["classes"].values()) for one in got["clusters"]) == 24
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [sum(row["cluster"] == str(k) for row in rows) for k in range(3)] == [
        one["images"] for one in got["clusters"]
    ]
    code, got = call(capsys, "clusters", made / "x.parquet")
    assert len(got["silhouettes"]) > 3
    assert cli.main(["clusters", str(made / "x.parquet"), "--method", "hdbscan", "--min-size", "2"]) == 0
    assert "clusters of 24 images" in capsys.readouterr().out

    more = ["--k", "4", "--count", "2", "--out", tmp_path / "o.csv", "--sheet", tmp_path / "o.png"]
    code, got = call(capsys, "outliers", made / "x.parquet", *more)
    assert code == 0
    kept = read_embeddings(made / "x.parquet")
    scores = (1 - kept.features @ kept.features.mT).fill_diagonal_(9).sort(1).values[:, :4].mean(1)
    assert [one["row"] for one in got["outliers"]] == scores.topk(2).indices.tolist()
    assert got["outliers"][0]["distance"] == pytest.approx(scores.max().item(), abs=1e-4)
    assert len(list(csv.reader((tmp_path / "o.csv").open()))) == 25


def test_without_the_images_thumbnails_stand_in(made, capsys, tmp_path):
    import shutil

    shutil.copytree(made / "data", tmp_path / "data")
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for name, more in (("with.parquet", ["--thumbnails"]), ("without.parquet", [])):
            assert cli.main(["embed", str(made / "w.safetensors"), "data", "--out", name, *more]) == 0
    finally:
        os.chdir(here)
    shutil.rmtree(tmp_path / "data")
    sheet = ["--k", "3", "--sheet", str(tmp_path / "s.png")]
    assert cli.main(["search", str(tmp_path / "with.parquet"), "0", *sheet]) == 0
    kept = read_embeddings(tmp_path / "with.parquet")
    seen = F.interpolate(torch.from_numpy(np.array(picture(0))).permute(2, 0, 1)[None].float(), (16, 16))[0]
    assert kept.image(0).shape == (3, 16, 16)  # What the backbone saw: 16 pixels, from 18.
    assert (kept.image(0).float() - seen).abs().mean() < 40
    assert kept.size(0) == (0, 0)
    capsys.readouterr()
    assert cli.main(["search", str(tmp_path / "without.parquet"), "0", *sheet]) == 1
    assert "is not to be found" in capsys.readouterr().err


def test_names_that_are_no_utf8(made, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    os.rename(folder / "1.png", os.fsencode(str(folder)) + b"/\xff.png")
    assert cli.main(["embed", str(made / "w.safetensors"), str(folder), "--out", str(tmp_path / "o.parquet")]) == 0
    kept = read_embeddings(tmp_path / "o.parquet")
    assert [os.path.basename(name) for name in kept.names][:2] == ["0.png", "2.png"]  # The third is escaped.
    assert kept.image(2).shape == (3, SIDE, SIDE)


def test_a_file_of_features_beside_the_photos_is_not_data(made, caplog):
    """``dino embed ... --out PHOTOS/x.parquet`` and then any command on PHOTOS, thumbnails in the file or not."""
    from dino.data.sources import open_source

    photos = made / "data"
    before = open_source(photos)
    (photos / "x.parquet").write_bytes((made / "x.parquet").read_bytes())
    try:
        again = open_source(photos)
        assert len(again) == len(before)
        assert "not read: 1 .parquet" in caplog.text
        with pytest.raises(ValueError, match="written by dino embed"):
            open_source(photos / "x.parquet")
    finally:
        (photos / "x.parquet").unlink()
