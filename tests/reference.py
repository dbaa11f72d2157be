"""Reads the reference implementation's numbers in tests/golden (what each is: the README beside them)."""

import json
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


def scalars(topic: str) -> dict:
    return json.loads((FOLDER / f"{topic}.json").read_text())


def arrays(topic: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / f"{topic}.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def waves(shape: tuple[int, int, int, int], s: float, formula: dict) -> torch.Tensor:
    """The images (B, C, H, W) that the reference numbers were made from ("image formula"), in float64."""
    a, k = formula["a"], formula["k"]
    b, c, i, j = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij")
    return (
        a[0] * torch.sin(k[0] * i + k[1] * j * (1 + c) + k[2] * b + s)
        + a[1] * torch.cos(k[3] * i * j + 1.3 * c + 0.31 * s + 0.9 * b)
        + a[2] * torch.sin(k[4] * (i * i + 2 * j * j) + 2.1 * c - s)
    )
