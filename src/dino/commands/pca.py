"""``dino pca``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Forward, WithWeights
from dino.options import ForwardOptions

_SHOWN = 24


@dataclass(frozen=True)
class Pca(WithWeights):
    """Shows patch tokens as colours: three principal components as red, green and blue, one basis for all images.

    Writes NAME_pca.png for each image, with --foreground also NAME_foreground.png (white on black), and pca.png, a
    sheet of the first 24. The patch tokens of all images are kept in memory: 1.8 MB for 640 x 480 pixels and ViT-S/16.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images, folders or tar archives of images, patterns."""
    _: KW_ONLY
    out: Path
    """Folder for the pictures; those of images in subfolders go to subfolders."""
    size: int | None = None
    """Shorter side in pixels at which images are seen; without: as they are, shrunk to 854 x 480 pixels in all."""
    foreground: bool = False
    """Colour the foreground only, found by the first component."""
    forward: Forward = ForwardOptions()

    def run(self) -> dict[str, Any]:
        from PIL import Image

        from dino.machine.progress import tracked
        from dino.pictures.inputs import check_size, fitted_images
        from dino.pictures.pca import patch_colors, pca_picture, pca_sheet

        check_size(self.size)
        encoder = self.open(self.forward)
        stems, sizes, tokens, shown, broken = [], [], [], [], {}
        for given, image in tracked(fitted_images(self.data, encoder, self.size, broken), "images"):
            tokens.append(encoder.tokens(image[None]).patch_tokens[0].cpu())
            stems.append(given.stem)
            sizes.append((image.shape[1], image.shape[2]))
            if len(shown) < _SHOWN:
                shown.append(image / 255)

        colors = patch_colors(tokens, self.foreground)
        for stem, size, found in zip(stems, sizes, colors, strict=True):
            target = self.out / stem
            target.parent.mkdir(parents=True, exist_ok=True)
            pca_picture(found.rgb, size).save(target.with_name(f"{target.name}_pca.png"))
            if self.foreground:
                mask = Image.fromarray(found.foreground.numpy()).resize(size[::-1], Image.Resampling.NEAREST)
                mask.convert("L").save(target.with_name(f"{target.name}_foreground.png"))
        names = [Path(stem).name for stem in stems[:_SHOWN]]
        pca_sheet(shown, colors[:_SHOWN], foreground=self.foreground, captions=names).save(self.out / "pca.png")
        results = {"images": len(stems), "broken": len(broken), "out": str(self.out)}
        return self.report(results, encoder, self.forward, size=self.size, foreground=self.foreground)
