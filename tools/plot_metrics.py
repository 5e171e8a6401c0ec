"""Draws losses, learning rate and evaluation metrics of one or more runs into a PNG.

    python tools/plot_metrics.py output/run1 output/run2 --output curves.png

Each run is an output folder or its metrics.json. Needs matplotlib, from the extra `plot`.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.utils.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Run = dict[str, list[tuple[int, float]]]
"""The points (iteration, value) of every metric; a value that is not finite is NaN, a gap."""

LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "x", "^", "+")
# A legend of more curves would cover them, and stands beside its chart.
MAX_LEGEND_INSIDE = 4
# As many as a chart is high.
MAX_LEGEND_ROWS = 15
# A breakdown by class of more curves is drawn only when --keys asks for it.
MAX_CLASS_CURVES = 20
# A curve of so few points shows where they are.
MAX_MARKERS = 40
MAX_VALUE = 1e300


@dataclass
class Panel:
    """One chart.

    Args:
        title: What stands above it.
        prefix: What the names of its metrics have in common, left out of the legend.
        by_class: Whether it breaks one metric down.
        keys: The metrics that share its axes.
    """

    title: str
    prefix: str = ""
    by_class: bool = False
    keys: list[str] = field(default_factory=list)


def read_run(path: Path) -> Run:
    """Reads the metrics of one run.

    Args:
        path: Its output folder, or its metrics.json.

    Raises:
        ConfigError: If the file is missing, empty or damaged.
    """
    file = path / "metrics.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{file} does not exist. Name a run's output folder or metrics.json.")
    run: Run = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            iteration = int(record.pop("iteration"))
            values = {_printable(key): _drawable(value) for key, value in record.items()}
            # A chart's axis cannot count further.
            if abs(iteration) >= 2**53:
                raise ValueError("too far")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise ConfigError(
                f"{file} is damaged: line {number} should be a JSON object of numbers with an "
                f"iteration, but begins with {line[:40]!r}. Delete that line."
            ) from None
        for key, value in values.items():
            run.setdefault(key, []).append((iteration, value))
    if not run:
        raise ConfigError(f"{file} holds no metrics. Wait for the run's first log step.")
    return run


def _printable(name: str) -> str:
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)


def _drawable(value: float | None) -> float:
    """Returns NaN for what is not finite, and for what is so large that a chart's range is not."""
    return math.nan if value is None or abs(float(value)) > MAX_VALUE else float(value)


def name_runs(paths: list[Path]) -> list[str]:
    """Returns the folders' names where those tell the runs apart, else the paths."""
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in paths]
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def choose_keys(runs: list[Run], wanted: list[str] | None = None) -> list[str]:
    """Returns the metrics to draw: those wanted, or losses, learning rate and evaluation metrics.

    Raises:
        UnknownNameError: If no run has a metric that is wanted.
        ConfigError: If there is nothing to draw by default.
    """
    known = sorted({key for run in runs for key in run}, key=lambda key: (key != "total_loss", key))
    for key in wanted or []:
        if key not in known:
            raise UnknownNameError("metric", key, known)
    keys = wanted or [k for k in known if k == "lr" or "loss" in k or "/" in k]
    if not keys:
        raise ConfigError(f"There is no loss to draw; choose --keys from {', '.join(known)}.")
    if not wanted and "total_loss" in keys:
        # The total of a single loss would hide it.
        total = [run.get("total_loss") for run in runs]
        keys = [k for k in keys if k == "total_loss" or [run.get(k) for run in runs] != total]
    return keys


def panel_of(key: str, known: set[str]) -> Panel:
    """Returns the empty chart that a metric belongs to."""
    if "loss" in key:
        return Panel("Loss")
    if key == "lr":
        return Panel("Learning rate")
    for whole in known:
        if key.startswith(f"{whole}-"):
            return Panel(f"{whole} of each class", f"{whole}-", by_class=True)
    group = key.rpartition("/")[0]
    return Panel(group, f"{group}/") if group else Panel(key)


def group_into_panels(keys: list[str], runs: list[Run], max_class_curves: int) -> list[Panel]:
    """Groups metrics into charts, losses and learning rate first.

    Args:
        keys: Metrics to draw.
        runs: What was read.
        max_class_curves: A breakdown by class of more curves is left out.
    """
    known = {key for run in runs for key in run}
    panels = {title: Panel(title) for title in ("Loss", "Learning rate")}
    for key in keys:
        panel = panel_of(key, known)
        panels.setdefault(panel.title, panel).keys.append(key)
    return [
        panel
        for panel in panels.values()
        if panel.keys and not (panel.by_class and len(panel.keys) * len(runs) > max_class_curves)
    ]


def draw_curves(ax: "Axes", panel: Panel, runs: dict[str, Run]) -> None:
    """Draws the curves of one chart; color tells runs apart if there are several, else metrics."""
    color_by_run = len(runs) > 1 and len(panel.keys) <= len(LINE_STYLES)
    for row, (name, run) in enumerate(runs.items()):
        for column, key in enumerate(panel.keys):
            if key not in run:
                continue
            # Equal runs stay visible through each other: style and marker change with the run.
            style = row + (column if color_by_run else column // 10)
            metric = key.removeprefix(panel.prefix)
            label = metric if len(runs) == 1 else f"{name}: {metric}"
            iterations, values = zip(*run[key], strict=True)
            ax.plot(
                iterations,
                values,
                color=f"C{(row if color_by_run else column) % 10}",
                alpha=0.8,
                linestyle=LINE_STYLES[style % len(LINE_STYLES)],
                marker=MARKERS[row % len(MARKERS)] if len(values) <= MAX_MARKERS else None,
                markersize=4,
                label=name if len(panel.keys) == 1 else label,
            )


def draw_panel(ax: "Axes", panel: Panel, runs: dict[str, Run]) -> None:
    """Draws one chart; its iterations are those of the longest run, as in all other charts."""
    draw_curves(ax, panel, runs)
    last = max(i for run in runs.values() for points in run.values() for i, _ in points)
    margin = 0.02 * max(last, 1)
    ax.set_xlim(-margin, last + margin)
    ax.locator_params(axis="x", integer=True)
    ax.ticklabel_format(axis="y", useOffset=False)
    if ax.dataLim.y0 >= 0:
        ax.set_ylim(bottom=max(0.0, ax.get_ylim()[0]))
    alone = len(panel.keys) == 1
    ax.set_title(panel.title)
    ax.set_xlabel("iteration")
    ax.set_ylabel(
        panel.keys[0].removeprefix(panel.prefix)
        if alone
        else panel.prefix[:-1] or panel.title.lower()
    )
    ax.grid(alpha=0.3)
    curves = len(ax.get_lines())
    if curves > MAX_LEGEND_INSIDE:
        columns = math.ceil(curves / MAX_LEGEND_ROWS)
        ax.legend(fontsize="small", ncols=columns, loc="upper left", bbox_to_anchor=(1.02, 1))
    elif len(runs) > 1 or not alone:
        ax.legend(fontsize="small")


def make_room_for_legends(figure: "Figure", columns: int) -> None:
    """Widens the figure by the legends that stand beside their charts."""
    widths = [0.0] * columns
    for index, ax in enumerate(figure.axes):
        legend = ax.get_legend()
        if legend and len(ax.get_lines()) > MAX_LEGEND_INSIDE:
            width = legend.get_window_extent().width / figure.dpi
            widths[index % columns] = max(widths[index % columns], width)
    figure.set_figwidth(figure.get_figwidth() + sum(widths))


def draw(runs: dict[str, Run], panels: list[Panel]) -> "Figure":
    """Draws all charts into one figure, two in a row.

    Raises:
        ConfigError: If matplotlib is missing.
    """
    try:
        from matplotlib import rcParams
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ConfigError(
            "Drawing needs matplotlib, which is not installed. Run pip install 'trainkit[plot]'."
        ) from None
    # A dollar sign in a name is no formula.
    rcParams["text.parse_math"] = False
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1)
    figure = Figure(figsize=(6.5 * columns, 4 * rows), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    for index, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(rows, columns, index), panel, runs)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    make_room_for_legends(figure, columns)
    return figure


def plot(paths: list[Path], output: Path | None = None, keys: list[str] | None = None) -> Path:
    """Draws the runs and returns where the image is.

    Args:
        paths: Output folders or metrics.json files.
        output: The PNG to write; metrics.png beside the first run's metrics by default.
        keys: The metrics to draw; losses, learning rate and evaluation metrics by default.

    Raises:
        ConfigError: If a run cannot be read, or matplotlib is missing.
        UnknownNameError: If no run has one of the `keys`.
        OSError: If the image cannot be written.
    """
    runs = dict(zip(name_runs(paths), map(read_run, paths), strict=True))
    chosen = choose_keys(list(runs.values()), keys)
    max_class_curves = sys.maxsize if keys else MAX_CLASS_CURVES
    panels = group_into_panels(chosen, list(runs.values()), max_class_curves)
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    output = output or folder / "metrics.png"
    draw(runs, panels).savefig(output, format="png")
    return output


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders or metrics.json files")
    parser.add_argument("--output", type=Path, help="default: metrics.png in the first run")
    parser.add_argument("--keys", nargs="+", help="default: losses, lr, and names with a slash")
    args = parser.parse_args(argv)
    try:
        print(plot(args.runs, args.output, args.keys))
    except (ConfigError, UnknownNameError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
