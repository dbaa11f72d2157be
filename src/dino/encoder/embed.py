"""Features of many images as one file, written in parts so that a run that was stopped goes on where it was."""

import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from dino.data.sources import Source
from dino.encoder.encoder import Encoder
from dino.encoder.map import map_2d
from dino.encoder.neighbors import neighbors_of_all
from dino.encoder.stored_features import check_provenance, provenance
from dino.machine import distributed
from dino.machine.files import printable, whole_file, write_text

_log = logging.getLogger(__name__)
_PART = 1024  # Images: what is lost at most when a run is stopped.
_THUMBNAIL = 128  # Pixels a side: some 4 kB an image.
Arrays = dict[str, np.ndarray]


def embed(
    encoder: Encoder,
    source: Source,
    out: Path,
    *,
    n_last_blocks: int = 1,
    patch_tokens: bool = False,
    float16: bool = False,
    thumbnails: bool = False,
    neighbors: int = 10,
    made_from: dict[str, Any] | None = None,
    part_size: int = _PART,
) -> dict[str, Any]:
    """Writes the features of every readable image to ``out`` (.npz or .parquet), a row an image.

    Columns are ``path``, ``label`` (where there are labels), the features, ``patch_tokens`` (h, w, d; flat in parquet)
    and ``thumbnail`` (what the backbone saw, a small JPEG), both where asked for. The features are the [CLS] token; of
    ``n_last_blocks`` their tokens, older first (n d). In a .npz they are called ``cls_token``, and ``classes``,
    ``broken`` (paths), ``settings`` and ``made_from`` (both JSON) are beside them.

    In a .parquet they are called ``embedding`` (a list of fixed size), and there are also ``class``, the coordinates
    ``x`` and ``y`` on a map of the set (``map_2d``) and ``neighbors``: the row numbers ``ids`` and the ``distances`` (1
    - cosine) of the nearest others, nearest first. What a .npz has beside its columns is JSON in the schema's metadata,
    under ``dino``. ``made_from``: where weights and images are, for whoever reads the file.

    Parts of ``part_size`` images are kept in the folder OUT.parts until all are there; the same call goes on from them.
    Several processes (``torchrun``) share the parts; the first of them writes the file. An ``out`` without an ending is
    a folder, to which every process writes its images as one .parquet, without map and neighbours. Gives the number of
    images, the reason for every broken one, how many were there before, and the width.

    Raises:
        ValueError: ``out`` exists or is of another kind, the parts are of other weights, images or settings, no image
            can be read, or the backbone has no blocks.
    """
    if out.suffix not in (".npz", ".parquet", ""):
        raise ValueError(f"{out} is not allowed: features are written as .npz or .parquet, or as a folder of those")
    if out.exists():
        raise ValueError(f"{out} is there already: delete it, or name another file")
    if out.suffix != ".npz":
        import_pyarrow()
    if n_last_blocks != 1 and not encoder.backbone.has_blocks:
        raise ValueError("this backbone has no blocks to look into: leave out --n-last-blocks")
    settings = provenance(
        encoder,
        {"all": source},
        n_last_blocks=n_last_blocks,
        patch_tokens=patch_tokens,
        dtype="float16" if float16 else "float32",
        **({"thumbnails": True} if thumbnails else {}),  # Parts of version 0.1 know nothing of them, and still fit.
        part_size=part_size,
    )
    folder = out.with_name(f"{out.name}.parts")
    if any(folder.glob("[0-9]*.npz")):
        check_provenance(folder, json.loads((folder / "settings.json").read_text()), settings)
    elif distributed.is_main():
        write_text(folder / "settings.json", json.dumps(settings))
    missing = [p for p in range(-(-len(source) // part_size)) if not _part_file(folder, p).exists()]
    there = len(source) - sum(len(_rows_of(p, part_size, source)) for p in missing)
    if distributed.is_main():  # Of a start with another number of processes.
        shutil.rmtree(folder / "written", ignore_errors=True)
    distributed.barrier()  # All have looked before any writes.

    def describe(images: Tensor) -> Iterator[tuple[str, np.ndarray]]:
        if n_last_blocks == 1:
            found = {"cls_token": encoder.cls_tokens(images)}
        else:
            found = {"cls_token": encoder.last_blocks(images, n_last_blocks)[:, :-1].flatten(1)}
        if patch_tokens:
            found["patch_tokens"] = encoder.tokens(images).patch_tokens
        for name, values in found.items():
            yield name, values.float().cpu().numpy().astype(np.float16 if float16 else np.float32)
        if thumbnails:
            yield "thumbnail", np.array([jpeg(image, _THUMBNAIL) for image in images.cpu()])

    mine = [missing[i] for i in distributed.share(len(missing))]
    rows = torch.tensor([row for part in mine for row in _rows_of(part, part_size, source)], dtype=torch.long)
    broken: dict[str, str] = {}
    pending: list[Arrays] = []

    def finish(part: int) -> None:
        names = [source.name(i) for i in _rows_of(part, part_size, source)] if broken else []
        noted = {name: broken[name] for name in names if name in broken}
        merged = {name: np.concatenate([rows[name] for rows in pending]) for name in (pending[0] if pending else ())}
        with whole_file(_part_file(folder, part)) as file:
            np.savez(file, broken=np.array(json.dumps(noted)), **merged)  # pyright: ignore[reportArgumentType]
        pending.clear()

    for images, indices in encoder.batches(source.subset(rows), broken):
        indices = rows[indices.cpu()].numpy()
        arrays: Arrays = {"index": indices, **dict(describe(images))}
        for part in np.unique(indices // part_size).tolist():
            while mine[0] != part:
                finish(mine.pop(0))
            here = indices // part_size == part
            pending.append({name: values[here] for name, values in arrays.items()})
    for part in mine:
        finish(part)
    distributed.barrier()

    parts = sorted(folder.glob("[0-9]*.npz"))
    broken = {}
    for path in parts:
        with np.load(path, allow_pickle=False) as arrays:
            broken |= json.loads(str(arrays["broken"]))
    parts = [path for path in parts if _holds_images(path)]
    if not parts:
        distributed.barrier()  # All have read.
        shutil.rmtree(folder, ignore_errors=True)
        first = next((f"{name}: {reason}" for name, reason in broken.items()), "the source is empty")
        raise ValueError(f"none of the {len(source)} images can be read ({first})")
    if broken and distributed.is_main():
        _log.warning("%d of %d images cannot be read and are left out", len(broken), len(source))
    extra = {"classes": source.classes, "broken": [*broken], "settings": settings, "made_from": made_from or {}}
    results = {"images": len(source) - len(broken), "already_there": there, "broken": broken}
    if not out.suffix and (own := [parts[i] for i in distributed.share(len(parts))]):
        name = f"part-{distributed.rank():05d}-of-{distributed.world_size():05d}.parquet"
        _write_parquet(folder / "written" / name, own, source, extra)
    distributed.barrier()
    if not distributed.is_main():
        return results
    if out.suffix == ".npz":
        _write_npz(out, parts, source, extra)
    elif out.suffix:
        _write_parquet(out, parts, source, extra, neighbors)
    else:
        os.replace(folder / "written", out)
    with np.load(parts[0], allow_pickle=False) as arrays:
        width = arrays["cls_token"].shape[1]
    shutil.rmtree(folder)
    return {**results, "width": width}


def jpeg(image: UInt8[Tensor, "c h w"], side: int, quality: int = 80) -> bytes:
    """The image as a JPEG, its longest side at most ``side`` pixels; of other than three channels the first, in grey.

    >>> jpeg(torch.zeros(3, 300, 200, dtype=torch.uint8), 64)[:2].hex()
    'ffd8'
    """
    pixels = (image if len(image) == 3 else image[:1].expand(3, -1, -1)).permute(1, 2, 0).contiguous().numpy()
    picture, file = Image.fromarray(pixels), io.BytesIO()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()


def as_text(name: str) -> str:
    """The name of an image, as every reader can read it: bytes that are no UTF-8 are escaped.

    >>> as_text("é.png"), as_text("\\udcff.png")
    ('é.png', '\\\\xff.png')
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return printable(name)
    return name


def _part_file(folder: Path, part: int) -> Path:
    return folder / f"{part:06d}.npz"


def _rows_of(part: int, part_size: int, source: Source) -> range:
    return range(part * part_size, min((part + 1) * part_size, len(source)))


def _holds_images(part: Path) -> bool:
    with np.load(part, allow_pickle=False) as arrays:
        return "index" in arrays


def _columns(part: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """The columns of the result, for the images of one part."""
    with np.load(part, allow_pickle=False) as arrays:
        index = arrays["index"]
        yield "path", np.array([as_text(source.name(i)) for i in index.tolist()])
        if source.labels is not None:
            yield "label", source.labels[torch.from_numpy(index)].numpy()
        for name in arrays.files:
            if name not in ("index", "broken"):
                yield name, arrays[name]


def _write_npz(out: Path, parts: list[Path], source: Source, extra: dict[str, Any]) -> None:
    """One part in memory at a time: an array in a .npz is a header with its shape, then its bytes."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, np.dtype] = {}
    for part in parts:
        for name, values in _columns(part, source):
            shapes[name] = (shapes.get(name, (0,))[0] + len(values), *values.shape[1:])
            dtypes[name] = np.promote_types(dtypes.get(name, values.dtype), values.dtype)  # Texts differ in length.
    extra = {**extra, "settings": json.dumps(extra["settings"]), "made_from": json.dumps(extra["made_from"])}
    with whole_file(out) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as array:
                header = {"descr": np.lib.format.dtype_to_descr(dtypes[name]), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(array, header)
                for part in parts:
                    values = next(values for column, values in _columns(part, source) if column == name)
                    array.write(np.ascontiguousarray(values, dtype=dtypes[name]).tobytes())
        for name, values in extra.items():
            with archive.open(f"{name}.npy", "w") as array:
                np.lib.format.write_array(array, np.array(values, dtype=np.str_), allow_pickle=False)


def _write_parquet(out: Path, parts: list[Path], source: Source, extra: dict[str, Any], neighbors: int = 0) -> None:
    """A row group a part; features are lists of fixed size. With ``neighbors`` also a map, and those: both need the
    features of all images."""
    pa, parquet = import_pyarrow()
    if neighbors:
        features = torch.cat([torch.from_numpy(dict(_columns(part, source))["cls_token"]).float() for part in parts])
        features = torch.nn.functional.normalize(features, dim=1)
        x, y = map_2d(features).numpy().T
        similarities, ids = neighbors_of_all(features, neighbors)
        distances = (1 - similarities).clamp_min(0).numpy()

    def as_column(values: np.ndarray) -> Any:
        flat = pa.array(values.reshape(-1))
        return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values[0].size)

    def as_lists(values: np.ndarray) -> Any:
        return pa.ListArray.from_arrays(np.arange(0, values.size + 1, values.shape[1], dtype=np.int32), values.ravel())

    start, writer = 0, None
    with whole_file(out) as file:
        for part in parts:
            columns = {}
            for name, values in _columns(part, source):
                if name == "thumbnail":
                    columns[name] = pa.StructArray.from_arrays(
                        [pa.array(values.tolist(), pa.binary()), columns["path"]], names=["bytes", "path"]
                    )
                    continue
                columns["embedding" if name == "cls_token" else name] = as_column(values)
                if name == "label":
                    columns["class"] = pa.array([source.classes[i] for i in values.tolist()])
                if name == "patch_tokens":
                    extra["patch_tokens shape"] = list(values.shape[1:])
            end = start + len(columns["path"])
            if neighbors:
                columns |= {"x": as_column(x[start:end]), "y": as_column(y[start:end])}
            if neighbors and similarities.shape[1]:
                columns["neighbors"] = pa.StructArray.from_arrays(
                    [as_lists(ids[start:end].numpy()), as_lists(distances[start:end])], names=["ids", "distances"]
                )
            table = pa.table(columns).replace_schema_metadata({"dino": json.dumps(extra)})
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
            start = end
        assert writer is not None
        writer.close()


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module.

    Raises:
        ValueError: it is not installed; says how.
    """
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(".parquet needs pyarrow: pip install 'dino-ssl[parquet]', or write .npz") from None
    return pyarrow, pyarrow.parquet
