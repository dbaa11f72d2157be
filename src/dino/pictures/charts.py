"""Curves as inline SVG: no file, no script, and colours that the page around them chooses."""

import math
from html import escape

Points = list[tuple[float, float]]  # (step, value)


def line_chart(series: dict[str, Points], reference: tuple[float, str] | None = None) -> str:
    """Curves as inline SVG with axes; of many points the mean of each stretch, in a band of its least and largest.

    Values that are not finite are left out. ``reference``: a dashed level with its name.
    """
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    levels = [y for points in finite.values() for _, y in points]
    if not levels:
        return "<p>No finite value yet.</p>"
    steps = [x for points in finite.values() for x, _ in points]
    left, right, top, bottom = 46, 384, 10, 178
    if reference:
        levels.append(reference[0])
    low, high = min(levels), max(levels)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = (0.0 if 0 <= low < pad else low - pad), high + pad
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def at_x(step: float) -> float:
        return left + (right - left) * (step - first) / (last - first)

    def at_y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = []
    for tick in ticks(low, high, 5):
        y = at_y(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick, 6)}</text>')
    parts.append(f'<text x="{left - 6}" y="{bottom + 16}" text-anchor="end">step</text>')
    for tick in ticks(first, last, 5):
        if at_x(tick) < left + 16:
            continue  # Would run into the word.
        parts.append(f'<text x="{at_x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{short(tick, 6)}</text>')
    if reference:
        y = at_y(reference[0])
        parts.append(f'<path class="reference" d="M{left} {y:.1f}H{right}"/>')
        parts.append(
            f'<text class="reference" x="{right}" y="{y - 4:.1f}" text-anchor="end">{escape(reference[1])}</text>'
        )
    for i, points in enumerate(finite.values()):
        mean, least, largest = _stretches(points, 200)
        if least != largest:
            outline = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in [*largest, *reversed(least)])
            parts.append(f'<polygon class="band c{i % 5}" points="{outline}"/>')
        curve = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in mean)
        parts.append(f'<polyline class="curve c{i % 5}" points="{curve}"/>')
        if len(mean) <= 30 and mean:
            parts += [f'<circle class="c{i % 5}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="2.6"/>' for x, y in mean]
    return f'<svg viewBox="0 0 400 200" role="img">{"".join(parts)}</svg>'


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between two others, about ``count`` of them.

    >>> ticks(0.0, 10.4, 5), ticks(0.031, 0.058, 4)
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.04, 0.05])
    """
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    width = next(m * unit for m in (1, 2, 5, 10) if m * unit >= 0.75 * rough)
    digits = max(0, -math.floor(math.log10(width)))
    return [round(i * width, digits) for i in range(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)]


def _stretches(points: Points, count: int) -> tuple[Points, Points, Points]:
    """Mean, least and largest value of at most ``count`` stretches of a curve."""
    size = max(1, -(-len(points) // count))
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    centres = [sum(x for x, _ in part) / len(part) for part in parts]
    values = [[y for _, y in part] for part in parts]
    of = [[sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]]
    mean, least, largest = (list(zip(centres, v, strict=True)) for v in of)
    return mean, least, largest


def short(value: float, digits: int = 3) -> str:
    """A number in few characters.

    >>> [short(v) for v in (0.0, 0.00012, 0.9961, 8.3178, 412.66, 65536.0, 1281167.0)]
    ['0', '0.00012', '0.996', '8.32', '413', '65.5k', '1.28M']
    >>> short(0.99955, 6)
    '0.99955'
    """
    for limit, scale, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if limit <= abs(value) < math.inf:
            return f"{value / scale:.{digits}g}{unit}"
    return f"{value:.{digits if abs(value) < 1000 else max(digits, 4)}g}"
