"""``dino duplicates``."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from dino.commands.stored import OnEmbeddings


@dataclass(frozen=True)
class Duplicates(OnEmbeddings):
    """Finds copies in an embed file: resized, recompressed, cropped or flipped. Exit code 0: none; 3: there are some.

    Two images count as copies when their distance (1 - cosine of the features) is at most a twentieth of the usual one,
    which is the median distance of an image to its tenth nearest: so the limit fits any weights and any set. Copies of
    copies form one group. Of each group the image of most pixels is kept.
    """

    _: KW_ONLY
    threshold: float | None = None
    """Cosine from which on two images are copies. Default: 1 - share * the usual distance."""
    share: float | None = None
    """Of the usual distance that copies may have: smaller is stricter. Default: 0.05."""

    def run(self) -> dict[str, Any]:
        from dino.encoder.groups import COPY, USUAL_K, duplicates, usual_distance
        from dino.encoder.neighbors import neighbors_of_all
        from dino.pictures.contact import Shown, contact_sheet

        if self.threshold is not None and self.share is not None:
            raise ValueError(f"--threshold {self.threshold} --share {self.share} is not allowed: one of the two")
        if self.threshold is not None and not -1 < self.threshold <= 1:
            raise ValueError(f"--threshold {self.threshold} is not allowed: a cosine above -1, at most 1")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"--share {self.share} is not allowed: above 0, below 1")
        kept = self.read()
        similarities, _ = neighbors_of_all(kept.features, USUAL_K)
        usual = usual_distance(similarities)
        # Rounding: even equal images may not reach a cosine of exactly 1.
        share = self.share or COPY
        threshold = min(1 - share * usual if self.threshold is None else self.threshold, 1 - 1e-6)
        nearest = similarities[:, 0] if similarities.numel() else kept.features.new_empty(0)
        # Nobody else is a candidate, and these are few.
        some = (nearest >= threshold - 1e-6).nonzero().flatten()
        groups = [some[group].tolist() for group in duplicates(kept.features[some], threshold)]

        table, found, sheet = [], [], []
        for number, group in enumerate(groups):
            sizes = {row: kept.size(row) for row in group}
            first = max(group, key=lambda row: (sizes[row][0] * sizes[row][1], -row))
            group = [first, *(row for row in group if row != first)]
            for row in group:
                cosine = float(kept.features[row] @ kept.features[first])
                height, width = sizes[row]
                size = f"{width} x {height}" if height else "not found"
                table.append([number, "keep" if row == first else "copy", cosine, size, row, kept.names[row]])
            sheet.append([Shown(row, f"{line[1]} {line[2]:.4f} {line[3]}", line[1] == "keep")
                          for row, line in zip(group, table[-len(group) :], strict=True)])  # fmt: skip
            found.append({"keep": kept.names[first], "copies": [kept.names[row] for row in group[1:]]})
        around = {f"{1 - part * usual:.4f}": int((nearest >= 1 - part * usual).sum()) for part in _SHARES}
        columns = ["group", "which", "cosine", "pixels", "row", "path"]
        copies = len(table) - len(groups)
        why = "as given" if self.threshold is not None else f"1 - {share:g} x {usual:.4f}, the usual distance here"
        note = f"Cosine {threshold:.4f} ({why}). Images that have a partner at other limits: " + ", ".join(
            f"{limit}: {count}" for limit, count in around.items()
        )
        title = f"{copies} copies in {len(groups)} groups among {len(kept):,} images"
        if groups:
            self.show(title, columns, table, note)
        elif not self.json:
            print(f"no copies among {len(kept):,} images. {note}")
        self.write(columns, table)
        if self.sheet is not None and sheet:
            contact_sheet(kept, sheet, self.sheet, title=title, note=f"Copies from cosine {threshold:.4f} on ({why}).")
        return {
            "groups": found,
            "copies": copies,
            "images": len(kept),
            "threshold": threshold,
            "usual_distance": usual,
            "with_a_partner_at": around,
            **self.files(),
        }

    def exit_code(self, results: dict[str, Any]) -> int:
        return 3 if results["groups"] else 0


_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
