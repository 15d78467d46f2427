"""A suite's result as a picture: every row's time beside the limit and the released procedure, and how a step
grows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RequestError
from .report import disturbance, options, seconds_text

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
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "ytick.color": INK,
    }
    style |= {
        "xtick.color": SOFT,
        "axes.edgecolor": "#cbd2d9",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        panels = [p for p in ((_bars, rows), (_curve, points)) if p[1]]
        height = max(4.6, 1.6 + 0.78 * len(rows))
        figure = Figure(
            figsize=(8.2 * len(panels) or 8.2, height), dpi=150, layout="constrained", facecolor="white"
        )
        env, model = result["environment"], result["model"]
        layers = (
            f"{model['layers_measured']} of {model['layers']} layers"
            if model["cut"]
            else f"all {model['layers']} layers"
        )
        title = f"Lance on {env['device_name']}" + (
            f", {env['threads']} threads" if env["device"] == "cpu" else ""
        )
        lines = [
            title,
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
            axis.annotate(
                seconds_text(seconds),
                (share, y),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
                color=INK if name == "ours" else SOFT,
                fontweight="bold" if name == "ours" else "normal",
            )
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.16)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel(
        "time, as a share of the released procedure's"
        if result["rows"] and "baseline" in rows[0]
        else "time, as a share of ours"
    )
    axis.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title("What the work takes", loc="left", fontsize=12, fontweight="bold", pad=30)
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        frameon=False,
        borderaxespad=0.3,
        handlelength=1.2,
    )


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
    series = [("ours", "fit", [p["seconds"] for p in points], OURS)]
    series += [
        (
            "released procedure",
            "baseline_fit",
            [p["baseline"]["seconds"] for p in points if "baseline" in p],
            "#9aa5b1",
        )
    ]
    top = 0.0
    for name, key, seconds, colour in series:
        if not seconds:
            continue
        top = max(top, *seconds)
        axis.plot(
            frames, seconds, "o", color=colour, markersize=5.5, label=name, zorder=4 if key == "fit" else 3
        )
        if key in growth:
            a, b, c = (growth[key][letter] for letter in "abc")
            axis.plot(
                fine,
                [a + b * per * f + c * (per * f) ** 2 for f in fine],
                color=colour,
                linewidth=1.6,
                zorder=2,
            )
    axis.plot(
        frames, [p["limit_seconds"] for p in points], color=LIMIT, linewidth=1.6, label="limit of this device"
    )
    axis.set_xlim(0, frames[-1] * 1.04)
    axis.set_ylim(0, top * 1.2)  # room for the formula
    unit, scale = ("s", 1) if top >= 1 else ("ms", 1e-3)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value / scale:g} {unit}" if value else "0")
    axis.set_xlabel(f"latent frames of {growth['width']}×{growth['height']} ({per:.0f} tokens each)")
    axis.grid(color="#e4e7eb", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title("How a guided step grows", loc="left", fontsize=12, fontweight="bold", pad=30)
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        frameon=False,
        borderaxespad=0.3,
        handlelength=1.2,
    )
    if "fit" in growth:
        found = growth["fit"]
        a, b, c = (seconds_text(found[letter]) for letter in "abc")
        text = (
            f"ours = {a} + {b}·N + {c}·N²\nR² {found['r2']:.4f}, off by "
            f"{max(map(abs, found['residuals'])):.1%} at most; N: tokens"
        )
        axis.text(
            0.03, 0.95, text, transform=axis.transAxes, va="top", fontsize=9.5, color=OURS, linespacing=1.5
        )
