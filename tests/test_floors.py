"""The house stands on floors: a file imports only from floors below its own, and peers do not know each other."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dino"

FLOORS: list[set[str]] = [
    {
        "schedules",
        "metrics",
        "boundary",
        "progress",
        "propagation",
        "ranking",
        "distributed",
        "hardware",
        "augment.resample",
        "augment.color",
        "augment.blur",
        "models.layers",
        "data.decode",
        "data.shapes",
        "data.plain_pickle",
    },
    {
        "models.vision_transformer",
        "models.head",
        "models.timm_backbone",
        "loss",
        "optim",
        "augment.multicrop",
        "data.files",
        "data.natural_size",
        "data.torchvision_sets",
        "checkpoint",
        "logbook",
    },
    {"data.layouts", "data.sources", "pretrained", "monitor"},
    {"data.davis", "network", "data.loader"},
    {"features", "data.masks"},
    {"visualization.pictures", "descriptors", "visualization.inputs", "stored_features"},
    {"linear_probe"},
    {"visualization.video"},
    {"evaluation.*", "visualization.*", "embed"},
    {"recipes", "report", "learner"},
    {"pretrain"},
    {"demo"},
    {"commands.common"},
    {"commands.*"},
    {"cli"},
    {"__main__", "__init__"},
]
# What everything may rest on: they rest on nothing.
GROUND = {"config", "randomness", "models.linear"}


def floor(module: str) -> int:
    if module in GROUND:
        return -1
    for number, names in enumerate(FLOORS):
        if module in names or f"{module.split('.')[0]}.*" in names:
            return number
    raise AssertionError(f"{module} stands on no floor: add it to FLOORS in tests/test_floors.py")


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("dino.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dino":
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                is_file = (SOURCE / Path(*full.split(".")[1:])).with_suffix(".py").exists()
                found.add(full if is_file else node.module)
    return {name.removeprefix("dino.") for name in found}


FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent == SOURCE or p.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for other in imports(path):
        if other == "dino":
            continue
        assert floor(other) < floor(module), f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)})"


def test_only_one_file_names_torch_distributed():
    naming = {p.name for p in FILES if "torch.distributed" in p.read_text()}
    assert naming == {"distributed.py"}
