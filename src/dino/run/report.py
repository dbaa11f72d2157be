"""A run folder -> one page, ``report.html``: what was trained, whether it works and why, and how to use it.

No other file and no script: the page is whole wherever it is copied.
"""

import base64
import json
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from dino.config import Config
from dino.machine.files import write_text
from dino.models.card import CardFacts, read_card
from dino.pictures.charts import CURVES, Points, line_chart


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
_LISTED = 200  # Lines of warnings or of broken files that the page shows.


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run folder, finished or still in progress, and returns its path.

    Reads ``config.json``, ``metrics.jsonl``, ``model_card.md``, ``warnings.txt``, ``broken.txt``, and every PNG and
    other HTML page in the folder. Each may be missing; a last line of metrics that is only half written is left out.

    Raises:
        ValueError: the folder does not exist.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a run folder: give the folder that was --out of dino pretrain")
    config = _read_config(run_dir / "config.json")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    warnings, broken = _lines(run_dir / "warnings.txt"), _lines(run_dir / "broken.txt")
    verdict = _verdict(metrics, warnings)
    finished = (run_dir / "results.json").is_file()
    out_dim = config.get("model.out_dim")
    ln_k = math.log(out_dim) if isinstance(out_dim, int) and out_dim > 1 else None
    known = {name for panel in HEALTH + COURSE for name in _matching(panel.keys, metrics)}
    others = [
        Panel(name, re.escape(name), "") for name in metrics if name not in known | _NOT_CURVES and "knn" not in name
    ]
    jinja = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = jinja.get_template("report.html.jinja").render(
        name=run_dir.resolve().name,
        folder=shlex.quote(str(run_dir)),
        verdict=verdict,
        finished=finished,
        facts=_facts(config, metrics, _card(run_dir / "model_card.md"), finished),
        health=_charts(HEALTH, metrics, ln_k),
        course=_charts(COURSE + others, metrics, ln_k),
        knn=_knn_rows(metrics),
        pictures=[_picture(path) for path in sorted(run_dir.glob("*.png"))],
        pages=sorted(path.name for path in run_dir.glob("*.html") if path.name != "report.html"),
        settings=_settings(config),
        lists=[
            ("Earlier warnings", [line for line in warnings if line != verdict[1]]),
            ("Files that cannot be read", broken),
        ],
        listed=_LISTED,
    )
    path = run_dir / "report.html"
    write_text(path, page)  # Replaced in one go: a reader never meets half a page.
    return path


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


def _verdict(metrics: dict[str, Points], warnings: Sequence[str]) -> tuple[str, str]:
    """Good, warn, bad or wait, and the sentence to it."""
    if "step" not in metrics:
        return "wait", "Nothing logged yet. The first line of metrics.jsonl is still to come."
    losses = metrics.get("loss", [])
    if losses and not math.isfinite(losses[-1][1]):
        return "bad", f"The loss is not finite at step {losses[-1][0]:,.0f}."
    if warnings:
        return "warn", warnings[-1]
    return "good", "Healthy: no warning."


def _facts(
    config: dict[str, Any], metrics: dict[str, Points], card: CardFacts | None, finished: bool
) -> dict[str, tuple[str, str]]:
    """What was trained, on what, how far and with which result: a title each, its value, and what explains it."""
    facts = {}
    if backbone := config.get("model.backbone"):
        size = f"{card.parameters / 1e6:.1f} M parameters, {card.embed_dim} numbers an image" if card else ""
        facts["Network"] = (backbone, size or f"crops of {config.get('crops.global_size')} px")
    if card and card.images:
        classes = f"{card.classes} classes, which training does not read" if card.classes else "no labels"
        facts["Images"] = (f"{card.images:,}", classes + (f"; median side {card.side} px" if card.side else ""))
    if "step" in metrics:
        step = metrics["step"][-1][0]
        batch = config.get("optim.batch_size")
        seen = f"{step * batch:,.0f} images seen" if isinstance(batch, int) else ""
        facts["Step"] = (f"{step:,.0f}, " + ("finished" if finished else "not finished"), seen)
    if losses := metrics.get("loss"):
        ratio = metrics.get("teacher_entropy_ratio")
        facts["Loss"] = (_short(losses[-1][1]), f"teacher entropy {_short(ratio[-1][1])} of ln K" if ratio else "")
    if rows := _knn_rows(metrics):
        k, first, last, best, step, _ = next((row for row in rows if row[0] == 20), rows[0])
        was = f"{first:.1f} % at first" + (f"; best {best:.1f} % at step {step:,.0f}" if best > last + 0.05 else "")
        facts[f"k-NN, k = {k}"] = (f"{last:.1f} %", was)
    elif metrics:
        facts["k-NN"] = ("none", "it needs labels, or comes later")
    return facts


def _knn_rows(metrics: dict[str, Points]) -> list[tuple[int, float, float, float, float, float | None]]:
    """k, first, last and best top-1, the step of the best, and the last top-5; in percent."""
    rows = []
    for name in _matching(r"knn_\d+_top1", metrics):
        points, top5 = metrics[name], metrics.get(name.replace("top1", "top5"))
        step, best = max(points, key=lambda point: point[1])
        rows.append((int(name.split("_")[1]), points[0][1], points[-1][1], best, step, top5[-1][1] if top5 else None))
    return rows


def _matching(keys: str, metrics: dict[str, Points]) -> list[str]:
    found = [name for name in metrics if re.fullmatch(keys, name)]
    return sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def _charts(panels: Sequence[Panel], metrics: dict[str, Points], ln_k: float | None) -> list[dict[str, Any]]:
    """For every panel with values: its title, how to read it, the drawing, and the last value of each curve."""
    charts = []
    for panel in panels:
        series = {name: metrics[name] for name in _matching(panel.keys, metrics)}
        if not series:
            continue
        reference = (ln_k, f"ln K = {ln_k:.2f}") if panel.ln_k and ln_k else None
        legend = [
            (i % CURVES, re.sub(r"knn_(\d+)_top1", r"k = \1", name) if len(series) > 1 else "", _short(points[-1][1]))
            for i, (name, points) in enumerate(series.items())
        ]
        drawing = Markup(line_chart(series, reference))
        charts.append({"title": panel.title, "how": panel.how, "legend": legend, "drawing": drawing})
    return charts


def _settings(config: dict[str, Any]) -> dict[str, list[tuple[str, str, bool]]]:
    """A list for every section: name, value, and whether it differs from the default."""
    default = json.loads(json.dumps(Config().flat()))
    sections: dict[str, list[tuple[str, str, bool]]] = {}
    for name, value in config.items():
        section, _, field = name.partition(".")
        entries = value if isinstance(value, list) else [value]
        text = ", ".join(f"{entry:.6g}" if isinstance(entry, float) else str(entry) for entry in entries)
        sections.setdefault(section, []).append((field, text, name in default and default[name] != value))
    return sections


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


def _card(path: Path) -> CardFacts | None:
    try:
        return read_card(path)
    except (OSError, ValueError):
        return None  # Still in progress, or a card that somebody rewrote.


def _picture(path: Path) -> tuple[str, str]:
    """Its name in words and its bytes as text."""
    return path.stem.replace("_", " ").replace("-", " "), base64.b64encode(path.read_bytes()).decode()


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: float) -> str:
    """A number in few characters.

    >>> [_short(v) for v in (0.0, 0.00012, 0.99612, 8.3178, 412.66, 65536.0, 1281167.0)]
    ['0', '0.00012', '0.996', '8.32', '413', '65,536', '1,281,167']
    """
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e12 else f"{value:.3g}"
