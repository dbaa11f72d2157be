"""Videos: what is written can be read, one colour scale and no flicker, and memory does not grow with the length."""

import struct
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from dino.commands.attention import Attention
from dino.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from dino.encoder.encoder import Encoder
from dino.models.vision_transformer import VisionTransformer
from dino.models.weights import save_backbone
from dino.options import ForwardOptions
from dino.pictures import attention_video as module
from dino.pictures.attention_video import attention_video
from dino.pictures.sheet import colorize
from dino.pictures.video import frame_rate, is_video, read_frames, writing

CPU = ForwardOptions(device="cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)
    save_backbone(backbone, path, ModelConfig("vit_tiny", patch_size=8), 32)
    return str(path)


def solid(*color, size=(40, 24)):
    return Image.new("RGB", size, color)


def drawn(i, size=(40, 24)):
    """A frame with soft colours (which video codecs keep), another for every i."""
    y, x = np.mgrid[: size[1], : size[0]]
    channels = [
        127 + 100 * np.sin(0.1 * x + i),
        127 + 100 * np.cos(0.12 * y - 0.5 * i),
        127 + 90 * np.sin(0.05 * (x + y) + 2 * i),
    ]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def write(path, frames, fps=10.0):
    with writing(path, fps) as add:
        for frame in frames:
            add(frame)
    return str(path)


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Alive:
    """How many of the objects that were shown to it live, and how many there were at most."""

    def __init__(self):
        self.count = self.most = 0

    def add(self, thing):
        weakref.finalize(thing, self._gone)
        self.count += 1
        self.most = max(self.most, self.count)
        return thing

    def _gone(self):
        self.count -= 1


class Bright(torch.nn.Module):
    """Attention is the brightness of a patch: one head as it is, the other half of it."""

    patch_size = 8

    def get_last_selfattention(self, images, queries):
        assert queries == slice(0, 1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        images = images * std + mean
        row = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1) + 0.01
        return torch.nn.functional.pad(torch.stack([row, row / 2], 1), (1, 0))[:, :, None]


def bright_frame(*patches):
    """A black frame of 2 x 3 patches, with brightness i of 255 in some of them."""
    frame = torch.zeros(3, 16, 24, dtype=torch.uint8)
    for (row, column), value in patches:
        frame[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = value
    return frame


def mean_panel(path):
    """The map of the mean in an overview of frames of 24 x 16 pixels: the upper right of four."""
    page = np.array(Image.open(path))
    times = 9  # Small frames are enlarged.
    return page[26 : 26 + 16 * times : times, 26 + 24 * times + 13 : 26 + 2 * 24 * times + 13 : times]


def pictures(out, name="attention"):
    return sorted((out.parent / f"{out.name}_{name}").glob("*.png"))


# Reading and writing.


def test_mp4_comes_back(tmp_path):
    pytest.importorskip("av")
    frames = [drawn(i, (41, 23)) for i in range(7)]  # Odd sides: padded to even ones.
    path = write(tmp_path / "a.mp4", frames, fps=12.5)
    assert is_video(path)
    assert frame_rate(path) == 12.5
    back = list(read_frames(path))
    assert [frame.shape for frame in back] == [(3, 24, 42)] * 7
    for frame, original in zip(back, frames, strict=True):
        assert (frame[:, :23, :41].float() - tensor(original)).abs().mean() < 6
        assert frame[:, 23].float().mean() > 200  # White.


def test_colours_of_an_mp4_are_those_that_were_written(tmp_path):
    pytest.importorskip("av")
    colors = [(252, 255, 164), (187, 55, 84), (20, 10, 60), (255, 255, 255)]
    back = read_frames(write(tmp_path / "a.mp4", [solid(*color) for color in colors]))
    for frame, color in zip(back, colors, strict=True):
        assert (frame.float().mean((1, 2)) - torch.tensor(color)).abs().max() <= 4


def test_a_phone_video_is_turned_upright(tmp_path):
    pytest.importorskip("av")
    frame = solid(0, 0, 0)
    frame.paste((255, 255, 255), (0, 0, 16, 8))
    path = tmp_path / "a.mp4"
    write(path, [frame] * 3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # Of the track header: where a quarter turn clockwise is noted.
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(data))
    shown = next(iter(read_frames(path))).float().mean(0)
    assert shown.shape == (40, 24)
    assert shown[:14, 18:].mean() > 200  # Top left became top right.
    assert shown[:, :14].mean() < 20


def test_gif_comes_back_and_takes_its_time(tmp_path):
    frames = [drawn(i) for i in range(6)]
    path = write(tmp_path / "a.gif", frames, fps=24)
    assert is_video(path)
    back = list(read_frames(path))
    assert len(back) == 6
    for frame, original in zip(back, frames, strict=True):
        assert (frame.float() - tensor(original)).abs().mean() < 8
    with Image.open(path) as image:
        delays = []
        for i in range(6):
            image.seek(i)
            delays.append(image.info["duration"])
        assert image.info["loop"] == 0
    assert sum(delays) == 250
    solid(1, 2, 3).save(tmp_path / "still.gif")
    assert not is_video(tmp_path / "still.gif")


def test_gif_keeps_the_colours_of_the_map_whatever_else_is_in_the_frame(tmp_path):
    heat = (255 * colorize(torch.linspace(0, 1, 40).expand(8, 40))).byte().permute(1, 2, 0).numpy()
    frames = []
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 256, (160, 200, 3), dtype=np.uint8)
        frames.append(Image.fromarray(noise))
        frames[-1].paste(Image.fromarray(heat), (0, 8))
    strips = [frame[:, 8:16, :40].int() for frame in read_frames(write(tmp_path / "a.gif", frames))]
    for strip in strips:
        assert (strip - strips[0]).abs().max() <= 8
        assert (strip.permute(1, 2, 0) - torch.from_numpy(heat).int()).abs().max() <= 8


def test_a_video_that_could_not_be_finished_is_removed(tmp_path):
    with pytest.raises(RuntimeError), writing(tmp_path / "a.gif", 10) as add:  # noqa: PT012
        add(solid(1, 2, 3))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"written as .mp4, .gif"), writing(tmp_path / "a.avi", 10):
        pass


@pytest.mark.parametrize("name", ["a.gif", "frames"])
def test_writing_keeps_no_frame(tmp_path, name):
    alive = Alive()
    with writing(tmp_path / name, 10) as add:
        for i in range(60):
            add(alive.add(drawn(i)))
    assert alive.most <= 2


# Attention.


def test_one_colour_scale_for_the_whole_video(tmp_path):
    """The same attention has the same colour, however strong the rest of its frame is."""
    dim, strong = bright_frame(((0, 0), 100)), bright_frame(((0, 0), 100), ((1, 2), 250))
    frames = [dim, strong, dim, strong, strong]
    attention_video(Encoder(Bright(), batch_size=2), lambda: frames, tmp_path / "v", fps=10, suffix="")
    panels = [mean_panel(path) for path in pictures(tmp_path / "v")]
    assert len(panels) == 5
    top = tuple(panels[1][12, 20])
    assert top == tuple((255 * colorize(torch.tensor([[0.0, 1.0]]))).round().byte()[:, 0, 1].tolist())
    for panel in panels:
        assert (panel[4, 4] == panels[0][4, 4]).all()
        assert (panel[4, 20] == panels[0][4, 20]).all()
    assert tuple(panels[0][4, 4]) != top  # Else each frame would have a scale of its own.


def test_a_frame_looks_the_same_twice_and_whatever_stands_beside_it(weights, tmp_path):
    a, b, c = (drawn(i) for i in (0, 3, 7))
    for name, frames in (("one", [a, b, a, c]), ("two", [c, a, b, a])):
        for i, frame in enumerate(frames):
            (tmp_path / name).mkdir(exist_ok=True)
            frame.save(tmp_path / name / f"{i}.png")
        Attention(weights, (str(tmp_path / name),), out=tmp_path, fps=5.0, video="png", batch_size=3, forward=CPU).run()
    for kind in ("attention", "heads"):
        one, two = ([np.array(Image.open(p)).astype(int) for p in pictures(tmp_path / n, kind)] for n in ("one", "two"))
        assert len(one) == len(two) == 4
        # One step of the colour map, which rounding may make between two batches.
        for i, j in ((0, 1), (1, 2), (2, 3), (3, 0)):
            assert np.abs(one[i] - two[j]).max() <= 8
        assert np.abs(one[0] - one[2]).max() <= 8
        assert np.abs(one[0] - one[1]).max() > 20


def test_a_single_flash_does_not_darken_the_rest(tmp_path):
    calm, flash = bright_frame(((0, 0), 50)), bright_frame(((0, 0), 255))
    frames = [calm] * 40 + [flash]
    attention_video(Encoder(Bright(), batch_size=16), lambda: frames, tmp_path / "v", fps=10, suffix="")
    assert mean_panel(pictures(tmp_path / "v")[0])[4, 4].sum() > 500  # The bright end of the map.


def test_memory_does_not_grow_with_the_video(tmp_path, monkeypatch):
    """Of a long video no more frames, maps or pages are alive than a batch of them."""
    tensors, pages = Alive(), Alive()

    def read():
        for i in range(100):
            yield tensors.add(bright_frame(((0, i % 3), 100 + i % 50)))

    overview = module.overview

    def counted(image, mean, *arguments, **options):
        tensors.add(image), tensors.add(mean)
        return pages.add(overview(image, mean, *arguments, **options))

    monkeypatch.setattr(module, "overview", counted)
    assert attention_video(Encoder(Bright(), batch_size=4), read, tmp_path / "v", fps=10, suffix=".gif") == 100
    assert sum(1 for _ in read_frames(tmp_path / "v_attention.gif")) == 100
    assert tensors.most <= 12
    assert pages.most <= 2


@pytest.mark.parametrize("kind", ["mp4", "gif", "png"])
def test_a_video_of_any_size_becomes_two(weights, tmp_path, kind):
    if kind == "mp4":
        pytest.importorskip("av")
    suffix = "" if kind == "png" else f".{kind}"
    path = write(
        tmp_path / ("in.gif" if kind == "png" else f"in.{kind}"), [drawn(i, (50, 38)) for i in range(5)], fps=10
    )
    command = Attention(weights, (path,), out=tmp_path / "out", video=kind, query=(49, 37), forward=CPU)
    assert command.run()["frames"] == 5
    outputs = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert outputs == [f"in_attention{suffix}", f"in_heads{suffix}"]
    if kind == "png":
        assert len(pictures(tmp_path / "out" / "in")) == 5
        return
    for name in outputs:
        shown = list(read_frames(tmp_path / "out" / name))
        assert len(shown) == 5
        assert shown[0].shape[2] > 2 * 48
        assert frame_rate(tmp_path / "out" / name) == pytest.approx(10)


def test_portrait_videos_stand_in_one_row(tmp_path):
    frames = [torch.zeros(3, 64, 16, dtype=torch.uint8)]
    attention_video(Encoder(Bright()), lambda: frames, tmp_path / "v", fps=10, suffix="")
    page = Image.open(pictures(tmp_path / "v")[0])
    assert page.height < 2 * 256  # Four times enlarged.
    assert page.width > 4 * 64


def test_bad_videos_are_named(weights, tmp_path, monkeypatch):
    def run(path, **options):
        Attention(weights, (str(path),), out=tmp_path / "out", forward=CPU, **options).run()

    good = write(tmp_path / "good.gif", [drawn(i) for i in range(3)])
    with pytest.raises(ValueError, match="--query 40 0 lies outside"):
        run(good, query=(40, 0))
    with pytest.raises(ValueError, match="--fps 0"):
        run(good, fps=0.0)
    folder = tmp_path / "mixed"
    write(folder, [solid(1, 2, 3)])
    solid(1, 2, 3, size=(32, 24)).save(folder / "1.png")
    with pytest.raises(ValueError, match="frame 1 has 24 x 32 pixels, the first 24 x 40"):
        run(folder, fps=5.0)
    assert not list((tmp_path / "out").glob("*"))

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'dino-ssl\[video\]'"):
        run(tmp_path / "a.mp4")
    monkeypatch.undo()
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=r"a.mp4 does not exist"):
        run(tmp_path / "a.mp4")
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"a.mp4 cannot be read as a video"):
        run(tmp_path / "a.mp4")
