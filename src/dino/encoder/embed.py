"""Features of many images as one file, written in parts so that a run that was stopped goes on where it was."""

import json
import logging
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino.data.sources import Source
from dino.encoder.encoder import Encoder
from dino.encoder.stored_features import check_provenance, provenance
from dino.machine.files import whole_file, write_text

_log = logging.getLogger(__name__)
_PART = 1024  # Images: what is lost at most when a run is stopped.
Arrays = dict[str, np.ndarray]


def embed(
    encoder: Encoder,
    source: Source,
    out: Path,
    *,
    n_last_blocks: int = 1,
    patch_tokens: bool = False,
    float16: bool = False,
    part_size: int = _PART,
) -> dict[str, Any]:
    """Writes the features of every readable image to ``out`` (.npz or .parquet), a row an image.

    Columns are ``path``, ``label`` (where there are labels), ``cls_token`` (d; of ``n_last_blocks``: n d, older first)
    and ``patch_tokens`` (h, w, d; flat in parquet). A .npz also holds ``classes``, ``broken`` (paths) and ``settings``
    (JSON); a .parquet has them as JSON in its schema's metadata, under ``dino``.

    Parts of ``part_size`` images are kept in the folder OUT.parts until all are there; the same call goes on from them.
    Gives the number of images, the reason for every broken one, how many were there before, and the width.

    Raises:
        ValueError: ``out`` exists or is of another kind, the parts are of other weights, images or settings, no image
            can be read, or the backbone has no blocks.
    """
    if out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"{out} is not allowed: features are written as .npz or .parquet")
    if out.exists():
        raise ValueError(f"{out} is there already: delete it, or name another file")
    if out.suffix == ".parquet":
        _pyarrow()
    if n_last_blocks != 1 and not encoder.backbone.has_blocks:
        raise ValueError("this backbone has no blocks to look into: leave out --n-last-blocks")
    settings = provenance(
        encoder,
        {"all": source},
        n_last_blocks=n_last_blocks,
        patch_tokens=patch_tokens,
        dtype="float16" if float16 else "float32",
        part_size=part_size,
    )
    folder = out.with_name(f"{out.name}.parts")
    kept = sorted(folder.glob("[0-9]*.npz"))
    if kept:
        check_provenance(folder, json.loads((folder / "settings.json").read_text()), settings)
    else:
        write_text(folder / "settings.json", json.dumps(settings))

    def describe(images: Tensor) -> Iterator[tuple[str, Tensor]]:
        if n_last_blocks == 1:
            yield "cls_token", encoder.cls_tokens(images)
        else:
            yield "cls_token", encoder.last_blocks(images, n_last_blocks)[:, :-1].flatten(1)
        if patch_tokens:
            yield "patch_tokens", encoder.tokens(images).patch_tokens

    start = min((int(kept[-1].stem) + 1) * part_size, len(source)) if kept else 0
    broken: dict[str, str] = {}
    batches = encoder.batches(source.subset(torch.arange(start, len(source))), broken)
    pending: list[Arrays] = []
    number = start // part_size
    for images, indices in batches:
        indices = (indices + start).numpy()
        rows: Arrays = {"index": indices}
        for name, values in describe(images):
            rows[name] = values.float().cpu().numpy().astype(np.float16 if float16 else np.float32)
        for part in np.unique(indices // part_size).tolist():
            if part > number:
                _write_part(folder, number, pending, broken)
                pending, number = [], part
            here = indices // part_size == part
            pending.append({name: values[here] for name, values in rows.items()})
    _write_part(folder, number, pending, broken)

    parts = sorted(folder.glob("[0-9]*.npz"))
    noted: dict[str, str] = {}
    for path in parts:
        with np.load(path, allow_pickle=False) as arrays:
            noted |= json.loads(str(arrays["broken"]))
    broken = noted | broken  # Those after the last image that could be read are in no part.
    if not parts:
        shutil.rmtree(folder)
        first = next((f"{name}: {reason}" for name, reason in broken.items()), "the source is empty")
        raise ValueError(f"none of the {len(source)} images can be read ({first})")
    if broken:
        _log.warning("%d of %d images cannot be read and are left out", len(broken), len(source))
    write = _write_npz if out.suffix == ".npz" else _write_parquet
    count, width = write(out, parts, source, {"classes": source.classes, "broken": [*broken], "settings": settings})
    shutil.rmtree(folder)
    return {"images": count, "width": width, "already_there": min(start, len(source)), "broken": broken}


def _write_part(folder: Path, number: int, pending: list[Arrays], broken: dict[str, str]) -> None:
    if pending:
        merged = {name: np.concatenate([rows[name] for rows in pending]) for name in pending[0]}
        with whole_file(folder / f"{number:06d}.npz") as partial:
            np.savez(partial, broken=np.array(json.dumps(broken)), **merged)  # pyright: ignore[reportArgumentType]
        broken.clear()


def _columns(part: Path, source: Source) -> Iterator[tuple[str, np.ndarray]]:
    """The columns of the result, for the images of one part."""
    with np.load(part, allow_pickle=False) as arrays:
        index = arrays["index"]
        yield "path", np.array([source.name(i) for i in index.tolist()])
        if source.labels is not None:
            yield "label", source.labels[torch.from_numpy(index)].numpy()
        for name in arrays.files:
            if name not in ("index", "broken"):
                yield name, arrays[name]


def _write_npz(out: Path, parts: list[Path], source: Source, extra: dict[str, Any]) -> tuple[int, int]:
    """One part in memory at a time: an array in a .npz is a header with its shape, then its bytes."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, np.dtype] = {}
    for part in parts:
        for name, values in _columns(part, source):
            shapes[name] = (shapes.get(name, (0,))[0] + len(values), *values.shape[1:])
            dtypes[name] = np.promote_types(dtypes.get(name, values.dtype), values.dtype)  # Texts differ in length.
    extra = {**extra, "settings": json.dumps(extra["settings"])}
    with whole_file(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
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
    return shapes["path"][0], shapes["cls_token"][1]


def _write_parquet(out: Path, parts: list[Path], source: Source, extra: dict[str, Any]) -> tuple[int, int]:
    """A row group a part; features are lists of fixed size."""
    pa, parquet = _pyarrow()
    rows, writer = 0, None
    with whole_file(out) as partial:
        for part in parts:
            columns = {}
            for name, values in _columns(part, source):
                flat = pa.array(values.reshape(-1))
                columns[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values[0].size)
                if values.ndim > 1:
                    extra[f"{name} shape"] = list(values.shape[1:])
            table = pa.table(columns).replace_schema_metadata({"dino": json.dumps(extra)})
            writer = writer or parquet.ParquetWriter(partial, table.schema)
            writer.write_table(table)
            rows += len(table)
        assert writer is not None
        writer.close()
    return rows, extra["cls_token shape"][0]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(".parquet needs pyarrow: pip install 'dino-ssl[parquet]', or write .npz") from None
    return pyarrow, pyarrow.parquet
