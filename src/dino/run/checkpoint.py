"""Checkpoints of a run: safetensors and JSON with a checksum, written whole or not at all, nothing in them executed."""

import hashlib
import itertools
import json
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dino.machine.files import remove_partial, whole_file

State = dict[str, Any]  # Nested dicts, lists and tuples of tensors, numbers and strings.
# .pt: of version 0.1, still read.
_NAME = re.compile(r"step_(\d+)\.(safetensors|pt)$")
_KEY = "dino_checkpoint"  # Of the JSON in the header.


def save(folder: Path, step: int, state: State, keep: int, milestones: int = 0) -> Path:
    """Writes ``step_{step}.safetensors``; the newest ``keep`` up to it stay, and every one whose step is a multiple of
    ``milestones``. Later ones, which could not be read, go.

    Raises:
        OSError: it could not be written; those before are all there.
    """
    tensors, tree = _flatten(state)
    text = json.dumps(tree)
    path = folder / f"step_{step:08d}.safetensors"
    with whole_file(path) as partial:
        header = {"format": "pt", _KEY: text, "checksum": _checksum(tensors, text)}
        save_file(tensors, partial, metadata=header)
    found = checkpoints(folder)
    place = found.index(path) + 1
    for other in [*found[: max(place - keep, 0)], *found[place:]]:
        if not (milestones and step_of(other) % milestones == 0 and step_of(other) < step):
            other.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted((p for p in folder.glob("step_*") if _NAME.search(p.name)), key=step_of)


def step_of(path: Path) -> int:
    """The number of steps done in a checkpoint, from its name.

    >>> step_of(Path("checkpoints/step_00001200.safetensors"))
    1200
    """
    match = _NAME.search(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint of a run: its name is not step_NUMBER.safetensors")
    return int(match[1])


def read(path: Path) -> State:
    """The state in a checkpoint, on the CPU.

    Raises:
        ValueError: the file is damaged; says how.
    """
    if path.suffix == ".pt":
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises nearly every type on damaged files.
            raise ValueError(f"it cannot be read ({type(error).__name__})") from error
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"it cannot be read ({error})") from error
    if _KEY not in header or not _is_whole(tensors, header[_KEY], header.get("checksum", "")):
        raise ValueError("its bytes are not those that were written (its checksum differs)")
    return _unflatten(json.loads(header[_KEY]), tensors)


def load_latest(folder: Path) -> State | None:
    """The newest checkpoint that is whole, on the CPU; None when there is none. Damaged ones are named on stderr.

    Raises:
        ValueError: there are checkpoints, but none is whole.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return read(path)
        except ValueError as error:
            print(f"warning: {path} is passed over: {error}", file=sys.stderr)
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {folder} can be read; remove them or use another --out"
        )
    return None


class Saver:
    """Writes checkpoints in the background, one at a time: training waits for the copy to host memory alone.

    Args:
        folder: ``checkpoints/`` of a run folder that this process owns.
        minutes: until the next one is due; None: ``steps`` say when.
        steps: between two.
        keep: as in ``save``, and ``milestones``.
        warn: is told of one that could not be written (a full disk). The run goes on, and the next is tried when due.
    """

    def __init__(
        self,
        folder: Path,
        *,
        minutes: float | None,
        steps: int,
        keep: int,
        milestones: int,
        warn: Callable[[str], None],
    ) -> None:
        self._folder, self._keep, self._milestones, self._warn = folder, keep, milestones, warn
        self._minutes, self._steps = minutes, steps
        self._pool = ThreadPoolExecutor(1)
        self._writing: Future[Path] | None = None
        self._copy: Any = None
        self._last = time.monotonic()
        remove_partial(folder)

    def due(self, step: int) -> bool:
        """Whether it is time for one after ``step`` steps."""
        if self._milestones and step % self._milestones == 0:
            return True
        if self._minutes is None:
            return step % self._steps == 0
        return time.monotonic() - self._last >= 60 * self._minutes

    def save(self, step: int, state: State) -> None:
        """Copies the state and has it written; first waits for the one before, whose memory it takes."""
        self.wait()
        self._copy = _to_host(state, self._copy)  # In new memory, the system would have to clear all of it first.
        self._writing = self._pool.submit(save, self._folder, step, self._copy, self._keep, self._milestones)
        self._last = time.monotonic()

    def wait(self) -> bool:
        """Waits for the checkpoint in hand; whether it is on the disk."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            self._warn(
                f"a checkpoint could not be written ({error.strerror}: {error.filename}); those before are there, "
                "and the run goes on"
            )
            return False
        return True

    def close(self) -> None:
        self._pool.shutdown()


def _to_host(state: Any, before: Any = None) -> Any:
    """A copy in host memory that further training does not change; in the place of the one ``before`` where it fits."""
    if isinstance(state, Tensor):
        fits = isinstance(before, Tensor) and (before.shape, before.dtype) == (state.shape, state.dtype)
        return before.copy_(state.detach()) if fits else state.detach().to("cpu", copy=True).contiguous()
    if isinstance(state, Mapping):
        before = before if isinstance(before, Mapping) else {}
        return {key: _to_host(value, before.get(key)) for key, value in state.items()}
    if isinstance(state, list | tuple):
        before = before if isinstance(before, list | tuple) else ()
        return type(state)(_to_host(value, old) for value, old in itertools.zip_longest(state, before[: len(state)]))
    return state


def _flatten(state: State) -> tuple[dict[str, Tensor], Any]:
    """The tensors by their path (``student.backbone.cls_token``), and all else as JSON that names them."""
    tensors: dict[str, Tensor] = {}

    def describe(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):  # Keys may be numbers, as in an optimizer's state.
            return {
                "dict": [[key, describe(item, f"{path}.{key}" if path else str(key))] for key, item in value.items()]
            }
        if isinstance(value, list | tuple):
            return {type(value).__name__: [describe(item, f"{path}.{i}") for i, item in enumerate(value)]}
        return value

    return tensors, describe(state, "")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](_unflatten(item, tensors) for item in content)


def _pieces(tensors: Mapping[str, Tensor], text: str) -> Iterator[Any]:
    """All that a checksum covers: the JSON, and of every tensor its name, type, shape and bytes."""
    yield text.encode()
    for name in sorted(tensors):
        tensor = tensors[name]
        yield f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """The CRC of gzip and zip: against flipped bits and cut files, not against people; many times as fast as a hash."""
    crc = 0
    for piece in _pieces(tensors, text):
        crc = zlib.crc32(piece, crc)
    return f"crc32 {crc:08x}"


def _is_whole(tensors: Mapping[str, Tensor], text: str, expected: str) -> bool:
    if expected.startswith("crc32 "):
        return expected == _checksum(tensors, text)
    digest = hashlib.blake2b(digest_size=16)  # Of earlier versions.
    for piece in _pieces(tensors, text):
        digest.update(piece)
    return expected == digest.hexdigest()
