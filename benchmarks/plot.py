"""The figures of README and docs/, drawn from the files under results/, on light and on dark pages.

python -m bcmfnet.benchmarks.plot [--output-dir docs/figures]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcmfnet.benchmarks.figures import AVX2, INSTRUCTIONS, MACHINES, RESULTS, counted, measured
from bcmfnet.benchmarks.peers.published import PAPER
from bcmfnet.benchmarks.scaling import AXES
from bcmfnet.viz import require_matplotlib


@dataclass(frozen=True)
class Theme:
    """Colours of a page: its text, what is quiet on it, ours, and the others."""

    ink: str
    quiet: str
    rule: str
    ours: str
    others: str
    second: str


THEMES = {
    "light": Theme("#1c2127", "#57606a", "#dde1e6", "#1d5b9f", "#b9c2cc", "#b4540a"),
    "dark": Theme("#e4e7eb", "#9da7b1", "#2f353d", "#79b4f2", "#59636e", "#f0a15c"),
}
LOSSES = {
    "Cross-entropy + boundary term\n19 classes, 1/8 to 512x1024": ("bcl", "2x19x64x128-512x1024-smooth", "naive"),
    "Cross-entropy + Dice\n19 classes, 1/8 to 512x1024": ("terms", "ce+dice-2x19x64x128-512x1024", "usual"),
    "Cross-entropy + Dice\n150 classes, 1/4 to 512x512": ("terms", "ce+dice-2x150x128x128-512x512", "usual"),
}
"""What is drawn of the losses: benchmark, case, and the provider that is eager PyTorch as one writes it."""
PROVIDERS = {"this library": "cpp", "torch.compile": "compile", "eager, the best form": "eager_best"}


def loss(figure: Any, theme: Theme) -> None:
    """Time and peak memory of value and gradient, a panel for each loss."""
    rows = measured(RESULTS / MACHINES["no AMX"])
    grid = figure.subplots(len(LOSSES), 2, gridspec_kw={"hspace": 0.55, "wspace": 0.1})
    for (name, (benchmark, case, usual)), panels in zip(LOSSES.items(), grid, strict=True):
        providers = PROVIDERS | {"eager, as one writes it": usual}
        found = [rows[benchmark, case, provider, "1"] for provider in providers.values()]
        milliseconds = [float(row["time_us_50"]) / 1e3 for row in found]
        megabytes = [float(row["extra_bytes"]) / 1e6 for row in found]
        panels[0].set_title(name.replace("\n", " - "), loc="left", color=theme.ink, fontsize=10)
        bars(panels[0], list(providers), milliseconds, "ms", theme)
        bars(panels[1], [""] * len(found), megabytes, "MB beyond inputs and outputs", theme)


def bars(axes: Any, names: list[str], values: list[float], unit: str, theme: Theme) -> None:
    """Bars from the left, the first one ours, each with its value."""
    places = range(len(values))
    axes.barh(places, values, color=[theme.ours, *[theme.others] * (len(values) - 1)], height=0.7)
    axes.set_yticks(places, names, color=theme.ink)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(values))
    axes.set_xticks([])
    for place, value in zip(places, values, strict=True):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        more = f" {unit}" if place == 0 else ""
        beside(axes, text + more, (value, place), color=theme.ink if place == 0 else theme.quiet)
    axes.tick_params(length=0)


def beside(axes: Any, text: str, place: tuple[float, float], points: float = 3, **looks: Any) -> None:
    """Text to the right of a place. Spaces would not do: a browser drops those that a text of an SVG begins with."""
    axes.annotate(text, place, (points, 0), textcoords="offset points", va="center_baseline", **looks)


def floors(figure: Any, theme: Theme) -> None:
    """What no schedule on an H200 can be below, of each call: by instructions, and by bytes."""
    rows = list(counted(INSTRUCTIONS).values())
    axes = figure.subplots()
    places = range(len(rows))
    for column, shift, color, name in (
        ("issue_us", -0.2, theme.ours, "instructions issued"),
        ("memory_us_h200", 0.2, theme.second, "bytes touched"),
    ):
        values = [float(row[column]) for row in rows]
        axes.barh([place + shift for place in places], values, height=0.36, color=color, label=name)
        for place, value in zip(places, values, strict=True):
            beside(axes, f"{value:.3g}", (value, place + shift), color=theme.quiet, fontsize=8)
    axes.set_yticks(places, [described(row["case"]) for row in rows], color=theme.ink)
    axes.invert_yaxis()
    axes.set(xscale="log", xlim=(0.5, 1500))
    axes.set_xlabel("microseconds that no schedule on an H200 can be below; counted, not measured", color=theme.quiet)
    axes.legend(frameon=False, labelcolor=theme.ink, loc="lower right")
    axes.tick_params(length=0)


def described(case: str) -> str:
    """A call whose instructions were counted, in words."""
    op, *others = case.split("-")
    if op == "terms":
        return f"loss, from 1/8, float32, {'cross-entropy' + others[0].removeprefix('ce').replace('+', ' + ')}"
    if op != "bcl":
        return " ".join([op, *(part for part in others if part not in ("channels_last", op))])
    shape, size, *options = others
    resolution = "full resolution" if shape.endswith(size) else "from 1/8"
    precision = "bfloat16" if "bfloat16" in options else "float32"
    words = [word for word in options if word not in ("smooth", "bfloat16")] or ["default"]
    return f"loss, {resolution}, {precision}, {' '.join(words)}"


def scaling(figure: Any, theme: Theme) -> None:
    """Time and peak memory of the loss against resolution, batch and classes, on logarithmic axes."""
    rows = measured(RESULTS / MACHINES["AMX"])
    looks = {
        "this library": ("cpp", theme.ours, "o"),
        "eager, the best form": ("eager_best", theme.quiet, "s"),
        "eager, as one writes it": ("naive", theme.second, "^"),
    }
    costs = {}
    for axis, cases in AXES.items():
        keys = {
            value: [("scaling", case.name, look[0], "1") for look in looks.values()] for value, case in cases.items()
        }
        found = {value: [rows[key] for key in each] for value, each in keys.items() if all(key in rows for key in each)}
        if len(found) > 1:
            costs[axis] = found
    grid = figure.subplots(2, len(costs), sharey="row", sharex="col")
    for (axis, found), panels in zip(costs.items(), grid.T, strict=True):
        for axes, column, unit in zip(panels, ("time_us_50", "extra_bytes"), (1e3, 1e6), strict=True):
            for number, (name, (_, color, marker)) in enumerate(looks.items()):
                values = [float(row[number][column]) / unit for row in found.values()]
                axes.plot(list(found), values, color=color, marker=marker, markersize=4, label=name)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(list(found), [f"{value:.2g}" if value < 10 else f"{value:g}" for value in found])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.grid(color=theme.rule, linewidth=0.6)
        panels[1].set_xlabel(axis, color=theme.quiet)
    for axes, name in zip(grid[:, 0], ("ms", "MB beyond inputs and outputs"), strict=True):
        axes.set_ylabel(name, color=theme.quiet)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, labelcolor=theme.ink, loc="outside upper left", ncols=len(looks))


def speed(figure: Any, theme: Theme) -> None:
    """Accuracy that papers print on Cityscapes against frames a second that were measured here."""
    rows = measured(RESULTS / AVX2)
    axes = figure.subplots()
    for known in PAPER["cityscapes"]:
        row = rows.get(("tables", "cityscapes-1x3x512x1024", known.network, "2"))
        if row is not None:
            ours = known.network == "bcmfnet"
            place = 1e6 / float(row["time_us_50"]), known.miou
            axes.scatter(*place, color=theme.ours if ours else theme.quiet, s=36 if ours else 22)
            beside(axes, known.title, place, points=6, color=theme.ink if ours else theme.quiet)
    axes.set(xscale="log")
    axes.margins(x=0.15, y=0.08)
    axes.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    axes.set_xticks([], minor=True)
    axes.grid(color=theme.rule, linewidth=0.6)
    axes.set_xlabel("frames of 512x1024 a second, eager float32 on two threads of a CPU, measured", color=theme.quiet)
    axes.set_ylabel("mIoU on Cityscapes, published", color=theme.quiet)


FIGURES: dict[str, tuple[Callable[[Any, Theme], None], tuple[float, float]]] = {
    "loss": (loss, (8.4, 5.6)),
    "floors": (floors, (8.4, 7.6)),
    "scaling": (scaling, (8.4, 5.0)),
    "speed": (speed, (8.4, 4.2)),
}
"""How each is drawn, and its width and height in inches."""


def draw(folder: Path) -> None:
    """Write NAME-light.svg and NAME-dark.svg of each figure; the same rows give the same bytes."""
    require_matplotlib("figures")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    fonts = {"font.family": "sans-serif", "font.sans-serif": ["system-ui", "DejaVu Sans"], "font.size": 9}
    for name, (drawing, size) in FIGURES.items():
        for mode, theme in THEMES.items():
            with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, **fonts}):
                figure = Figure(figsize=size, layout=None if name == "loss" else "constrained")
                drawing(figure, theme)
                for axes in figure.axes:
                    axes.spines[:].set_visible(False)
                    axes.tick_params(which="both", colors=theme.quiet, labelcolor=theme.ink)
                    axes.set_facecolor("none")
                path = folder / f"{name}-{mode}.svg"
                figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
                path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=RESULTS.parents[1] / "docs" / "figures")
    draw(parser.parse_args().output_dir)


if __name__ == "__main__":
    main()
