"""What the commands on a file of embeddings share: its place, a table, a contact sheet, a CSV file."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import tyro

from dino.commands.shared import Command

if TYPE_CHECKING:
    from dino.encoder.embeddings import Embeddings


@dataclass(frozen=True)
class OnEmbeddings(Command):
    """A command on what ``dino embed`` wrote."""

    shows_results: ClassVar[bool] = True

    embeddings: tyro.conf.Positional[Path]
    """A file that dino embed wrote (.parquet or .npz)."""
    _: KW_ONLY
    out: Path | None = None
    """Table to write (.csv)."""
    sheet: Path | None = None
    """Contact sheet to draw (.png)."""

    def read(self) -> "Embeddings":
        from dino.encoder.embeddings import read_embeddings
        from dino.pictures.inputs import check_picture

        if self.out is not None and self.out.suffix != ".csv":
            raise ValueError(f"--out {self.out} is not allowed: the table is written as .csv")
        if self.sheet is not None:
            check_picture(self.sheet, "sheet")
        return read_embeddings(self.embeddings)

    def files(self) -> dict[str, str]:
        """The files that were asked for, as results name them."""
        return {name: str(path) for name, path in (("out", self.out), ("sheet", self.sheet)) if path is not None}

    def show(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> None:
        """A table on the terminal; numbers to the right."""
        if self.json:
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", caption=note or None, caption_justify="left")
        written = [[f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
        for i, column in enumerate(columns):
            numbers = all(row[i].replace(".", "").lstrip("-").isdigit() for row in written)
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in written:
            table.add_row(*(Text(cell) for cell in row))  # Names may hold what rich takes for markup.
        console = Console()
        console.width = max(console.width, 100) if not console.is_terminal else console.width
        console.print(table)

    def write(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """The table as CSV, where asked for."""
        if self.out is None:
            return
        from dino.machine.files import write_text

        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        write_text(self.out, text.getvalue())
