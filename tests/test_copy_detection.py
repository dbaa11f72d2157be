"""Copy detection: the reference's numbers, and a small set laid out as Copydays through the command."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import reference
from dino.commands import cli
from dino.commands.copy_detection import CopyDetection
from dino.config import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dino.data.sources import open_source
from dino.encoder import encoder
from dino.encoder.encoder import Encoder
from dino.encoder.sizes import resized
from dino.evaluation.copy_detection import TOP, copy_descriptor, find_blocks, match, run, score_copies
from dino.evaluation.ranking import learn_whitening, ranked_tiles, whiten
from dino.models.backbone import Tokens
from dino.models.timm_backbone import TimmBackbone
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import Weights
from dino.options import CopyDetectionOptions, ForwardOptions

FACTS, VITS = reference.scalars("11_copydays"), reference.scalars("01_vit")


def arrays_of(scenario):
    prefix = scenario["id"] + "/"
    return {k.removeprefix(prefix): a for k, a in reference.arrays("11_copydays").items() if k.startswith(prefix)}


@pytest.mark.parametrize("mode", ["plain", "whitened"])
@pytest.mark.parametrize("scenario", FACTS["scenarios"], ids=lambda scenario: scenario["id"])
def test_the_whole_scenario_equals_the_reference(scenario, mode):
    arrays = arrays_of(scenario)
    blocks = {name: arrays[name.replace("/", "_")] for name in scenario["blocks"]}
    database = torch.cat([arrays["original"], arrays["distractors"]])
    queries = torch.cat([*blocks.values()])
    if mode == "plain":
        database, queries = (torch.nn.functional.normalize(f, dim=1) for f in (database, queries))
    else:
        learnt = learn_whitening(arrays["whitening_features"])
        database, queries = whiten(database, learnt), whiten(queries, learnt)
    assert (queries @ database.T - arrays[f"{mode}/similarity"]).abs().max() <= 1e-5
    order = torch.cat([order for _, order in ranked_tiles(queries, database, entries=700)])
    assert scenario["topk"] == TOP
    assert torch.equal(order[:, :TOP], arrays[f"{mode}/top20"].long())

    stems = {"original": scenario["original_names"], "strong": scenario["strong_names"]}
    stems = {name: [file.removesuffix(".jpg") for file in files] for name, files in stems.items()}
    assert scenario["block_sizes"] == [len(block) for block in blocks.values()]
    for name, part in zip(blocks, queries.split(scenario["block_sizes"]), strict=True):
        positives = match(name, stems.get(name, stems["original"]), stems["original"])
        if name == "strong":
            assert (positives.sum(1) > 1).sum() == scenario["n_strong_with_several_positives"]
        positives = torch.nn.functional.pad(positives, (0, len(arrays["distractors"])))
        aps = score_copies(part, database, positives)
        expected = arrays[f"{mode}/aps_{name.replace('/', '_')}"]
        torch.testing.assert_close(aps, expected, atol=1e-9, rtol=0)
        assert aps.mean().item() == pytest.approx(scenario["results"][mode]["mAP"][name], abs=1e-9)
        uncut = score_copies(part, database, positives, top=None)
        assert (uncut >= aps - 1e-12).all()  # What is found later only adds.
        assert (uncut > 0).all()


def test_gem_of_tokens_equals_the_reference():
    arrays, facts = reference.arrays("11_copydays"), FACTS["gem_tokens"]
    tokens = arrays["gem_tokens/tokens"]
    got = copy_descriptor(tokens[:, 0], tokens[:, 1:].unflatten(1, (facts["h"], facts["w"])))
    assert (got - arrays["gem_tokens/descriptor"]).abs().max() <= 2e-6


def eight_bit(height, width, s):
    x = reference.waves((1, 3, height, width), s, VITS["formula"])[0]
    return (127.5 + 90 * x).floor().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("case", FACTS["gem"], ids=lambda case: case["key"])
def test_descriptors_equal_the_reference(case):
    model = VisionTransformer(**VITS["models"][case["model"]])
    model.load_state_dict(load_file(reference.FOLDER / f"01_vit_{case['model']}.safetensors"))
    assert (tuple(case["mean"]), tuple(case["std"])) == (IMAGENET_MEAN, IMAGENET_STD)
    side = case["imsize"]
    images = [resized(eight_bit(*image["hw"], image["s"]), side, side) for image in case["images"]]
    got = copy_descriptor(*Encoder(model, mean=case["mean"], std=case["std"]).tokens(torch.stack(images)))
    assert (got - reference.arrays("11_copydays")[case["key"]]).abs().max() <= 2e-5


def test_the_ranking_is_cut_after_20():
    database = torch.nn.functional.normalize(torch.stack([torch.ones(30), torch.arange(30.0)], 1), dim=1)
    positives = torch.zeros(1, 30, dtype=torch.bool)
    for place, (cut, uncut) in {0: (1, 1), 19: (1 / 40, 1 / 40), 20: (0, 1 / 42)}.items():
        positives.zero_()[0, place] = True
        query = torch.tensor([[1.0, 0.0]])  # The database comes in its own order.
        assert score_copies(query, database, positives).item() == pytest.approx(cut)
        assert score_copies(query, database, positives, top=None).item() == pytest.approx(uncut)


def test_strong_copies_are_matched_by_four_letters_and_the_rest_by_name():
    originals = ["200000", "200001", "201000"]
    assert match("strong", ["2000_s1", "2010_s1"], originals).int().tolist() == [[1, 1, 0], [0, 0, 1]]
    assert match("crops/10", ["200001"], originals).int().tolist() == [[0, 1, 0]]
    with pytest.raises(ValueError, match=r"1 images of strong have no original of their name, the first 2099_s1"):
        match("strong", ["2010_s1", "2099_s1"], originals)
    with pytest.raises(ValueError, match=r"crops/10 have no original"):
        match("crops/10", ["2000"], originals)


class Colors(torch.nn.Module):
    def forward(self, images):
        patches = torch.nn.functional.avg_pool2d(images, 10).permute(0, 2, 3, 1)
        return Tokens(patches.mean((1, 2)), patches)


def color_weights(*_, **__):
    return Weights(Colors(), Preprocessing(), "dino", 0, [], Path())


def copydays(folder, jpeg="jpegqual"):
    """Six originals of one colour each in groups of two, and what was made from them."""
    generator = np.random.default_rng(0)
    for i in range(6):
        name, color = f"20{i // 2}0{i % 2:02}", tuple(map(int, generator.integers(0, 255, 3)))
        image = Image.new("RGB", (60, 40), color)
        made = {
            f"original/{name}": image,
            f"strong/20{i // 2}0_s{i % 2}": image.resize((33, 47)),
            f"crops/10/{name}": image.crop((5, 5, 50, 30)),
            f"crops/9/{name}": image,
            f"{jpeg}/3/{name}": image,
        }
        for path, version in made.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            version.save(folder / f"{path}.jpg", quality=3 if "jpeg" in path else 100)
    return folder


@pytest.fixture
def sets(tmp_path):
    """Copydays, distractors, and images to learn whitening from."""
    generator = np.random.default_rng(1)
    for folder, count in (("distractors", 30), ("whitening", 20)):
        for i in range(count):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(
                tmp_path / folder / f"{i}.png"
            )
    return copydays(tmp_path / "copydays"), tmp_path / "distractors", tmp_path / "whitening"


BLOCKS = ["original", "strong", "jpegqual/3", "crops/9", "crops/10"]


def test_copydays_through_the_command(sets, monkeypatch, capsys):
    folder, distractors, whitening = sets
    monkeypatch.setattr(cli, "COMMANDS", {"eval": {"copy-detection": CopyDetection}})
    monkeypatch.setattr(
        encoder, "open_weights", lambda *_, **__: Weights(Colors(), Preprocessing(), "dino", 0, [], Path())
    )
    arguments = ["eval", "copy-detection", "none", str(folder), "--device", "cpu", "--side", "40"]
    more = ["--distractors", str(distractors), "--whitening", str(whitening), "--json"]
    assert cli.main([*arguments, *more]) == 0
    assert '"copydays_crops/10_map_uncut"' in capsys.readouterr().out.splitlines()[-1]
    shown = {"options": CopyDetectionOptions(side=40), "forward": ForwardOptions(device="cpu")}
    got = CopyDetection("none", folder, distractors=(str(distractors),), **shown).run()
    assert [name for name in got if name != "settings"] == [
        f"copydays_{block}_map{suffix}" for block in BLOCKS for suffix in ("", "_uncut")
    ]
    assert got["copydays_original_map"] == got["copydays_crops/10_map"] == 100
    assert 0 < got["copydays_strong_map"] <= got["copydays_strong_map_uncut"] < 100  # Two originals for every query.
    assert got["settings"] == {
        "weights": "none",
        "parts": BLOCKS,
        "distractors": 30,
        "whitening_images": 0,
        "side": 40,
        "top": 20,
        "mean": [*IMAGENET_MEAN],
        "std": [*IMAGENET_STD],
        "precision": "float32",
    }


def test_distractors_and_whitening_change_what_they_should(sets):
    folder, distractors, whitening = sets
    plain, among, whitened = (
        run(Encoder(Colors(), progress=False), folder, CopyDetectionOptions(side=40), **more)
        for more in (
            {},
            {"distractors": open_source(distractors)},
            {"distractors": open_source(distractors), "whitening": open_source(whitening)},
        )
    )
    # Copies of the originals themselves among the distractors: never nearer than the original, but as near.
    strong = open_source(folder / "strong")
    harder = run(Encoder(Colors(), progress=False), folder, CopyDetectionOptions(side=40), distractors=strong)
    assert plain["copydays_original_map"] == whitened["copydays_original_map"] == 100
    assert among["copydays_strong_map_uncut"] <= plain["copydays_strong_map_uncut"]
    assert harder["copydays_strong_map_uncut"] < plain["copydays_strong_map_uncut"]
    assert whitened != among


def test_images_are_squeezed_to_a_square(sets):
    backbone, shapes = Colors(), []
    backbone.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    run(Encoder(backbone, batch_size=4), sets[0], CopyDetectionOptions(side=30))
    assert {tuple(shape) for shape in shapes} == {(4, 3, 30, 30), (2, 3, 30, 30)}


def test_any_backbone_with_patches(sets):
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=3)
    for backbone in (vit, TimmBackbone("test_resnet")):
        got = run(Encoder(backbone), sets[0], CopyDetectionOptions(side=32), whitening=open_source(sets[2]))
        assert got["copydays_original_map"] == 100


def test_layouts_are_found_and_bad_ones_named(tmp_path):
    folder = copydays(tmp_path / "a", jpeg="jpeg")
    assert list(find_blocks(folder)) == [block.replace("jpegqual", "jpeg") for block in BLOCKS]
    (folder / "jpeg" / "3").rename(folder / "flat")
    (folder / "jpeg").rmdir()
    (folder / "flat").rename(folder / "jpeg")  # Images in it, no degrees.
    assert "copydays_jpeg_map" in run(Encoder(Colors()), folder, CopyDetectionOptions(side=40))
    with pytest.raises(ValueError, match=r"not laid out as Copydays: it has no known part"):
        find_blocks(folder / "strong")
    (folder / "strong" / "2000_s0.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1 of the 6 images cannot be read, the first .*2000_s0\.jpg"):
        run(Encoder(Colors()), folder, CopyDetectionOptions(side=40))
    with pytest.raises(ValueError, match="--side 0 is not allowed: at least 1 pixel"):
        CopyDetectionOptions(side=0)
