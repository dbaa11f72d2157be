"""``dino search``."""

import os
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from dino.commands.stored import OnEmbeddings
from dino.options import Device

if TYPE_CHECKING:
    from torch import Tensor

    from dino.data.sources import Source
    from dino.encoder.embeddings import Embeddings


@dataclass(frozen=True)
class Search(OnEmbeddings):
    """Finds the images of an embed file that are nearest to others, by the cosine of their features.

    Exact: every image is compared.
    """

    query: tyro.conf.Positional[tuple[str, ...]]
    """What to look for: image files or folders, names of images in the file (an unambiguous end is enough), or row
    numbers from 0. An image is no neighbour of itself."""
    _: KW_ONLY
    k: int = 10
    """Neighbours of each query."""
    weights: str | None = None
    """The weights that made the file, when they are no longer where they were. Needed for other images only."""
    device: Device = "auto"
    """Where they run."""

    def run(self) -> dict[str, Any]:
        import torch

        from dino.encoder.neighbors import nearest_neighbors
        from dino.pictures.contact import Shown, contact_sheet

        if not self.query or self.k < 1:
            raise ValueError(f"QUERY {' '.join(self.query)} --k {self.k}: at least one query and one neighbour")
        kept = self.read()
        queries = [query for given in self.query for query in self._queries(given, kept)]
        features = torch.stack([query.features for query in queries])
        similarities, found = nearest_neighbors(features, kept.features, min(self.k + 1, len(kept)))
        results, table, sheet = {}, [], []
        for query, values, near in zip(queries, similarities.tolist(), found.tolist(), strict=True):
            pairs = [(row, value) for row, value in zip(near, values, strict=True) if row != query.row][: self.k]
            results[query.name] = [
                {"row": row, "path": kept.names[row], "similarity": round(value, 4)}
                | ({"class": kept.class_of(row)} if kept.labels is not None else {})
                for row, value in pairs
            ]
            table += [
                [query.name, i + 1, row, value, kept.names[row], kept.class_of(row)]
                for i, (row, value) in enumerate(pairs)
            ]
            first = Shown(query.picture, os.path.basename(query.name), framed=True)
            sheet.append([first, *(Shown(row, f"{value:.2f} {kept.class_of(row)}") for row, value in pairs)])
        columns = ["query", "rank", "row", "similarity", "path", "class"]
        self.show(f"Nearest images of {len(kept):,}", columns, table)
        self.write(columns, table)
        if self.sheet is not None:
            titles = ["query", *(str(i + 1) for i in range(self.k))]
            note = "Below each image: its cosine similarity to the query."
            contact_sheet(kept, sheet, self.sheet, title="Nearest neighbours", note=note, columns=titles)
        return {"neighbors": results, "images": len(kept), **self.files()}

    def _queries(self, given: str, kept: "Embeddings") -> "list[_Query]":
        """The images that one word of the command line names."""
        from dino.data.sources import open_source

        is_file = os.path.exists(given)
        row = int(given) if given.isdecimal() and not is_file else kept.find(given)
        if row is not None:
            if row >= len(kept):
                raise ValueError(f"row {row} does not exist: {self.embeddings} has rows 0 to {len(kept) - 1}")
            return [_Query(kept.names[row], row, kept.features[row], row)]
        if not is_file:
            raise ValueError(f"{given} is no image file, no row number and no name in {self.embeddings}")
        source = open_source([given], read=kept.read)
        found = kept.encoder(self.weights, device=self.device).features(source)
        return [
            _Query(source.name(i), kept.find(source.name(i)), features, source.subset([i]))
            for i, features in zip(found.indices.tolist(), found.features, strict=True)
        ]


class _Query(NamedTuple):
    name: str
    row: int | None  # None: no row of the file.
    features: "Tensor"
    picture: "Source | int"  # A source of one image, or a row of the file.
