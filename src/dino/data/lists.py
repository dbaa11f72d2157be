"""Lists of images: a path a line (.txt), columns (.csv, .tsv), JSON lines. Says which columns it took."""

import csv
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from dino.config import ReadConfig
from dino.data.files import extension, is_image, read_file
from dino.data.parts import parts_of
from dino.machine.files import printable

LISTS = frozenset({".txt", ".csv", ".tsv", ".jsonl", ".ndjson", ".json"})
PATH_NAMES = (
    "path",
    "paths",
    "file",
    "files",
    "filename",
    "filenames",
    "filepath",
    "filepaths",
    "image",
    "images",
    "img",
)
PATH_NAMES += (
    "img",
    "imagepath",
    "imgpath",
    "imagefile",
    "imagefilename",
    "imagename",
    "imgname",
    "imageid",
    "fname",
    "uri",
    "id",
)
LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "classes",
    "classname",
    "classid",
    "labelname",
    "target",
    "targets",
    "category",
)
LABEL_NAMES += ("category", "categories", "categoryid", "y", "cls", "species", "diagnosis", "dx", "groundtruth", "gt")
LABEL_NAMES += ("annotation", "tag", "grade", "kind", "type", "breed")
PART_NAMES = ("split", "splits", "part", "subset", "partition", "set", "fold", "phase", "dataset", "usage")
_FEW = 1000  # Rows that are looked at to tell what a column holds.


class Row(NamedTuple):
    """A line of a list. Label and part are None where there is no such column, "" where the cell is blank."""

    path: str
    label: str | None
    part: str | None


@dataclass(frozen=True)
class Table:
    """The rows of a list, and one sentence on how they were understood."""

    rows: Iterable[Row]
    note: str
    has_labels: bool
    count: int


def read_list(path: str, config: ReadConfig) -> Table:
    """Every row of a list, whatever separates its columns and whether it has a header.

    Raises:
        ValueError: it cannot be read, has no column of images, or not the one asked for; says which it has.
    """
    shown = printable(path)
    try:
        text = read_file(path).decode("utf-8-sig")
        if extension(path) in (".jsonl", ".ndjson", ".json"):
            header, rows = _objects(text)
        else:
            header, rows = _lines(text, extension(path), config)
    except (OSError, UnicodeError, csv.Error, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{shown} cannot be read as a list of images: {reason}") from None
    if not rows:
        raise ValueError(f"{shown} is an empty list")
    return _understood(shown, header, rows, config)


def column(
    names: list[str], known: tuple[str, ...], asked: str | None, flag: str, shown: str, *, required: bool = False
) -> int | None:
    """Which column: the one asked for by name or number (from 1), else the first with a usual name.

    Raises:
        ValueError: the one asked for is not there; says which are.
    """
    if asked is not None:
        if asked in names:
            return names.index(asked)
        if asked.isdecimal() and 1 <= int(asked) <= len(names):
            return int(asked) - 1
        raise ValueError(f"--data.{flag} {asked}: {shown} has no such column; it has {_listed(names)}")
    plain = [re.sub(r"[\W_]", "", name).lower() for name in names]
    found = next((plain.index(name) for name in known if name in plain), None)
    if found is None and required:
        raise ValueError(
            f"{shown}: none of its columns is named as images are ({_listed(names)}): name it with --data.{flag}"
        )
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(printable(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")


def _understood(shown: str, header: list[str] | None, rows: list[list[str]], config: ReadConfig) -> Table:
    width = max(map(len, itertools.islice(rows, _FEW)))
    if header is None:
        names = [str(i + 1) for i in range(width)]
        images = column(names, (), config.path_column, "path-column", shown)
        images = _column_of_images(rows) if images is None else images
        labels = column(names, (), config.label_column, "label-column", shown)
        parts = column(names, (), config.part_column, "part-column", shown)
        rest = [i for i in range(width) if i not in (images, parts)]
        parts = next((i for i in rest if _holds_parts(rows, i)), None) if parts is None else parts
        labels = next((i for i in rest if i != parts), None) if labels is None else labels
    else:
        names = header
        images = column(names, PATH_NAMES, config.path_column, "path-column", shown)
        if images is None or (config.path_column is None and not _holds_images(rows, images)):
            images = next((i for i in range(len(names)) if _holds_images(rows, i)), images)
        if images is None:
            images = column(names, PATH_NAMES, None, "path-column", shown, required=True)
        labels = column(names, LABEL_NAMES, config.label_column, "label-column", shown)
        parts = column(names, PART_NAMES, config.part_column, "part-column", shown)
        if config.part_column is None and parts is not None and not _holds_parts(rows, parts):
            parts = None
        rest = [i for i in range(len(names)) if i not in (images, parts)]
        if labels is None and len(rest) == 1 and _repeats(rows, rest[0]):
            labels = rest[0]
    assert images is not None

    def named(i: int) -> str:
        return f"column {names[i]}" if header is None else f"column {printable(names[i])!r}"

    note = f"{shown}: images from {named(images)}"
    note += f", labels from {named(labels)}" if labels is not None else ""
    note += f", parts from {named(parts)}" if parts is not None else ""
    others = [name for i, name in enumerate(names) if i not in (images, labels, parts)]
    if labels is None and others:
        note += f"; no labels in it (other columns: {_listed(others)}; --data.label-column takes one)"
    if width == 1:
        note = ""  # A path a line: nothing to choose.
    return Table(list(_picked(rows, images, labels, parts)), note, labels is not None, len(rows))


def _picked(rows: list[list[str]], images: int, labels: int | None, parts: int | None) -> Iterator[Row]:
    def cell(row: list[str], i: int | None) -> str | None:
        return None if i is None else row[i] if i < len(row) else ""

    for row in rows:
        yield Row(cell(row, images) or "", cell(row, labels), cell(row, parts))


def _holds_images(rows: list[list[str]], i: int) -> bool:
    few = [row[i] for row in rows[:_FEW] if i < len(row) and row[i]]
    return sum(map(is_image, few)) > len(few) / 2


def _column_of_images(rows: list[list[str]]) -> int:
    return next((i for i in range(max(map(len, rows[:_FEW]))) if _holds_images(rows, i)), 0)


def _holds_parts(rows: list[list[str]], i: int) -> bool:
    values = {row[i] for row in rows if i < len(row) and row[i]}
    return 1 <= len(values) <= 20 and len(parts_of(values)) == len(values)


def _repeats(rows: list[list[str]], i: int) -> bool:
    """Whether a column holds classes: far fewer values than rows."""
    values = [row[i] for row in rows if i < len(row) and row[i]]
    return len(set(values)) <= max(2, len(values) // 2) < len(values)


def _objects(text: str) -> tuple[list[str], list[list[str]]]:
    """JSON lines, or one JSON list, of objects: the keys are the columns."""
    values = (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x.strip()]
    )
    if not all(isinstance(value, dict) for value in values):
        raise ValueError("each line must be a JSON object with the path of an image")
    header = list(dict.fromkeys(key for value in values for key in value))
    return header, [[_text(value.get(key)) for key in header] for value in values]


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _lines(text: str, kind: str, config: ReadConfig) -> tuple[list[str] | None, list[list[str]]]:
    lines = text.splitlines() if kind == ".txt" else text.splitlines(keepends=True)
    if kind == ".txt":
        lines = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        rows = _columns_of_text(lines)
    else:
        separator = _separator([line for line in lines if line.strip()][:_FEW], kind)
        rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    rows = [[cell.strip() for cell in row] for row in rows if any(map(str.strip, row))]
    if not rows or any(map(is_image, rows[0])):
        return None, rows
    asked = {config.path_column, config.label_column, config.part_column} - {None}
    plain = {re.sub(r"[\W_]", "", cell).lower() for cell in rows[0]}
    below = [cell for row in rows[1:_FEW] for cell in row]
    # A first row that names no image is a header where the other rows do name one, or where it says what columns are.
    says_columns = any(map(is_image, below)) or plain & {*PATH_NAMES, *LABEL_NAMES, *PART_NAMES} or asked & {*rows[0]}
    several = max(map(len, rows[:2])) > 1 or plain & {*PATH_NAMES}
    return (rows[0], rows[1:]) if says_columns and several else (None, rows)


def _columns_of_text(lines: list[str]) -> list[list[str]]:
    """A path a line, or a path and more, by whatever separates them in every line. Names may hold separators too."""
    few = lines[:_FEW]
    if all(map(is_image, few)):
        return [[line] for line in lines]
    for separator in ("\t", ";", ",", " "):
        cut = [line.rsplit(separator, line.count(separator)) for line in few]
        if min(map(len, cut)) < 2:
            continue
        if separator == " ":  # Names may hold spaces: the path ends with its extension, the rest are columns.
            return [_after_the_image(line) for line in lines]
        return list(csv.reader(lines, delimiter=separator, skipinitialspace=True))
    return [[line] for line in lines]


def _after_the_image(line: str) -> list[str]:
    words = line.split()
    for i in range(1, len(words)):
        if is_image(" ".join(words[:i])):
            end = next(m.end() for m in re.finditer(re.escape(words[i - 1]), line) if is_image(line[: m.end()]))
            return [line[:end], *line[end:].split()]
    for i in range(1, len(words)):  # label path
        if is_image(line.split(None, i)[-1]):
            return [*words[:i], line.split(None, i)[-1]]
    return [line] if is_image(line) else words


def _separator(lines: list[str], kind: str) -> str:
    """The one that cuts all lines into the same number of columns, more than one; that of the extension first."""
    own = "\t" if kind == ".tsv" else ","
    for separator in dict.fromkeys((own, "\t", ";", ",", "|")):
        widths = {len(row) for row in csv.reader(lines, delimiter=separator)}
        if len(widths) == 1 and widths != {1}:
            return separator
    counts = {s: sum(line.count(s) for line in lines) for s in dict.fromkeys((own, "\t", ";", ",", "|"))}
    return own if counts[own] else max(counts, key=counts.__getitem__)
