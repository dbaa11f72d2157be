"""``dino eval video-segmentation``."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any, Literal

import tyro

from dino.commands.shared import Flat, Forward, WithWeights
from dino.options import ForwardOptions, VideoSegmentationOptions


@dataclass(frozen=True)
class VideoSegmentation(WithWeights):
    """Video object segmentation on DAVIS: the first masks, propagated by frozen features (table 5 of the paper).

    WEIGHTS may also be ``colors`` or ``colors8``: a baseline without a network, whose features are the colours of each
    patch of 16 (8) pixels.
    """

    data: tyro.conf.Positional[str]
    """Folder or .tar with the layout of DAVIS: JPEGImages/480p/VIDEO, Annotations/480p/VIDEO, perhaps ImageSets."""
    _: KW_ONLY
    year: Literal["auto", "2016", "2017"] = "auto"
    """2017: each object its own, 2016: all are one; by that year's val list. auto: 2017 if there is its list."""
    videos: tuple[str, ...] = ()
    """Only these videos."""
    options: Annotated[VideoSegmentationOptions, Flat] = VideoSegmentationOptions()
    forward: Forward = ForwardOptions()

    def run(self) -> dict[str, Any]:
        from dino.data.davis import open_davis
        from dino.encoder.encoder import open_encoder
        from dino.evaluation import video_segmentation

        videos = open_davis(self.data, self.year, self.videos)
        if without_network := {"colors": 16, "colors8": 8}.get(self.weights):
            colors = video_segmentation.PatchColors(without_network)
            encoder = open_encoder(colors, device=self.forward.device)
        else:
            encoder = self.open(self.forward)
        encoder = video_segmentation.as_released(encoder)  # What the results will quote.
        return self.report(
            video_segmentation.run(encoder, videos, self.options),
            encoder,
            self.options,
            self.forward,
            videos=len(videos),
            frames=sum(map(len, videos)),
            objects=sum(video.objects for video in videos),
            year=self.year,
            objects_as_one=videos[0].one_object,
        )
