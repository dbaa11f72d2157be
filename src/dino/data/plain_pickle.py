"""Reads pickles that hold data and nothing else. A pickle is a program: what it may call is listed here, harmless."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

# NumPy's own functions that put arrays and scalars together again, under the names of NumPy 1 and 2.
_ARRAY, _SCALAR = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
_BUFFER = np.zeros(1).__reduce_ex__(5)[0]


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes; any other codec could be one that somebody registered."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds text in {encoding!r}")
    return text.encode("latin1")


def _dtype(name: Any, *options: Any) -> np.dtype:
    if not isinstance(name, str) or np.dtype(name).kind not in "biufSUO":
        raise pickle.UnpicklingError(f"it holds an array of {name!r}, which are no plain numbers or strings")
    return np.dtype(name, *options)


_HARMLESS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2.
    _HARMLESS |= {(_builtins, "set"): set, (_builtins, "bytes"): bytes}
for _core in ("numpy.core", "numpy._core"):
    _HARMLESS |= {(f"{_core}.multiarray", "_reconstruct"): _ARRAY, (f"{_core}.multiarray", "scalar"): _SCALAR}
    _HARMLESS[f"{_core}.numeric", "_frombuffer"] = _BUFFER


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _HARMLESS:
            raise pickle.UnpicklingError(
                f"reading it would execute code ({module}.{name}); it may hold only plain data"
            )
        return _HARMLESS[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to something outside the file ({pid!r})")


def read_plain_pickle(path: Path) -> Any:
    """Containers, strings, numbers, and NumPy arrays and scalars of those.

    Raises:
        ValueError: the file holds anything else, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            return _PlainUnpickler(file, encoding="latin1").load()  # Python 2 wrote bytes where these files mean text.
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except OSError:
        raise
    except Exception as error:  # The machine that runs pickles raises nearly every type on damaged files.
        raise ValueError(f"{path} is damaged, or no pickle of plain data ({type(error).__name__}: {error})") from None
