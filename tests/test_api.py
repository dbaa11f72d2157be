"""The API pages: up to date, complete, and with what a reader looks for."""

import importlib.util
import re
from pathlib import Path

import dino

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("make_api", DOCS / "make_api.py")
assert spec is not None
assert spec.loader is not None
make_api = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_api)


def test_the_pages_are_those_of_the_code():
    written = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md")}
    assert written == make_api.pages(), "run: make api"


def test_every_public_name_is_there():
    index = (DOCS / "api" / "README.md").read_text()
    modules = {"evaluate", "pictures"}
    names = {f"dino.{name}" for name in dino.__all__ if name not in modules}
    names |= {f"dino.{module}.{name}" for module in modules for name in getattr(dino, module).__all__}
    assert names <= set(re.findall(r"\[`([\w.]+)`\]", index))
    for page, place in re.findall(r"\]\((\w+\.md)#([^)]*)\)", index):
        headings = re.findall(r"^## `(.*)`$", (DOCS / "api" / page).read_text(), re.MULTILINE)
        assert place in {make_api._anchor(heading) for heading in headings}


def test_docstrings_become_markdown():
    text = "First ``x``.\n\nArgs:\n    a: one,\n        two.\n\nRaises:\n    ValueError: three.\n\n>>> 1 + 1\n2"
    assert make_api._prose(text) == (
        "First `x`.\n\n**Arguments**\n\n- `a`: one,\n  two.\n\n**Raises**\n\n- `ValueError`: three.\n\n"
        "```python\n>>> 1 + 1\n2\n```"
    )
