"""Sources: every layout people keep images in, made here and found again."""

import io
import json
import os
import pickle
import tarfile
import time
from pathlib import Path

import pytest
import torch
import torchvision.datasets
from PIL import Image

from dino.data.decode import BrokenImage
from dino.data.listing import find_images
from dino.data.sources import open_source, train_and_val

REAL = Path(__file__).parents[1].parent / "shared" / "data"


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, *names: str) -> Path:
    """Each file's red is its place in the arguments."""
    for value, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def reds(source) -> list[int]:
    return [int(source.load(i)[0, 0, 0]) for i in range(len(source))]


def class_of(source) -> list[str]:
    return [source.classes[label] for label in source.labels]


def test_class_folders_nested_to_any_depth(tmp_path):
    write(tmp_path, "cat/1.png", "cat/deep/er/2.PNG", "dog/3.jpeg", ".hidden/4.png", "dog/._5.png", "__MACOSX/6.png")
    write(tmp_path, "cat/note.txt")
    source = open_source(tmp_path)
    assert class_of(source) == ["cat", "cat", "dog"]
    assert reds(source) == [0, 1, 2]
    assert source.load(0, 3).shape == (3, 2, 3)
    assert source.size(0, 3) == (2, 3)
    assert source.name(1) == str(tmp_path / "cat/deep/er/2.PNG")
    assert source.parts == {}
    assert "3 images, 2 classes" in source.description


@pytest.mark.parametrize("names", [("1.png", "2.png"), ("cat/1.png", "2.png"), ("wrapper/1.png", "wrapper/2.png")])
def test_without_class_folders_there_are_no_labels(tmp_path, names):
    source = open_source(str(write(tmp_path, *names)))
    assert source.labels is None
    assert source.classes == []
    assert len(source) == 2
    assert train_and_val(source, 0.5, 0) == (source, None)


def test_a_folder_around_everything_is_no_class(tmp_path):
    source = open_source(write(tmp_path, "photos/2024/cat/1.png", "photos/2024/dog/2.png"))
    assert class_of(source) == ["cat", "dog"]


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
@pytest.mark.parametrize("wrapper", ["", "imagenet/"])
def test_parts(tmp_path, held_out, wrapper):
    names = ["train/cat/1.png", "train/dog/2.png", f"{held_out}/dog/3.png", f"{held_out}/emu/x/4.png"]
    source = open_source(write(tmp_path, *(wrapper + name for name in names)))
    train, val = train_and_val(source, 0.1, 0)
    assert val is not None
    assert class_of(train) == ["cat", "dog"]
    assert class_of(val) == ["dog", "emu"]  # One numbering for both parts.
    assert train.classes == val.classes == ["cat", "dog", "emu"]
    assert sorted(reds(source)) == [0, 1, 2, 3]
    assert reds(open_source(tmp_path, "val")) == reds(source.part("val")) == [2, 3]


def test_val_goes_before_test_and_other_folders_are_in_no_part(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "test/a/4.png", "extra/a/5.png")
    source = open_source(tmp_path)
    assert {name: reds(part) for name, part in source.parts.items()} == {"train": [0, 1], "val": [2]}


def test_a_class_called_train_is_a_class(tmp_path):
    source = open_source(write(tmp_path, "bus/1.png", "train/2.png"))
    assert class_of(source) == ["bus", "train"]
    assert source.parts == {}


def test_several_folders_named_like_parts(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    source = open_source([tmp_path / "train", tmp_path / "val"])
    assert [len(source.part("train")), len(source.part("val"))] == [2, 1]
    assert len(open_source(str(tmp_path / "{train,val}"), "val")) == 1


def test_a_missing_part_says_which_there_are(tmp_path):
    source = open_source(write(tmp_path, "train/a/1.png", "train/b/2.png"))
    with pytest.raises(ValueError, match=r"no part 'val' \(parts: train\)"):
        source.part("val")


def test_train_alone_is_split(tmp_path):
    write(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in range(10)))
    train, val = train_and_val(open_source(tmp_path), 0.2, 0)
    assert val is not None
    assert (len(train), len(val)) == (16, 4)


def test_split_is_stratified_disjoint_and_by_seed(tmp_path):
    write(tmp_path, *(f"a/{i}.png" for i in range(20)), *(f"b/{i}.png" for i in range(5)), "c/0.png")
    source = open_source(tmp_path)
    train, val = source.split(0.2, seed=1)
    assert val.labels is not None
    assert torch.bincount(val.labels, minlength=3).tolist() == [4, 1, 0]  # The only image of c stays.
    assert sorted([*train.rows, *val.rows]) == list(range(26))
    again, other = source.split(0.2, seed=1)[1], source.split(0.2, seed=2)[1]
    assert again.rows.tolist() == val.rows.tolist() != other.rows.tolist()


def test_subset_keeps_order_and_labels(tmp_path):
    subset = open_source(write(tmp_path, "a/1.png", "b/2.png", "b/3.png")).subset([2, 0])
    assert reds(subset) == [2, 0]
    assert class_of(subset) == ["b", "a"]


def test_tar_is_read_in_place(tmp_path):
    files = {f"./train/{c}/{i}.png": png(10 * k + i) for k, c in enumerate("ab") for i in range(3)}
    pack(tmp_path / "s-0.tar", files)
    pack(tmp_path / "s-1.tar", {"train/b/9.png": png(90), "val/a/1.png": png(91), "val/._a.png": b"", "x.txt": b"no"})
    before = sorted(os.listdir(tmp_path))
    for data in (f"{tmp_path}/s-{{0..1}}.tar", f"{tmp_path}/*.tar", [f"{tmp_path}/s-0.tar", f"{tmp_path}/s-1.tar"]):
        source = open_source(data)
        assert reds(source) == [0, 1, 2, 10, 11, 12, 90, 91]
        assert class_of(source.part("train")) == list("aaabbbb")
        assert class_of(source.part("val")) == ["a"]
    assert source.name(6) == f"{tmp_path}/s-1.tar/train/b/9.png"
    assert reds(pickle.loads(pickle.dumps(source))) == reds(source)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("sidecar", ["cls", "json"])
def test_webdataset_sidecars_are_labels(tmp_path, sidecar):
    files = {}
    for i, label in enumerate([10, 2, 10]):
        files[f"{i:06d}.png"] = png(i)
        files[f"{i:06d}.{sidecar}"] = (str(label) if sidecar == "cls" else json.dumps({"label": label})).encode()
    source = open_source(pack(tmp_path / "shard-000.tar", files))
    assert class_of(source) == ["10", "2", "10"]
    assert source.classes == ["2", "10"]  # In the order of numbers.
    assert reds(source) == [0, 1, 2]


def test_lists(tmp_path):
    write(tmp_path / "images", "a/1.png", "b/2.png", "b/x, y.png")
    absolute = tmp_path / "images/b/2.png"
    (tmp_path / "list.txt").write_text(f"images/a/1.png\n\n{absolute}\nimages/b/x, y.png\n")
    assert reds(open_source(tmp_path / "list.txt")) == [0, 1, 2]
    (tmp_path / "plain.csv").write_text("images/b/2.png,good\nimages/a/1.png,bad\n")
    plain = open_source(tmp_path / "plain.csv")
    assert (reds(plain), class_of(plain)) == ([1, 0], ["good", "bad"])
    (tmp_path / "header.csv").write_text('id,Label,Path\n7,1,images/a/1.png\n8,0,"images/b/x, y.png"\n')
    header = open_source(tmp_path / "header.csv")
    assert (reds(header), class_of(header)) == ([0, 2], ["1", "0"])
    (tmp_path / "nolabel.tsv").write_text("image\timages/\nimages/a/1.png\t3\nimages/b/2.png\t4\n")
    assert class_of(open_source(tmp_path / "nolabel.tsv")) == ["a", "b"]


def test_listed_files_that_cannot_be_read_are_broken_not_lost(tmp_path):
    write(tmp_path, "good.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    source = open_source(tmp_path)
    reasons = {}
    for i in range(len(source)):
        try:
            source.load(i)
        except BrokenImage as error:
            reasons[Path(source.name(i)).name] = str(error)
    assert reasons == {
        "empty.jpg": "the file is empty",
        "folder.png": "Is a directory",
        "gone.png": "No such file or directory",
    }


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    write(tmp_path / "real", "a/1.png", "b/2.png")
    write(tmp_path / "elsewhere", "3.png")
    (tmp_path / "real/c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real/a/up").symlink_to(tmp_path / "real")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "real/a")
    found = [item.key for item in find_images([str(tmp_path / "real")])]
    assert {"a/1.png", "b/2.png", "c/3.png"} <= set(found)
    assert len(found) < 8


@pytest.mark.parametrize(
    "make, data, message",
    [
        (lambda _: None, "nothing", r"/nothing does not exist"),
        (lambda _: None, "*.tar", r"matches nothing"),
        (lambda p: (p / "d").mkdir(), "d", r"no images in .*/d \(files there: none\)"),
        (lambda p: write(p, "d/a.doc", "d/b.doc", "d/c"), "d", r"files there: 2 .doc, 1 without extension"),
        (lambda p: write(p, "d/a.tar"), "d", r"name the archives themselves"),
        (lambda p: write(p, "a.tar"), "a.tar", r"a.tar is not a whole .tar archive"),
        (lambda p: write(p, "a.tar.gz"), "a.tar.gz", r"a.tar.gz is not a whole .tar archive"),
        (lambda p: write(p, "a.doc"), "a.doc", r"a.doc is no folder, archive"),
        (lambda p: write(p, "a.csv"), "a.csv", r"a.csv cannot be read as a list"),
    ],
)
def test_bad_data_is_one_clear_line(tmp_path, make, data, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        open_source(str(tmp_path / data))
    assert "\n" not in str(error.value)


def test_a_cut_archive_is_refused(tmp_path):
    path = pack(tmp_path / "a.tar", {f"{i}.png": png(i) * 50 for i in range(5)})
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(ValueError, match="not a whole"):
        open_source(path)


def test_names(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="cifar11 does not exist and is no named data set; names: shapes, cifar10"):
        open_source("cifar11")
    with pytest.raises(ValueError, match="write shapes, or shapes:COUNTxSIZE"):
        open_source("shapes:12")
    with pytest.raises(ValueError, match="cannot be joined"):
        open_source(["shapes", str(write(tmp_path, "1.png"))])

    def unreachable(*_, download, **__):
        raise (OSError("no route to host") if download else RuntimeError("not found"))

    monkeypatch.setenv("DINO_DATA", str(tmp_path / "sets"))
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", unreachable)
    with pytest.raises(ValueError, match=r"cifar100 is not in .*sets \(set DINO_DATA\) and cannot be .*no route"):
        open_source("cifar100")


def test_torchvision_set_by_name(monkeypatch, tmp_path):
    class Fake(torch.utils.data.Dataset):
        classes = ("a", "b")

        def __init__(self, *_, train, download):
            if not download:
                raise RuntimeError("not found")
            self.targets = [0, 1, 1] if train else [1]

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, i):
            return Image.new("RGB", (32, 32), (i, 0, 0)), self.targets[i]

    monkeypatch.setenv("DINO_DATA", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    source = open_source("cifar10")
    assert class_of(source) == ["a", "b", "b"]
    assert reds(source) == [0, 1, 2]
    assert source.size(0, 16) == (16, 16)
    assert class_of(source.part("val")) == ["b"]


def test_shapes_have_masks_and_a_val_part_of_their_own():
    source = open_source("shapes:40x32")
    train, val = train_and_val(source, 0.1, 0)
    assert val is not None
    assert (len(source), len(train), len(val)) == (40, 40, 10)
    assert not torch.equal(train.load(0), val.load(0))
    assert source.load(0, 16).shape == (3, 16, 16)
    masks = train.subset([3, 1]).masks
    assert masks is not None
    assert masks.shape == (2, 32, 32)
    assert val.description == "shapes:40x32: 10 images, 10 classes"
    assert len(pickle.dumps(source)) < 5000


def test_many_files_are_listed_fast(tmp_path):
    for c in range(20):
        (tmp_path / str(c)).mkdir()
        for i in range(250):
            os.close(os.open(tmp_path / str(c) / f"{i}.png", os.O_CREAT | os.O_WRONLY))
    start = time.perf_counter()
    assert len(open_source(tmp_path)) == 5000
    assert time.perf_counter() - start < 3


@pytest.mark.skipif(not (REAL / "imagenette-val.tar").exists(), reason="no real data here")
def test_real_archive():
    source = open_source(str(REAL / "imagenette-val.tar"))
    assert len(source) == len(source.part("val")) == 3925
    assert len(source.classes) == 10
    assert source.load(0, 112).shape == (3, 112, 112)
