"""Label propagation: the reference's numbers, a plain nested-loop version, and the whole command."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import reference
from dino.commands import cli
from dino.commands.video_segmentation import VideoSegmentation
from dino.config import IMAGENET_STD, ModelConfig
from dino.data.davis import open_davis
from dino.encoder.encoder import Encoder
from dino.evaluation.propagation import propagate, propagate_labels, scaled_scores
from dino.evaluation.video_segmentation import RELEASED_STD, PatchColors, one_hot, run, segment
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import VideoSegmentationOptions

FACTS = reference.scalars("12_video")
ARRAYS = reference.arrays("12_video")
VIDEO = FACTS["video"]


@pytest.fixture(scope="module")
def features():
    """Of the reference's video, by the backbone it was made with, frame by frame."""
    spec = reference.scalars("01_vit")
    backbone = VisionTransformer(**spec["models"]["m1"])
    backbone.load_state_dict(load_file(reference.FOLDER / "01_vit_m1.safetensors"))
    return Encoder(backbone, std=RELEASED_STD).tokens(ARRAYS["frames_rgb"].permute(0, 3, 1, 2)).patch_tokens


def test_features_equal_the_reference(features):
    assert torch.allclose(torch.tensor(RELEASED_STD), torch.tensor(VIDEO["std"]))
    expected = ARRAYS["frame1_patch_features_every7"]
    assert (features[1].flatten(0, 1)[::7] - expected).abs().max() <= 3e-5


@pytest.mark.parametrize("variant", VIDEO["variants"])
def test_propagated_labels_equal_the_reference(features, variant):
    facts = VIDEO["variants"][variant]
    first = ARRAYS["first_label_onehot"][0].permute(1, 2, 0)
    truth = ARRAYS["ground_truth"][0].long()
    assert torch.equal(one_hot(truth, 4, *VIDEO["grid"]), first)
    unit = torch.nn.functional.normalize(features, dim=-1)
    soft = propagate_labels(
        iter(unit),
        first,
        n_last_frames=facts["n_last_frames"],
        radius=facts["size_mask_neighborhood"],
        topk=facts["topk"],
        temperature=VIDEO["temperature"],
    )
    wrong, frames = 0, 0
    for frame, labels in enumerate(soft):
        expected = ARRAYS[f"v/{variant}/soft"][frame].permute(1, 2, 0)
        assert (labels - expected).abs().max() <= 1e-5
        hard = scaled_scores(labels, VIDEO["patch"]).argmax(0)
        wrong += int((hard != ARRAYS[f"v/{variant}/hard"][frame + 1]).sum())
        frames += 1
    assert frames == 7
    assert wrong <= 10


def test_scaled_scores_equal_the_reference():
    got = scaled_scores(ARRAYS["norm_mask/low"][0].permute(1, 2, 0), 4)
    assert (got - ARRAYS["norm_mask/normed"]).abs().max() <= 1e-5
    assert torch.equal(got.argmax(0), ARRAYS["norm_mask/argmax"].long())


def test_an_object_that_is_nowhere_never_wins():
    soft = torch.zeros(2, 2, 2)
    soft[..., 0] = 1  # Background everywhere: nothing to scale.
    assert scaled_scores(soft, 3).argmax(0).sum() == 0


def nested_loops(target, sources, labels, radius, topk, temperature):
    """What ``propagate`` does, patch by patch."""
    f, h, w, _ = sources.shape
    out = torch.zeros(h, w, labels.shape[-1])
    for y, x in itertools.product(range(h), range(w)):
        found = []
        for frame, v, u in itertools.product(range(f), range(h), range(w)):
            if not radius or (abs(v - y) <= radius and abs(u - x) <= radius):
                found.append((float(target[y, x] @ sources[frame, v, u]), frame, v, u))
        best = sorted(found, reverse=True)[:topk]
        total = sum(math.exp(similar / temperature) for similar, *_ in best)
        for similar, frame, v, u in best:
            out[y, x] += math.exp(similar / temperature) / total * labels[frame, v, u]
    return out


@given(
    f=st.integers(1, 3),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    radius=st.integers(0, 7),
    topk=st.integers(1, 12),
    tile=st.sampled_from([(1, 1), (2, 3), (6, 18)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_propagation_equals_nested_loops_however_it_is_cut(f, h, w, radius, topk, tile, seed):
    random = torch.Generator().manual_seed(seed)
    target, sources = (
        torch.nn.functional.normalize(torch.randn(*shape, 4, generator=random), dim=-1) for shape in ((h, w), (f, h, w))
    )
    labels = torch.rand(f, h, w, 3, generator=random).softmax(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dino.evaluation.propagation._TILE", tile)
        got = propagate(target, sources, labels, radius=radius, topk=topk, temperature=0.2)
    assert torch.allclose(got, nested_loops(target, sources, labels, radius, topk, 0.2), atol=1e-5)
    assert torch.allclose(got.sum(-1), torch.ones(h, w), atol=1e-5)


def test_window_is_that_of_the_reference():
    # A target that is most similar to one patch takes its label exactly where the reference's mask lets it.
    allowed = ARRAYS["window_mask_h4_w6_r2"].bool()
    labels = torch.eye(24).view(1, 4, 6, 24)
    sources = torch.full((1, 4, 6, 1), -1.0)
    for source in range(24):
        sources.view(-1)[:] = -1
        sources.view(-1)[source] = 1
        got = propagate(torch.ones(4, 6, 1), sources, labels, radius=2, topk=1)[..., source].flatten()
        assert torch.equal(got == 1, allowed[:, source])


def test_only_the_first_frame_and_the_last_few_are_remembered():
    features = torch.eye(6).view(6, 1, 1, 6)  # Six frames of one patch each, no two alike.
    targets = [*features[:5], features[1]]  # The last looks like frame 1, which is four frames ago.
    first = torch.ones(1, 1, 1)
    labels_seen = {}
    for last in (3, 4):
        with pytest.MonkeyPatch.context() as patch:
            seen = []

            def spy(_, sources, labels, seen=seen, **__):
                seen.append({int(source.argmax()) for source in sources})
                return labels[0]

            patch.setattr("dino.evaluation.propagation.propagate", spy)
            list(propagate_labels(targets, first, n_last_frames=last))
        labels_seen[last] = seen
    assert labels_seen[3] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}, {0, 2, 3, 4}]
    assert labels_seen[4][-1] == {0, 1, 2, 3, 4}


def test_frames_are_taken_one_at_a_time():
    taken = []

    def frames():
        for i in range(5):
            taken.append(i)
            yield torch.zeros(3, 64, 64, dtype=torch.uint8)

    labels = torch.zeros(64, 64, dtype=torch.long)
    labels[:32] = 1
    masks = segment(Encoder(PatchColors()), frames(), labels, VideoSegmentationOptions(size=64))
    next(masks)
    assert taken == [0, 1]


def squares(i, height=96, width=128):
    """A frame with two squares that move, and its mask."""
    labels = np.zeros((height, width), np.uint8)
    labels[16 + 4 * i : 48 + 4 * i, 8:40] = 1
    labels[40:72, 64 + 4 * i : 96 + 4 * i] = 2
    return np.array([[90, 90, 90], [220, 40, 40], [40, 60, 220]], np.uint8)[labels], labels


@pytest.fixture
def davis(tmp_path):
    """Two small videos in the layout of DAVIS 2017, one of them upright."""
    root = tmp_path / "DAVIS"
    for name, turned in (("across", False), ("upright", True)):
        for i in range(6):
            frame, labels = squares(i)
            if turned:
                frame, labels = frame.transpose(1, 0, 2), labels.T
            for folder, array, kind in (("JPEGImages", frame, "jpg"), ("Annotations", labels, "png")):
                path = root / folder / "480p" / name / f"{i:05}.{kind}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.ascontiguousarray(array)).save(path, quality=95)
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("upright\nacross\n")
    return root


def test_moving_squares_are_followed_by_their_colours(davis, tmp_path):
    out = tmp_path / "out"
    encoder = Encoder(PatchColors(patch_size=8, cells=2), progress=False)
    results = run(encoder, open_davis(str(davis)), VideoSegmentationOptions(size=96, out=out))
    assert results["j_mean"] > 75
    assert results["upright/j_mean"] == pytest.approx(results["across/j_mean"], abs=8)
    assert results["j_and_f"] == pytest.approx((results["j_mean"] + results["f_mean"]) / 2)
    assert results["j_recall"] == 100
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert written == [f"{name}/{i:05}.png" for name in ("across", "upright") for i in range(6)]
    with Image.open(out / "across" / "00003.png") as image:
        assert (image.mode, image.size) == ("P", (128, 96))
        assert image.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
        drawn = np.asarray(image)
    assert set(np.unique(drawn)) == {0, 1, 2}
    truth = squares(3)[1]
    assert (drawn == truth).mean() > 0.9
    assert np.array_equal(np.asarray(Image.open(out / "across" / "00000.png")), squares(0)[1])


@pytest.mark.parametrize("std, seen", [(IMAGENET_STD, RELEASED_STD), ((0.5, 0.25, 0.2), (0.5, 0.25, 0.2))])
def test_frames_are_normalised_as_released_or_as_the_weights_say(davis, monkeypatch, std, seen):
    used = []

    def segment_and_note(encoder, *arguments):
        used.append((tuple(encoder.mean), tuple(encoder.std)))
        return segment(encoder, *arguments)

    monkeypatch.setattr("dino.evaluation.video_segmentation.segment", segment_and_note)
    encoder = Encoder(PatchColors(), mean=(0.4, 0.4, 0.4), std=std, progress=False)
    run(encoder, open_davis(str(davis), only=["across"]), VideoSegmentationOptions(size=64))
    assert used == [((0.4, 0.4, 0.4), seen)]
    assert encoder.std == std  # The caller's stays as it was.


def test_command_on_a_trained_file_and_on_colours(davis, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"video-segmentation": VideoSegmentation}})
    weights = tmp_path / "backbone.safetensors"
    save_backbone(VisionTransformer(32, 16, 3, 24, 1, 2), weights, ModelConfig(patch_size=16), 32)
    settings = ["--size", "128", "--topk", "3", "--json"]
    assert cli.main(["eval", "video-segmentation", str(weights), str(davis), *settings]) == 0
    network = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert cli.main(["eval", "video-segmentation", "colors", str(davis), *settings, "--year", "2016"]) == 0
    colors = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert network["settings"]["videos"] == 2
    assert network["settings"]["objects"] == 4
    assert colors["settings"]["objects"] == 2  # Merged.
    assert colors["settings"]["year"] == "2016"
    assert network["settings"]["topk"] == 3
    assert network["settings"]["std"] == [*RELEASED_STD]
    for results in (network, colors):
        assert {"j_and_f", "j_mean", "j_recall", "j_decay", "f_mean", "f_recall", "f_decay"} <= results.keys()
        assert 0 <= results["across/j_mean"] <= 100


def test_bad_input_is_named(davis):
    for option, value in {
        "n_last_frames": 0,
        "temperature": 0.0,
        "size": 32,
        "topk": 0,
        "size_mask_neighborhood": -1,
    }.items():
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} {value} is not allowed"):
            VideoSegmentationOptions(**{option: value})
    encoder = Encoder(PatchColors())
    with pytest.raises(ValueError, match="no video"):
        run(encoder, [])
    (davis / "Annotations" / "480p" / "across" / "00000.png").unlink()
    with pytest.raises(ValueError, match="across: its first frame has no mask"):
        run(encoder, open_davis(str(davis), only=["across"]))
    for path in (davis / "Annotations" / "480p" / "upright").glob("0000[1-4].png"):
        path.unlink()
    with pytest.raises(ValueError, match="upright: no frame between"):
        run(encoder, open_davis(str(davis), only=["upright"]), VideoSegmentationOptions(size=64))
