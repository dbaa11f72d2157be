"""``dino pca``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Device, WithWeights

_SHOWN = 24


@dataclass(frozen=True)
class Pca(WithWeights):
    """Shows patch tokens as colours: three principal components as red, green and blue, one basis for all images.

    Writes NAME_pca.png for each image, with --foreground also NAME_foreground.png (white on black), and pca.png, a
    sheet of the first 24. The patch tokens of all images are kept in memory: 1.8 MB for 640 x 480 pixels and ViT-S/16.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images, folders or tar archives of images, patterns."""
    out: Path
    """Folder for the pictures; those of images in subfolders go to subfolders."""
    size: int | None = None
    """Shorter side in pixels at which images are seen; without: as they are, shrunk to 854 x 480 pixels in all."""
    foreground: bool = False
    """Colour the foreground only, found by the first component."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from PIL import Image

        from dino.encoder.features import frozen
        from dino.machine.device import choose_device
        from dino.machine.progress import tracked
        from dino.pictures.inputs import check_size, fit, normalized, read_images
        from dino.pictures.pca import patch_colors, pca_picture, pca_sheet

        check_size(self.size)
        device = choose_device(self.device)
        backbone = self.backbone(device)
        patch = int(backbone.patch_size)  # pyright: ignore[reportArgumentType]
        stems, sizes, tokens, shown, broken = [], [], [], [], {}
        for given in tracked(read_images(self.data, broken), "images"):
            image = fit(given.image, patch, self.size, name=given.name)
            with frozen(backbone, device):
                tokens.append(backbone(normalized(image[None], device)).patch_tokens[0].float().cpu())
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
        return {
            "images": len(stems),
            "broken": len(broken),
            "out": str(self.out),
            "settings": {"weights": self.weights, "size": self.size, "foreground": self.foreground},
        }
