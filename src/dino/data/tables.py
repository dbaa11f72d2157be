"""Images inside tables: Parquet files with image bytes, and data sets of Hugging Face by name or from a folder."""

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dino.config import ReadConfig
from dino.data.files import open_binary, read_file
from dino.data.lists import LABEL_NAMES, PART_NAMES, column
from dino.data.readers import EncodedReader
from dino.data.remote import is_remote
from dino.machine.files import printable

_KEPT = 4  # Row groups a process keeps: images are read in chunks as they were written.
HUGGING_FACE = "hf:"


class Columns(NamedTuple):
    """A table as it was understood: its reader, and for every row a label and the name of a part, None where it says
    none."""

    reader: "Tables | HuggingFace"
    count: int
    labels: Sequence[str | None] | None
    parts: Sequence[str | None] | None
    note: str


@dataclass(frozen=True)
class Tables(EncodedReader):
    """Rows of one Parquet file."""

    path: str
    image: str
    ends: np.ndarray  # Of each row group, the row after its last.

    def name(self, i: int) -> str:
        return f"{printable(self.path)}/{i}"

    def read(self, i: int) -> bytes:
        group = int(np.searchsorted(self.ends, i, "right"))
        rows = _row_group(self.path, group, self.image)
        value = rows[i - (int(self.ends[group - 1]) if group else 0)].as_py()
        return _bytes(value, os.path.dirname(self.path))


def _bytes(value: Any, folder: str) -> bytes:
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
        if value is None and path:
            return read_file(os.path.join(folder, path))
    if value is None:
        raise OSError("the row holds no image")
    return bytes(value)


@functools.lru_cache(maxsize=_KEPT)
def _row_group(path: str, group: int, image: str) -> Any:
    return _parquet(path).read_row_group(group, columns=[image]).column(0)


@functools.lru_cache(maxsize=64)
def _parquet(path: str) -> Any:
    try:
        from pyarrow.parquet import ParquetFile  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(".parquet needs pyarrow: pip install 'dino-ssl[parquet]'") from None
    return ParquetFile(open_binary(path) if is_remote(path) else path)


class NoImages(ValueError):
    """A table of other things: of features, say."""


@contextlib.contextmanager
def _readable(shown: str) -> Iterator[None]:
    """Raises:
    ValueError: whatever a damaged table makes pyarrow raise.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and "pyarrow:" in str(error):
            raise
        raise ValueError(f"{shown} cannot be read as a table: {' '.join(str(error).split())[:200]}") from None


def open_parquet(path: str, config: ReadConfig) -> Columns:
    """A Parquet file with a column of image bytes (or of Hugging Face's images).

    Raises:
        ValueError: it cannot be read.
        NoImages: it has no such column; says which it has.
    """
    shown = printable(path)
    with _readable(shown):
        file = _parquet(path)
        schema = file.schema_arrow
    if b"dino" in (schema.metadata or {}) and config.path_column is None:
        raise NoImages(
            f"{shown} was written by dino embed: it holds features (its thumbnails: --data.path-column thumbnail)"
        )
    holds_bytes = [name for name in schema.names if _holds_bytes(schema.field(name).type)]
    image = _image_column(schema.names, holds_bytes, config, shown)
    scalar = [name for name in schema.names if not _holds_bytes(schema.field(name).type)]
    label = column(scalar, LABEL_NAMES, config.label_column, "label-column", shown)
    part = column(scalar, PART_NAMES, config.part_column, "part-column", shown)
    wanted = [scalar[i] for i in (label, part) if i is not None]
    with _readable(shown):
        said = file.read(columns=wanted).to_pydict() if wanted else {}
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    ends = np.cumsum(np.array(groups, np.int64))
    names = features.get(scalar[label], {}).get("names") if label is not None else None
    return _columns(
        Tables(path, image, ends),
        file.metadata.num_rows,
        shown,
        image,
        (scalar[label], said[scalar[label]], names) if label is not None else None,
        (scalar[part], said[scalar[part]]) if part is not None else None,
    )


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as types  # pyright: ignore[reportMissingImports]

    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return types.is_binary(kind) or types.is_large_binary(kind)


def _image_column(names: list[str], holds_bytes: list[str], config: ReadConfig, shown: str) -> str:
    asked = column(names, (), config.path_column, "path-column", shown)
    image = names[asked] if asked is not None else next(iter(holds_bytes), None)
    if image is None:
        raise NoImages(f"{shown}: none of its columns holds the bytes of images ({', '.join(names)})")
    return image


def _columns(
    reader: Any,
    count: int,
    shown: str,
    image: str,
    label: tuple[str, list[Any], list[str] | None] | None,
    part: tuple[str, list[Any]] | None,
) -> Columns:
    note, labels, parts = f"{shown}: images from column {image!r}", None, None
    if label is not None:
        name, values, names = label
        labels = [_class(value, names) for value in values]
        note += f", labels from column {name!r}"
    if part is not None:
        name, values = part
        parts = [None if value is None else str(value) for value in values]
        note += f", parts from column {name!r}"
    return Columns(reader, count, labels, parts, note)


def _class(value: Any, names: list[str] | None) -> str:
    """A label in words; "" where there is none, as -1 says in unlabelled test parts."""
    if value is None or not names:
        return "" if value is None else str(value)
    return names[value] if 0 <= value < len(names) else ""


@dataclass(frozen=True, eq=False)
class HuggingFace(EncodedReader):
    """One split of a data set of the library ``datasets``, memory-mapped."""

    origin: str
    dataset: Any  # Its image column undecoded.
    image: str

    def name(self, i: int) -> str:
        return f"{self.origin}/{i}"

    def read(self, i: int) -> bytes:
        return _bytes(self.dataset[i][self.image], "")


def is_saved_dataset(folder: str) -> bool:
    """Whether a folder is what ``Dataset.save_to_disk`` wrote."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def open_hugging_face(data: str, config: ReadConfig) -> dict[str, Columns]:
    """The splits of a data set by name (``hf:NAME`` or ``hf:NAME:CONFIG``) or from a folder that the library wrote.

    Raises:
        ValueError: the library is not there, the data set is not, or holds no images; says why.
    """
    shown = printable(data)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(f"{shown} needs the library datasets: pip install 'dino-ssl[data]'") from None
    try:
        if data.startswith(HUGGING_FACE):
            name, _, subset = data.removeprefix(HUGGING_FACE).partition(":")
            loaded: Any = datasets.load_dataset(name, subset or None)
        else:
            loaded = datasets.load_from_disk(data)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{shown} cannot be opened by the library datasets: {reason}") from None
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {split: _open_split(f"{shown}/{split}", dataset, config, datasets) for split, dataset in splits.items()}


def _open_split(shown: str, dataset: Any, config: ReadConfig, datasets: Any) -> Columns:
    features = dataset.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images += [
        name for name, feature in features.items() if getattr(feature, "dtype", "") in ("binary", "large_binary")
    ]
    image = _image_column([*features], images, config, shown)
    if isinstance(features[image], datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    scalar = [name for name in features if name not in images]
    label = column(scalar, LABEL_NAMES, config.label_column, "label-column", shown)
    if label is None and config.label_column is None:
        label = next((i for i, name in enumerate(scalar) if isinstance(features[name], datasets.ClassLabel)), None)
    part = column(scalar, PART_NAMES, config.part_column, "part-column", shown)
    return _columns(
        HuggingFace(shown, dataset, image),
        len(dataset),
        shown,
        image,
        (scalar[label], list(dataset[scalar[label]]), getattr(features[scalar[label]], "names", None))
        if label is not None
        else None,
        (scalar[part], list(dataset[scalar[part]])) if part is not None else None,
    )
