"""``dino embed`` and features kept in a file: what is written, going on after a stop, refusing what does not fit."""

import builtins
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dino.commands import cli
from dino.commands.embed import Embed
from dino.config import ModelConfig
from dino.data.sources import open_source
from dino.encoder.embed import embed
from dino.encoder.embeddings import read_embeddings
from dino.encoder.encoder import Encoder, open_encoder
from dino.encoder.stored_features import fingerprint, provenance
from dino.evaluation import knn
from dino.machine import distributed
from dino.models.backbone import Tokens
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import KnnOptions

PLAIN = {"resize": 16, "size": 16, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "progress": False}
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="pyarrow is not installed")


class Stops(Exception):
    pass


class Colors(torch.nn.Module):
    """The mean colour, and two older blocks; raises after some images."""

    embed_dim, patch_size = 3, 8

    def __init__(self, stop_after=10_000):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.left = stop_after

    def forward(self, images):
        self.left -= len(images)
        if self.left < 0:
            raise Stops
        patches = F.avg_pool2d(images, 8).permute(0, 2, 3, 1) * self.scale
        return Tokens(patches.mean((1, 2)), patches)

    def get_intermediate_layers(self, images, n=1):
        last = self(images)
        tokens = torch.cat([last.cls_token[:, None], last.patch_tokens.flatten(1, 2)], 1)
        return [tokens * (i + 1) for i in range(3)][-n:]


def shown(backbone=None, **options):
    """An encoder that shows images as they are."""
    return Encoder(backbone or Colors(), **{**PLAIN, **options})


@pytest.fixture
def folder(tmp_path):
    """23 images of two classes, of which the 3rd, and a whole part of four, are broken."""
    for i in range(23):
        name = "blue" if i < 12 else "red"
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "data" / name / f"{i:02}{'x' * (i % 5)}.png"
        Image.new("RGB", (16 + i, 24), (10 * i, 0, 250 - 10 * i)).save(path)
        if i in (2, 8, 9, 10, 11):
            path.write_bytes(b"no image")
    return tmp_path / "data"


GOOD = [i for i in range(23) if i not in (2, 8, 9, 10, 11)]


def read_npz(path):
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_what_is_written(folder, tmp_path, caplog):
    source = open_source(folder)
    got = embed(shown(batch_size=5), source, tmp_path / "x.npz", patch_tokens=True, part_size=4)
    assert (got["images"], got["width"], got["already_there"]) == (18, 3, 0)
    assert [*got["broken"]] == [source.name(i) for i in (2, 8, 9, 10, 11)]
    assert "5 of 23 images cannot be read" in caplog.text
    arrays = read_npz(tmp_path / "x.npz")
    assert arrays["path"].tolist() == [source.name(i) for i in GOOD]
    assert arrays["label"].tolist() == [int(i >= 12) for i in GOOD]
    assert arrays["classes"].tolist() == ["blue", "red"]
    assert arrays["broken"].tolist() == [*got["broken"]]
    expected = np.array([(10 * i, 0, 250 - 10 * i) for i in GOOD]) / 255
    assert arrays["cls_token"].dtype == np.float32
    np.testing.assert_allclose(arrays["cls_token"], expected, atol=1e-6)
    assert arrays["patch_tokens"].shape == (18, 2, 2, 3)
    np.testing.assert_allclose(
        arrays["patch_tokens"], np.broadcast_to(expected[:, None, None], (18, 2, 2, 3)), atol=1e-6
    )
    assert json.loads(str(arrays["settings"]))["weights"] == fingerprint(Colors())
    assert [path.name for path in tmp_path.iterdir() if path != folder] == ["x.npz"]


def test_blocks_and_half_precision(folder, tmp_path):
    embed(shown(batch_size=7), open_source(folder), tmp_path / "x.npz", n_last_blocks=2, float16=True)
    tokens = read_npz(tmp_path / "x.npz")["cls_token"]
    assert (tokens.shape, tokens.dtype) == ((18, 6), np.float16)
    np.testing.assert_allclose(tokens[:, 3:], tokens[:, :3] / 2 * 3, rtol=2e-3)  # Older first: twice, then three times.


@pytest.mark.parametrize("stop_after", [1, 7, 13, 17])
@pytest.mark.parametrize("batch_size", [3, 4, 50])
def test_a_stopped_run_goes_on(folder, tmp_path, stop_after, batch_size):
    source = open_source(folder)
    embed(shown(batch_size=5), source, tmp_path / "whole.npz", part_size=4)
    out = tmp_path / "x.npz"
    with pytest.raises(Stops):
        embed(shown(Colors(stop_after), batch_size=batch_size), source, out, part_size=4)
    assert not out.exists()
    assert (tmp_path / "x.npz.parts").exists()
    kept = len(list((tmp_path / "x.npz.parts").glob("*.npz")))
    backbone = Colors()
    got = embed(shown(backbone, batch_size=4), source, out, part_size=4)
    assert len(got["broken"]) == 5
    assert (got["already_there"] > 0) == (kept > 0)
    assert 10_000 - backbone.left == sum(i >= got["already_there"] for i in GOOD), "images were seen again"
    a, b = read_npz(out), read_npz(tmp_path / "whole.npz")
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_run_stopped_while_it_puts_the_parts_together_goes_on(folder, tmp_path, monkeypatch):
    source, out = open_source(folder), tmp_path / "x.npz"
    with monkeypatch.context() as patch:
        patch.setattr("dino.encoder.embed._write_npz", lambda *_: (_ for _ in ()).throw(Stops))
        with pytest.raises(Stops):
            embed(shown(), source, out, part_size=4)
    backbone = Colors()
    assert embed(shown(backbone), source, out, part_size=4)["already_there"] == 23
    assert backbone.left == 10_000


def test_processes_share_the_parts(folder, tmp_path, monkeypatch):
    """Of two processes the second writes its parts and no file; the first its own, and the file of all."""
    source, out = open_source(folder), tmp_path / "x.npz"
    embed(shown(), source, tmp_path / "whole.npz", part_size=4)
    for rank in (1, 0):  # One after the other: six parts, of which each has three.
        if rank == 0:
            assert [path.name for path in sorted((tmp_path / "x.npz.parts").glob("[0-9]*"))] == [
                "000003.npz", "000004.npz", "000005.npz",
            ]  # fmt: skip
        monkeypatch.setattr(distributed, "is_main", lambda rank=rank: rank == 0)
        monkeypatch.setattr(
            distributed, "share", lambda n, rank=rank: range(3, 6) if rank == 1 else range(n)
        )  # What the first sees as missing are its own three.
        (tmp_path / "x.npz.parts").mkdir(exist_ok=True)
        if rank == 1:
            settings = embed_settings(source)
            (tmp_path / "x.npz.parts" / "settings.json").write_text(settings)
        embed(shown(), source, out, part_size=4)
        assert out.exists() == (rank == 0)
    for name, array in read_npz(tmp_path / "whole.npz").items():
        np.testing.assert_array_equal(array, read_npz(out)[name])


@needs_pyarrow
def test_each_process_writes_a_part_of_a_folder(tmp_path):
    """By torchrun, 2,100 images in three parts: together the rows of one process, which every command reads."""
    torch.manual_seed(0)
    save_backbone(VisionTransformer(16, 8, 3, 12, 2, 3), tmp_path / "b.safetensors", ModelConfig(), 16)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    left = tmp_path / "two.parts" / "written" / "part-00003-of-00004.parquet"  # By a start of four processes.
    left.parent.mkdir(parents=True)
    left.write_bytes(b"")
    for out, start in (("one.npz", []), ("two", torchrun)):
        command = ["-m", "dino", "embed", "b.safetensors", "shapes:2100x16", "--out", out, "--device", "cpu"]
        subprocess.run([sys.executable, *start, *command], cwd=tmp_path, check=True, capture_output=True)
    parts = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert parts == ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"]
    assert not (tmp_path / "two.parts").exists()
    one, two = read_embeddings(tmp_path / "one.npz"), read_embeddings(tmp_path / "two")
    assert one.names == two.names
    assert one.classes == two.classes
    torch.testing.assert_close(one.features, two.features)
    assert torch.equal(one.labels, two.labels)
    assert cli.main(["duplicates", str(tmp_path / "two"), "--json"]) in (0, 3)


def embed_settings(source):
    how = {"n_last_blocks": 1, "patch_tokens": False, "dtype": "float32", "part_size": 4}
    return json.dumps(provenance(shown(), {"all": source}, **how))


def test_other_settings_weights_or_images_are_refused(folder, tmp_path):
    source, out = open_source(folder), tmp_path / "x.npz"
    with pytest.raises(Stops):  # Nothing is kept of this, so nothing has to fit.
        embed(shown(Colors(1), batch_size=4), source, out, part_size=4, float16=True)
    with pytest.raises(Stops):
        embed(shown(Colors(9), batch_size=4), source, out, part_size=4)
    other = Colors()
    other.scale.data += 1e-3
    for name, call in {
        "crop: 16 there, 8 now": lambda: embed(shown(size=8), source, out, part_size=4),
        "dtype: float32 there, float16 now": lambda: embed(shown(), source, out, part_size=4, float16=True),
        "weights": lambda: embed(shown(other), source, out, part_size=4),
        "all images: 23, .*, 22, .* now": lambda: embed(shown(), source.subset(range(22)), out, part_size=4),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
    embed(shown(), source, out, part_size=4)
    with pytest.raises(ValueError, match="there already"):
        embed(shown(), source, out, part_size=4)


def test_bad_input_is_named(folder, tmp_path, monkeypatch):
    source = open_source(folder)
    with pytest.raises(ValueError, match=r"\.npz or \.parquet"):
        embed(shown(), source, tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"none of the 4 images can be read \(.*08xxx\.png"):
        embed(shown(), source.subset([8, 9, 10, 11]), tmp_path / "x.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

    class Convnet(torch.nn.Module):
        forward = Colors.forward

    with pytest.raises(ValueError, match="no blocks to look into"):
        embed(shown(Convnet()), source, tmp_path / "y.npz", n_last_blocks=2)

    real = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ValueError, match=r"pip install 'dino-ssl\[parquet\]'"):
        embed(shown(), source, tmp_path / "x.parquet")


@needs_pyarrow
@pytest.mark.parametrize("float16", [False, True])
def test_parquet_holds_the_same(folder, tmp_path, float16):
    import pyarrow.parquet as parquet

    source, shared = open_source(folder), {"patch_tokens": True, "float16": float16, "part_size": 4}
    embed(shown(), source, tmp_path / "x.npz", **shared)
    embed(shown(), source, tmp_path / "x.parquet", **shared)
    arrays, table = read_npz(tmp_path / "x.npz"), parquet.read_table(tmp_path / "x.parquet")
    names = ["path", "label", "class", "embedding", "patch_tokens", "x", "y", "neighbors"]
    assert table.column_names == names
    assert table["path"].to_pylist() == arrays["path"].tolist()
    assert table["label"].to_pylist() == arrays["label"].tolist()
    for name, called in (("cls_token", "embedding"), ("patch_tokens", "patch_tokens")):
        np.testing.assert_array_equal(
            np.array(table[called].to_pylist(), dtype=arrays[name].dtype).reshape(arrays[name].shape), arrays[name]
        )
    extra = json.loads(table.schema.metadata[b"dino"])
    assert extra["classes"] == ["blue", "red"]
    assert extra["patch_tokens shape"] == [2, 2, 3]
    assert len(extra["broken"]) == 5


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    save_backbone(VisionTransformer(16, 8, 3, 12, 2, 3), tmp_path / "b.safetensors", ModelConfig(), 16)
    monkeypatch.setattr(cli, "COMMANDS", {"embed": Embed})
    out = tmp_path / "x.npz"
    arguments = ["embed", str(tmp_path / "b.safetensors"), str(folder), "--out", str(out), "--device", "cpu"]
    assert cli.main([*arguments, "--resize", "16", "--crop", "16", "--n-last-blocks", "2", "--json"]) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (got["images"], got["width"], len(got["broken"])) == (18, 24, 5)
    encoder = open_encoder(tmp_path / "b.safetensors", resize=16, size=16, device="cpu")
    expected = encoder.features(open_source(folder), unit_length=False).features
    np.testing.assert_allclose(read_npz(out)["cls_token"][:, 12:], expected.numpy(), atol=1e-5)
    assert cli.main(arguments) == 1
    assert "there already" in capsys.readouterr().err


def test_knn_reads_features_from_a_file_that_fits(folder, tmp_path):
    source, file = open_source(folder), tmp_path / "kept" / "f.safetensors"
    test = source.subset([0, 22])
    backbone = Colors()
    options = KnnOptions(k=(1, 3), features=file)
    first = knn.run(shown(backbone), source, test, options)
    assert first == knn.run(shown(), source, test, KnnOptions(k=(1, 3)))
    seen = backbone.left
    assert knn.run(shown(backbone), source, test, options) == first
    others = KnnOptions(k=(2,), temperature=0.1, features=file)
    assert knn.run(shown(backbone), source, test, others)["knn_2_top1"] == 100
    assert backbone.left == seen, "features were extracted again"
    backbone.scale.data += 1e-3
    with pytest.raises(ValueError, match=r"weights: .* there, .* now"):
        knn.run(shown(backbone), source, test, options)
    with pytest.raises(ValueError, match="crop: 16 there, 8 now"):
        knn.run(shown(size=8), source, test, options)
    with pytest.raises(ValueError, match=r"test images: 2, .*, 1, .* now"):
        knn.run(shown(), source, source.subset([0]), options)
    with pytest.raises(ValueError, match=r"test images: 2, .* there, None now"):
        knn.run(shown(), source, options=options)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no file of features"):
        knn.run(shown(), source, test, options)


def test_knn_compares_classes_by_name(folder, tmp_path):
    """Train has a class that test has not, which shifts the numbers of the others: red is red, whatever its number."""
    (folder / "aaa").mkdir()
    Image.new("RGB", (16, 16), (0, 250, 0)).save(folder / "aaa" / "0.png")
    for name, color in (("blue", (0, 0, 250)), ("red", (250, 0, 0))):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), color).save(tmp_path / "other" / name / "0.png")
    test = open_source(tmp_path / "other")
    assert test.labels.tolist() == [0, 1]
    assert open_source(folder).classes.index("blue") == 1
    assert knn.run(shown(), open_source(folder), test, KnnOptions(k=(1,)))["knn_1_top1"] == 100


def test_fingerprints():
    same = [fingerprint(VisionTransformer(16, 8, 3, 12, 1, 3, pos_offset=offset)) for offset in (0.1, 0.1)]
    torch.manual_seed(0)
    a = VisionTransformer(16, 8, 3, 12, 1, 3)
    b = VisionTransformer(16, 8, 3, 12, 1, 3, pos_offset=0.0)
    b.load_state_dict(a.state_dict())
    c = VisionTransformer(16, 8, 3, 12, 1, 6)
    c.load_state_dict(a.state_dict())
    assert len({*same, fingerprint(a), fingerprint(b), fingerprint(c)}) == 5
    assert fingerprint(a) == fingerprint(a.train())
