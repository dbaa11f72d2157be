"""A set of images as one page that needs no server and no network: map, neighbours, similar patches, attention."""

import base64
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from dino.data.sources import Source
from dino.encoder.components import Codes, encode_tokens
from dino.encoder.embed import as_text, jpeg
from dino.encoder.encoder import Encoder
from dino.encoder.groups import k_means
from dino.encoder.map import map_2d
from dino.encoder.neighbors import neighbors_of_all
from dino.machine.files import write_text
from dino.pictures.sheet import COLORMAP

WIDTH = 64  # Bytes that stand for a patch.
_NEIGHBORS = 12
_COUNTS = (2, 3, 4, 5, 6, 8, 10, 12, 15, 20)
_PAGE = 2048  # Pixels a side of a sheet of thumbnails: what every graphics processor takes.


@dataclass(frozen=True, eq=False)
class Seen:
    """What the encoder gives for a set: all images by their [CLS] token, some of them by patches and attention."""

    rows: Int[Tensor, " n"]  # Of the images in the source.
    features: Float[Tensor, "n d"]  # Of length 1.
    thumbnails: list[bytes]
    dense: list[int]  # Which of the n images have patches.
    tokens: Float[Tensor, "m h w d"]  # Theirs.
    attention: Float[Tensor, "m heads h w"] | None
    pictures: list[bytes]


def see(encoder: Encoder, source: Source, patches: int, thumbnail: int, broken: dict[str, str]) -> Seen:
    """Shows a source to an encoder, evenly spread ``patches`` images of it in detail.

    Raises:
        ValueError: no image can be read.
    """
    chosen = set(torch.linspace(0, len(source) - 1, min(patches, len(source))).round().long().tolist())
    rows, features, thumbnails, pictures = [], [], [], []
    dense: list[int] = []
    tokens, attention = [], []
    for images, indices in encoder.batches(source, broken, "images"):
        found = encoder.tokens(images)
        mine = [i for i, index in enumerate(indices.tolist()) if index in chosen]
        dense += [sum(map(len, rows)) + i for i in mine]
        rows.append(indices.cpu())
        features.append(found.cls_token.cpu())
        thumbnails += [jpeg(image, thumbnail, quality=75) for image in images.cpu()]
        if mine:
            pictures += [jpeg(image, encoder.size, quality=75) for image in images[mine].cpu()]
            tokens.append(found.patch_tokens[mine].cpu())
            if encoder.backbone.has_attention:
                attention.append(encoder.attention(images[mine]).cpu())
    if not tokens:
        name, reason = next(iter(broken.items()), (source.origin, "the source is empty"))
        raise ValueError(f"none of the {len(source)} images can be read ({name}: {reason})")
    return Seen(
        torch.cat(rows),
        torch.nn.functional.normalize(torch.cat(features), dim=1),
        thumbnails,
        dense,
        torch.cat(tokens),
        torch.cat(attention) if attention else None,
        pictures,
    )


def similarity_error(tokens: Float[Tensor, "n d"], codes: Codes, queries: int = 200) -> dict[str, float]:
    """How far the similarities of codes are from the cosines of the tokens: mean and largest difference, and the 99th
    percentile, of some tokens with all."""
    unit = torch.nn.functional.normalize(tokens.float(), dim=1)
    chosen = torch.linspace(0, len(unit) - 1, min(queries, len(unit))).long().tolist()
    errors = torch.cat([(codes.similarities(i) - unit @ unit[i]).abs() for i in chosen])
    ordered = errors.sort().values
    p99 = ordered[round(0.99 * (len(ordered) - 1))]
    return {"mean": errors.mean().item(), "p99": p99.item(), "largest": errors.max().item()}


def explore(
    encoder: Encoder, source: Source, out: Path, *, patches: int = 100, limit: int = 5000, weights: str = ""
) -> dict[str, Any]:
    """Writes the page: a map of the set, each image's neighbours, and for ``patches`` images their patches.

    Of a larger set than ``limit`` so many evenly spread images are taken. Patch tokens travel as ``WIDTH`` bytes each
    (``encode_tokens``), and the page says how far their similarities are from exact ones.

    Gives the numbers of images, of those with patches, the error, and the size of the file in bytes.

    Raises:
        ValueError: no image can be read.
    """
    if len(source) > limit:
        source = source.subset(torch.linspace(0, len(source) - 1, limit).round().long())
    broken: dict[str, str] = {}
    tile = 96 if len(source) <= 500 else 64
    seen = see(encoder, source, patches, tile, broken)
    count, (m, h, w, _) = len(seen.rows), seen.tokens.shape
    flat = seen.tokens.flatten(0, 2)
    codes = encode_tokens(flat, WIDTH)
    error = similarity_error(flat, codes)
    similarities, near = neighbors_of_all(seen.features, _NEIGHBORS)
    counts = [k for k in _COUNTS if k <= count // 2]
    data: dict[str, Any] = {
        "names": [as_text(source.name(i)) for i in seen.rows.tolist()],
        "classes": source.classes if source.labels is not None else [],
        "labels": source.labels[seen.rows].tolist() if source.labels is not None else None,
        "clusters": k_means(seen.features, counts).cluster.tolist() if counts else [0] * count,
        "places": [[round(x, 4), round(y, 4)] for x, y in map_2d(seen.features).tolist()],
        "neighbors": near.tolist(),
        "similarities": [[round(value, 3) for value in row] for row in similarities.tolist()],
        "tile": tile,
        "columns": _PAGE // tile,
        "atlas": _atlas(seen.thumbnails, tile),
        "dense": seen.dense,
        "grid": [h, w],
        "side": encoder.size,
        "pictures": [_data_url(one) for one in seen.pictures],
        "width": WIDTH,
        "codes": _base64(codes.codes.numpy()),
        "scales": codes.scales.tolist(),
        "heads": 0,
        "colors": _base64((matplotlib.colormaps[COLORMAP](np.arange(256))[:, :3] * 255).round().astype(np.uint8)),
    }
    if seen.attention is not None:
        levels = seen.attention / seen.attention.amax((2, 3), keepdim=True).clamp_min(1e-12)
        data |= {
            "heads": levels.shape[1],
            "attention": _base64((levels * 255).round().to(torch.uint8).numpy()),
        }
    facts = {
        "weights": weights,
        "images": f"{count:,}",
        "with patches": f"{m:,}, {h} x {w} patches of {encoder.patch_size} pixels",
        "seen at": f"{encoder.size} pixels",
        "similarities": f"{error['mean']:.4f} from exact on average, {error['p99']:.3f} at most for 99 of 100",
    }
    if broken:
        facts["cannot be read"] = f"{len(broken):,}"
    page = _render(data, title=source.origin, facts=facts)
    write_text(out, page)
    results = {"images": count, "with_patches": m, "similarity_error": error, "bytes": out.stat().st_size}
    return {**results, "broken": broken}


def _render(data: dict[str, Any], title: str, facts: dict[str, str]) -> str:
    folder = Path(__file__).parent
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (folder / "explore.js").read_text(encoding="utf-8")
    # The browser runs this script and no other: not even one that a file's name would bring in.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return jinja.get_template("explore.html.jinja").render(
        data=data, title=as_text(title), facts=facts, script=Markup(script), digest=digest
    )


def _atlas(thumbnails: list[bytes], tile: int) -> list[str]:
    """Sheets of thumbnails, row by row: the browser decodes a few large pictures sooner than thousands of small."""
    columns = _PAGE // tile
    pages = []
    for start in range(0, len(thumbnails), columns**2):
        part = thumbnails[start : start + columns**2]
        sheet = Image.new("RGB", (min(columns, len(part)) * tile, math.ceil(len(part) / columns) * tile))
        for i, one in enumerate(part):
            sheet.paste(Image.open(io.BytesIO(one)).resize((tile, tile)), (i % columns * tile, i // columns * tile))
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=78, optimize=True)
        pages.append(_data_url(file.getvalue()))
    return pages


def _data_url(picture: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
