"""Images and their nearest neighbours in feature space, with what the labels say about them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from dino.pictures.sheet import INK, RIGHT, WRONG, Tile, sheet, to_pil


def neighbor_sheet(
    queries: Sequence[Float[Tensor, "3 _ _"]],
    neighbors: Sequence[Sequence[Float[Tensor, "3 _ _"]]],
    similarities: Float[Tensor, "m k"],
    *,
    query_classes: Sequence[str] | None = None,
    neighbor_classes: Sequence[Sequence[str]] | None = None,
    names: Sequence[str] = (),
    tile: int = 128,
    title: str = "Nearest neighbours of frozen features",
) -> Image.Image:
    """One row a query: the query, then its neighbours, nearest first.

    A border is green for the query's own class and red for another; there is none where a class is not known ("").
    ``names`` stand below queries without a class. Images hold values from 0 to 1.
    """
    rows, borders = [], set()
    for i, query in enumerate(queries):
        own = query_classes[i] if query_classes else ""
        row = [Tile(to_pil(query), own or (names[i] if names else ""), border=INK)]
        for j, image in enumerate(neighbors[i]):
            caption, border = f"{similarities[i, j].item():.2f}", None
            other = neighbor_classes[i][j] if neighbor_classes else ""
            if own and other:
                border = RIGHT if other == own else WRONG
                borders.add(border)
            caption += "" if other == own else f" {other}"
            row.append(Tile(to_pil(image), caption, border))
        rows.append(row)
    count = max(len(row) for row in rows) - 1
    note = "Below each neighbour: its cosine similarity to the query."
    if borders:
        note += " Green border: the same class as the query; red: another, which is named."
    columns = ["query", *(f"{j + 1}" for j in range(count))]
    return sheet(rows, tile=tile, columns=columns, title=title, note=note)


def without_self(
    similarities: Float[Tensor, "m c"], indices: Int[Tensor, "m c"], own: Sequence[int], k: int
) -> tuple[Float[Tensor, "m n"], Int[Tensor, "m n"]]:
    """The ``k`` nearest of k + 1 candidates a query, nearest first, without the query itself.

    ``own``: each query's index among the candidates, -1 where it is none of them. Fewer candidates: as many as every
    query has.

    >>> without_self(torch.tensor([[1.0, 0.5, 0.2]]), torch.tensor([[7, 3, 4]]), [7], k=2)[1].tolist()
    [[3, 4]]
    """
    is_own = indices == torch.tensor(own, device=indices.device)[:, None]
    order = is_own.int().argsort(dim=1, stable=True)[:, : min(k, indices.shape[1] - int(is_own.any()))]
    return similarities.gather(1, order), indices.gather(1, order)
