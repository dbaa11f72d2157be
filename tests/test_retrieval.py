"""Retrieval: the reference's numbers, a pickle that must not run, and both modes through the command."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import reference
from dino.commands import cli
from dino.commands.retrieval import Retrieval
from dino.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dino.data.plain_pickle import read_plain_pickle
from dino.data.sources import open_source
from dino.encoder import encoder
from dino.encoder.descriptors import extract_descriptors
from dino.encoder.encoder import Encoder
from dino.evaluation.ranking import ranked_tiles
from dino.evaluation.retrieval import (
    PROTOCOLS,
    class_average_precision,
    crop_and_shrink,
    multi_scale,
    read_ground_truth,
    run,
    run_revisited,
    score_protocols,
    shrink,
)
from dino.models.backbone import Tokens
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import Weights
from dino.options import ForwardOptions, RetrievalOptions

FACTS, VITS = reference.scalars("10_retrieval"), reference.scalars("01_vit")


@pytest.fixture(scope="module")
def arrays():
    return reference.arrays("10_retrieval")


def marks_of(truth, n):
    marks = {kind: torch.zeros(len(truth), n, dtype=torch.bool) for kind in ("easy", "hard", "junk")}
    for row, entry in enumerate(truth):
        for kind, mark in marks.items():
            mark[row, entry[kind]] = True
    return marks


def test_similarities_and_ranks_equal_the_reference(arrays):
    queries, database = arrays["query_features"], arrays["db_features"]
    assert (database @ queries.T - arrays["similarity"]).abs().max() <= 1e-6
    for entries in (1, 500, 2**24):
        order = torch.cat([order for _, order in ranked_tiles(queries, database, entries)])
        assert torch.equal(order.T, arrays["ranks"])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_equal_the_reference(arrays, protocol):
    facts = FACTS["protocols"][protocol]
    assert [*map(set, PROTOCOLS[protocol])] == [set(facts["ok"]), set(facts["junk"])]
    marks = marks_of(FACTS["gnd"], 120)
    aps, precisions = score_protocols(arrays["query_features"], arrays["db_features"], marks, FACTS["kappas"])[protocol]
    torch.testing.assert_close(aps, arrays[f"{protocol}/aps"], atol=1e-9, rtol=0, equal_nan=True)
    torch.testing.assert_close(precisions, arrays[f"{protocol}/prs"], atol=1e-9, rtol=0, equal_nan=True)
    torch.testing.assert_close(precisions.nanmean(0), arrays[f"{protocol}/pr"], atol=1e-9, rtol=0)
    assert aps.nanmean().item() == pytest.approx(facts["mAP"], abs=1e-9)
    assert precisions.nanmean(0).tolist() == pytest.approx(facts["mP_at_k"], abs=1e-9)
    assert aps.isnan().sum() == facts["n_queries_without_positives"]


@pytest.mark.parametrize("case", FACTS["multi_scale"], ids=lambda case: case["key"])
def test_multi_scale_features_equal_the_reference(arrays, case):
    model = VisionTransformer(**VITS["models"][case["model"]])
    model.load_state_dict(load_file(reference.FOLDER / f"01_vit_{case['model']}.safetensors"))
    sizes = []
    model.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(list(args[0].shape[-2:])))
    images = reference.waves(tuple(case["shape"]), case["s"], VITS["formula"]).float()
    got = multi_scale(Encoder(model, mean=(0.0,), std=(1.0,)), images)  # As they are, beyond 0 to 1.
    assert sizes == case["sizes"]
    # The reference divides by the norm of the whole batch.
    assert (got / got.norm() - arrays[case["key"]]).abs().max() <= 2e-6
    rows = torch.nn.functional.normalize(got, dim=1) * torch.tensor(case["row_norms"])[:, None]
    assert (rows - arrays[case["key"]]).abs().max() <= 2e-6


@pytest.mark.parametrize("case", FACTS["thumbnail"], ids=lambda case: str(case["id"]))
def test_thumbnails_equal_the_reference(arrays, case):
    image = arrays[f"thumbnail/{case['id']}/input"].permute(2, 0, 1)
    before = image.clone()
    got, want = shrink(image, case["imsize"]), arrays[f"thumbnail/{case['id']}/output"].permute(2, 0, 1)
    assert [*got.shape[1:]] == case["output_hw"]
    assert (got.int() - want.int()).abs().max() <= 1
    assert [*image.shape[1:]] == case["input_hw"]
    assert torch.equal(image, before)  # The image itself stays.
    for channels in (1, 2, 4):  # Channel by channel the same.
        rows = torch.arange(channels) % 3
        assert torch.equal(shrink(image[rows], case["imsize"]), got[rows])


def test_a_cropped_query_keeps_its_scale():
    image = torch.arange(3 * 200 * 100).to(torch.uint8).view(3, 200, 100)  # 100 wide, 200 high.
    assert crop_and_shrink(image, (20.4, 40.0, 60.0, 140.2), 100).shape == (3, 50, 20)
    beyond = crop_and_shrink(image, (-5.0, -5.0, 300.0, 300.0), 400)
    assert beyond.shape == (3, 200, 100)  # Beyond the image; not enlarged.
    assert torch.equal(crop_and_shrink(image, (20.0, 40.0, 60.0, 140.0), 200), image[:, 40:140, 20:60])


def test_class_average_precision_worked_by_hand():
    angles = torch.tensor([0.0, 10.0, 15.0, 40.0, 90.0]).deg2rad()
    features, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 1, 0, 0, 2])
    # Others by nearness: 0: 1, [2], [3]; 1: none of its class; 2: 1, [0], [3]; 3: [2], 1, [0].
    two_late = ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    first_and_third = (1 + (1 / 2 + 2 / 3) / 2) / 2
    expected = [two_late, float("nan"), two_late, first_and_third, float("nan")]
    assert class_average_precision(features, labels).tolist() == pytest.approx(expected, nan_ok=True)


# Reading the ground truth.


def ground_truth(queries=2, images=6):
    entries = [
        {"easy": np.array([i]), "hard": [i + 2], "junk": np.array([], dtype=np.int64), "bbx": [1.0, 2.0, 30.5, 20]}
        for i in range(queries)
    ]
    return {
        "gnd": entries,
        "imlist": [f"db_{i}" for i in range(images)],
        "qimlist": [f"query_{i}" for i in range(queries)],
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_reads_as_pickle_does(tmp_path, protocol):
    content = {
        "grid": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big_endian": np.arange(3, dtype=">i4"),
        "objects": np.array(["a", 1, [np.float32(2.5)]], dtype=object),
        "text": np.array(["ab", "c"]),
        "numbers": (np.int64(3), np.float64(0.5), True, None, b"bytes", 2**80, {1, 2}),
    }
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    got, expected = read_plain_pickle(tmp_path / "x.pkl"), pickle.loads((tmp_path / "x.pkl").read_bytes())
    for name in ("grid", "big_endian", "text"):
        assert got[name].dtype == expected[name].dtype
        assert got[name].tolist() == content[name].tolist()
    assert got["objects"].tolist() == content["objects"].tolist()
    assert got["numbers"] == content["numbers"]


class Evil:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call, named",
    [
        ((os.system, ("touch caught",)), r"(posix|nt)\.system"),
        ((eval, ("open('caught', 'w')",)), r"builtins\.eval"),
        ((subprocess.check_call, (["touch", "caught"],)), r"subprocess\.check_call"),
        ((np.load, ("caught", None, True)), r"numpy\.load"),
        ((getattr, (os, "system")), None),
        ((np.dtype, ([("f", "O")],)), "numbers or strings"),
    ],
    ids=["system", "eval", "subprocess", "numpy.load", "getattr", "dtype"],
)
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, capsys, call, named):
    monkeypatch.chdir(tmp_path)
    try:
        payload = pickle.dumps({**ground_truth(), "imlist": [Evil(call)]})
    except TypeError:  # A module cannot be pickled: written by hand.
        payload = b"cbuiltins\ngetattr\n(cos\nsystem\nS'name'\ntR."
        named = r"builtins\.getattr"
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(payload)
    with pytest.raises(ValueError, match=f"gnd_roxford5k.pkl is refused: .*{named}") as caught:
        read_ground_truth(tmp_path / "gnd_roxford5k.pkl")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "caught").exists()
    # Through the command: one line, exit code 1.
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"retrieval": Retrieval}})
    monkeypatch.setattr(
        encoder, "open_weights", lambda *_, **__: Weights(Colors(), Preprocessing(), "dino", 0, [], Path())
    )
    assert cli.main(["eval", "retrieval", "none", str(tmp_path), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "is refused" in error
    assert error.count("\n") == 1


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "gnd_x.pkl"
    for content in (b"", b"\x80\x04", b"no pickle at all", pickle.dumps(np.arange(1000))[:-900]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"gnd_x.pkl is (damaged|refused)"):
            read_ground_truth(path)
    whole = pickle.dumps(ground_truth())
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"gnd_x.pkl is (damaged|refused)"):
            read_ground_truth(path)
    # Huge shapes reserve nothing.
    path.write_bytes(pickle.dumps(np.zeros(1, np.uint8), protocol=2).replace(b"K\x01\x85", b"J\xff\xff\xff\x7f\x85"))
    with pytest.raises(ValueError, match=r"gnd_x.pkl is damaged"):
        read_ground_truth(path)
    old = [{"ok": [1], "junk": []}]  # Not the revisited form.
    for content in ([1], {"gnd": old}, {"gnd": old, "imlist": ["a"], "qimlist": ["b"]}, {**ground_truth(3, 4)}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match="is no ground truth of revisited Oxford or Paris"):
            read_ground_truth(path)


def test_ground_truth_is_read(tmp_path):
    (tmp_path / "gnd_x.pkl").write_bytes(pickle.dumps(ground_truth(), protocol=2))
    truth = read_ground_truth(tmp_path / "gnd_x.pkl")
    assert truth.images == [f"db_{i}" for i in range(6)]
    assert truth.queries == ["query_0", "query_1"]
    assert truth.boxes == [(1.0, 2.0, 30.5, 20.0)] * 2
    assert {kind: mark.nonzero().tolist() for kind, mark in truth.marks.items()} == {
        "easy": [[0, 0], [1, 1]],
        "hard": [[0, 2], [1, 3]],
        "junk": [],
    }


# Both modes on generated images.


class Colors(torch.nn.Module):
    """Sees the mean colour, about grey; keeps the sizes it was shown."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        assert not self.training
        self.sizes.append(tuple(images.shape))
        patches = torch.nn.functional.avg_pool2d(images, 2).permute(0, 2, 3, 1)
        return Tokens(patches.mean((1, 2)), patches)


def color_weights(*_, **__):
    return Weights(Colors(), Preprocessing(), "dino", 0, [], Path())


def paint(path, color, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, quality=100)


RED, PINK, GREEN, LIME, BLUE, NAVY = (
    *((250, 0, 0), (250, 60, 60), (0, 250, 0)),
    *((60, 250, 60), (0, 0, 250), (40, 40, 250)),
)


@pytest.fixture
def oxford(tmp_path):
    """Queries red and green. Easy is nearest, then hard; both are found, unless the query is seen wrongly."""
    for i, color in enumerate((RED, GREEN, PINK, LIME, BLUE, NAVY)):
        paint(tmp_path / "jpg" / f"db_{i}.jpg", color, (40 + 4 * (i % 2), 30))
    for i, (inside, outside) in enumerate(((RED, BLUE), (GREEN, NAVY))):
        paint(tmp_path / "jpg" / f"query_{i}.jpg", outside, (60, 40))
        with Image.open(tmp_path / "jpg" / f"query_{i}.jpg") as image:
            image.paste(inside, (0, 0, 24, 40))
            image.save(tmp_path / "jpg" / f"query_{i}.jpg", quality=100)
    truth = ground_truth()
    for entry in truth["gnd"]:
        entry["bbx"] = [0, 0, 20, 40]
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    return tmp_path


def test_revisited_sets_through_the_command(oxford, monkeypatch, capsys):
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"retrieval": Retrieval}})
    monkeypatch.setattr(
        encoder, "open_weights", lambda *_, **__: Weights(Colors(), Preprocessing(), "dino", 0, [], Path())
    )
    arguments = ["eval", "retrieval", "none", str(oxford), "--device", "cpu", "--batch-size", "2"]
    assert cli.main([*arguments, "--crop-queries", "--multi-scale"]) == 0
    cropped = capsys.readouterr().out
    assert all(f"roxford5k_{p}_{m}" in cropped for p in PROTOCOLS for m in ("map", "mp1", "mp5", "mp10"))
    forward = ForwardOptions(device="cpu")
    options = RetrievalOptions(crop_queries=True, multi_scale=True)
    got = Retrieval("none", (str(oxford),), options=options, forward=forward).run()
    assert {value for name, value in got.items() if name != "settings"} == {100.0}
    assert got["settings"]["ground_truth"] == ["gnd_roxford5k.pkl"]
    assert got["settings"]["scales"] == [1.0, 0.7071, 0.5]
    # The whole query is mostly blue: blue and navy come first, and the easy image third.
    whole = Retrieval("none", (str(oxford),), forward=forward).run()
    assert (whole["settings"]["side"], whole["settings"]["scales"]) == (224, [1.0])
    assert whole["roxford5k_easy_map"] < 50
    assert whole["roxford5k_easy_mp1"] == 0


def test_images_are_shrunk_and_shown_at_three_scales(oxford):
    backbone = Colors()
    options = RetrievalOptions(side=20, multi_scale=True, crop_queries=True)
    run_revisited(Encoder(backbone, batch_size=8), oxford / "gnd_roxford5k.pkl", options)
    sizes = {shape[2:] for shape in backbone.sizes}
    # 40 x 30 pixels shrunk to 20 x 15, then by sqrt(2) and 2; the queries' 20 x 40 of 60 x 40 become 6 x 13.
    assert {(15, 20), (10, 14), (7, 10), (13, 6)} <= sizes
    assert max(map(max, sizes)) == 20
    one = Colors()
    run_revisited(Encoder(one), oxford / "gnd_roxford5k.pkl")
    assert {shape[2:] for shape in one.sizes} == {(30, 40), (30, 44), (40, 60)}


def test_missing_images_and_broken_ones_stop_the_protocol(oxford):
    (oxford / "jpg" / "db_3.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of the 6 images cannot be read, the first .*db_3\.jpg"):
        run_revisited(Encoder(Colors()), oxford / "gnd_roxford5k.pkl")
    (oxford / "jpg" / "db_3.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of the 6 images of roxford5k are missing, the first .*db_3\.jpg"):
        run_revisited(Encoder(Colors()), oxford / "gnd_roxford5k.pkl")


@pytest.fixture
def classes(tmp_path):
    for name, colors in {"red": (RED, PINK, (250, 30, 0)), "blue": (BLUE, NAVY), "green": (GREEN,)}.items():
        for i, color in enumerate(colors):
            paint(tmp_path / "data" / name / f"{i}.png", color, (30 + 2 * i, 40))
    (tmp_path / "data" / "blue" / "1b.png").write_bytes(b"no image")
    return tmp_path / "data"


def test_labelled_images_through_the_command(classes, monkeypatch, capsys, caplog):
    monkeypatch.setattr(
        encoder, "open_weights", lambda *_, **__: Weights(Colors(), Preprocessing(), "dino", 0, [], Path())
    )
    got = Retrieval("none", (str(classes),), forward=ForwardOptions(device="cpu")).run()
    assert {name: value for name, value in got.items() if name != "settings"} == {
        "retrieval_map": 100.0,
        "retrieval_class_map": 100.0,
        "retrieval_map/blue": 100.0,
        "retrieval_map/red": 100.0,
    }
    assert got["settings"] == {
        "weights": "none",
        "side": 224,
        "multi_scale": False,
        "scales": [1.0],
        "crop_queries": False,
        "whitening": None,
        "images": 7,
        "classes": ["blue", "green", "red"],
        "protocol": "each image against all others",
        "mean": [*IMAGENET_MEAN],
        "std": [*IMAGENET_STD],
        "precision": "float32",
    }
    assert "1 of 7 images cannot be read and are left out, the first" in caplog.text
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"retrieval": Retrieval}})
    assert cli.main(["eval", "retrieval", "none", str(classes), "--crop-queries"]) == 1
    assert "has no gnd_*.pkl" in capsys.readouterr().err


def test_images_of_many_sizes_come_in_order_whatever_the_batch(tmp_path):
    sizes = [(10 + 7 * i % 23, 10 + 5 * i % 19) for i in range(60)]
    for i, size in enumerate(sizes):
        paint(tmp_path / f"{i:02}.png", (4 * i, 200 - 3 * i, 90), size)

    parts = {}
    for batch_size in (1, 2, 64):
        backbone = Colors()
        shown = Encoder(backbone, batch_size=batch_size, progress=False)
        found = extract_descriptors(shown, open_source(tmp_path), shown.cls_tokens, lambda image, _: image)
        assert found.indices.tolist() == list(range(60))
        assert sum(shape[0] for shape in backbone.sizes) == 60
        assert max(shape[0] for shape in backbone.sizes) <= batch_size
        parts[batch_size] = found.features
    expected = torch.tensor([[4 * i, 200 - 3 * i, 90] for i in range(60)]) / 255
    expected = (expected - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    for features in parts.values():
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_whitening_from_the_database_or_another_set(classes, tmp_path):
    source = open_source(classes)
    for i in range(8):
        paint(tmp_path / "other" / f"{i}.png", (30 * i, 200 - 20 * i, 7 * i * i % 250))
    plain, own, other = (
        run(Encoder(Colors(), progress=False), source, whitening=whitening)
        for whitening in (None, "database", open_source(tmp_path / "other"))
    )
    assert plain["retrieval_map"] == 100
    assert 0 < own["retrieval_map"] <= 100
    assert 0 < other["retrieval_map"] <= 100


def test_a_real_backbone_of_any_kind(classes):
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    from dino.models.timm_backbone import TimmBackbone

    for backbone in (vit, TimmBackbone("test_resnet")):
        for options in (RetrievalOptions(), RetrievalOptions(multi_scale=True)):
            assert 0 < run(Encoder(backbone), open_source(classes), options)["retrieval_map"] <= 100
    with pytest.raises(ValueError, match=r"smaller than one patch .* try --no-multi-scale"):
        run(Encoder(vit), open_source(classes), RetrievalOptions(side=12, multi_scale=True))
    with pytest.raises(ValueError, match=r"smaller than one patch of 8 \(an image of 7 x 5 at scale 1: .*--side\)"):
        run(Encoder(vit), open_source(classes), RetrievalOptions(side=7))  # One scale: no other to leave away.


def test_images_that_cannot_be_searched_are_named(tmp_path):
    for i in range(2):
        paint(tmp_path / f"{i}.png", RED)
    with pytest.raises(ValueError, match="retrieval needs labels"):
        run(Encoder(Colors()), open_source(tmp_path))
    for name in ("a", "b"):
        paint(tmp_path / "single" / name / "x.png", RED)
    with pytest.raises(ValueError, match="no class has two images"):
        run(Encoder(Colors()), open_source(tmp_path / "single"))
    with pytest.raises(ValueError, match="--side 0 is not allowed: at least 1 pixel"):
        RetrievalOptions(side=0)


def test_the_command_imports_no_torch_until_it_runs():
    code = "import sys, dino.commands.retrieval, dino.commands.copy_detection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False).returncode == 0
