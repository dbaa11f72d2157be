"""Contact sheets of images of a file of embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dino.data.sources import Source
from dino.encoder.embeddings import Embeddings
from dino.pictures.sheet import RIGHT, Tile, sheet, to_pil

_ROWS, _COLUMNS = 60, 12  # A sheet has no more.


class Shown(NamedTuple):
    """An image on a sheet: a row of the file, or the first of a source; the line below it; whether it has a frame."""

    image: int | Source
    caption: str = ""
    framed: bool = False


def contact_sheet(
    embeddings: Embeddings,
    rows: Sequence[Sequence[Shown]],
    out: Path,
    *,
    title: str,
    note: str,
    columns: Sequence[str] = (),
) -> None:
    """Draws the first 60 rows, of each the first 12 images, and writes the picture.

    Raises:
        ValueError: there is no row, or an image is not to be found.
    """

    def tile(one: Shown) -> Tile:
        found = one.image.load(0, 512) if isinstance(one.image, Source) else embeddings.image(one.image)
        return Tile(to_pil(found / 255), one.caption, RIGHT if one.framed else None)

    if len(rows) > _ROWS:
        note += f" The first {_ROWS} of {len(rows)} rows."
    tiles = [[tile(one) for one in row[:_COLUMNS]] for row in rows[:_ROWS]]
    picture = sheet(tiles, tile=150, title=title, note=note, columns=columns[:_COLUMNS])
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
