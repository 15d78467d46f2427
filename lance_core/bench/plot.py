"""A suite's result as a picture: every row's time beside the limit and the released procedure, and how a step
grows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RequestError
from .report import seconds_text
from .speed_report import disturbance, options

INK, SOFT, OURS, RELEASED, LIMIT = "#1f2933", "#7b8794", "#0f766e", "#c5ccd3", "#e8a33d"
BAR = 0.26


def require(path: str) -> None:
    """Make sure that a plot can be drawn to `path`.

    Raises:
        RequestError: matplotlib is missing, or writes no such format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise RequestError(
            f"--plot needs matplotlib ({error}): pip install '.[bench]', or leave --plot out"
        ) from None
    formats = FigureCanvasAgg.get_supported_filetypes()
    suffix = Path(path).suffix.lower().removeprefix(".")
    if suffix not in formats:
        raise RequestError(
            f"{path}: a plot can be {', '.join(f'.{f}' for f in sorted(formats))}; name it *.png"
        )


def draw(result: dict[str, Any], path: str) -> None:
    """Draw a suite's result into `path`.

    Raises:
        RequestError: it cannot be written; see also `require`.
    """
    require(path)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if not row["skipped"]]
    points = (result["growth"] or {}).get("points", [])
    style: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "xtick.color": SOFT}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "ytick.color"), INK)
    style |= {"axes.edgecolor": "#cbd2d9", "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        panels = [p for p in ((_bars, rows), (_curve, points)) if p[1]]
        height = max(4.6, 1.6 + 0.78 * len(rows))
        figure = Figure(
            figsize=(8.2 * len(panels) or 8.2, height), dpi=150, layout="constrained", facecolor="white"
        )
        env, model = result["environment"], result["model"]
        measured = f"{model['layers_measured']} of" if model["cut"] else "all"
        layers = f"{measured} {model['layers']} layers"
        threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
        lines = [
            f"Lance on {env['device_name']}{threads}",
            f"{env['dtype']}, {layers}{options(model)}, random weights, torch {env['torch']}",
            *disturbance(env),
        ]
        figure.suptitle("\n".join(lines), fontsize=12)
        axes = figure.subplots(
            1, max(len(panels), 1), width_ratios=[1.2, 1][: len(panels)] or None, squeeze=False
        )[0]
        for (panel, data), axis in zip(panels, axes, strict=False):
            panel(axis, data, result)
        if not panels:
            axes[0].set_axis_off()
            axes[0].text(0.5, 0.5, "nothing could be measured", ha="center", va="center")
        try:
            figure.savefig(path)
        except OSError as error:
            raise RequestError(f"{path} cannot be written: {error.strerror}") from None


def _bars(axis: Any, rows: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Each row's times as shares of the released procedure's (of ours, where that was not measured), with the
    times written on.
    """
    shown: set[str] = set()
    longest = 1.0
    for place, row in enumerate(rows):
        slow = row.get("baseline")
        whole = slow["seconds"] if slow else row["seconds"]
        bars = [("ours", row["seconds"], OURS), ("limit of this device", row["limit_seconds"], LIMIT)]
        bars += [("released procedure", slow["seconds"], RELEASED)] if slow else []
        for level, (name, seconds, colour) in enumerate(bars):
            share, y = seconds / whole, place + (level - (len(bars) - 1) / 2) * BAR
            longest = max(longest, share)
            axis.barh(y, share, height=BAR * 0.86, color=colour, label=None if name in shown else name)
            shown.add(name)
            look = {"color": INK, "fontweight": "bold"} if name == "ours" else {"color": SOFT}
            beside = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
            axis.annotate(seconds_text(seconds), (share, y), fontsize=8.5, **look, **beside)
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.16)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    whose = "the released procedure's" if "baseline" in rows[0] else "ours"
    axis.set_xlabel(f"time, as a share of {whose}")
    _frame(axis, "What the work takes", grid="x")


def _frame(axis: Any, title: str, grid: str) -> None:
    """A panel's grid, its title and its legend below that."""
    axis.grid(axis=grid, color="#e4e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=30)
    place = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "borderaxespad": 0.3}
    axis.legend(**place, ncols=3, frameon=False, handlelength=1.2)


def _label(row: dict[str, Any]) -> str:
    """A row's title on two lines: the work, and its size."""
    what, _, size = row["title"].rpartition(f", {row['width']}x")
    return f"{what}\n{row['width']}×{size}"


def _curve(axis: Any, points: list[dict[str, Any]], result: dict[str, Any]) -> None:
    """Seconds of a guided step over latent frames: measured points, the fits through them, and the limit."""
    growth = result["growth"]
    frames = [p["latent_frames"] for p in points]
    per = points[0]["tokens"] / frames[0]
    fine = [frames[0] + (frames[-1] - frames[0]) * i / 200 for i in range(201)]
    slow = [p["baseline"]["seconds"] for p in points if "baseline" in p]
    ours = [p["seconds"] for p in points]
    top = max(ours + slow)
    for name, key, seconds, colour, above in (
        ("ours", "fit", ours, OURS, 4),
        ("released procedure", "baseline_fit", slow, "#9aa5b1", 3),
    ):
        if seconds:
            axis.plot(frames, seconds, "o", color=colour, markersize=5.5, label=name, zorder=above)
        if key in growth:
            a, b, c = (growth[key][letter] for letter in "abc")
            fitted = [a + b * per * f + c * (per * f) ** 2 for f in fine]
            axis.plot(fine, fitted, color=colour, linewidth=1.6, zorder=2)
    limits = [p["limit_seconds"] for p in points]
    axis.plot(frames, limits, color=LIMIT, linewidth=1.6, label="limit of this device")
    axis.set_xlim(0, frames[-1] * 1.04)
    axis.set_ylim(0, top * 1.2)  # room for the formula
    unit, scale = ("s", 1) if top >= 1 else ("ms", 1e-3)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value / scale:g} {unit}" if value else "0")
    axis.set_xlabel(f"latent frames of {growth['width']}×{growth['height']} ({per:.0f} tokens each)")
    _frame(axis, "How a guided step grows", grid="both")
    if "fit" in growth:
        found = growth["fit"]
        a, b, c = (seconds_text(found[letter]) for letter in "abc")
        worst = max(map(abs, found["residuals"]))
        formula = f"ours = {a} + {b}·N + {c}·N²"
        quality = f"R² {found['r2']:.4f}, off by {worst:.1%} at most; N: tokens"
        place = {"transform": axis.transAxes, "va": "top", "linespacing": 1.5}
        axis.text(0.03, 0.95, f"{formula}\n{quality}", fontsize=9.5, color=OURS, **place)
