"""Images and their nearest neighbours in feature space, with what the labels say about them."""

from collections.abc import Sequence

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from dino.visualization.pictures import INK, RIGHT, WRONG, Tile, sheet, to_pil


def neighbor_sheet(
    queries: Sequence[Float[Tensor, "3 _ _"]],
    neighbors: Sequence[Sequence[Float[Tensor, "3 _ _"]]],
    similarities: Float[Tensor, "m k"],
    *,
    query_classes: Sequence[str] | None = None,
    neighbor_classes: Sequence[Sequence[str]] | None = None,
    tile: int = 128,
    title: str = "Nearest neighbours of frozen features",
) -> Image.Image:
    """One row a query: the query, then its neighbours, nearest first.

    A border is green for the query's own class and red for another; without classes there are none. Images hold values
    from 0 to 1.
    """
    rows = []
    for i, query in enumerate(queries):
        own = query_classes[i] if query_classes else ""
        row = [Tile(to_pil(query), own, border=INK)]
        for j, image in enumerate(neighbors[i]):
            caption, border = f"{similarities[i, j].item():.2f}", None
            if query_classes and neighbor_classes:
                other = neighbor_classes[i][j]
                border = RIGHT if other == own else WRONG
                caption += "" if other == own else f" {other}"
            row.append(Tile(to_pil(image), caption, border))
        rows.append(row)
    count = max(len(row) for row in rows) - 1
    note = "Below each neighbour: its cosine similarity to the query."
    if query_classes and neighbor_classes:
        note += " Green border: the same class as the query; red: another, which is named."
    columns = ["query", *(f"{j + 1}" for j in range(count))]
    return sheet(rows, tile=tile, columns=columns, title=title, note=note)
