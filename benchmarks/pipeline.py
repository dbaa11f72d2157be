"""From images to crops: ours beside Pillow/torchvision (the plain form) and lightly's DINOTransform.

    python benchmarks/pipeline.py FOLDER [--task vits16 tiny4] [--device cuda] [--runs 5] [--images N]

FOLDER holds JPEGs in one folder a class. Two measurements: ``augment``, decoded images to crops on one thread (per
image and core); and ``pipeline``, JPEG files to batches of crops on the device with all cores, as training reads them:
worker processes for the others; for ours both decoding anew (``dino``) and from the cache, decoded once (``cached``).
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from contenders import NAMES, TASKS, configuration, make_batches
from side_by_side import available, compare, save, show


def make(name: str, options: dict[str, Any]) -> Callable[[], int]:
    if options["what"] == "augment":
        return make_augment(name, options)
    options = {**options, "cache": "auto" if name == "cached" else "none"}
    batches: Iterator[Any] = make_batches("dino" if name == "cached" else name, options)
    count = max(1, options["images"] // options["batch"])
    for _ in range(8):  # Workers start, and what they had ready is used up.
        next(batches)

    def run() -> int:
        for _ in range(count):
            next(batches)
        return count * options["batch"]

    return run


def make_augment(name: str, options: dict[str, Any]) -> Callable[[], int]:
    """All images in memory; one call augments all of them, on one thread."""
    import torch
    from PIL import Image

    torch.set_num_threads(1)
    task = TASKS[options["task"]]
    files = [path for path in Path(options["folder"]).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg")]
    files = sorted(files, key=lambda path: path.name)[: options["images"]]
    images = [Image.open(path).convert("RGB") for path in files]
    sigma = configuration(options).crops.blur_sigma
    if name == "dino":
        from dino.augment.multicrop import MultiCrop
        from dino.data.decode import Canvas, from_pillow, to_canvas
        from dino.machine.device import prepare

        prepare(torch.device("cpu"), threads=1)  # As training does.
        tensors = [from_pillow(image, None) for image in images]
        height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (1, 2))
        canvas, multicrop = to_canvas(tensors, height, width), MultiCrop(configuration(options).crops)
        batches = [
            Canvas(*(x[i : i + options["batch"]] for x in canvas)) for i in range(0, len(images), options["batch"])
        ]

        def run() -> int:
            for batch in batches:
                multicrop(batch)
            return len(images)

        return run
    if name == "lightly":
        from lightly.transforms import DINOTransform

        size, local = task["sizes"]
        transform: Any = DINOTransform(size, local_crop_size=local, n_local_views=task["local_count"], sigmas=sigma)
    else:
        import plain

        transform = plain.Crops(*task["sizes"], task["local_count"], sigma)

    def run_each() -> int:
        for image in images:
            transform(image)
        return len(images)

    return run_each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["tiny4"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where ours makes crops")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=4096, help="a round")
    parser.add_argument("--name", default="pipeline", help="of the file of results")
    args = parser.parse_args()
    results = {}
    for task in args.task:
        for what in ("augment", "pipeline"):
            options = {
                "task": task,
                "what": what,
                "device": args.device,
                "batch": args.batch,
                "images": args.images if what == "pipeline" else args.images // 8,
                "folder": str(args.folder),
            }
            names = ["dino", "cached", *NAMES[1:]] if what == "pipeline" else NAMES
            alone = what == "pipeline"
            rows = compare(make, available(names), options, args.runs, warmup=0 if alone else 1, alone=alone)
            show(f"{what}, {task}, {options['images']} images a round, {args.device}, {args.runs} rounds", rows)
            shown = {key: value for key, value in options.items() if key != "folder"}
            results[f"{task} {what}"] = {"options": shown, "runs": args.runs, "contenders": rows}
    save(args.name, results, args.device)


if __name__ == "__main__":
    main()
