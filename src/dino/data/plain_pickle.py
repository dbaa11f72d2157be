"""Reads pickles that hold data and nothing else. A pickle is a program; here nothing it names is ever called."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np


def read_plain_pickle(path: Path) -> Any:
    """Containers, strings, numbers, and NumPy arrays and scalars of those; arrays come back as NumPy arrays.

    Even NumPy's own functions are not called with what the file says: arrays are built from their bytes.

    Raises:
        ValueError: the file holds anything else, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            # Python 2 wrote bytes where these files mean text.
            return _without_stand_ins(_PlainUnpickler(file, encoding="latin1").load())
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except (
        AttributeError,
        EOFError,
        IndexError,
        KeyError,
        MemoryError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path} is damaged, or no pickle of plain data ({type(error).__name__}: {error})") from None


class _Dtype:
    def __init__(self, name: Any, *_: object) -> None:
        self.value = np.dtype(name) if isinstance(name, str) else np.dtype(np.void)
        if self.value.kind not in "biufSUO":
            raise pickle.UnpicklingError(f"it holds an array of {name!r}, which are no plain numbers or strings")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands where the file says ndarray, until its contents are known."""

    def __init__(self, *_: object) -> None:
        self.value = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_major, content = state
        if dtype.value.kind == "O":  # A list of anything that the file may hold.
            flat = np.empty(len(content), dtype=object)
            for i, item in enumerate(content):
                flat[i] = _without_stand_ins(item)
        else:
            flat = _from_bytes(content, dtype)
        self.value = flat.reshape(shape, order="F" if column_major else "C")


def _from_bytes(content: Any, dtype: _Dtype) -> np.ndarray:
    return np.frombuffer(content.encode("latin1") if isinstance(content, str) else content, dtype=dtype.value)


def _scalar(dtype: _Dtype, content: Any) -> Any:
    return _from_bytes(content, dtype)[0].item()


def _buffer(content: Any, dtype: _Dtype, shape: Any, order: Any, *_: object) -> np.ndarray:
    return _from_bytes(content, dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text in {encoding!r}")
    return text.encode("latin1")


def _empty_bytes() -> bytes:
    return b""


# What a file may name -> what is called in its place. Protocol 2 writes bytes as calls, protocol 5 arrays as buffers.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2.
    _STAND_INS |= {(_builtins, "set"): set, (_builtins, "bytes"): _empty_bytes}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2.
    _STAND_INS |= {(f"{_core}.multiarray", "_reconstruct"): _Array, (f"{_core}.multiarray", "scalar"): _scalar}
    _STAND_INS[f"{_core}.numeric", "_frombuffer"] = _buffer


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(
                f"reading it would execute code ({module}.{name}); it may hold only plain data"
            )
        return _STAND_INS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to something outside the file ({pid!r})")


def _without_stand_ins(content: Any) -> Any:
    if isinstance(content, _Array):
        return content.value
    if isinstance(content, dict):
        return {_without_stand_ins(key): _without_stand_ins(value) for key, value in content.items()}
    if isinstance(content, list | tuple | set):
        return type(content)(map(_without_stand_ins, content))
    return content
