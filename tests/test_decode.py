"""decode: every kind of file people have gives upright 8-bit RGB, and broken ones say why."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dino.data import decode as module
from dino.data.decode import BrokenImage, Canvas, decode, image_size, to_canvas

RNG = np.random.default_rng(0)
SMOOTH = np.stack(np.meshgrid(np.linspace(0, 255, 40), np.linspace(255, 0, 30), indexing="xy"), -1)
RGB = Image.fromarray(np.concatenate([SMOOTH, 128 + 0 * SMOOTH[..., :1]], -1).astype(np.uint8))  # 40 wide, 30 high


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_come_back_exactly(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert torch.equal(decode(encode(RGB, kind, **options)), as_tensor(RGB))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_equals_pillow(mode):
    data = encode(RGB.convert(mode), "JPEG", quality=90)
    assert torch.equal(decode(data), as_tensor(Image.open(io.BytesIO(data))))


def test_jpeg_without_torchvisions_decoder(monkeypatch):
    data = encode(RGB, "JPEG")
    fast = decode(data)
    monkeypatch.setattr(module, "decode_jpeg", None)
    assert torch.equal(decode(data), fast)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("max_side", [None, 20])
def test_exif_orientation_is_applied(kind, orientation, max_side):
    """Corner colours tell where the image's top-left went: worked by hand from the EXIF table."""
    corners = Image.new("RGB", (40, 20), (255, 255, 255))
    corners.paste((255, 0, 0), (0, 0, 12, 8))  # The stored top-left is red.
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encode(corners, kind, exif=exif), max_side)
    tall = orientation >= 5
    long, short = (40, 20) if max_side is None else (20, 10)
    assert image.shape == ((3, long, short) if tall else (3, short, long))
    red = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}[orientation]
    assert image[1][red] < 90
    others = {(0, 0), (0, -1), (-1, 0), (-1, -1)} - {red}
    assert all(image[1][corner] > 200 for corner in others)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_uses_its_full_range(kind):
    values = np.array([[0, 257, 65535], [128 * 257, 200 * 257 + 100, 1000]], np.uint16)
    image = decode(encode(Image.fromarray(values), kind))
    assert image[0].tolist() == [[0, 1, 255], [128, 200, 4]]
    assert torch.equal(image[0], image[2])


def test_float_pixels_without_a_range_are_stretched():
    values = np.array([[-2.0, 0.0, 2.0, np.nan]], np.float32)
    assert decode(encode(Image.fromarray(values), "TIFF"))[0].tolist() == [[0, 128, 255, 0]]


def test_alpha_and_palette_give_their_colours_without_a_warning():
    clear = RGB.copy()
    clear.putalpha(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(decode(encode(clear, "PNG")), as_tensor(RGB))
        palette = RGB.quantize(16)
        assert torch.equal(decode(encode(palette, "PNG", transparency=bytes(range(16)))), as_tensor(palette))
        grey = decode(encode(RGB.convert("1"), "PNG"))
    assert set(grey.unique().tolist()) == {0, 255}


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(data)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "kind, mode", [("JPEG", "RGB"), ("JPEG", "L"), *(("PNG", m) for m in ("RGB", "L", "P", "I;16", "RGBA"))]
)
def test_shrinks_to_the_longest_side(kind, mode):
    wide = RGB.resize((400, 100), Image.Resampling.BICUBIC)
    image = (
        Image.fromarray(np.asarray(wide.convert("L")).astype(np.uint16) * 257) if mode == "I;16" else wide.convert(mode)
    )
    data = encode(image, kind)
    small = decode(data, 64)
    assert small.shape == (3, 16, 64)
    assert image_size(data, 64) == (16, 64)
    full = torch.nn.functional.interpolate(decode(data)[None].float(), (16, 64), mode="bicubic", antialias=True)[0]
    assert (small - full).abs().mean() < 3
    assert torch.equal(decode(data, 400), decode(data))


def test_shrinking_does_not_alias():
    noise = Image.fromarray(RNG.integers(0, 2, (512, 512, 3), dtype=np.uint8) * 255)
    assert decode(encode(noise, "PNG"), 32).float().std() < 12  # Picking every 16th pixel would give 127.


def test_one_pixel_wide():
    assert decode(encode(Image.new("RGB", (1, 300)), "JPEG"), 50).shape == (3, 50, 1)
    assert image_size(encode(Image.new("RGB", (1, 300)), "JPEG"), 50) == (50, 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"this is text",
        encode(RGB, "JPEG")[:400],
        encode(RGB, "PNG")[:-40],
        encode(RGB, "JPEG")[:20],
        b"\xff\xd8\xff" * 9,
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "JPEG header only", "JPEG of nonsense"],
)
def test_broken_images_say_why_in_one_line(data):
    with pytest.raises(BrokenImage) as error:
        decode(data, 32)
    assert str(error.value).strip()
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    """Half a kilobyte that says it is 30,000 x 30,000; Pillow's own limit is the limit, and stays as it is."""
    rows = zlib.compress(bytes(3751), 9)
    header = struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(BrokenImage, match=r"more than 178,956,970 pixels .*cut it into tiles"):
        decode(data, 512)
    assert before == Image.MAX_IMAGE_PIXELS == 89478485


def test_canvas_holds_each_image_top_left():
    images = [torch.full((3, 2, 5), 7, dtype=torch.uint8), torch.full((3, 4, 1), 9, dtype=torch.uint8)]
    canvas = to_canvas(images, 4, 6)
    assert isinstance(canvas.to("cpu"), Canvas)
    assert canvas.pixels.shape == (2, 3, 4, 6)
    for pixels, (height, width), image in zip(*canvas, images, strict=True):
        assert torch.equal(pixels[:, :height, :width], image)
    assert canvas.pixels.sum() == 3 * (10 * 7 + 4 * 9)
    assert to_canvas([], 4, 6).sizes.shape == (0, 2)
