"""Makes the example backbone that the package carries (``dino.load("example")``) out of a run on imagenette.

    python benchmarks/example.py RUN [--results benchmarks/results/long.json]

Weights of two or more dimensions are kept in half precision: half the bytes. RUN is a folder that ``learning.py``
trained; --results holds what was measured on it: long.json (the last point of its curve) or learning.json (its row).
"""

import argparse
import dataclasses
import json
from pathlib import Path

from dino.config import Config
from dino.models.card import CardFacts, write_card
from dino.models.weight_files import EXAMPLE
from dino.models.weights import open_weights, save_backbone

DATA = """The photos of the train part of imagenette (github.com/fastai/imagenette, itself under Apache-2.0): tench,
English springer, cassette player, chain saw, church, French horn, garbage truck, gas pump, golf ball, parachute.
No label was read. They are ImageNet's, whose terms allow research and teaching without profit and leave the rights with
their owners; none of them is in this package."""
USAGE = """
import dino

encode = dino.encoder("example")  # The file is inside the package; its preprocessing is in its header.
features = encode.features(dino.open_source("YOUR IMAGES")).features  # One row an image, of length 1
"""
_NAMES = ("data", "variant", "seed")
LICENCE = "So are these weights."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    weights = open_weights(args.run)
    config = Config.from_json((args.run / "config.json").read_text("utf-8"))
    for parameter in weights.backbone.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()
    save_backbone(weights.backbone, EXAMPLE, config.model, weights.preprocessing)

    facts = CardFacts.of(weights.backbone, weights.preprocessing, config, images=9469, classes=10, side=128)
    if args.results:
        found = json.loads(args.results.read_text("utf-8"))
        run = ("imagenette", "resnet", config.run.seed, config.optim.length)
        rows = (row for row in found.get("rows", []) if run == (*map(row.get, _NAMES), f"{row['steps']} steps"))
        last = found["curve"][-1] if "curve" in found else next(rows)
        measured = {f"imagenette_val_{name}": last[name] for name in ("knn_20", "linear", "rankme")}
        facts = dataclasses.replace(facts, results={"steps": last.get("steps", last.get("step")), **measured})
    card = write_card(EXAMPLE.with_name("model_card.md"), facts, usage=USAGE)
    text = card.read_text("utf-8")
    for old, new in (
        ("license: unknown", "license: apache-2.0"),
        (_between(text, "Say here", "## Training"), DATA + "\n\n"),
        (text[text.index("The licence of these weights") :], LICENCE + "\n"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    card.write_text(text, "utf-8")
    print(f"{EXAMPLE.name}: {EXAMPLE.stat().st_size / 2**20:.2f} MiB; {open_weights('example').summary}")


def _between(text: str, start: str, end: str) -> str:
    return text[text.index(start) : text.index(end)]


if __name__ == "__main__":
    main()
