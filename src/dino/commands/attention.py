"""``dino attention``."""

import os
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dino.commands.shared import Forward, WithWeights
from dino.options import ForwardOptions

if TYPE_CHECKING:
    from torch import Tensor

    from dino.encoder.encoder import Encoder


@dataclass(frozen=True)
class Attention(WithWeights):
    """Shows what the [CLS] token, or a chosen patch, attends to in the last block (figures 1 and 3 of the paper).

    For each image NAME.jpg: NAME_attention.png (everything on one sheet), NAME_mean.png (mean over heads),
    NAME_overlay.png (over the image), NAME_mask.png (white: the patches that hold --share of the attention), and
    NAME_head0.png, NAME_head0_mask.png, ... for each head. For each video: NAME_attention.mp4 (frame, mean, overlay,
    mask) and NAME_heads.mp4, in one colour scale from the first frame to the last.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images, folders or tar archives of images, patterns; videos (with PyAV) and animated GIFs."""
    _: KW_ONLY
    out: Path
    """Folder for the pictures; those of images in subfolders go to subfolders."""
    size: int | None = None
    """Shorter side in pixels at which images are seen; without: as they are, shrunk to 854 x 480 pixels in all."""
    share: float = 0.6
    """Share of the attention that masks hold."""
    query: tuple[int, int] | None = None
    """X Y in pixels of the image: show what the patch there attends to, instead of the [CLS] token."""
    fps: float | None = None
    """Frames a second of the videos written; without: as read. A folder given with it is the frames of one video."""
    video: Literal["mp4", "gif", "png"] = "mp4"
    """What videos are written as; png: a folder of numbered frames."""
    batch_size: int = 4
    """Frames of a video in one forward pass."""
    forward: Forward = ForwardOptions()

    def run(self) -> dict[str, Any]:
        from dino.pictures.inputs import check_size
        from dino.pictures.video import is_video

        if not 0 < self.share < 1:
            raise ValueError(f"--share {self.share} is not allowed: between 0 and 1, both excluded")
        check_size(self.size)
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise ValueError(f"--fps {self.fps} is not allowed: a number above 0")
        encoder = self.open(self.forward, batch_size=self.batch_size)
        images, frames, broken = [], 0, {}
        for path in self.data:
            if is_video(path) or (self.fps and os.path.isdir(path)):
                frames += self._video(encoder, path)
            else:
                images.append(path)
        results = {
            "images": self._images(encoder, images, broken) if images or not self.data else 0,
            "frames": frames,
            "broken": len(broken),
            "out": str(self.out),
        }
        return self.report(results, encoder, self.forward, size=self.size, share=self.share, query=self.query)

    @property
    def _title(self) -> str:
        of = "the [CLS] token" if self.query is None else f"the patch at {self.query[0]}, {self.query[1]}"
        return f"Self-attention of {of}, last block"

    def _images(self, encoder: "Encoder", paths: list[str], broken: dict[str, str]) -> int:
        from dino.machine.progress import tracked
        from dino.pictures.attention import attention_pictures
        from dino.pictures.inputs import fitted_images, patch_at

        count, patch = 0, encoder.patch_size
        for given, image in tracked(fitted_images(paths, encoder, self.size, broken), "images"):
            token = None if self.query is None else patch_at(self.query, given.image, patch, self.size, given.name)
            attention = encoder.attention(image[None], token)[0]
            pictures = attention_pictures(image / 255, attention, share=self.share, query=token, title=self._title)
            target = self.out / given.stem
            target.parent.mkdir(parents=True, exist_ok=True)
            for name, picture in pictures.items():
                picture.save(target.with_name(f"{target.name}_{name}.png"))
            count += 1
        return count

    def _video(self, encoder: "Encoder", path: str) -> int:
        from dino.pictures.attention_video import attention_video
        from dino.pictures.inputs import read_images
        from dino.pictures.video import frame_rate, read_frames

        def frames_of_folder() -> "Iterator[Tensor]":
            return (given.image for given in read_images([path]))

        is_folder = Path(path).is_dir()
        fps = self.fps or frame_rate(path)
        return attention_video(
            encoder,
            frames_of_folder if is_folder else lambda: read_frames(path),
            self.out / (Path(path).resolve().name if is_folder else Path(path).stem),
            fps=fps,
            suffix="" if self.video == "png" else f".{self.video}",
            size=self.size,
            query=self.query,
            share=self.share,
        )
