"""``dino clusters``."""

from collections import Counter
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from dino.commands.stored import OnEmbeddings

_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)
_SHOWN = 10


@dataclass(frozen=True)
class Clusters(OnEmbeddings):
    """Groups the images of an embed file by what they look like: k-means or HDBSCAN on their features."""

    _: KW_ONLY
    k: int | None = None
    """Number of clusters of k-means. Default: of 2 to 50 the one with the best silhouette."""
    method: Literal["kmeans", "hdbscan"] = "kmeans"
    """hdbscan finds the number itself, and leaves images out that are in no dense group."""
    min_size: int = 10
    """Images of the smallest cluster of hdbscan."""
    seed: int = 0
    """Of the first centres of k-means."""

    def run(self) -> dict[str, Any]:
        from dino.encoder.groups import hdbscan, k_means, typical_members
        from dino.pictures.contact import Shown, contact_sheet

        if self.k is not None and (self.k < 1 or self.method == "hdbscan"):
            raise ValueError(f"--k {self.k} --method {self.method} is not allowed: k-means takes 1 cluster or more")
        if self.min_size < 2:
            raise ValueError(f"--min-size {self.min_size} is not allowed: at least 2 images")
        kept = self.read()
        if self.method == "kmeans":
            clusters = k_means(kept.features, _COUNTS if self.k is None else [self.k], self.seed)
        else:
            clusters = hdbscan(kept.features, self.min_size)
        found, sheet = [], []
        for number, rows in enumerate(typical_members(clusters, _SHOWN)):
            members = (clusters.cluster == number).nonzero().flatten().tolist()
            classes = Counter(kept.class_of(row) for row in members) if kept.labels is not None else Counter()
            found.append(
                {
                    "cluster": number,
                    "images": len(members),
                    "typical": kept.names[rows[0]],
                    "mean_cosine": round(float(clusters.typical[members].mean()), 4),
                    **({"classes": dict(classes.most_common())} if classes else {}),
                }
            )
            most = classes.most_common(1)
            about = f"{number}: {len(members)} images" + (f", {most[0][0]}" if most else "")
            sheet.append([Shown(row, about if i == 0 else "") for i, row in enumerate(rows)])
        outside = int((clusters.cluster < 0).sum())
        table = [
            [one["cluster"], one["images"], one["mean_cosine"], one["typical"],
             ", ".join(f"{name} {count}" for name, count in [*one.get("classes", {}).items()][:3])]
            for one in found
        ]  # fmt: skip
        note = ""
        if len(clusters.silhouettes) > 1:
            note = "Silhouette of k clusters: " + ", ".join(f"{k}: {s:.3f}" for k, s in clusters.silhouettes.items())
        if outside:
            note += f"{outside} images are in no cluster."
        title = f"{len(found)} clusters of {len(kept):,} images"
        self.show(title, ["cluster", "images", "mean cosine", "most typical", "classes"], table, note)
        rows = zip(kept.names, clusters.cluster.tolist(), clusters.typical.tolist(), strict=True)
        self.write(["path", "cluster", "cosine"], ([name, one, f"{cosine:.4f}"] for name, one, cosine in rows))
        if self.sheet is not None and sheet:
            contact_sheet(kept, sheet, self.sheet, title=title, note="The most typical images of each cluster.")
        results = {"clusters": found, "in_none": outside, "images": len(kept), "silhouettes": clusters.silhouettes}
        return {**results, **self.files()}
