"""Tables, JSON and plots of what was measured."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsek_vllm.bench.kernels import OURS, Row


def table(name: str, rows: list[Row]) -> str:
    """A Markdown table: microseconds of each contender, our rate, and the best peer over us."""
    contenders = list(dict.fromkeys(c for row in rows for c in row.times))
    lines = [
        f"| {name} | {' | '.join(f'{c}, us' for c in contenders)} | {OURS}, {rows[0].unit} "
        "| best peer / sparsek |",
        f"|---|{'---|' * (len(contenders) + 2)}",
    ]
    ratios = []
    for row in rows:
        cells = [f"{row.times[c]:.1f}" if c in row.times else "" for c in contenders]
        best = row.best_peer()
        ratio = row.times[best] / row.times[OURS] if best else None
        ratios += [ratio] if ratio else []
        shown = f"{ratio:.2f} ({best})" if ratio else ""
        lines.append(f"| {row.name} | {' | '.join(cells)} | {row.rate(OURS):.4g} | {shown} |")
    if ratios:
        mean = statistics.geometric_mean(ratios)
        lines.append(f"| geometric mean |{' |' * (len(contenders) + 1)} {mean:.2f} |")
    if any(row.apart for row in rows):
        lines.append("")
        for row in rows:
            calls = ", ".join(f"{c} {t:.1f}" for c, t in row.apart.items())
            lines.append(f"{row.apart_title}, {row.name}: {calls}")
    return "\n".join(lines)


def as_json(
    environment: dict[str, str], sets: dict[str, list[Row]], floor: Any, serving: Any, load: Any
) -> str:
    kernels = {name: [asdict(row) for row in rows] for name, rows in sets.items()}
    everything = {
        "environment": environment,
        "kernels": kernels,
        "floor": floor,
        "serving": serving,
        "load": load,
    }
    return json.dumps(everything, indent=1) + "\n"


def plot(folder: Path, environment: dict[str, str], sets: dict[str, list[Row]]) -> list[Path]:
    """One picture a set: the rate of each contender on each row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in sets.items():
        contenders = list(dict.fromkeys(c for row in rows for c in row.times))
        figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(rows) + 1.6))
        height = 0.8 / len(contenders)
        for i, contender in enumerate(contenders):
            own = [(n, row.rate(contender)) for n, row in enumerate(rows) if contender in row.times]
            axes.barh(
                [n + i * height for n, _ in own], [rate for _, rate in own], height, label=contender
            )
        axes.set_yticks([n + 0.4 - height / 2 for n in range(len(rows))], [r.name for r in rows])
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.set_xlabel(rows[0].unit)
        axes.set_title(f"{name}: {environment['gpu']}, torch {environment['torch']}", fontsize=10)
        # Below the axis' label, however many rows there are.
        below = -0.6 / (0.32 * len(rows) + 1.6)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncol=len(contenders))
        axes.grid(axis="x", alpha=0.3)
        path = folder / f"bench-{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        paths.append(path)
    return paths
