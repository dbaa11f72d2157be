"""Video object segmentation by propagating the first frame's masks along nearest neighbours (section 4.2.2, table 5).

The protocol of Jabri et al. 2020 (arXiv 2006.14613) as DINO runs it on DAVIS: no training, only frozen patch tokens.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from dino.config import IMAGENET_STD
from dino.data.annotated import stem
from dino.data.davis import Video, frame_size, resize_bilinear, resize_labels, write_mask
from dino.encoder.encoder import Encoder, open_encoder
from dino.evaluation.boundary import boundary_f, statistics
from dino.evaluation.metrics import jaccard
from dino.evaluation.propagation import propagate_labels, scaled_scores
from dino.machine.progress import ahead, tracked
from dino.models.backbone import Backbone, Tokens
from dino.options import VideoSegmentationOptions

RELEASED_STD = (0.228, 0.224, 0.225)  # Of the released evaluation on videos: the first is not ImageNet's 0.229.


def one_hot(labels: Int64[Tensor, "height width"], count: int, h: int, w: int) -> Float[Tensor, "{h} {w} {count}"]:
    """The mask of the first frame at the size of the patch grid (nearest neighbour), void counted as background."""
    small = resize_labels(labels.clamp_min(0).to(torch.uint8), h, w)
    return F.one_hot(small.long(), count).float()


class PatchColors(Backbone):
    """The baseline without a network: the features of a patch are its colours, averaged over 4 x 4 cells."""

    def __init__(self, patch_size: int = 16, cells: int = 4):
        super().__init__()
        self.patch_size, self.cells, self.embed_dim = patch_size, cells, 3 * cells**2

    def forward(self, images: Float[Tensor, "b c height width"]) -> Tokens:
        patches = F.pixel_unshuffle(F.avg_pool2d(images, self.patch_size // self.cells), self.cells)
        return Tokens(patches.mean((2, 3)), patches.permute(0, 2, 3, 1))


def as_released(encoder: Encoder) -> Encoder:
    """The encoder with the deviation of the released evaluation on videos, where its own is ImageNet's."""
    return open_encoder(encoder, std=RELEASED_STD) if tuple(encoder.std) == IMAGENET_STD else encoder


def segment(
    encoder: Encoder,
    frames: Iterable[UInt8[Tensor, "3 height width"]],
    first_labels: Int64[Tensor, "height width"],
    options: VideoSegmentationOptions = VideoSegmentationOptions(),
) -> Iterator[UInt8[Tensor, "height width"]]:
    """The masks of a video's frames from the second on, at the frames' own size, given those of the first."""
    patch = encoder.patch_size
    full = (first_labels.shape[0], first_labels.shape[1])
    height, width = frame_size(*full, options.size, patch)

    def patch_features() -> Iterator[Tensor]:
        for frame in frames:
            tokens = encoder.tokens(resize_bilinear(frame.to(encoder.device), height, width)[None]).patch_tokens[0]
            yield F.normalize(tokens, dim=-1)

    objects = int(first_labels.max())
    first = one_hot(first_labels, objects + 1, height // patch, width // patch).to(encoder.device)
    for soft in propagate_labels(
        patch_features(),
        first,
        n_last_frames=options.n_last_frames,
        radius=options.size_mask_neighborhood,
        topk=options.topk,
        temperature=options.temperature,
    ):
        labels = scaled_scores(soft, patch).argmax(0).to(torch.uint8).cpu()
        yield resize_labels(labels, *full)


def score(
    predicted: UInt8[Tensor, "h w"], true: Int64[Tensor, "h w"], objects: int
) -> tuple[Float[Tensor, "{objects}"], Float[Tensor, "{objects}"]]:
    """Region similarity J and contour accuracy F of each object, 0 to 1. Void is background, as in DAVIS 2017."""
    number = torch.arange(1, objects + 1)[:, None, None]
    masks, true_masks = predicted == number, true == number
    return jaccard(masks, true_masks, torch.float64), boundary_f(masks, true_masks)


def summarize(j: Sequence[Float[Tensor, "_ _"]], f: Sequence[Float[Tensor, "_ _"]]) -> dict[str, float]:
    """J&F, and mean, recall and decay of J and of F, in per cent; every object of every video counts the same.

    Of each video a table (objects, frames), without the first and the last frame.
    """
    results = {}
    for name, tables in (("j", j), ("f", f)):
        of_videos = [statistics(table) for table in tables]
        for kind in ("mean", "recall", "decay"):
            values = torch.cat([getattr(of_video, kind) for of_video in of_videos])
            results[f"{name}_{kind}"] = 100 * values.mean().item()
    return {"j_and_f": (results["j_mean"] + results["f_mean"]) / 2, **results}


def run(
    encoder: Encoder, videos: Sequence[Video], options: VideoSegmentationOptions = VideoSegmentationOptions()
) -> dict[str, float]:
    """Segments every video from its first masks and scores all frames but the first and the last (table 5).

    Returns what ``summarize`` gives, first of each video (``"libby/j_mean"``), then of all objects. ``out``: writes
    ``VIDEO/FRAME.png`` there, as DAVIS's own evaluation reads them.

    Raises:
        ValueError: no videos, or a video has no object in its first frame or no mask between
            the first and the last frame.
    """
    if not videos:
        raise ValueError("there is no video to segment")

    encoder = as_released(encoder)
    out = options.out
    results: dict[str, float] = {}
    j: list[Tensor] = []
    f: list[Tensor] = []
    for video in videos:
        if not (objects := video.objects):
            raise ValueError(f"video {video.name}: its first frame has no mask with an object to propagate")
        first = video.labels(0)
        if out:
            write_mask(out / video.name / f"{stem(video.frames[0].key)}.png", first.clamp_min(0).to(torch.uint8))
        frames = tracked(ahead(video.frame, range(len(video)), 1), video.name, len(video), encoder.progress)
        masks = segment(encoder, frames, first, options)
        scores = []
        for i, predicted in enumerate(masks, start=1):
            if out:
                write_mask(out / video.name / f"{stem(video.frames[i].key)}.png", predicted)
            if i < len(video) - 1 and video.masks[i]:
                scores.append(torch.stack(score(predicted, video.labels(i), objects)))
        if not scores:
            raise ValueError(f"video {video.name}: no frame between the first and the last has a mask to compare with")
        table = torch.stack(scores, -1)  # (2, objects, frames)
        j.append(table[0])
        f.append(table[1])
        results |= {f"{video.name}/{name}": value for name, value in summarize(j[-1:], f[-1:]).items()}
    return results | summarize(j, f)
