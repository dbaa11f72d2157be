"""``dino correspond``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Device, WithWeights


@dataclass(frozen=True)
class Correspond(WithWeights):
    """Draws which patches of two images correspond: mutual nearest neighbours of patch tokens, spread out."""

    first: tyro.conf.Positional[str]
    """An image."""
    second: tyro.conf.Positional[str]
    """Another image."""
    out: Path
    """The picture (.png)."""
    count: int = 20
    """Pairs drawn, the most similar ones."""
    size: int | None = None
    """Shorter side in pixels at which images are seen; without: as they are, shrunk to 854 x 480 pixels in all."""
    device: Device = "auto"
    """Where the backbone runs."""
    json: bool = False
    """End with one JSON object on stdout."""

    def run(self) -> dict[str, Any]:
        from dino.encoder.features import frozen
        from dino.machine.device import choose_device
        from dino.pictures.correspond import correspondence_picture, mutual_nearest, spread
        from dino.pictures.inputs import check_picture, check_size, fit, normalized, read_images

        check_size(self.size)
        check_picture(self.out)
        if self.count < 1:
            raise ValueError(f"--count {self.count} is not allowed: at least 1 pair")
        device = choose_device(self.device)
        backbone = self.backbone(device)
        patch = int(backbone.patch_size)  # pyright: ignore[reportArgumentType]
        images, tokens = [], []
        for path in (self.first, self.second):
            given = next(read_images([path]))
            image = fit(given.image, patch, self.size, name=given.name)
            images.append(image / 255)
            with frozen(backbone, device):
                tokens.append(backbone(normalized(image[None], device)).patch_tokens[0].float())
        matches = mutual_nearest(tokens[0], tokens[1])
        chosen = spread(matches, self.count, (tokens[0].shape[0], tokens[0].shape[1]))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"Corresponding patches: {Path(self.first).stem}, {Path(self.second).stem}"
        correspondence_picture(images[0], images[1], chosen, patch, title=title).save(self.out)
        return {
            "pairs": len(chosen.first),
            "mutual_pairs": len(matches.first),
            "mean_similarity": chosen.similarities.mean().item(),
            "out": str(self.out),
            "settings": {"weights": self.weights, "size": self.size, "count": self.count},
        }
