"""``dino eval retrieval``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from dino.commands.shared import Flat, Forward, WithData
from dino.options import ForwardOptions, RetrievalOptions


@dataclass(frozen=True)
class Retrieval(WithData):
    """Image retrieval with frozen features (table 3 of the paper): revisited Oxford and Paris, or any labelled set.

    The released code's defaults are 224 pixels and one scale; the published numbers of Oxford and Paris come from
    larger images in three: --side 512 --multi-scale.
    """

    data: tyro.conf.Positional[tuple[str, ...]]
    """A folder with gnd_roxford5k.pkl or gnd_rparis6k.pkl and jpg/; or labelled images, each a query for the others."""
    _: KW_ONLY
    whitening: str | None = None
    """Images to learn a PCA whitening from; "database" takes the images that are searched."""
    options: Annotated[RetrievalOptions, Flat] = RetrievalOptions()
    forward: Forward = ForwardOptions()
    batch_size: int = 32
    """Images of equal size a forward pass."""

    def run(self) -> dict[str, Any]:
        from dino.evaluation import retrieval

        truths = sorted(Path(self.data[0]).glob("gnd_*.pkl")) if len(self.data) == 1 else []
        whitening = self.whitening if self.whitening == "database" else self.other(self.whitening)
        encoder = self.open(self.forward, batch_size=self.batch_size)
        source = None if truths else self.source()
        facts: dict[str, Any] = {"whitening": self.whitening}
        results: dict[str, float] = {}
        if source is None:
            for truth in truths:
                results |= retrieval.run_revisited(encoder, truth, self.options, whitening)
            facts |= {"ground_truth": [truth.name for truth in truths]}
        else:
            results = retrieval.run(encoder, source, self.options, whitening)
            facts |= {"images": len(source), "protocol": "each image against all others", "classes": source.classes}
        scales = retrieval.SCALES if self.options.multi_scale else retrieval.SCALES[:1]
        facts["scales"] = [round(scale, 4) for scale in scales]
        return self.report(results, encoder, self.options, self.forward, **facts)
