"""The benchmark's results as text. Pure functions of what `bench.run` returns."""

from __future__ import annotations

from typing import Any

COLUMNS = ("", "time", "fastest", "TFLOP", "of limit", "of matmul", "of copy", "working", "baseline", "ratio", "all layers (extrapolated)")


def report(result: dict[str, Any]) -> str:
    """The result of `run` as a table for people."""
    env, model, speed = result["environment"], result["model"], result["rates"]
    layers = f"{model['layers']} layers" if not model["cut"] else f"{model['layers_measured']} of {model['layers']} layers ({model['cut']})"
    lines = [
        f"{env['device_name']} ({env['device']}, {env['threads']} threads), {env['dtype']}, torch {env['torch']}",
        f"{model['name']}, {layers}, random weights",
        f"matmul {speed['matmul']['flops_per_second'] / 1e12:.2f} TFLOP/s, copy {speed['copy']['bytes_per_second'] / 1e9:.1f} GB/s",
    ]
    for case in result["cases"]:
        size = f"{case['width']}x{case['height']}, {case['frames']} frame{'s'[: case['frames'] > 1]}"
        kind = f"{'edit, ' if case['edit'] else ''}batch {case['batch']}, {'guided' if case['guidance'] else 'no guidance'}"
        rows = [list(COLUMNS)]
        for name, m in case["measures"].items():
            slow, whole = m.get("baseline"), m.get("extrapolated")
            shares = [f"{m[key]:.0%}" for key in ("share_of_limit", "share_of_matmul", "share_of_copy")]
            working = "?" if m["working_bytes"] is None else f"{m['working_bytes'] / 2**20:.0f} MiB"
            compared = [seconds_text(slow["seconds"]), f"{slow['ratio']:.2f}x"] if slow else ["", ""]
            compared.append(seconds_text(whole["seconds"]) if whole else "")
            times = [seconds_text(m[key]) for key in ("seconds", "fastest")]
            rows.append([name, *times, f"{m['flops'] / 1e12:.3g}", *shares, working, *compared])
        keep = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
        lines += ["", f"{size}, {kind}, {case['context']} tokens of text", table([[row[i] for i in keep] for row in rows])]
        if "denoising" in case:
            d = case["denoising"]
            how = "extrapolated to all layers" if d["extrapolated"] else "from the steps above"
            lines.append(
                f"{d['steps']} steps ({d['guided_steps']} guided), {how}: {seconds_text(d['seconds'])}; "
                f"limit {seconds_text(d['limit_seconds'])}, {d['share_of_limit']:.0%} of it reached"
            )
    return "\n".join(lines)


def table(rows: list[list[str]]) -> str:
    """Rows as aligned text, the first column to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def seconds_text(seconds: float) -> str:
    """A duration with a unit that suits it."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} µs"
