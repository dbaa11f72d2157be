"""``dino eval video-segmentation``."""

from dataclasses import dataclass
from typing import Any, Literal

import tyro

from dino.commands.shared import Device, WithWeights


@dataclass(frozen=True)
class VideoSegmentation(WithWeights):
    """Video object segmentation on DAVIS: the first masks, propagated by frozen features (table 5 of the paper).

    WEIGHTS may also be ``colors`` or ``colors8``: a baseline without a network, whose features are the colours of each
    patch of 16 (8) pixels.
    """

    data: tyro.conf.Positional[str]
    """Folder or .tar with the layout of DAVIS: JPEGImages/480p/VIDEO, Annotations/480p/VIDEO, perhaps ImageSets."""
    year: Literal["auto", "2016", "2017"] = "auto"
    """2017: each object its own, 2016: all are one; by that year's val list. auto: 2017 if there is its list."""
    videos: tuple[str, ...] = ()
    """Only these videos."""
    out: str | None = None
    """Folder for the masks, OUT/VIDEO/FRAME.png, with DAVIS's palette."""
    size: int = 480
    """Shorter side in pixels at which the backbone sees the frames; the longer one is cut to a multiple of 64."""
    n_last_frames: int = 7
    """Frames before the current one that it takes labels from, besides the first."""
    size_mask_neighborhood: int = 12
    """Labels come from patches at most this many rows and columns away; 0: from all."""
    topk: int = 5
    """Labels come from this many most similar patches."""
    temperature: float = 0.1
    """Of their weights exp(cosine / temperature)."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from pathlib import Path

        from dino.data.davis import open_davis
        from dino.evaluation import video_segmentation
        from dino.machine.device import choose_device

        device = choose_device(self.device)
        videos = open_davis(self.data, self.year, self.videos)
        without_network = {"colors": 16, "colors8": 8}.get(self.weights)
        results = video_segmentation.run(
            video_segmentation.Colors(without_network) if without_network else self.backbone(device),
            videos,
            size=self.size,
            n_last_frames=self.n_last_frames,
            radius=self.size_mask_neighborhood,
            topk=self.topk,
            temperature=self.temperature,
            out=Path(self.out) if self.out else None,
            device=device,
        )
        settings = {
            "videos": len(videos),
            "frames": sum(map(len, videos)),
            "objects": sum(video.objects for video in videos),
            "year": self.year,
            "objects_as_one": videos[0].one_object,
            "size": self.size,
            "n_last_frames": self.n_last_frames,
            "size_mask_neighborhood": self.size_mask_neighborhood,
            "topk": self.topk,
            "temperature": self.temperature,
        }
        return {**results, "settings": settings}
