"""Damaged image files through the real source and loader: each is decoded, or listed with its reason.

    python benchmarks/mutated.py [--count 10000] [--seed 0]

Of every format that is read: truncated, with flipped bits, with bytes cut out or doubled, with a wrong extension. They
are read in processes of their own: a crash or a hang (more than 30 seconds for one file) is counted and named, and ends
with exit code 1. Odd files that are there already: ``odd_images.py``.
"""

import argparse
import collections
import io
import multiprocessing
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dino.data.loader import iterate_once
from dino.data.sources import open_source
from side_by_side import save

HANGS = 30.0  # Seconds.
# Extension -> how Pillow writes it, and the modes that it can hold.
FORMATS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    ".jpg": ("JPEG", ("RGB", "L", "CMYK"), {}),
    ".jpeg": ("JPEG", ("RGB", "L"), {"progressive": True}),
    ".png": ("PNG", ("RGB", "RGBA", "L", "P", "1", "I;16"), {}),
    ".webp": ("WEBP", ("RGB", "RGBA"), {}),
    ".tif": ("TIFF", ("RGB", "L", "I;16", "F", "CMYK"), {}),
    ".tiff": ("TIFF", ("RGB", "L"), {"compression": "tiff_lzw"}),
    ".bmp": ("BMP", ("RGB", "L", "P"), {}),
    ".gif": ("GIF", ("P", "L"), {}),
    ".ppm": ("PPM", ("RGB",), {}),
    ".pgm": ("PPM", ("L",), {}),
    ".pbm": ("PPM", ("1",), {}),
    ".jp2": ("JPEG2000", ("RGB", "L"), {}),
    ".avif": ("AVIF", ("RGB",), {}),
}


def picture(rng: random.Random, mode: str) -> Image.Image:
    size = rng.randrange(1, 40), rng.randrange(1, 40)
    noise = np.random.default_rng(rng.randrange(2**32))
    if mode == "F":
        return Image.fromarray(noise.normal(size=size[::-1]).astype(np.float32))
    if mode == "I;16":
        return Image.fromarray(noise.integers(0, 2**16, size[::-1], dtype=np.uint16))
    colors = Image.fromarray(noise.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    return colors if mode == "RGB" else colors.convert(mode)


def damaged(rng: random.Random, data: bytes) -> bytes:
    """One to three of: the end cut off, bits flipped, a piece cut out, a piece doubled, a header of other numbers."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at, length = rng.randrange(max(len(changed), 1)), rng.randrange(1, 64)
        kind = rng.randrange(5)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            for _ in range(rng.choice([1, 1, 8, 64])):
                if changed:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at : at + length]
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif changed:
            for place in range(min(len(changed), 48)):
                if rng.random() < 0.1:
                    changed[place] = rng.choice([0, 1, 127, 128, 255])
    return bytes(changed)


def make(folder: Path, count: int, seed: int) -> None:
    rng, extensions = random.Random(seed), list(FORMATS)
    for i in range(count):
        extension = extensions[i % len(extensions)]
        kind, modes, options = FORMATS[extension]
        file = io.BytesIO()
        picture(rng, rng.choice(modes)).save(file, kind, **options)
        data = damaged(rng, file.getvalue()) if rng.random() < 0.95 else file.getvalue()
        name = rng.choice(extensions) if rng.random() < 0.15 else extension
        (folder / f"{i:06d}{name}").write_bytes(data)


def read(paths: list[str], results: Any) -> None:
    """One file after the other, as a run does: decoded at most 64 pixels large, and listed where that fails."""
    for path in paths:
        results.send(("begin", path, ""))
        broken: dict[str, str] = {}
        try:
            source = open_source(path)
            found = sum(len(batch.indices) for batch in iterate_once(source, 8, workers=0, broken=broken))
            reason = next(iter(broken.values()), "")
            results.send(
                ("decoded" if found == 1 else "listed" if reason and "\n" not in reason else "lost", path, reason)
            )
        except ValueError as error:  # One line that refuses the file.
            results.send(("listed", path, str(error)))
        except BaseException as error:
            results.send(("traceback", path, f"{type(error).__name__}: {error}"))
    results.send(("end", "", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    make(folder, args.count, args.seed)
    left = sorted(map(str, folder.iterdir()))
    counts, bad, slowest = collections.Counter(), [], ("", 0.0)
    context = multiprocessing.get_context("fork")  # So that what is imported here need not be again.
    while left:
        ours, theirs = context.Pipe()
        process = context.Process(target=read, args=(left, theirs))
        process.start()
        theirs.close()
        current, began, done = "", time.monotonic(), 0
        try:
            while ours.poll(HANGS):
                what, path, reason = ours.recv()
                if what == "begin":
                    current, began = path, time.monotonic()
                    continue
                if what == "end":
                    current = ""
                    break
                done += 1
                counts[what] += 1
                slowest = max(slowest, (path, time.monotonic() - began), key=lambda pair: pair[1])
                if what in ("traceback", "lost"):
                    bad.append(f"{what}: {path}: {reason}")
            else:
                counts["hang"] += 1
                bad.append(f"hang: {current}")
        except EOFError:
            counts["crash"] += 1
            bad.append(f"crash: {current}")
        process.kill()
        process.join()
        left = left[done + 1 :] if current else []
    result = {name: counts[name] for name in ("decoded", "listed", "lost", "traceback", "crash", "hang")}
    result |= {"files": args.count, "slowest_seconds": round(slowest[1], 2)}
    print(result)
    print(*bad[:50], sep="\n")
    shutil.rmtree(folder)
    save("mutated", {**result, "seed": args.seed}, "cpu")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
