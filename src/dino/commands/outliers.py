"""``dino outliers``."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from dino.commands.stored import OnEmbeddings


@dataclass(frozen=True)
class Outliers(OnEmbeddings):
    """Shows the images of an embed file that are like no other: those farthest from their nearest neighbours."""

    _: KW_ONLY
    count: int = 20
    """Images to show; --out has all of them."""
    k: int = 10
    """Neighbours whose mean distance (1 - cosine) is the score. A group of more than k strange images is no outlier."""

    def run(self) -> dict[str, Any]:
        from dino.encoder.groups import loneliness
        from dino.pictures.contact import Shown, contact_sheet

        if self.count < 1 or self.k < 1:
            raise ValueError(f"--count {self.count} --k {self.k} is not allowed: at least 1 each")
        kept = self.read()
        scores = loneliness(kept.features, self.k)
        usual = max(scores.median().item(), 1e-12)
        order = scores.argsort(descending=True, stable=True).tolist()
        table = [[i + 1, float(scores[r]), float(scores[r]) / usual, r, kept.names[r]] for i, r in enumerate(order)]
        columns = ["rank", "distance", "times the median", "row", "path"]
        title = f"Outliers among {len(kept):,} images"
        note = f"Distance: mean of 1 - cosine over the {self.k} nearest others; the median image has {usual:.4f}."
        self.show(title, columns, table[: self.count], note)
        self.write(columns, table)
        if self.sheet is not None:
            shown = [Shown(row, f"{distance:.3f}") for _, distance, _, row, _ in table[: self.count]]
            sheet = [shown[i : i + 10] for i in range(0, len(shown), 10)]
            contact_sheet(kept, sheet, self.sheet, title=title, note=note)
        outliers = [{"path": path, "row": row, "distance": round(d, 4)} for _, d, _, row, path in table[: self.count]]
        results = {"outliers": outliers, "median_distance": usual, "images": len(kept), "k": self.k}
        return {**results, **self.files()}
