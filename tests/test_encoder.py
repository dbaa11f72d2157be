"""The encoder: images shown as torchvision shows them, weights that bring how, and one number wherever it is asked."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import dino
import tiny
from dino.commands import cli
from dino.config import replace
from dino.data.sources import open_source
from dino.encoder.encoder import Encoder, open_encoder
from dino.encoder.sizes import center_crop, resized
from dino.models.backbone import Backbone, Tokens
from dino.run.pretrain import pretrain

SHARED = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample-100.tar"


def torchvision_says(image: Image.Image, resize: int, size: int) -> torch.Tensor:
    show = v2.Compose([v2.Resize(resize, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size), v2.PILToTensor()])
    return show(image)


def checkerboard(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([(x + y) % 2 * 255, x % 2 * 255, y % 3 * 127], -1).astype(np.uint8))


@pytest.mark.parametrize("width, height", [(3000, 2000), (1280, 256), (256, 1281), (37, 64), (224, 224)])
@pytest.mark.parametrize("resize, size", [(256, 224), (73, 64), (1024, 896)])
def test_images_are_shown_as_torchvision_shows_them(width, height, resize, size):
    image = checkerboard(width, height)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(center_crop(resize, size)(pixels), torchvision_says(image, resize, size))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared ImageNet originals are not here")
def test_imagenet_originals_are_shown_as_torchvision_shows_them():
    source = open_source(SHARED)
    encoder = Encoder(Mean(), batch_size=10)
    shown = torch.cat([images for images, _ in encoder.batches(source, {})])
    with tarfile.open(SHARED) as archive:
        for i, image in enumerate(shown):
            name = source.name(i).removeprefix(f"{SHARED}/")
            content = archive.extractfile(next(m for m in archive.getmembers() if m.name.endswith(name))).read()
            expected = torchvision_says(Image.open(io.BytesIO(content)).convert("RGB"), 256, 224)
            assert (image.int() - expected.int()).abs().max() <= 1
    assert len(shown) == 100


def test_channels_are_resized_alone_and_together_the_same():
    pixels = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    alone = torch.cat([resized(channel[None], 20, 31) for channel in pixels])
    assert torch.equal(resized(pixels, 20, 31), alone)
    assert resized(torch.zeros(5, 50, 70, dtype=torch.uint8), 20, 31).shape == (5, 20, 31)


class Mean(Backbone):
    """Sees the mean colour; counts whether it was called as a frozen network should be."""

    embed_dim, patch_size = 3, 8

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        return Tokens(images.mean((2, 3)) * self.scale, torch.zeros(len(images), 2, 2, 3))


def test_what_comes_out_is_normalised_frozen_and_can_be_used():
    encoder = Encoder(Mean().train(), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 0.2))
    images = torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    tokens = encoder.tokens(images).cls_token
    assert torch.allclose(tokens, torch.tensor([1.0, 3.0, 5.0]).expand(2, 3))
    assert torch.allclose(encoder.tokens(images / 255).cls_token, tokens)
    assert encoder.backbone.training
    # No inference tensors: what is learnt on top of frozen features has gradients.
    weight = torch.ones(3, requires_grad=True)
    (tokens @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    "options, words",
    [
        ({"size": 0}, "--crop 0"),
        ({"size": 64, "resize": 32}, "--resize 32 --crop 64"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
        ({"mean": (0.5, 0.5)}, "3 channels"),
        ({"batch_size": 0}, "--batch-size 0"),
    ],
)
def test_settings_out_of_range_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Encoder(Mean(), **options)


def test_a_module_of_the_callers_own_needs_nothing_but_forward():
    class Plain(torch.nn.Module):
        def forward(self, images):
            return Tokens(images.mean((2, 3)), images.permute(0, 2, 3, 1))

    encoder = open_encoder(Plain(), size=8)
    found = encoder.features(open_source("shapes:20x16"))
    assert found.features.shape == (20, 3)
    assert torch.allclose(found.features.norm(dim=1), torch.ones(20))
    with pytest.raises(ValueError, match="Plain has no attention maps"):
        encoder.attention(torch.zeros(1, 3, 16, 16))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a mean, a deviation and a size of its own."""
    out = tmp_path_factory.mktemp("run")
    own = {"crops__mean": (0.3, 0.4, 0.5), "crops__std": (0.2, 0.1, 0.3), "crops__global_size": 24}
    config = replace(tiny.CONFIG, **own, data__canvas=40, model__backbone="vit_nano", optim__length="2 steps")
    data = open_source("shapes:60x40")
    results = pretrain(data.part("train"), out, config, val=data.part("val"), quiet=True)
    return out, config, results


def test_the_same_weights_give_the_same_number_everywhere(run, capsys):
    out, config, results = run
    top1 = {name: value for name, value in results.items() if name.startswith("knn")}
    assert top1
    for weights in (out, out / "backbone.safetensors", next((out / "checkpoints").iterdir())):
        assert dino.evaluate.knn(weights, "shapes:60x40") == top1
    assert cli.main(["eval", "knn", str(out), "shapes:60x40", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: told[name] for name in top1} == top1
    assert told["settings"]["mean"] == list(config.crops.mean)
    assert told["settings"]["crop"] == 24
    # Shown otherwise, the same weights give other features: the settings matter.
    other = open_encoder(out, mean=(0.485, 0.456, 0.406))
    image = open_source("shapes:60x40").load(0)[None]
    assert not torch.allclose(other.cls_tokens(image), open_encoder(out).cls_tokens(image))


def test_an_encoder_of_an_encoder_changes_only_what_is_given(run):
    encoder = open_encoder(run[0])
    assert open_encoder(encoder, size=48).settings == {**encoder.settings, "crop": 48, "resize": 54}
    assert open_encoder(encoder, resize=100).settings == {**encoder.settings, "resize": 100}
    with pytest.raises(TypeError, match="no option sice"):
        open_encoder(encoder, sice=3)


def test_in_a_notebook_import_dino_is_enough(run):
    code = """
import dino, sys
assert "torch" not in sys.modules
encode = dino.encoder(sys.argv[1])
image = dino.open_source("shapes:20x40").load(3)
pictures = [
    dino.pictures.show_attention(encode, image, size=48),
    dino.pictures.show_pca(encode, [image, image]),
    dino.pictures.show_correspondence(encode, image, image),
    dino.pictures.show_neighbors(encode, "shapes:20x40", [0, 7], k=3),
    dino.pictures.show_crops(image),
]
assert all(picture.width > 100 for picture in pictures)
assert callable(dino.pretrain) and callable(dino.encoder) and dino.load(sys.argv[1]).embed_dim
print(sorted(dino.evaluate.__all__)[0], encode.features(dino.open_source("shapes:20x40")).features.shape[0])
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(run[0])], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["attention_segmentation", "20"]


def test_a_pyramid_is_the_last_blocks_as_maps(run):
    encoder = open_encoder(run[0])
    images = open_source("shapes:20x40").load(0)[None]
    maps = encoder.pyramid(images, 2)
    assert [tuple(one.shape) for one in maps] == [(1, 128, 5, 5)] * 2
    assert torch.allclose(maps[-1].permute(0, 2, 3, 1), encoder.tokens(images).patch_tokens, atol=1e-5)
