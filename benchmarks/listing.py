"""How long a run takes to know its images, and what it remembers of them: seconds, and bytes a name.

    python benchmarks/listing.py [--files 1281167] [--names 10000000]

--files empty files in 1,000 class folders (ImageNet's numbers) are listed from the disk, as every run begins; --names
are generated, of ImageNet's form. Each in a process of its own.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from side_by_side import save


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def name(i: int) -> tuple[str, str]:
    return f"train/n{i // 1282:08d}/", f"n{i // 1282:08d}_{i * 7919 % 1_000_000}.JPEG"


def listed(folder: str) -> dict[str, Any]:
    from dino.data.sources import open_source

    before, began = resident(), time.perf_counter()
    source = open_source(folder, part="train")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"images": len(source), "classes": len(source.classes), "seconds": round(seconds, 2)}
    kept = resident() - before
    return found | {"bytes_a_name": round(kept / len(source), 1), "peak_gib": round(peak / 2**30, 2)}


def generated(count: int) -> dict[str, Any]:
    from dino.data.files import Found
    from dino.data.listing import Listing

    listing, before, began = Listing(), resident(), time.perf_counter()
    for i in range(count):
        folder, file = name(i)
        listing.add(Found(folder, file, f"data/{folder}"))
    seconds = time.perf_counter() - began
    return {
        "images": len(listing.images),
        "seconds": round(seconds, 2),
        "bytes_a_name": round((resident() - before) / count, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_281_167)
    parser.add_argument("--names", type=int, default=10_000_000)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.files):
            below, file = name(i)
            path = Path(folder, below)
            if i % 1282 == 0:
                path.mkdir(parents=True)
            os.close(os.open(path / file, os.O_CREAT))
        with context.Pool(1) as pool:
            results["on_disk"] = pool.apply(listed, (folder,))
    print(json.dumps(results["on_disk"]), flush=True)
    with context.Pool(1) as pool:
        results["generated"] = pool.apply(generated, (args.names,))
    print(json.dumps(results["generated"]))
    save("listing", results, "cpu")


if __name__ == "__main__":
    main()
