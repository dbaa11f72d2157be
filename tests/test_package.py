"""What is published: the wheel's files, one version everywhere, and extras that exist for what the code imports."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import dino

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Distributions whose modules have another name.
MODULES = {
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "faiss-cpu": "faiss",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
}


# Used without being imported: by torch's exporter, by tifffile.
NAMED = {"onnxscript", "imagecodecs"}


def names(requirements):
    return {re.split(r"[\[<>=~! ]", requirement)[0] for requirement in requirements}


@functools.cache
def imported():
    found = set()
    for path in (ROOT / "src" / "dino").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"dino", "compression"}  # compression: of the library from 3.14 on.


def test_every_file_is_in_the_wheel(tmp_path):
    built = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("dino/")}
    tree = ROOT / "src"
    files = [path for path in (tree / "dino").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert inside == {path.relative_to(tree).as_posix() for path in files}
    assert {"dino/py.typed", "dino/run/report.html.jinja", "dino/models/card.md.jinja"} <= inside


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert dino.__version__ == PROJECT["project"]["version"] == citation["version"]
    assert citation["references"][0]["authors"][0]["family-names"] == "Caron"


def test_what_is_imported_is_required():
    required = names(PROJECT["project"]["dependencies"])
    extras = set().union(*(names(extra) for extra in PROJECT["project"]["optional-dependencies"].values()))
    assert "dev" not in PROJECT["project"]["optional-dependencies"]
    known = {MODULES.get(name, name) for name in required | extras}
    # jinja2 brings markupsafe, jaxtyping is for types alone.
    assert imported() - known - {"markupsafe"} == set()


@pytest.mark.parametrize("extra", PROJECT["project"]["optional-dependencies"])
def test_every_extra_is_used(extra):
    wanted = {MODULES.get(name, name) for name in names(PROJECT["project"]["optional-dependencies"][extra])}
    assert wanted <= imported() | NAMED, f"nobody imports {wanted - imported()}"


def test_the_lock_pins_every_requirement():
    pinned = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    groups = PROJECT["dependency-groups"]["dev"] + PROJECT["project"]["dependencies"]
    extras = [entry for extra in PROJECT["project"]["optional-dependencies"].values() for entry in extra]
    assert names(groups + extras) <= pinned
