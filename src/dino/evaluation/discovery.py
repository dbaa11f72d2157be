"""One object of an image, found without any label: LOST and TokenCut on the patch features of a frozen backbone.

Sources: Siméoni et al. 2021 (LOST, arXiv 2109.14279, section 3), Wang et al. 2022 (TokenCut, arXiv 2202.11539,
section 3). Both compare the keys of the last block of a DINO ViT and mark one connected region of patches.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torchvision.ops import box_iou

from dino.data.masks import boxes_around
from dino.encoder.encoder import Encoder
from dino.encoder.sizes import batches_of_one_size, whole_patches
from dino.evaluation.boundary import dilate
from dino.options import DiscoveryOptions


def lost(features: Float[Tensor, "h w d"], k: int = 100) -> Bool[Tensor, "h w"]:
    """The patches that correlate with the seed and its like: LOST.

    The seed is the patch with the fewest positive correlations: objects are smaller than the background. Of the ``k``
    patches with the fewest, those that correlate with the seed positively join it. The region is where the correlations
    with all of them have a positive sum, as far as it is connected with the seed.
    """
    h, w, _ = features.shape
    flat = features.flatten(0, 1)
    correlations = flat @ flat.mT  # (h w, h w)
    fewest = (correlations >= 0).sum(1).argsort(stable=True)[:k]
    seed = int(fewest[0])
    seeds = fewest[correlations[seed, fewest] >= 0]
    return component((correlations[:, seeds].sum(1) >= 0).view(h, w).cpu(), divmod(seed, w))


def tokencut(features: Float[Tensor, "h w d"], threshold: float = 0.2) -> Bool[Tensor, "h w"]:
    """The smaller side of a normalised cut through the graph of patches: TokenCut.

    Patches whose cosine is at least ``threshold`` are joined by 1, others by 1e-5. The eigenvector of the second
    smallest eigenvalue of (D - E) x = lambda D x, cut at its mean, gives two sides. The object is on that of the entry
    with the largest absolute value; of it, the region connected with that patch.
    """
    h, w, _ = features.shape
    unit = F.normalize(features.flatten(0, 1), dim=1)
    graph = torch.where(unit @ unit.mT >= threshold, 1.0, 1e-5)
    graph = graph.cpu() if graph.device.type == "mps" else graph  # Which has no float64.
    degree = graph.double().sum(1).rsqrt()
    # With x = D^-1/2 z, z is the eigenvector of the second largest eigenvalue of D^-1/2 E D^-1/2.
    eigenvector = degree * torch.linalg.eigh(degree[:, None] * graph * degree).eigenvectors[:, -2]
    seed = int(eigenvector.abs().argmax())
    above = eigenvector > eigenvector.mean()
    return component((above == above[seed]).view(h, w).cpu(), divmod(seed, w))


def component(mask: Bool[Tensor, "h w"], seed: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The part of a mask that is connected with the seed (row, column), over the four sides of patches.

    >>> component(torch.tensor([[True, False, True], [True, False, True]]), (0, 2)).int().tolist()
    [[0, 0, 1], [0, 0, 1]]
    """
    reached = torch.zeros_like(mask)
    reached[seed] = True
    while True:
        grown = dilate(reached, 1) & mask | reached
        if torch.equal(grown, reached):
            return reached
        reached = grown


def run(
    encoder: Encoder,
    samples: Iterable[tuple[Float[Tensor, "c _ _"], Int64[Tensor, "_ 4"]]],
    options: DiscoveryOptions = DiscoveryOptions(),
) -> dict[str, float]:
    """CorLoc: in which share of the images the one predicted box overlaps some true box by an IoU of at least 0.5.

    ``samples``: images (values from 0 to 1, of any sizes) with boxes (top, left, bottom, right in pixels); a stream.
    They are seen at full size; what does not fill a patch is cut off. Images without a box are passed over.

    Returns ``{"corloc_lost": per cent, "corloc_tokencut": ..., "corloc_whole_image": ...}``, the last of the box around
    everything.

    Raises:
        ValueError: no image has a box, or an image is smaller than a patch.
    """
    patch = encoder.patch_size
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "lost": lambda keys: lost(keys, options.k),
        "tokencut": lambda keys: tokencut(keys, options.threshold),
        "whole_image": lambda keys: torch.ones(keys.shape[:2], dtype=torch.bool),
    }
    hits: dict[str, list[bool]] = {name: [] for name in methods}

    def seen() -> Iterator[tuple[Tensor, Tensor]]:
        for image, boxes in samples:
            if len(boxes):
                yield whole_patches(image, patch), boxes

    for images, of_images in batches_of_one_size(seen(), encoder.batch_size):
        for keys, boxes in zip(encoder.keys(images), of_images, strict=True):
            for name, method in methods.items():
                box = patch * boxes_around(method(keys).long())
                hits[name].append(bool(box_iou(box.double(), boxes.double()).max() >= 0.5))
    if not hits["lost"]:
        raise ValueError("no image has a box around an object")
    return {f"corloc_{name}": 100 * sum(found) / len(found) for name, found in hits.items()}
