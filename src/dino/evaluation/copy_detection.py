"""Copy detection with frozen features (section 4.2.1, table 4): which original was an image made from? (Copydays)"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dino.data.sources import Source, open_source
from dino.encoder.descriptors import extract_descriptors
from dino.encoder.encoder import Encoder
from dino.encoder.sizes import resized
from dino.evaluation.ranking import average_precision, learn_whitening, ranked_tiles, whiten
from dino.options import CopyDetectionOptions

TOP = 20  # The released code looks no further down the ranking.


def copy_descriptor(
    cls_token: Float[Tensor, "b d"], patch_tokens: Float[Tensor, "b h w d"], p: float | int = 4
) -> Float[Tensor, "b two_d"]:
    """The [CLS] token and the GeM pooled patch tokens, concatenated (section 4.2.1, "Copy detection").

    GeM: the p-th root of the mean of p-th powers, of tokens clamped to at least 1e-6. In float32.

    >>> descriptor = copy_descriptor(torch.tensor([[5.0]]), torch.tensor([[[[1.0], [2.0]]]]))
    >>> [round(value, 4) for value in descriptor[0].tolist()]  # The second: ((1 + 16) / 2) ** (1 / 4)
    [5.0, 1.7075]
    """
    powers = patch_tokens.float().clamp(min=1e-6).pow(p)
    return torch.cat([cls_token.float(), powers.mean((1, 2)).pow(1 / p)], dim=1)


def score_copies(
    queries: Float[Tensor, "m d"], database: Float[Tensor, "n d"], positives: Bool[Tensor, "m n"], top: int | None = TOP
) -> Float[Tensor, " m"]:
    """Average precision of every query, 0 to 1; ``positives`` says which of the database it was made from.

    Features have length 1. What comes after the first ``top`` of the ranking counts as not found; ``None``: nothing is
    cut.
    """
    aps = []
    for rows, order in ranked_tiles(queries, database):
        relevant = positives[rows].to(order.device)
        aps.append(average_precision(relevant.gather(1, order)[:, :top], relevant.sum(1)))
    return torch.cat(aps)


def find_blocks(folder: Path) -> dict[str, Path]:
    """The parts of Copydays there are, by name: original, strong, jpegqual/3, ..., crops/10, ... (or ``jpeg``).

    Raises:
        ValueError: there are no originals, or nothing made from them.
    """
    blocks = {name: folder / name for name in ("original", "strong") if (folder / name).is_dir()}
    for name in ("jpegqual", "jpeg", "crops"):
        degrees = sorted(
            (path for path in folder.glob(f"{name}/*") if path.name.isdecimal()), key=lambda p: int(p.name)
        )
        blocks |= {f"{name}/{path.name}": path for path in degrees}
        if not degrees and (folder / name).is_dir():
            blocks[name] = folder / name
    if "original" not in blocks or len(blocks) == 1:
        raise ValueError(
            f"{folder} is not laid out as Copydays: it has {', '.join(blocks) or 'no known part'}, and needs original/ "
            "and some of strong/, crops/NUMBER/, jpegqual/NUMBER/"
        )
    return blocks


def match(block: str, queries: Sequence[str], originals: Sequence[str]) -> Bool[Tensor, "m n"]:
    """Which original every query was made from, by file name: the same name, or for ``strong`` its first four letters.

    Raises:
        ValueError: a query has no original.
    """
    letters = 4 if block == "strong" else None
    matches = torch.tensor([[query[:letters] == original[:letters] for original in originals] for query in queries])
    if (lost := ~matches.any(1)).any():
        example = queries[int(lost.nonzero()[0])]
        raise ValueError(f"{int(lost.sum())} images of {block} have no original of their name, the first {example}")
    return matches


def run(
    encoder: Encoder,
    folder: Path,
    options: CopyDetectionOptions = CopyDetectionOptions(),
    *,
    distractors: Source | None = None,
    whitening: Source | None = None,
) -> dict[str, float]:
    """Searches every image of Copydays among the originals and the distractors (table 4: ``strong``).

    ``whitening``: images to learn it from. Returns
    ``{"copydays_strong_map": per cent, "copydays_strong_map_uncut": ..., ...}`` for every part; the first looks at the
    20 nearest, as the released code does, the second at the whole ranking.

    Raises:
        ValueError: the folder is not laid out as Copydays, or one of its images cannot be read.
    """

    def extract(source: Source, label: str, complete: bool = False) -> Tensor:
        found = extract_descriptors(
            encoder,
            source,
            lambda images: copy_descriptor(*encoder.tokens(images)),
            lambda image, _: resized(image, options.side, options.side),
            complete=complete,
            label=label,
        )
        return found.features.to(encoder.device)

    blocks = find_blocks(folder)
    sources = {name: open_source(path) for name, path in blocks.items()}
    names = {name: [Path(source.name(i)).stem for i in range(len(source))] for name, source in sources.items()}
    positives = {name: match(name, names[name], names["original"]) for name in blocks}  # First: it may fail.
    found = {name: extract(source, name, complete=True) for name, source in sources.items()}
    database = found["original"]
    if distractors is not None:
        database = torch.cat([database, extract(distractors, "distractors")])
    learnt = None if whitening is None else learn_whitening(extract(whitening, "whitening"))

    def finish(features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if learnt is None else whiten(features, learnt)

    results, database = {}, finish(database)
    for name, features in found.items():
        queries = finish(features)
        true = F.pad(positives[name], (0, len(database) - positives[name].shape[1]))
        for suffix, top in (("", TOP), ("_uncut", None)):
            aps = score_copies(queries, database, true, top)
            results[f"copydays_{name}_map{suffix}"] = 100 * aps.mean().item()
    return results
