"""The house has wings: a file imports only from its own folder and from folders below it, and never in a circle."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "dino"
# From the front door down. Beside them stand config, recipes and options, pure data that everything may read.
WINGS = [
    "commands",
    "run",
    "pictures",
    "evaluation",
    "encoder",
    "method",
    "augment",
    "data",
    "models",
    "machine",
]
PURE = {"config", "recipes", "options"}
FRONT = {"__init__", "__main__", "evaluate"}  # They only name what stands below.
FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent == SOURCE or path.name != "__init__.py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """The files of this package that a file imports, anywhere in it (also inside functions)."""
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
    return {name.removeprefix("dino.") for name in found} - {"dino"}


def height(module: str) -> int:
    wing = module.split(".")[0]
    if wing in PURE:
        return len(WINGS)
    assert wing in WINGS, f"{module} stands in no wing: the wings are {', '.join(WINGS)}"
    return WINGS.index(wing)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    module = module_of(path)
    for other in imports(path) if module not in FRONT else ():
        assert height(other) >= height(module), f"{module} imports {other}, which stands above it"
        if module in PURE:
            assert other in PURE, f"{module} is pure data and imports {other}"


def test_no_imports_in_a_circle():
    graph = {module_of(path): imports(path) for path in FILES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_every_folder_is_a_wing():
    assert {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= {*WINGS}


def test_two_files_name_torch_distributed():
    naming = {path.name for path in FILES if "torch.distributed" in path.read_text()}
    assert naming == {"distributed.py", "sharding.py"}
