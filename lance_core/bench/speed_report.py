"""What `bench speed` and `bench suite` found, as a document. Pure functions of their results."""

from __future__ import annotations

from typing import Any

from .profile import COUNTED, NAMES, shares
from .report import Block, Notes, Table, mebibytes, seconds_text

NOISE = 0.1  # cores taken by others, from which on a CPU's times are not to be trusted
NOTE = (
    "released: the released code's procedure on the same weights; limit: what the arithmetic or the reading "
    "must take at the rates measured here; memory: the peak above the weights"
)
CASE_HEAD = (
    *("", "time", "fastest", "TFLOP", "of limit", "of matmul", "of copy", "working"),
    *("baseline", "ratio", "all layers (extrapolated)"),
)
SUITE_HEAD = (
    *("", "ours", "limit", "of limit", "released", "ratio", "memory", "released"),
    *("all layers (extrapolated)", "goal", "cut from"),
)
GROWTH_HEAD = ("latent frames", "tokens", "ours", "fit off by", "limit", "released", "ratio", "memory")


def document(result: dict[str, Any]) -> list[Block]:
    """A suite's rows, what the runs of all steps showed and how time grows; or a table a case."""
    blocks: list[Block] = ["\n".join(heading(result))]
    if "suite" not in result:
        return blocks + [block for case in result["cases"] for block in _case(case)]
    measured = [row for row in result["rows"] if not row["skipped"]]
    if measured:
        blocks.append(Table(SUITE_HEAD, [_row(row) for row in measured]))
    notes = [NOTE, *(_steady(row) for row in measured if row.get("whole"))]
    notes += [f"skipped: {row['title']}: {row['skipped']}" for row in result["rows"] if row["skipped"]]
    blocks += [Notes(notes), *_profiles({row["title"]: row for row in measured})]
    return blocks + (_growth(result["growth"]) if result["growth"] else [])


def heading(result: dict[str, Any]) -> list[str]:
    """Device, model and rates; and a warning where other programs took part of what was measured."""
    env, model, speed = result["environment"], result["model"], result["rates"]
    lines = [
        f"{env['device_name']} ({env['device']}, {env['threads']} threads), {env['dtype']}, "
        f"torch {env['torch']}",
        f"{model['name']}, {layers_text(model)}, random weights{options(model)}",
        f"matmul {speed['matmul']['flops_per_second'] / 1e12:.2f} TFLOP/s, copy "
        f"{speed['copy']['bytes_per_second'] / 1e9:.1f} GB/s",
    ]
    return lines + disturbance(env)


def layers_text(model: dict[str, Any]) -> str:
    """How many layers were measured, and why not all."""
    if not model["cut"]:
        return f"{model['layers']} layers"
    return f"{model['layers_measured']} of {model['layers']} layers ({model['cut']})"


def options(model: dict[str, Any]) -> str:
    """What was on that is off by default."""
    return "".join(f", {name}" for name in ("compiled", "overlapped") if model[name])


def disturbance(env: dict[str, Any]) -> list[str]:
    """A warning where other programs were busy; on an accelerator they hardly matter."""
    cores = env["others_cores"]
    if env["device"] != "cpu" or cores is None or cores <= NOISE:
        return []
    return [f"OTHER PROGRAMS TOOK {cores:.1f} CORES MEANWHILE: times are too long, differences may be noise"]


def _case(case: dict[str, Any]) -> list[Block]:
    size = f"{case['width']}x{case['height']}, {case['frames']} frame{'s'[: case['frames'] > 1]}"
    edit, guided = "edit, " if case["edit"] else "", "guided" if case["guidance"] else "no guidance"
    rows = []
    for name, m in case["measures"].items():
        shared = [f"{m[key]:.0%}" for key in ("share_of_limit", "share_of_matmul", "share_of_copy")]
        whole = m.get("extrapolated")
        times = [seconds_text(m[key]) for key in ("seconds", "fastest")]
        cells = [name, *times, f"{m['flops'] / 1e12:.3g}", *shared, mebibytes(m["working_bytes"])]
        rows.append([*cells, *_slower(m), seconds_text(whole["seconds"]) if whole else ""])
    blocks: list[Block] = [
        f"{size}, {edit}batch {case['batch']}, {guided}, {case['context']} tokens of text",
        Table(CASE_HEAD, rows),
    ]
    if "denoising" in case:
        d = case["denoising"]
        how = "extrapolated to all layers" if d["extrapolated"] else "from the steps above"
        blocks.append(
            f"{d['steps']} steps ({d['guided_steps']} guided), {how}: {seconds_text(d['seconds'])}; "
            f"limit {seconds_text(d['limit_seconds'])}, {d['share_of_limit']:.0%} of it reached"
        )
    return blocks + _profiles(case["measures"])


def _slower(entry: dict[str, Any]) -> list[str]:
    """The released procedure's time and how many times ours that is, where it was measured."""
    slow = entry.get("baseline")
    return [seconds_text(slow["seconds"]), f"{slow['ratio']:.2f}x"] if slow else ["", ""]


def _row(row: dict[str, Any]) -> list[str]:
    slow, whole = row.get("baseline"), row.get("extrapolated")
    rate = f" ({row['tokens_per_second']:.1f}/s)" if "tokens_per_second" in row else ""
    limit = seconds_text(row["limit_seconds"])
    cells = [row["title"], seconds_text(row["seconds"]) + rate, limit, f"{row['share_of_limit']:.0%}"]
    cells += [*_slower(row), mebibytes(row["working_bytes"])]
    cells.append(mebibytes(slow["working_bytes"]) if slow else "")
    far = f"{seconds_text(whole['seconds'])}, limit {seconds_text(whole['limit_seconds'])}" if whole else ""
    goals = row["goals"]
    reached = "; ".join(map(_goal, goals["goals"])) if goals["compared"] else goals["why"]
    return [*cells, far, reached, row["stands_for"] or ""]


def _goal(goal: dict[str, Any]) -> str:
    """One goal, what was reached of it and whether that is enough."""
    what, bound = goal["what"], "at most" if goal["what"] == "seconds" else "at least"
    shown = {"seconds": seconds_text, "tokens_per_second": "{:.0f}/s".format}.get(what, "{:.0%}".format)
    named = {"share_of_matmul": " of matmul", "share_of_copy": " of copy"}.get(what, "")
    verdict = "met" if goal["met"] else "MISSED"
    return f"{verdict}: {shown(goal['reached'])}{named}, {bound} {shown(goal['goal'])}"


def _steady(row: dict[str, Any]) -> str:
    whole = row["whole"]
    text = (
        f"{row['title']}, in one run: {seconds_text(whole['seconds'])}; a guided step takes "
        f"{seconds_text(whole['first'])} at first and {seconds_text(whole['last'])} at last "
        f"({whole['drift']:+.1%}, where steps scatter by {whole['spread']:.1%})"
    )
    if whole["memory_growth"] is not None:
        text += f"; memory from the second step to the last: {whole['memory_growth'] / 2**20:+.0f} MiB"
    if whole["allocation_growth"] is not None:
        text += f"; allocations in a step: {whole['allocation_growth']:+d}"
    return text


def _profiles(entries: dict[str, dict[str, Any]]) -> list[Block]:
    """What each entry's time goes to, and how near the limit's rate the counted work runs."""
    rows = []
    for title, entry in entries.items():
        if "profile" not in entry:
            continue
        part = shares(entry["profile"])
        counted = sum(part[kind] for kind in COUNTED)
        cells = [f"{part[kind]:.1%}" if part[kind] else "" for kind in NAMES]
        rate = f"{entry['share_of_limit'] / counted:.0%} of the limit's rate" if counted else ""
        rows.append([title, *cells, rate])
    told = "What the time goes to; between: Python and dispatch on a CPU, an idle device elsewhere"
    return [told, Table(("", *NAMES, "counted work runs at"), rows)] if rows else []


def _growth(growth: dict[str, Any]) -> list[Block]:
    rows = []
    off = growth.get("fit", {}).get("residuals", [None] * len(growth["points"]))
    for point, residual in zip(growth["points"], off, strict=True):
        cells = [str(point["latent_frames"]), str(point["tokens"]), seconds_text(point["seconds"])]
        cells += ["" if residual is None else f"{residual:+.1%}", seconds_text(point["limit_seconds"])]
        rows.append([*cells, *_slower(point), mebibytes(point["working_bytes"])])
    fits = (("ours", "fit"), ("released", "baseline_fit"))
    notes = [f"{name}: {_formula(growth[key])}" for name, key in fits if key in growth]
    notes += [f"skipped: {p['latent_frames']} latent frames: {p['skipped']}" for p in growth["skipped"]]
    size = f"{growth['width']}x{growth['height']}"
    blocks: list[Block] = [f"A guided step over latent frames, {size}, {growth['layers']} layers"]
    blocks += [Table(GROWTH_HEAD, rows)] if rows else []
    return blocks + ([Notes(notes)] if notes else [])


def _formula(found: dict[str, Any]) -> str:
    worst = max(map(abs, found["residuals"]))
    a, b, c = (seconds_text(found[key]) for key in "abc")
    return f"{a} + {b} N + {c} N², R² {found['r2']:.4f}, off by {worst:.1%} at most"
