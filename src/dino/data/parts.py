"""Names of parts: ``train``, ``val`` and ``test`` under all the names that people give to them."""

import re
from collections.abc import Iterable

Part = str  # "train", "val" or "test".
_WORDS: dict[str, Part] = {
    **dict.fromkeys(("train", "training", "trn", "tr", "learn", "learning"), "train"),
    **dict.fromkeys(("val", "vali", "valid", "validation", "validate", "validating"), "val"),
    **dict.fromkeys(("dev", "devel", "development", "holdout", "heldout"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "evaluate"), "test"),
}
_FILLERS = frozenset(
    {"set", "sets", "split", "splits", "part", "parts", "data", "dataset", "datasets", "image", "images", "img"}
    | {"imgs", "photo", "photos", "picture", "pictures", "pics", "sample", "samples", "subset", "folder"}
    | {"folders", "dir", "file", "files", "list", "all", "hold", "held", "out", "of"}
)
_GLUED = re.compile(rf"({'|'.join(sorted(_WORDS, key=len, reverse=True))})(sets?|splits?|data|images?|imgs?)")


def part_of(name: str) -> tuple[Part, tuple[str, ...]] | None:
    """Which part a name means, and what else it says; None for the name of no part.

    >>> part_of("Training"), part_of("valid_set"), part_of("testImages"), part_of("ILSVRC2012_img_train")
    (('train', ()), ('val', ()), ('test', ()), ('train', ('ilsvrc',)))
    >>> part_of("trains"), part_of("steam_engine")
    (None, None)
    """
    tokens = [token.lower() for token in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
    if "hold" in tokens or "held" in tokens:  # held-out
        tokens = ["holdout" if token == "out" else token for token in tokens]
    tokens = [glued[1] if (glued := _GLUED.fullmatch(token)) else token for token in tokens]
    tokens = [piece for token in tokens for piece in (("train", "val") if token == "trainval" else (token,))]
    meant = {_WORDS[token] for token in tokens if token in _WORDS}
    rest = tuple(token for token in tokens if token not in _WORDS and token not in _FILLERS)
    if meant == {"train", "val"}:  # trainval: what one may learn from.
        return "train", rest
    return (meant.pop(), rest) if len(meant) == 1 else None


def parts_of(names: Iterable[str]) -> dict[str, Part]:
    """Which of these names, of one level of folders or of one column, are parts. Empty when they are something else.

    They are parts when all of them are, or when a train part and a held-out one stand among others. Names that say
    more than the part must all say the same more.

    >>> parts_of(["Training", "Testing"]), parts_of(["train", "dev", "unlabelled"])
    ({'Training': 'train', 'Testing': 'test'}, {'train': 'train', 'dev': 'val'})
    >>> parts_of(["train", "bus"]), parts_of(["steam_train", "model_test"])
    ({}, {})
    """
    names = list(names)
    meant = {name: meaning for name in names if (meaning := part_of(name))}
    for rest in dict.fromkeys(rest for _, rest in meant.values()):
        parts = {name: part for name, (part, others) in meant.items() if others == rest}
        if len(parts) == len(names) or ("train" in parts.values() and set(parts.values()) - {"train"}):
            return parts
    return {}
