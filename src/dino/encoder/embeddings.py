"""A file that ``dino embed`` wrote, read back: features by name, and the images and weights that they were made of."""

import dataclasses
import functools
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from dino.config import ReadConfig
from dino.data.decode import BrokenImage
from dino.data.sources import Source, open_source
from dino.encoder.embed import as_text, import_pyarrow
from dino.encoder.encoder import Encoder, open_encoder
from dino.encoder.stored_features import fingerprint


@dataclass(frozen=True, eq=False)
class Embeddings:
    """The features of a set of images, a row an image, of length 1."""

    file: Path
    names: list[str]
    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"] | None
    classes: list[str]
    settings: dict[str, Any]  # How they were made.
    made_from: dict[str, Any]  # ``weights``, ``checkpoint_key``, ``data`` and the ``folder`` it is relative to.
    thumbnails: list[bytes] | None

    def __len__(self) -> int:
        return len(self.names)

    def class_of(self, row: int) -> str:
        return "" if self.labels is None else self.classes[int(self.labels[row])]

    def find(self, name: str) -> int | None:
        """The row of a name: a file, or an unambiguous end of a row's path, with or without the extension.

        Raises:
            ValueError: several rows end so.
        """
        if (row := self._rows.get(os.path.abspath(name))) is not None or (row := self._rows.get(name)) is not None:
            return row
        ending = [i for i, path in enumerate(self.names) if f"/{path}".endswith(f"/{name}") or Path(path).stem == name]
        if len(ending) > 1:
            some = ", ".join(self.names[i] for i in ending[:3])
            raise ValueError(f"{name} names {len(ending)} images of {self.file} ({some}, ...): give more of the path")
        return ending[0] if ending else None

    def size(self, row: int) -> tuple[int, int]:
        """Height and width of the image itself; (0, 0) when it is not to be found."""
        source, numbers = self._images
        if source is None or row not in numbers:
            return 0, 0
        try:
            return source.size(numbers[row])
        except BrokenImage:
            return 0, 0

    def image(self, row: int, max_side: int = 512) -> UInt8[Tensor, "c h w"]:
        """The image itself, or its thumbnail where that is no longer to be found.

        Raises:
            ValueError: neither is there.
        """
        source, numbers = self._images
        if source is not None and row in numbers:
            try:
                return source.load(numbers[row], max_side)
            except BrokenImage:
                pass
        if self.thumbnails is None:
            raise ValueError(
                f"{self.names[row]} is not to be found: name DATA so that it is found from here, or write thumbnails "
                f"into {self.file} (dino embed --thumbnails)"
            )
        pixels = np.array(Image.open(io.BytesIO(self.thumbnails[row])).convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def encoder(self, weights: str | None = None, **options: Any) -> Encoder:
        """The encoder that the features were made by, so that other images can be compared with them.

        ``weights``: where the weights are now. ``options``: what does not change the features.

        Raises:
            ValueError: they are other weights, or the features are of several blocks.
        """
        if self.settings.get("n_last_blocks", 1) != 1:
            raise ValueError(f"{self.file} holds the features of several blocks: only its own rows can be looked for")
        weights = weights or self.made_from.get("weights")
        if weights is None:
            raise ValueError(f"{self.file} does not say which weights made it: name them with --weights")
        made = {"size": "crop", "resize": "resize", "mean": "mean", "std": "std", "precision": "precision"}
        options |= {name: self.settings[kept] for name, kept in made.items() if kept in self.settings}
        options |= {name: self.settings[name] for name in ("channels", "pixel_range") if name in self.settings}
        encoder = open_encoder(weights, checkpoint_key=self.made_from.get("checkpoint_key", "teacher"), **options)
        if (found := fingerprint(encoder.backbone)) != self.settings["weights"]:
            raise ValueError(
                f"{weights} are not the weights that made {self.file} ({found}, not {self.settings['weights']}): name "
                "those with --weights, or embed again"
            )
        return encoder

    @property
    def read(self) -> ReadConfig:
        """How DATA was understood, so that other images are read alike."""
        values: dict[str, Any] = dict(self.made_from.get("read", {}))
        if values.get("pixel_range"):
            values["pixel_range"] = tuple(values["pixel_range"])  # JSON has lists alone.
        return ReadConfig(**values)

    @functools.cached_property
    def _rows(self) -> dict[str, int]:
        folder = self.made_from.get("folder", "")
        return {os.path.normpath(os.path.join(folder, name)): i for i, name in enumerate(self.names)} | {
            name: i for i, name in enumerate(self.names)
        }

    @functools.cached_property
    def _images(self) -> tuple[Source | None, dict[int, int]]:
        """The images, and the number in them of every row that is there."""
        folder, data = self.made_from.get("folder", ""), self.made_from.get("data", [])
        paths = [path if os.path.exists(path) else os.path.join(folder, path) for path in data]
        paths = [path if os.path.exists(path) else given for path, given in zip(paths, data, strict=True)]
        try:
            source = open_source(paths, read=self.read)
        except (ValueError, OSError):
            return None, {}
        keys = (as_text(source.name(i)) for i in range(len(source)))
        found = ((self._rows.get(key, self._rows.get(os.path.abspath(key))), i) for i, key in enumerate(keys))
        return source, {row: i for row, i in found if row is not None}


def read_embeddings(file: Path | str) -> Embeddings:
    """Reads what ``dino embed`` wrote: a file or a folder of them, of this version (column ``embedding``) and the first
    (``cls_token``).

    Raises:
        ValueError: it is no such file, or holds features that are not finite; says which.
    """
    file = Path(file)
    if not file.is_file() and not any(file.glob("part-*.parquet")):
        raise ValueError(f"{file} does not exist: dino embed WEIGHTS DATA --out {file} writes it")
    try:
        found = _read_npz(file) if file.suffix == ".npz" else _read_parquet(file)
    except (KeyError, OSError, EOFError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is no file that dino embed wrote: {error}") from error
    bad = (~found.features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{file}: the features of {len(bad)} images are not finite, the first {found.names[bad[0]]}")
    return dataclasses.replace(found, features=F.normalize(found.features, dim=1))


def _read_npz(file: Path) -> Embeddings:
    if not zipfile.is_zipfile(file):
        raise OSError("it is no archive of arrays")
    with np.load(file, allow_pickle=False) as arrays:
        return Embeddings(
            file,
            arrays["path"].tolist(),
            torch.from_numpy(arrays["cls_token"]).float(),
            torch.from_numpy(arrays["label"]) if "label" in arrays else None,
            arrays["classes"].tolist(),
            json.loads(str(arrays["settings"])),
            json.loads(str(arrays["made_from"])) if "made_from" in arrays else {},
            arrays["thumbnail"].tolist() if "thumbnail" in arrays else None,
        )


def _read_parquet(file: Path) -> Embeddings:
    pa, parquet = import_pyarrow()
    files = sorted(file.glob("part-*.parquet")) if file.is_dir() else [file]
    try:
        schema = parquet.read_schema(files[0])
        features = "embedding" if "embedding" in schema.names else "cls_token"
        wanted = [name for name in ("path", "label", "thumbnail", features) if name in schema.names]
        table = pa.concat_tables([parquet.read_table(path, columns=wanted) for path in files])
    except pa.ArrowException as error:
        raise OSError(str(error)) from None
    extra = json.loads(schema.metadata[b"dino"])
    flat = table[features].combine_chunks()
    width = flat.type.list_size
    return Embeddings(
        file,
        table["path"].to_pylist(),
        torch.from_numpy(flat.values.to_numpy(zero_copy_only=False).astype(np.float32)).view(-1, width),
        torch.tensor(table["label"].to_pylist()) if "label" in table.column_names else None,
        extra["classes"],
        extra["settings"],
        extra.get("made_from", {}),
        [one["bytes"] for one in table["thumbnail"].to_pylist()] if "thumbnail" in table.column_names else None,
    )
