"""Inputs on which version 0.1 failed: for each a command, and how it ends with one version's source or several.

    python benchmarks/cases.py CASES [--src SRC ...] [--only PATTERN] [--markdown FILE]

CASES: what ``make_cases.py`` wrote. Faults that are not among them get small inputs made here. SRC: the ``src`` folder
of a version (default: this one). A line a case and version: exit code, traceback or time-out, and what was said last,
of a result the numbers that matter. A command hangs when it does nothing for ``IDLE`` seconds or takes over ``LIMIT``.
"""

import argparse
import contextlib
import gzip
import importlib
import io
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import textures

IDLE, LIMIT = 20, 300
TINY = "--model.backbone vit_nano --model.out-dim 16 --model.hidden-dim 8 --optim.batch-size 4 --quiet --json"
STEPS = f"{TINY} --optim.length 2steps"
STILL = f"{STEPS} --run.device cpu --data.val-fraction 0.1"


class Case(NamedTuple):
    name: str
    does: str | Callable[[Path], Any]  # Words of the command line, or what gives a line, in the folder of made inputs.
    before: Callable[[Path], Any] | None = None  # Something that must have happened, in the same folder.


def cases() -> list[Case]:
    """CASES/, MADE/ and RUN stand for the folders and for a run of a small network."""
    many = [Case(f"{name}: embed", f"embed RUN CASES/{name} --out x.npz --json") for name in FOLDERS]
    many += [Case(f"{name}: pretrain", f"pretrain CASES/{name} --out made {STEPS}") for name in FOLDERS]
    many += [Case(f"{name}: eval knn", f"eval knn RUN CASES/{name} --json") for name in LABELLED]
    many += [Case(f"lists/{name}: eval knn", f"eval knn RUN CASES/lists/{name} --json") for name in LISTS]
    return [
        *many,
        *(
            Case(f"{kind} set: eval knn", f"eval knn RUN MADE/{kind}_set --k 5 --json")
            for kind in ("microscopy", "elevation")
        ),
        *(Case(f"{kind} set: pretrain", f"pretrain MADE/{kind}_set --out made {STEPS}") for kind in textures.KINDS),
        Case("lists, tabs", "eval knn RUN MADE/tabs.tsv --json"),
        Case("latin1, one broken: pretrain", f"pretrain CASES/latin1 --data.max-broken 0.3 --out made {STEPS}"),
        Case("small: attention", "attention RUN CASES/small --out made --json"),
        Case("small: pca", "pca RUN CASES/small --out made --json"),
        Case("archives/dotdot.tar: embed", "embed RUN CASES/archives/dotdot.tar --out x.npz --json"),
        Case("a gzip named .tar: embed", "embed RUN MADE/packed.tar --out x.npz --json"),
        Case("davis, a mask unreadable", "eval video-segmentation RUN CASES/davis --size 64 --json"),
        Case("a stray in val/: pretrain", f"pretrain MADE/stray_val --out made {STEPS}"),
        Case("16-bit MinIsWhite", min_is_white),
        Case("float16 TIFF: embed", "embed RUN MADE/float16 --out x.npz --json"),
        Case("float64 TIFF: embed", "embed RUN MADE/float64 --out x.npz --json"),
        Case("5 channels: pretrain", f"pretrain MADE/five --out made {STEPS}"),
        Case("5 channels, planar: pretrain", f"pretrain MADE/five_planar --out made {STEPS}"),
        Case("weights with NaN: embed", "embed MADE/nan.safetensors CASES/small --out x.npz --json"),
        Case("a FIFO: embed", "embed RUN MADE/fifo --out x.npz --json"),
        Case("an EPS named .jpg", "embed RUN MADE/eps --out x.npz --json"),
        Case("disk full: pretrain", f"pretrain shapes:12x32 --out DISK/run {STEPS}"),
        *(Case(f"--{flag}", f"pretrain shapes:12x32 --out made {STEPS} --{flag}") for flag in FLAGS),
        Case("--crop -8: eval knn", "eval knn RUN shapes:12x32 --crop=-8 --json"),
        Case("--batch-size 0: embed", "embed RUN shapes:12x32 --out x.npz --batch-size 0 --json"),
        Case("weights, timm {state_dict}", "embed MADE/timm.pth CASES/small --out x.npz --json"),
        Case("weights, DeiT {model}", "embed MADE/deit.pth CASES/small --out x.npz --json"),
        Case("weights, _orig_mod.", "embed MADE/compiled.pth CASES/small --out x.npz --json"),
        Case("weights, flat teacher.backbone.", "embed MADE/flat.pth CASES/small --out x.npz --json"),
        Case("weights, Lightning", "embed MADE/lightning.ckpt CASES/small --out x.npz --json"),
        Case("weights, a tensor missing", "embed MADE/partial.pth CASES/small --out x.npz --json"),
        Case("grown data on resume", f"pretrain grown --out made {STILL}", grow),
        Case("recipe trains on all", "", None)._replace(does=recipes),
        Case("TF32 and Pillow's limit after a run from Python", global_settings),
        Case("frozen features can be used", usable),
        Case("a DAVIS frame enlarged, against OpenCV", opencv),
        Case("JPEG decoder", lambda _: decoder()),
    ]


FOLDERS = ["depth12", "depth12_png", "nodata_f32min", "eloop", "mixed", "small", "stray", "latin1"]
LABELLED = ["parts_Training_Testing", "parts_train_valid_set", "parts_train_dev", "stray"]
LISTS = ["blank.csv", "diagnosis.csv", "semicolon.csv", "caffe.txt", "split.csv"]
FLAGS = [
    *("optim.batch-size 0", "crops.global-size -8", "crops.local-size 0", "run.threads -3", "optim.base-lr inf"),
    *("crops.std 0 0 0", "data.canvas -8", "data.channels 0"),
]


def make(at: Path, run: Path) -> None:
    """The inputs that ``make_cases.py`` does not write."""
    import tifffile
    import torch
    from PIL import Image
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    def picture(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:40, :40]
        return ((rng.integers(0, 255, 3) + x[..., None] * rng.integers(1, 5, 3) + y[..., None]) % 256).astype(np.uint8)

    def save(pixels: np.ndarray, *names: str) -> None:
        path = at.joinpath(*names)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for kind in textures.KINDS:
        textures.write(kind, at / f"{kind}_set")
    for i in range(12):
        for part in ("train", "val"):
            save(picture(i), "stray_val", part, "ab"[i % 2], f"{i}.png")
        save(picture(i), "fifo", f"{i}.png")
        save(picture(i), "eps", f"{i}.png")
        save(picture(i), "photos", "ab"[i % 2], f"{i}.png")
        five = np.concatenate((picture(i), picture(i + 50)[..., :2]), -1).astype(np.uint16) * 16 + 100
        for name, pixels, planar in (
            ("float16", picture(i).astype(np.float16)[..., 0], False),
            ("float64", picture(i).astype(np.float64)[..., 0] * 1e3, False),
            ("five", five, False),
            ("five_planar", np.moveaxis(five, -1, 0).copy(), True),
        ):
            (at / name).mkdir(exist_ok=True)
            layout: dict[str, Any] = {"planarconfig": "separate" if planar else "contig"} if pixels.ndim == 3 else {}
            tifffile.imwrite(at / name / f"{i:02}.tif", pixels, photometric="minisblack", **layout)
    save(picture(99), "stray_val", "val", "preview.png")
    os.mkfifo(at / "fifo" / "pipe.png")
    (at / "eps" / "drawing.jpg").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    (at / "tabs.tsv").write_text(
        "path\tlabel\n" + "".join(f"photos/{'ab'[i % 2]}/{i}.png\tk{i // 6}\n" for i in range(12))
    )
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        archive.add(at / "photos", "photos")
    (at / "packed.tar").write_bytes(gzip.compress(plain.getvalue()))

    state = load_file(run / "backbone.safetensors")
    with safe_open(run / "backbone.safetensors", "pt") as file:
        about = file.metadata()
    broken = {name: tensor.clone() for name, tensor in state.items()}
    next(iter(broken.values())).view(-1)[0] = float("nan")
    save_file(broken, at / "nan.safetensors", about)
    import timm

    foreign = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32).state_dict()
    ours = importlib.import_module("dino").vit_tiny(16).state_dict()
    prefixed = {f"teacher.backbone.{name}": tensor for name, tensor in ours.items()}
    for name, what in (
        ("timm.pth", {"state_dict": foreign, "arch": "vit_tiny_patch16_224"}),
        ("deit.pth", {"model": foreign}),
        ("compiled.pth", {"teacher": {f"_orig_mod.backbone.{name}": tensor for name, tensor in ours.items()}}),
        ("flat.pth", prefixed),
        ("lightning.ckpt", {"state_dict": prefixed, "pytorch-lightning_version": "2.5", "hyper_parameters": {}}),
        ("partial.pth", {name: tensor for name, tensor in ours.items() if "blocks.3.mlp" not in name}),
    ):
        torch.save(what, at / name)


def min_is_white(_: Path) -> str:
    """The first pixel is the brightest."""
    import tifffile

    from dino.data.decode import decode

    file = io.BytesIO()
    tifffile.imwrite(file, np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000, photometric="miniswhite")
    first, last = decode(file.getvalue())[0].flatten()[[0, -1]].tolist()
    return f"its brightest pixel is read as {first}, its darkest as {last}"


def grow(here: Path) -> None:
    """A run of 2 steps on 10 images; then there are more."""
    from PIL import Image

    for i in range(10):
        path = here / "grown" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.effect_noise((32, 32), 60).convert("RGB").save(path)
    front_door(shlex.split(f"pretrain grown --out made {STILL}"))
    for i in range(10, 40):
        Image.effect_noise((32, 32), 60).convert("RGB").save(here / "grown" / f"{i}.png")


def recipes(_: Path) -> str:
    from dino.recipes import RECIPES, Facts

    with contextlib.suppress(TypeError):
        facts = Facts(images=1_281_167, side=224, accelerator=True)
        said = []
        for name in ("vits16_vanilla_100ep", "vits16_boost_300ep", "resnet50"):
            config = RECIPES[name](facts)
            said.append(f"{name} holds out {config.data.val_fraction:g}, min_lr {config.optim.min_lr:g}")
        return "; ".join(said)
    return "no such recipe"


def global_settings(_: Path) -> str:
    """What ``prepare`` for a card (none is needed) and decoding leave behind."""
    import torch
    from PIL import Image

    def state() -> tuple[Any, ...]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, Image.MAX_IMAGE_PIXELS

    torch.backends.cudnn.allow_tf32 = False
    before = state()
    importlib.import_module("dino.data.decode")
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("dino.hardware").prepare(torch.device("cuda"))
    with contextlib.suppress(ModuleNotFoundError):
        device = importlib.import_module("dino.machine.device")
        with device.prepared(torch.device("cuda")):
            assert torch.backends.cuda.matmul.allow_tf32
    after = state()
    return f"TF32 of products, of convolutions, pixel limit: {before}, then {after}"


def usable(_: Path) -> str:
    """Whether features of a frozen backbone can go on into training."""
    import torch

    with contextlib.suppress(ModuleNotFoundError, AttributeError):
        import dino

        features = dino.encoder(str(RUN)).features(
            importlib.import_module("dino.data.sources").open_source("shapes:8x32")
        )
        features = features.features
        layer = torch.nn.Linear(features.shape[1], 2)
        layer(features).sum().backward()
        return "a layer on them is trained"
    frozen = importlib.import_module("dino.features")
    data = importlib.import_module("dino.data.sources").open_source("shapes:8x32")
    features = frozen.extract_features(importlib.import_module("dino").load(str(RUN)), data).features
    layer = torch.nn.Linear(features.shape[1], 2)
    layer(features).sum().backward()
    return "a layer on them is trained"


def opencv(_: Path) -> str:
    import cv2
    import torch

    from dino.data.davis import resize_bilinear

    frame = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    different = 0
    for height, width in ((480, 640), (66, 94), (100, 61), (35, 140)):
        theirs = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
        ours = resize_bilinear(torch.from_numpy(frame).permute(2, 0, 1), height, width).permute(1, 2, 0).numpy()
        different += int((ours != theirs).sum())
    return f"{different} bytes differ (OpenCV {cv2.__version__})"


def decoder() -> str:
    from dino.data import decode

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", (32, 32)).save(file, "JPEG")
        decode.decode(file.getvalue())
    used = getattr(decode.decode_jpeg, "__module__", "?")
    return f"{used}; warnings: {sorted({type(one.message).__name__ for one in said})}"


RUN = Path()


def front_door(arguments: list[str]) -> int:
    name = "dino.commands.cli" if importlib.util.find_spec("dino.commands.cli") else "dino.cli"
    return importlib.import_module(name).main(arguments)


def outcome(said: str, here: Path) -> str:
    """What was said last; of a result, the numbers that matter."""
    said = re.sub(r"[╭╮╰╯─│]+", " ", said)  # Wrong usage comes in a box.
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()] or ["(nothing)"]
    if "Parsing error" in lines[0] or "error" in lines[0].lower():
        return " ".join(lines)[:200]
    with contextlib.suppress(json.JSONDecodeError):
        found = json.loads(lines[-1])
        if isinstance(found, dict):
            settings = found.get("settings", {})
            wanted = ("images", "broken", "steps", "knn_5_top1", "knn_10_top1", "dim")
            line = ", ".join(f"{key} {found[key]}" for key in wanted if key in found)
            classes, counted = settings.get("classes", "not said"), settings.get("train_images")
            line += f", classes {classes}, train images {counted}" if "knn_10_top1" in found and counted else ""
            if (here / "x.npz").exists():
                with np.load(here / "x.npz") as file:
                    features = file["cls_token"].astype(np.float64)
                unit = features / np.linalg.norm(features, axis=1, keepdims=True)
                alike = np.unique(unit.round(3), axis=0)
                line += f", {len(features)} rows, {len(alike)} of them different"
            config = here / "made" / "config.json"
            if config.exists():
                read = json.loads(config.read_text())["data"]
                line += f", {read.get('channels', 3)} channels" if read.get("channels", 3) != "auto" else ""
                line += f", range {read['pixel_range']}" if read.get("pixel_range") else ""
            noted = [
                text
                for text in lines[:-1]
                if re.search(r"left out|not read|from column|is Train|black to white|no class", text)
            ]
            return line + (f" [said: {noted[-1]}]" if noted else "")
    return lines[-1]


@contextlib.contextmanager
def small_disk(at: Path, needed: bool) -> Iterator[bool]:
    if not needed:
        yield True
        return
    at.mkdir(exist_ok=True)
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(at)], stderr=subprocess.DEVNULL
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(at)], check=True)


def one(case: Case, words: dict[str, str], made: Path, here: Path) -> dict[str, Any]:
    """Runs a case in a process forked from this one."""
    log = here / "log.txt"
    began = time.perf_counter()
    if not (child := os.fork()):
        os.setpgid(0, 0)
        file = os.open(log, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(here)
        code = 70
        try:
            if case.before:
                case.before(here)
            if callable(case.does):
                print(case.does(made), flush=True)
                code = 0
            else:
                text = case.does
                for word, stands in words.items():
                    text = re.sub(rf"\b{word}\b", stands, text)
                code = front_door(shlex.split(text))
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    waits, ended, used = os.pidfd_open(child), False, -1
    while not ended and time.perf_counter() - began < LIMIT:
        ended = bool(select.select([waits], [], [], IDLE)[0])
        ticks = sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]))
        if ticks == used:
            break
        used = ticks
    if not ended:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(waits)
    said = log.read_text(errors="replace")
    left = [path.name for path in Path(words["DISK"]).rglob(".partial*")] if "DISK" in str(case.does) else []
    return {
        "name": case.name,
        "code": code if ended else None,
        "traceback": "Traceback" in said,
        "said": outcome(said, here) + (f"; leaves {left[0]}" if left else ""),
        "seconds": round(time.perf_counter() - began, 1),
    }


def of_this_version(folder: Path, only: str) -> None:
    """Prints a JSON line a case, with the ``dino`` that this process finds."""
    global RUN
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        at = Path(scratch)
        RUN, made = at / "run", at / "inputs"
        made.mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            assert front_door(shlex.split(f"pretrain shapes:64x32 --out {RUN} {STEPS}")) == 0
        make(made, RUN)
        words = {"CASES": str(folder), "MADE": str(made), "RUN": str(RUN), "DISK": str(at / "disk")}
        for i, case in enumerate(case for case in cases() if re.search(only, case.name)):
            here = at / f"case{i}"
            here.mkdir()
            with small_disk(at / "disk", "DISK" in str(case.does)) as there:
                result = one(case, words, made, here) if there else {"name": case.name, "said": "needs root"}
            said = str(result["said"])
            for word in ("MADE", "RUN", "CASES", "DISK"):
                said = said.replace(words[word], word)
            print(json.dumps({**result, "said": said.replace(str(here), ".")}), flush=True)


def shown(result: dict[str, Any]) -> str:
    if "code" not in result:
        return result["said"]
    ends = "HANGS" if result["code"] is None else f"exit {result['code']}"
    traced = ", TRACEBACK" if result["traceback"] else ""
    said = re.sub(r"0x[0-9a-f]{6,}", "0x...", result["said"][:230])
    return f"{ends}{traced}: {said}".replace("|", "/").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path)
    parser.add_argument("--src", nargs="+", default=[str(Path(__file__).parents[1] / "src")])
    parser.add_argument("--only", default="")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        of_this_version(args.cases.resolve(), args.only)
        return 0
    table: dict[str, list[str]] = {}
    bad = 0
    for number, src in enumerate(args.src):
        command = [sys.executable, __file__, str(args.cases), "--here", "--only", args.only]
        environment = {**os.environ, "PYTHONPATH": str(Path(src).resolve())}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout
            for line in process.stdout:
                result = json.loads(line)
                table.setdefault(result["name"], [""] * len(args.src))[number] = shown(result)
                print(f"{number} | {result['name']} | {shown(result)}", flush=True)
                if number == len(args.src) - 1:
                    bad += bool(result.get("traceback")) or result.get("code", 0) not in (0, 1, 2)
    if args.markdown:
        rows = [f"| {name} | {' | '.join(cells)} |\n" for name, cells in table.items()]
        heads = ["0.1", "now"] if len(args.src) == 2 else args.src
        args.markdown.write_text(f"| | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}\n{''.join(rows)}")
    print(f"{bad} of {len(table)} cases end in a traceback, a hang or an unknown exit code in the last version")
    return min(bad, 100)


if __name__ == "__main__":
    sys.exit(main())
