"""A run folder -> one page, ``report.html``, that says whether the run works and why. No other file, no script."""

import base64
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from dino.config import Config
from dino.pictures.charts import Points, line_chart, short


class Panel(NamedTuple):
    """One chart: the metrics on it, how to read it, and whether ln K is drawn."""

    title: str
    keys: str  # Regular expression of the metrics' names.
    how: str
    ln_k: bool = False


HEALTH = [
    Panel(
        "k-NN accuracy, %",
        r"knn_\d+_top1",
        "Share of held-out images whose class their nearest neighbours name: the plainest sign that features improve.",
    ),
    Panel(
        "Loss, nats",
        "loss",
        "Starts near ln K; staying there, or falling to 0 early, means collapse. It is the sum of the next two curves, "
        "so it may rise while the features improve.",
        True,
    ),
    Panel(
        "Teacher entropy, nats",
        "teacher_entropy",
        "How undecided the teacher is about a crop: at ln K it says nothing, at 0 it always picks one prototype; "
        "healthy runs settle in between.",
        True,
    ),
    Panel(
        "KL divergence, nats",
        "kl",
        "How far the student is from the teacher: 0 for good means that outputs are constant (figure 7).",
    ),
    Panel(
        "RankMe",
        "rankme",
        "How many directions the features use: it should rise and stay; a fall towards 1 is collapse.",
    ),
    Panel(
        "Feature spread",
        "feature_std",
        "How far the features of different images lie apart: 1 is even in all directions, 0 means all the same.",
    ),
    Panel(
        "Prototypes used",
        "prototypes_used",
        "How many prototypes are the teacher's first choice for some crop: a handful means collapse.",
    ),
    Panel(
        "Length of the center",
        "center_norm",
        "Should level off; growth without end means that the teacher drifts one way.",
    ),
]
COURSE = [
    Panel("Learning rate", "lr", "Rises linearly during warm-up, then follows a cosine down."),
    Panel("Weight decay", "weight_decay", "Follows a cosine up to its final value."),
    Panel("Teacher momentum", "teacher_momentum", "Follows a cosine to 1: the teacher moves ever more slowly."),
    Panel("Teacher temperature", "teacher_temp", "Lower is sharper; it rises during its warm-up."),
    Panel(
        "Images a second",
        "images_per_second",
        "Speed of training; drops are evaluations, checkpoints or other users of the machine.",
    ),
    Panel("Steps skipped", "skipped", "Steps so far whose loss or gradients were not finite: should stay at 0."),
    Panel("Waiting for data", "data_wait", "Share of the time in which the device waits for images: near 0 is good."),
]
_NOT_CURVES = {"step", "epoch", "images", "time", "seconds", "teacher_entropy_ratio"}


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run folder, finished or still in progress, and returns its path.

    Reads ``config.json``, ``metrics.jsonl``, ``warnings.txt``, ``broken.txt`` and every PNG in the folder; each may be
    missing, and a last line of metrics that is only half written is left out.

    Raises:
        ValueError: the folder does not exist.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a run folder: give the folder that was --out of dino pretrain")
    config = _read_config(run_dir / "config.json")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    warnings, broken = _lines(run_dir / "warnings.txt"), _lines(run_dir / "broken.txt")
    out_dim = config.get("model.out_dim")
    ln_k = math.log(out_dim) if isinstance(out_dim, int) and out_dim > 1 else None
    known = {name for panel in HEALTH + COURSE for name in _matching(panel.keys, metrics)}
    others = [
        Panel(name, re.escape(name), "") for name in metrics if name not in known | _NOT_CURVES and "knn" not in name
    ]
    body = [
        f"<h1>{escape(run_dir.resolve().name)}</h1>",
        _verdict(metrics, warnings, finished=(run_dir / "results.json").is_file()),
        _section("Is it learning?", _charts(HEALTH, metrics, ln_k)),
        _section("k-NN", _knn_table(metrics)),
        _section("Pictures", "".join(_picture(path) for path in sorted(run_dir.glob("*.png")))),
        _section("Course and speed", _charts(COURSE + others, metrics, ln_k)),
        _section("Settings", _settings(config)),
        _section(f"Warnings ({len(warnings)})", _list(warnings)),
        _section(f"Files that cannot be read ({len(broken)})", _list(broken)),
    ]
    page = _PAGE.replace("{title}", escape(f"{run_dir.resolve().name}: DINO run")).replace(
        "{body}", "\n".join(filter(None, body))
    )
    # Replaced in one go, so that a reader never meets half a page.
    part, path = run_dir / "report.html.part", run_dir / "report.html"
    part.write_text(page, encoding="utf-8")
    return part.replace(path)


def read_metrics(path: Path) -> dict[str, Points]:
    """``metrics.jsonl`` as one list of (step, value) a metric. Lines that are not whole are left out.

    The logbook writes null for a value that is not finite: here it is nan. A resumed run
    may write a step twice: the later line counts.
    """
    rows: dict[float, dict[str, Any]] = {}
    for line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.setdefault(row["step"], {}).update(row)
    metrics: dict[str, Points] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if value is None or _is_number(value):
                metrics.setdefault(name, []).append((float(step), math.nan if value is None else float(value)))
    return metrics


def _verdict(metrics: dict[str, Points], warnings: Sequence[str], finished: bool) -> str:
    if "step" not in metrics:
        return (
            '<p class="verdict wait"><b>Nothing logged yet.</b> The first line of metrics.jsonl is still to come.</p>'
        )
    losses = metrics.get("loss", [])
    if losses and not math.isfinite(losses[-1][1]):
        state, word = "bad", f"The loss is not finite at step {short(losses[-1][0])}."
    elif warnings:
        state, word = "warn", warnings[-1]
    else:
        state, word = "good", "Healthy: no warning."
    facts = [f"step {metrics['step'][-1][1]:,.0f}" + (", finished" if finished else ", not finished")]
    if losses:
        facts.append(f"loss {short(losses[-1][1])}")
    if name := _main_knn(metrics):
        points = metrics[name]
        best_step, best = max(points, key=lambda point: point[1])
        facts.append(f"k-NN (k = {name.split('_')[1]}) {points[-1][1]:.1f} %")
        if best > points[-1][1] + 0.05:
            facts.append(f"best {best:.1f} % at step {best_step:,.0f}")
    else:
        facts.append("no k-NN")
    if ratio := metrics.get("teacher_entropy_ratio"):
        facts.append(f"teacher entropy {short(ratio[-1][1])} of ln K")
    if rank := metrics.get("rankme"):
        facts.append(f"RankMe {short(rank[-1][1])}")
    return f'<p class="verdict {state}"><b>{escape(word)}</b><br>{escape(" · ".join(facts))}</p>'


def _main_knn(metrics: dict[str, Points]) -> str | None:
    """The k of the verdict: 20, as in the paper, or else the smallest there is."""
    names = _matching(r"knn_\d+_top1", metrics)
    return "knn_20_top1" if "knn_20_top1" in names else next(iter(names), None)


def _matching(keys: str, metrics: dict[str, Points]) -> list[str]:
    found = [name for name in metrics if re.fullmatch(keys, name)]
    return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def _charts(panels: Sequence[Panel], metrics: dict[str, Points], ln_k: float | None) -> str:
    figures = []
    for panel in panels:
        series = {name: metrics[name] for name in _matching(panel.keys, metrics)}
        if not series:
            continue
        reference = (ln_k, f"ln K = {ln_k:.2f}") if panel.ln_k and ln_k else None
        legend = "".join(
            f'<span class="key"><i class="c{i % 5}"></i>{escape(_label(name) if len(series) > 1 else "last")} '
            f"<b>{short(points[-1][1])}</b></span>"
            for i, (name, points) in enumerate(series.items())
        )
        figures.append(
            f"<figure><h3>{escape(panel.title)}</h3><div>{legend}</div>{line_chart(series, reference)}"
            f"<figcaption>{escape(panel.how)}</figcaption></figure>"
        )
    return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _label(name: str) -> str:
    found = re.fullmatch(r"knn_(\d+)_top1", name)
    return f"k = {found[1]}" if found else name


def _knn_table(metrics: dict[str, Points]) -> str:
    names = _matching(r"knn_\d+_top1", metrics)
    rows = []
    for name in names:
        top5 = metrics.get(name.replace("top1", "top5"), [])
        last, best = metrics[name][-1][1], max(y for _, y in metrics[name])
        cells = [name.split("_")[1], f"{last:.2f}", f"{best:.2f}", f"{top5[-1][1]:.2f}" if top5 else "–"]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>k</th><th>top-1, %</th><th>best</th><th>top-5, %</th></tr>"
    return f'<table class="numbers">{head}{"".join(rows)}</table>' if rows else ""


def _settings(config: dict[str, Any]) -> str:
    """One folded table a section; what differs from the default is bold."""
    default = json.loads(json.dumps(Config().flat()))
    sections: dict[str, list[str]] = {}
    changed = 0
    for name, value in config.items():
        section, _, entry = name.partition(".")
        text = escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))
        differs = name in default and default[name] != value
        changed += differs
        sections.setdefault(section, []).append(
            f"<tr><td>{escape(entry)}</td><td>{f'<b>{text}</b>' if differs else text}</td></tr>"
        )
    tables = "".join(f"<div><h3>{escape(s)}</h3><table>{''.join(rows)}</table></div>" for s, rows in sections.items())
    note = f"<p>Bold: differs from the default ({changed} settings).</p>"
    return f'{note}<div class="settings">{tables}</div>' if sections else ""


def _read_config(path: Path) -> dict[str, Any]:
    """Flat settings as plain JSON: also of a run that another version wrote, whose fields may differ."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return {
        f"{s}.{k}": v
        for s, values in raw.items()
        for k, v in (values if isinstance(values, dict) else {"": values}).items()
    }


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.stem.replace("_", " ").replace("-", " "))
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f'<figure class="picture">{image}<figcaption>{name}</figcaption></figure>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _list(lines: Sequence[str], shown: int = 200) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:shown])
    more = f"<p>… and {len(lines) - shown} more.</p>" if len(lines) > shown else ""
    return f"<ul>{items}</ul>{more}" if lines else ""


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --page: #fff; --ink: #1c1e21; --soft: #5f6670; --line: #e3e6ea; --card: #f7f8fa;
  --good: #e3f4e7; --warn: #fff2d6; --bad: #fde3e1; --wait: #e8eef7;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b0578d; --c4: #b07c00; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --ink: #e8eaed; --soft: #a0a7b1; --line: #32363d;
  --card: #1c1f25; --good: #17351f; --warn: #40320f; --bad: #481d1a; --wait: #1e2a3d;
  --c0: #56b4e9; --c1: #ff9248; --c2: #35c99b; --c3: #e394c4; --c4: #e6b93c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 82rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .2rem; }
.verdict { padding: .9rem 1.1rem; border-radius: .6rem; margin: .6rem 0; }
.good { background: var(--good); } .warn { background: var(--warn); }
.bad { background: var(--bad); } .wait { background: var(--wait); }
.charts, .settings { display: grid; gap: 1rem; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
.settings { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
figcaption, .key { color: var(--soft); font-size: .85rem; }
.key { margin-right: .9rem; white-space: nowrap; } .key b { color: var(--ink); }
.key i { display: inline-block; width: .9em; height: .25em; margin: 0 .4em .2em 0; background: currentColor; }
svg { display: block; width: 100%; height: auto; margin: .3rem 0; } svg text { font-size: 11px; fill: var(--soft); }
.grid { stroke: var(--line); fill: none; } .reference { stroke: var(--soft); stroke-dasharray: 5 4; fill: none; }
svg text.reference { stroke: none; fill: var(--ink); }
.curve { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
.band { fill: currentColor; stroke: none; opacity: .22; } circle { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); }
table { border-collapse: collapse; font-size: .85rem; width: 100%; } .numbers { width: auto; }
td, th { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.numbers td, .numbers th { text-align: right; padding: .2rem .8rem; font-variant-numeric: tabular-nums; }
.picture { margin-bottom: 1rem; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto .4rem; border-radius: .3rem; }
ul { padding-left: 1.2rem; font-size: .9rem; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
