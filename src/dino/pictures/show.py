"""One picture in one call, for notebooks: images or DATA in, a PIL image out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor, nn

from dino.augment.multicrop import MultiCrop
from dino.config import Config, CropConfig
from dino.data.decode import Canvas
from dino.data.sources import Source, open_source
from dino.encoder.encoder import Encoder, open_encoder
from dino.encoder.neighbors import nearest_neighbors
from dino.machine.randomness import generator
from dino.pictures.attention import head_sheet
from dino.pictures.correspond import correspondence_picture, mutual_nearest, spread
from dino.pictures.crops import crop_sheet
from dino.pictures.inputs import fit, patch_at, read_images
from dino.pictures.neighbors import neighbor_sheet, without_self
from dino.pictures.pca import patch_colors, pca_sheet

Weights = str | Path | nn.Module | Encoder
Picture = str | Path | Image.Image | Tensor


def show_attention(
    weights: Weights,
    image: Picture,
    *,
    size: int | None = None,
    share: float = 0.6,
    query: tuple[int, int] | None = None,
) -> Image.Image:
    """What the [CLS] token, or the patch at the pixel ``query`` (x, y), attends to, for every head (figures 1 and 3).

    ``size``: shorter side in pixels at which the image is seen; without, as it is, shrunk to 854 x 480 pixels in all.

    Raises:
        ValueError: the image cannot be read or is smaller than a patch, or the backbone has no attention to show.
    """
    encoder, whole = open_encoder(weights), _pixels(image)
    fitted = fit(whole, encoder.patch_size, size)
    token = None if query is None else patch_at(query, whole, encoder.patch_size, size)
    return head_sheet(fitted / 255, encoder.attention(fitted[None], token)[0], share=share, query=token)


def show_pca(
    weights: Weights, images: Sequence[Picture], *, size: int | None = None, foreground: bool = False
) -> Image.Image:
    """Patch tokens as colours: their first three principal components, one basis for all images.

    Raises:
        ValueError: an image cannot be read or is smaller than a patch.
    """
    encoder = open_encoder(weights)
    fitted = [fit(_pixels(image), encoder.patch_size, size) for image in images]
    tokens = [encoder.tokens(image[None]).patch_tokens[0].cpu() for image in fitted]
    return pca_sheet([image / 255 for image in fitted], patch_colors(tokens, foreground), foreground=foreground)


def show_correspondence(
    weights: Weights, first: Picture, second: Picture, *, count: int = 20, size: int | None = None
) -> Image.Image:
    """The ``count`` most similar pairs of patches of two images that are each other's nearest neighbour.

    Raises:
        ValueError: an image cannot be read or is smaller than a patch.
    """
    encoder = open_encoder(weights)
    images = [fit(_pixels(image), encoder.patch_size, size) for image in (first, second)]
    tokens = [encoder.tokens(image[None]).patch_tokens[0] for image in images]
    chosen = spread(mutual_nearest(*tokens), count, (tokens[0].shape[0], tokens[0].shape[1]))
    return correspondence_picture(images[0] / 255, images[1] / 255, chosen, encoder.patch_size)


def show_neighbors(
    weights: Weights, data: str | Path | Sequence[str | Path] | Source, queries: Sequence[int], *, k: int = 8
) -> Image.Image:
    """The ``k`` images of DATA that are nearest to each of some of them, by the cosine of their features.

    ``queries``: numbers of images of DATA, from 0.

    Raises:
        ValueError: no image can be read.
    """
    source = data if isinstance(data, Source) else open_source(data)
    bank = open_encoder(weights).features(source)
    rows = torch.searchsorted(bank.indices, torch.tensor(queries))
    similarities, found = nearest_neighbors(bank.features[rows], bank.features, k + 1)
    similarities, found = without_self(similarities, bank.indices[found], list(queries), k)

    def named(i: int) -> str:
        return "" if source.labels is None else source.classes[source.labels[i]]

    return neighbor_sheet(
        [source.load(i) / 255 for i in queries],
        [[source.load(i) / 255 for i in row] for row in found.tolist()],
        similarities,
        query_classes=[named(i) for i in queries],
        neighbor_classes=[[named(i) for i in row] for row in found.tolist()],
        names=[Path(source.name(i)).name for i in queries],
    )


def show_crops(image: Picture, config: Config | CropConfig = CropConfig(), *, seed: int = 0) -> Image.Image:
    """The global and local crops that training would see of an image, and where they come from (section 3.1).

    Raises:
        ValueError: the image cannot be read.
    """
    crops = config.crops if isinstance(config, Config) else config
    pixels = _pixels(image)
    sizes = torch.tensor([pixels.shape[1:]])
    multicrop = MultiCrop(crops)
    draws = multicrop.sample(sizes, generator(seed, "picture"))
    drawn = multicrop.apply(Canvas(pixels[None], sizes), draws)
    both = drawn.global_crops[0], drawn.local_crops[0]
    return crop_sheet(pixels / 255, draws.boxes[0], *both, mean=crops.mean, std=crops.std)


def _pixels(image: Picture) -> UInt8[Tensor, "c h w"]:
    if isinstance(image, Tensor):
        return image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    return next(read_images([str(image)])).image
