"""The rows of ``learning.py`` (``results/learning.json``), one a run; their table, the ablation and the plot."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from learning_sets import PARTS_OF, SETS
from learning_variants import PIXELS
from side_by_side import environment, read_rows, write_rows

RESULTS = Path(__file__).parent / "results" / "learning.json"


def rows() -> list[dict[str, Any]]:
    return read_rows(RESULTS)


def add_row(row: dict[str, Any]) -> None:
    row = row | {"cpu": environment("cpu")["cpu"]}  # Rows may come from several machines.
    write_rows(RESULTS, [other for other in rows() if _key(other) != _key(row)] + [row])


def measured(key: dict[str, Any]) -> bool:
    return any(_key(row) == _key(key) for row in rows())


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["data"], row["variant"], row["tflop"], row["seed"]


def show() -> None:
    """The table: medians over seeds, and their range."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows():
        groups.setdefault((row["data"], row["tflop"], row["variant"]), []).append(row)
    print("| set | TFLOP | variant | n | steps | CPU s | k-NN(20) | linear | + mean patch | RankMe | prototypes used |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (data, tflop, variant), found in sorted(groups.items(), key=lambda item: str(item[0])):
        cells = [_cell([row[name] for row in found]) for name in ("knn_20", "linear", "linear_mean", "rankme")]
        seconds, used = (
            f"{median(row[name] for row in found):.0f}" if name in found[0] else ""
            for name in ("cpu_seconds", "prototypes_used")
        )
        print(
            "|",
            " | ".join([data, f"{tflop:g}", variant, f"{len(found)}", f"{found[0]['steps']}", seconds, *cells, used]),
            "|",
        )
    ablation()
    plot()


MENDED = "resnet, mended convolutions"  # The winner once more, after the fault that docs/learning.md tells of.


def ablation(winner: str = "resnet") -> None:
    """One part changed: each seed's difference from the winner's same seed, from before or after its fault alike."""
    of_winner = {(row["variant"], row["data"], row["tflop"], row["seed"]): row for row in rows()}
    groups: dict[tuple[str, float, str], list[tuple[float, float]]] = {}
    for row in rows():
        like = (row["data"], row["tflop"], row["seed"])
        old = row.get("mended") is False or row["variant"] == MENDED or (MENDED, *like) not in of_winner
        base = of_winner.get((winner if old else MENDED, *like))
        if base is not None and row["variant"].startswith(f"{winner}, "):
            change = row["knn_20"] - base["knn_20"], row["linear"] - base["linear"]
            groups.setdefault((row["data"], row["tflop"], row["variant"]), []).append(change)
    print(f"\n| set | TFLOP | {winner}, but | n | k-NN(20) | linear |\n|---|---|---|---|---|---|")
    for (data, tflop, variant), changes in sorted(groups.items()):
        cells = [f"{mean(c):+.1f} ({min(c):+.1f} to {max(c):+.1f})" for c in zip(*changes, strict=True)]
        print(
            "|", " | ".join([data, f"{tflop:g}", variant.removeprefix(f"{winner}, "), f"{len(changes)}", *cells]), "|"
        )


def _cell(values: Sequence[float]) -> str:
    middle = f"{median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f}-{max(values):.1f})"


def plot() -> None:
    """k-NN over compute, one line a variant that was run at more than one budget, a point for the others."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trained = [row for row in rows() if row["variant"] != PIXELS]
    variants = {name: sorted({row["variant"] for row in trained if row["data"] == name}) for name in SETS | PARTS_OF}
    names = [name for name, found in variants.items() if len(found) > 1]  # One variant alone compares nothing.
    figure, axes = plt.subplots(max(len(names), 1), 1, figsize=(9, 4 * max(len(names), 1)), squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=False):
        mine = [row for row in trained if row["data"] == name]
        for i, variant in enumerate(variants[name]):
            budgets = sorted({row["tflop"] for row in mine if row["variant"] == variant})
            at = [[row for row in mine if (row["variant"], row["tflop"]) == (variant, b)] for b in budgets]
            axis.plot(
                [median(row["cpu_seconds"] for row in found) for found in at],
                [median(row["knn_20"] for row in found) for found in at],
                "osD^vP"[i // 10] + "-",
                label=variant,
            )
        axis.set(title=name, xlabel="CPU seconds of training", ylabel="k-NN(20), %", xscale="log")
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
