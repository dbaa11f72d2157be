"""``dino neighbors``."""

import os
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tyro

from dino.commands.shared import Cropped, WithData
from dino.config import ReadConfig
from dino.options import CropOptions

if TYPE_CHECKING:
    from dino.data.sources import Source


@dataclass(frozen=True)
class Neighbors(WithData):
    """Finds the images of DATA whose features are nearest to a query's by their cosine, and draws them on a sheet."""

    data: tyro.conf.Positional[tuple[str, ...]]
    """Images to search in: folders, tar archives, lists, or a named data set."""
    _: KW_ONLY
    query: tuple[str, ...]
    """What to look for: image files, or numbers of images of DATA, from 0. An image is no neighbour of itself."""
    out: Path
    """The sheet (.png)."""
    k: int = 8
    """Neighbours of each query."""
    shown: Cropped = CropOptions()
    batch_size: int = 128
    """Images a forward pass."""

    def run(self) -> dict[str, Any]:
        import torch

        from dino.encoder.neighbors import nearest_neighbors
        from dino.pictures.inputs import check_picture
        from dino.pictures.neighbors import neighbor_sheet, without_self

        check_picture(self.out)
        if not self.query or self.k < 1:
            raise ValueError(f"--query {' '.join(self.query)} --k {self.k}: at least one query and one neighbour")
        encoder = self.open(self.shown, batch_size=self.batch_size)
        source = self.source()
        queries = [query for given in self.query for query in _queries(given, source, self.read)]
        asked = [encoder.features(one.source).features for one in queries]
        bank = encoder.features(source)
        similarities, rows = nearest_neighbors(torch.cat(asked), bank.features, self.k + 1)
        similarities, found = without_self(similarities, bank.indices[rows], [one.number for one in queries], self.k)

        def class_of(number: int) -> str:
            return "" if number < 0 or source.labels is None else source.classes[source.labels[number]]

        sheet = neighbor_sheet(
            [one.source.load(0, max_side=512) / 255 for one in queries],
            [[source.load(i, max_side=512) / 255 for i in row] for row in found.tolist()],
            similarities,
            query_classes=[class_of(one.number) for one in queries],
            neighbor_classes=[[class_of(i) for i in row] for row in found.tolist()],
            names=[Path(one.source.name(0)).name for one in queries],
            tile=200,
        )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(self.out)
        found_names = {
            one.source.name(0): {source.name(i): round(value, 4) for i, value in zip(row, values, strict=True)}
            for one, row, values in zip(queries, found.tolist(), similarities.tolist(), strict=True)
        }
        results = {"neighbors": found_names, "out": str(self.out)}
        return self.report(results, encoder, self.shown, images=len(bank.features), k=self.k)


class _Query(NamedTuple):
    source: "Source"  # Of one image.
    number: int  # Which image of DATA it is; -1: none.


def _queries(given: str, source: "Source", read: ReadConfig) -> list[_Query]:
    """The images of one ``--query``: a number of DATA, or files, which are looked for among those of DATA."""
    from dino.data.sources import open_source

    if given.isdecimal() and not os.path.exists(given):
        number = int(given)
        if number >= len(source):
            raise ValueError(f"--query {given}: {source.origin} has images 0 to {len(source) - 1}")
        return [_Query(source.subset([number]), number)]
    found = open_source([given], read=read)
    numbers = {os.path.abspath(source.name(i)): i for i in range(len(source))}
    return [_Query(found.subset([i]), numbers.get(os.path.abspath(found.name(i)), -1)) for i in range(len(found))]
