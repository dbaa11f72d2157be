"""``dino correspond``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import tyro

from dino.commands.shared import Forward, WithWeights
from dino.options import ForwardOptions


@dataclass(frozen=True)
class Correspond(WithWeights):
    """Draws which patches of two images correspond: mutual nearest neighbours of patch tokens, spread out."""

    first: tyro.conf.Positional[str]
    """An image."""
    second: tyro.conf.Positional[str]
    """Another image."""
    _: KW_ONLY
    out: Path
    """The picture (.png)."""
    count: int = 20
    """Pairs drawn, the most similar ones."""
    size: int | None = None
    """Shorter side in pixels at which images are seen; without: as they are, shrunk to 854 x 480 pixels in all."""
    forward: Forward = ForwardOptions()

    def run(self) -> dict[str, Any]:
        from dino.pictures.correspond import correspondence_picture, mutual_nearest, spread
        from dino.pictures.inputs import check_picture, check_size, fitted_images

        check_size(self.size)
        check_picture(self.out)
        if self.count < 1:
            raise ValueError(f"--count {self.count} is not allowed: at least 1 pair")
        encoder = self.open(self.forward)
        images, tokens = [], []
        for path in (self.first, self.second):
            _, image = next(fitted_images([path], encoder, self.size, {}))
            images.append(image / 255)
            tokens.append(encoder.tokens(image[None]).patch_tokens[0])
        matches = mutual_nearest(tokens[0], tokens[1])
        chosen = spread(matches, self.count, (tokens[0].shape[0], tokens[0].shape[1]))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        title = f"Corresponding patches: {Path(self.first).stem}, {Path(self.second).stem}"
        correspondence_picture(images[0], images[1], chosen, encoder.patch_size, title=title).save(self.out)
        results = {
            "pairs": len(chosen.first),
            "mutual_pairs": len(matches.first),
            "mean_similarity": chosen.similarities.mean().item(),
            "out": str(self.out),
        }
        return self.report(results, encoder, self.forward, size=self.size, count=self.count)
