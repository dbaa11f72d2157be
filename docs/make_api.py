"""Writes docs/api/*.md: what ``import dino`` gives, from signatures, docstrings and comments. Imports nothing of it.

Run ``make api`` after a change of a public name; a test says when it is due.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1] / "src"
PAGES = {  # Of names that live in these modules and folders, in the order of the index.
    "dino.run": ("training", "Training"),
    "dino.config": ("config", "Configuration"),
    "dino.recipes": ("recipes", "Recipes"),
    "dino.encoder": ("encoder", "Using a backbone"),
    "dino.evaluate": ("evaluate", "Evaluation"),
    "dino.options": ("options", "Options of the evaluations"),
    "dino.pictures": ("pictures", "Pictures"),
    "dino.data": ("data", "Images"),
    "dino.models": ("models", "Networks and weights"),
    "dino.method": ("method", "The method"),
    "dino.augment": ("augment", "Augmentation"),
}
WHOLE = ("dino.config", "dino.options", "dino.recipes")  # All that these files make public is on their page.
SHOWN = ("__call__", "__len__", "__getitem__")  # Methods with underscores that one may call.

Definition = ast.ClassDef | ast.FunctionDef


class Entry(NamedTuple):
    """A public name: how it is called from outside, and where it is defined."""

    name: str
    module: str
    node: Definition
    comments: dict[int, str]  # By line.


def entries() -> list[Entry]:
    """All public names in the order of their modules and of their definition."""
    found = [*_exports("dino"), *((module, module, None) for module in WHOLE if _path(module).exists())]
    result = {}
    for public, module, name in found:
        tree, comments = _read(module)
        for node in tree.body:
            if not isinstance(node, Definition) or node.name.startswith("_") or name not in (None, node.name):
                continue
            if ast.get_docstring(node):
                entry = Entry(public if name else f"{module}.{node.name}", module, node, comments)
                known = result.setdefault((module, node.name), entry)
                if len(entry.name) < len(known.name):
                    result[module, node.name] = entry
    return sorted(result.values(), key=lambda e: (list(PAGES).index(_page(e.module)), e.module, e.node.lineno))


def _exports(package: str) -> list[tuple[str, str, str | None]]:
    """(public name, module, name there) of what a package imports for type checkers, or defines and lists."""
    tree, _ = _read(package)
    found: list[tuple[str, str, str | None]] = []
    for node in (inner for top in tree.body if isinstance(top, ast.If) for inner in top.body):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if node.module == "dino":
                    found += _exports(f"dino.{alias.name}")
                else:
                    found.append((f"{package}.{alias.asname or alias.name}", *_home(node.module, alias.name)))
    listed = {
        word
        for node in tree.body
        if _is_all(node)
        for word in ast.literal_eval(node.value)  # pyright: ignore
    }
    defined = [node.name for node in tree.body if isinstance(node, Definition) and node.name in listed]
    return found + [(f"{package}.{name}", package, name) for name in defined]


def _home(module: str, name: str) -> tuple[str, str]:
    """Where a name is defined that a module may only have imported."""
    for node in _read(module)[0].body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dino."):
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _home(node.module, alias.name)
    return module, name


def _is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


def _path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _read(module: str) -> tuple[ast.Module, dict[int, str]]:
    """Its syntax tree, and for every line the comment that explains it: at its end, or on the lines above it."""
    path = _path(module)
    comments: dict[int, str] = {}
    above = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip().startswith("#"):
            above = f"{above} {line.strip('# ')}".strip()
            continue
        code, mark, comment = line.partition("  # ")
        comments[number] = comment if mark and code.strip() else above
        above = ""
    return ast.parse(path.read_text(encoding="utf-8")), comments


def _page(module: str) -> str:
    return next(page for page in PAGES if f"{module}.".startswith(f"{page}."))


def pages() -> dict[str, str]:
    """File name -> content."""
    found = entries()
    index = [
        "# `import dino`",
        "",
        "Made from the docstrings by `make api`. Every name is imported at its first use.",
        "",
    ]
    result = {}
    for page, (file, title) in PAGES.items():
        here = [entry for entry in found if _page(entry.module) == page]
        if not here:
            continue
        about = (ast.get_docstring(_read(page)[0]) or "") if page in WHOLE else ""
        parts = [f"# {title}", *([_prose(about)] if about else []), *map(_entry, here)]
        result[f"{file}.md"] = "\n\n".join(parts) + "\n"
        index += [f"## [{title}]({file}.md)", "", "| | |", "|---|---|"]
        for entry in here:
            first = re.split(r"(?<=\.)\s|\n\n", ast.get_docstring(entry.node) or "", maxsplit=1)[0].replace("\n", " ")
            index.append(f"| [`{entry.name}`]({file}.md#{_anchor(entry.name)}) | {_code(first)} |")
        index.append("")
    result["README.md"] = "\n".join(index)
    return result


def _anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9_ -]", "", heading.lower()).replace(" ", "-")


def _entry(entry: Entry) -> str:
    node = entry.node
    parts = [f"## `{entry.name}`"]
    if isinstance(node, ast.FunctionDef):
        return "\n\n".join([*parts, _signature(node, entry.name), _prose(ast.get_docstring(node) or "")])
    methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
    if start := next((method for method in methods if method.name == "__init__"), None):
        parts.append(_signature(start, entry.name))
    parts.append(_prose(ast.get_docstring(node) or ""))
    fields = [inner for inner in node.body if isinstance(inner, ast.AnnAssign)]
    if fields and not start:  # Where there is __init__, the docstring says what its attributes are.
        parts.append(_fields(fields, entry.comments))
    for method in methods:
        shown = not method.name.startswith("_") or method.name in SHOWN
        if shown and (text := ast.get_docstring(method)):
            name = f"{entry.name.split('.')[-1]}.{method.name}"
            decorators = {ast.unparse(decorator) for decorator in method.decorator_list}
            parts += [f"### `{name}`", *([] if "property" in decorators else [_signature(method, name)]), _prose(text)]
    return "\n\n".join(parts)


def _fields(fields: list[ast.AnnAssign], comments: dict[int, str]) -> str:
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for field in fields:
        name, default = ast.unparse(field.target), "" if field.value is None else _source(field.value)
        if name.startswith("_") or "ClassVar" in ast.unparse(field.annotation):
            continue
        default = re.sub(r"field\(default_factory=(\w+)\)", r"\1()", default)
        about = comments.get(field.end_lineno or 0) or comments.get(field.lineno, "")
        cells = [f"`{name}`", f"`{_type(field.annotation)}`", f"`{default}`" if default else "", _code(about)]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _type(annotation: ast.expr) -> str:
    """An annotation as written; one that is quoted as a whole without its quotes."""
    quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
    return str(annotation.value) if quoted else _source(annotation)


def _source(node: ast.expr) -> str:
    return ast.unparse(node).replace("'", '"')


def _signature(node: ast.FunctionDef, name: str) -> str:
    """The call with its types; a parameter a line where one line is too long."""
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    shown = [_parameter(a, d) for a, d in zip(plain, defaults, strict=True) if a.arg not in ("self", "cls")]
    if given.vararg:
        shown.append("*" + _parameter(given.vararg, None))
    elif given.kwonlyargs:
        shown.append("*")
    shown += [_parameter(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        shown.append("**" + _parameter(given.kwarg, None))
    result = f" -> {_type(node.returns)}" if node.returns and node.name != "__init__" else ""
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {parameter},\n" for parameter in shown) + f"){result}"
    return f"```python\n{line}\n```"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {_type(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{kind}" + ("" if default is None else f"{' = ' if kind else '='}{_source(default)}")


def _code(text: str) -> str:
    return text.replace("``", "`")


def _prose(text: str) -> str:
    """A docstring as Markdown: its lists of arguments become lists, its examples blocks of code."""
    lines: list[str] = []
    inside = None
    for line in text.split("\n"):
        if heading := re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            inside = heading[1]
            lines += [f"**{'Arguments' if inside == 'Args' else inside}**", ""]
        elif inside and line.startswith("    "):
            item = re.match(r"    ((?:``)?[\w, *.]+?(?:``)?): (.*)", line) if inside != "Returns" else None
            if item:
                name = item[1].strip("`")
                lines.append(f"- `{name}`: {item[2]}")
            else:
                lines.append(("  " if inside != "Returns" else "") + line.strip())
        else:
            inside = inside if not line.strip() else None
            lines.append(line)
    prose = _code("\n".join(lines))
    return re.sub(r"(?m)(^>>> .*(?:\n(?!\n).*)*)", r"```python\n\1\n```", prose).replace("  # doctest: +SKIP", "")


if __name__ == "__main__":
    folder = Path(__file__).parent / "api"
    folder.mkdir(exist_ok=True)
    made = pages()
    for old in folder.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, content in made.items():
        (folder / name).write_text(content, encoding="utf-8")
    print(f"{len(made)} pages in {folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder}")
