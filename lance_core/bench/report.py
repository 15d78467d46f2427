"""The benchmark's results as text and Markdown. Pure functions of what `bench.run` returns."""

from __future__ import annotations

from typing import Any

from .profile import COUNTED, NAMES, shares

COLUMNS = (
    "",
    "time",
    "fastest",
    "TFLOP",
    "of limit",
    "of matmul",
    "of copy",
    "working",
    "baseline",
    "ratio",
    "all layers (extrapolated)",
)
SUITE_COLUMNS = (
    "",
    "ours",
    "limit",
    "of limit",
    "released",
    "ratio",
    "memory",
    "released",
    "all layers (extrapolated)",
    "goal",
    "cut from",
)
GIB = 2**30
NOISE = 0.1  # cores taken by others, from which on a CPU's times are not to be trusted
NOTE = (
    "released: the released code's procedure on the same weights; limit: what the arithmetic or the reading "
    "must take at the rates measured "
    "here; memory: the peak above the weights"
)


def report(result: dict[str, Any]) -> str:
    """The result of `run` as a table for people."""
    return _suite(result, table, "\n".join) if "suite" in result else _cases(result)


def markdown(result: dict[str, Any]) -> str:
    """A suite's result as Markdown."""
    return _suite(result, _piped, lambda lines: "\n".join(f"- {line}" for line in lines))


def _cases(result: dict[str, Any]) -> str:
    lines = _heading(result)
    for case in result["cases"]:
        size = f"{case['width']}x{case['height']}, {case['frames']} frame{'s'[: case['frames'] > 1]}"
        kind = (
            f"{'edit, ' if case['edit'] else ''}batch {case['batch']}, "
            f"{'guided' if case['guidance'] else 'no guidance'}"
        )
        rows = [list(COLUMNS)]
        for name, m in case["measures"].items():
            slow, whole = m.get("baseline"), m.get("extrapolated")
            shares = [f"{m[key]:.0%}" for key in ("share_of_limit", "share_of_matmul", "share_of_copy")]
            compared = [seconds_text(slow["seconds"]), f"{slow['ratio']:.2f}x"] if slow else ["", ""]
            compared.append(seconds_text(whole["seconds"]) if whole else "")
            times = [seconds_text(m[key]) for key in ("seconds", "fastest")]
            rows.append(
                [name, *times, f"{m['flops'] / 1e12:.3g}", *shares, _bytes(m["working_bytes"]), *compared]
            )
        lines += ["", f"{size}, {kind}, {case['context']} tokens of text", table(_used(rows))]
        if "denoising" in case:
            d = case["denoising"]
            how = "extrapolated to all layers" if d["extrapolated"] else "from the steps above"
            lines.append(
                f"{d['steps']} steps ({d['guided_steps']} guided), {how}: {seconds_text(d['seconds'])}; "
                f"limit {seconds_text(d['limit_seconds'])}, {d['share_of_limit']:.0%} of it reached"
            )
        lines += _profiles([(name, m) for name, m in case["measures"].items() if "profile" in m], table)
    return "\n".join(lines)


def _heading(result: dict[str, Any]) -> list[str]:
    env, model, speed = result["environment"], result["model"], result["rates"]
    layers = (
        f"{model['layers']} layers"
        if not model["cut"]
        else f"{model['layers_measured']} of {model['layers']} layers ({model['cut']})"
    )
    return [
        f"{env['device_name']} ({env['device']}, {env['threads']} threads), {env['dtype']}, torch "
        f"{env['torch']}",
        f"{model['name']}, {layers}, random weights{options(model)}",
        f"matmul {speed['matmul']['flops_per_second'] / 1e12:.2f} TFLOP/s, copy "
        f"{speed['copy']['bytes_per_second'] / 1e9:.1f} GB/s",
        *disturbance(env),
    ]


def options(model: dict[str, Any]) -> str:
    """What was on that is off by default."""
    return "".join(f", {name}" for name in ("compiled", "overlapped") if model[name])


def disturbance(env: dict[str, Any]) -> list[str]:
    """A warning where other programs took part of what was measured."""
    cores = env["others_cores"]
    busy = env["device"] == "cpu" and cores is not None and cores > NOISE
    return [
        f"OTHER PROGRAMS TOOK {cores:.1f} CORES MEANWHILE: times are too long, differences may be noise"
    ] * busy


# -- the suite -----------------------------------------------------------------------------------------------


def _suite(result: dict[str, Any], tabulate: Any, listed: Any) -> str:
    """Heading, table, what the runs of all steps showed, how time grows, and what is missing."""
    rows = result["rows"]
    measured = [row for row in rows if not row["skipped"]]
    parts = ["\n".join(_heading(result)) if tabulate is table else "  \n".join(_heading(result))]
    if measured:
        parts.append(tabulate(_used([list(SUITE_COLUMNS), *map(_row, measured)])))
    notes = [NOTE] + [_steady(row) for row in measured if row.get("whole")]
    notes += [f"skipped: {row['title']}: {row['skipped']}" for row in rows if row["skipped"]]
    parts.append(listed(notes))
    parts += _profiles([(row["title"], row) for row in measured if "profile" in row], tabulate)
    if result["growth"]:
        parts.append(_growth(result["growth"], tabulate, listed))
    return "\n\n".join(parts)


def _row(row: dict[str, Any]) -> list[str]:
    slow, whole = row.get("baseline"), row.get("extrapolated")
    time = seconds_text(row["seconds"])
    if "tokens_per_second" in row:
        time += f" ({row['tokens_per_second']:.1f}/s)"
    cells = [row["title"], time, seconds_text(row["limit_seconds"]), f"{row['share_of_limit']:.0%}"]
    cells += [seconds_text(slow["seconds"]), f"{slow['ratio']:.2f}x"] if slow else ["", ""]
    cells += [_bytes(row["working_bytes"]), _bytes(slow["working_bytes"]) if slow else ""]
    cells.append(
        f"{seconds_text(whole['seconds'])}, limit {seconds_text(whole['limit_seconds'])}" if whole else ""
    )
    goals = "; ".join(map(_goal, row["goals"]["goals"])) if row["goals"]["compared"] else row["goals"]["why"]
    return [*cells, goals, row["stands_for"] or ""]


def _profiles(entries: list[tuple[str, dict[str, Any]]], tabulate: Any) -> list[str]:
    """A title and a table of what each entry's time goes to, and at what share of the limit's rate that runs
    which the limit counts.
    """
    if not entries:
        return []
    rows = [["", *NAMES, "counted work runs at"]]
    for title, entry in entries:
        part = shares(entry["profile"])
        counted = sum(part[kind] for kind in COUNTED)
        cells = [f"{part[kind]:.1%}" if part[kind] else "" for kind in NAMES]
        rows.append(
            [title, *cells, f"{entry['share_of_limit'] / counted:.0%} of the limit's rate" if counted else ""]
        )
    return [
        "What the time goes to; between: Python and dispatch on a CPU, an idle device elsewhere",
        tabulate(_used(rows)),
    ]


def _goal(goal: dict[str, Any]) -> str:
    """One goal, what was reached of it and whether that is enough."""
    what, bound = goal["what"], "at most" if goal["what"] == "seconds" else "at least"
    shown = {"seconds": seconds_text, "tokens_per_second": "{:.0f}/s".format}.get(what, "{:.0%}".format)
    named = {"share_of_matmul": " of matmul", "share_of_copy": " of copy"}.get(what, "")
    return (
        f"{'met' if goal['met'] else 'MISSED'}: {shown(goal['reached'])}{named}, {bound} "
        f"{shown(goal['goal'])}"
    )


def _steady(row: dict[str, Any]) -> str:
    whole = row["whole"]
    text = (
        f"{row['title']}, in one run: {seconds_text(whole['seconds'])}; a guided step takes "
        f"{seconds_text(whole['first'])} at first and "
        f"{seconds_text(whole['last'])} at last ({whole['drift']:+.1%}, where steps scatter by "
        f"{whole['spread']:.1%})"
    )
    if whole["memory_growth"] is not None:
        text += f"; memory from the second step to the last: {whole['memory_growth'] / 2**20:+.0f} MiB"
    if whole["allocation_growth"] is not None:
        text += f"; allocations in a step: {whole['allocation_growth']:+d}"
    return text


def _growth(growth: dict[str, Any], tabulate: Any, listed: Any) -> str:
    rows = [["latent frames", "tokens", "ours", "fit off by", "limit", "released", "ratio", "memory"]]
    off = growth.get("fit", {}).get("residuals", [None] * len(growth["points"]))
    for point, residual in zip(growth["points"], off, strict=True):
        slow = point.get("baseline")
        cells = [str(point["latent_frames"]), str(point["tokens"]), seconds_text(point["seconds"])]
        cells += ["" if residual is None else f"{residual:+.1%}", seconds_text(point["limit_seconds"])]
        cells += [seconds_text(slow["seconds"]), f"{slow['ratio']:.2f}x"] if slow else ["", ""]
        rows.append([*cells, _bytes(point["working_bytes"])])
    title = (
        f"A guided step over latent frames, {growth['width']}x{growth['height']}, {growth['layers']} layers"
    )
    notes = [
        f"{name}: {fit_text(growth[key])}"
        for name, key in (("ours", "fit"), ("released", "baseline_fit"))
        if key in growth
    ]
    notes += [
        f"skipped: {point['latent_frames']} latent frames: {point['skipped']}" for point in growth["skipped"]
    ]
    return "\n\n".join(
        [title, *([tabulate(_used(rows))] if growth["points"] else []), *([listed(notes)] if notes else [])]
    )


def fit_text(found: dict[str, Any]) -> str:
    """A fit as a formula."""
    worst = max(map(abs, found["residuals"]))
    a, b, c = (seconds_text(found[key]) for key in "abc")
    return f"{a} + {b} N + {c} N², R² {found['r2']:.4f}, off by {worst:.1%} at most"


# -- text ----------------------------------------------------------------------------------------------------


def _used(rows: list[list[str]]) -> list[list[str]]:
    """The table without columns that have nothing in them."""
    keep = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in keep] for row in rows]


def table(rows: list[list[str]]) -> str:
    """Rows as aligned text, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _piped(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---|" + "--:|" * (len(rows[0]) - 1), *body])


def seconds_text(seconds: float) -> str:
    """A duration with a unit that suits it."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if seconds >= (0.1 * size if unit == "ms" else size):
            return f"{seconds / size:.{1 if unit in ('µs', 'ns') else 2}f} {unit}"
    return f"{seconds * 1e12:.1f} ps" if seconds else "0 s"


def _bytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:.0f} MiB"
