"""Queued prompts with odd values anywhere: refused in a sentence or run, and the next good one runs.

LANCE_FUZZ_PROMPTS: how many (40; `make fuzz` asks for 500).
"""

from __future__ import annotations

import copy
import math
import os
import random

from inprocess import NodeFailedError, RejectedError
from small import edit, ksampler, lance, question, t2i

COUNT = int(os.environ.get("LANCE_FUZZ_PROMPTS", "40"))
ODD = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    math.nan,
    "",
    "x",
    "\ud83d",
    "a" * 50_000,
    [],
    {},
    [1],
    ["loader", 0],
    ["text", 9],
]
# What one case may not make large: it would only take long.
FIXED = {
    "steps",
    "width",
    "height",
    "frames",
    "batch_size",
    "max_new_tokens",
    "resolution",
    "file",
    "filename_prefix",
}


def test_odd_prompts(comfy):
    graphs = [lance(t2i()), ksampler(t2i()), lance(edit()), question()]
    outcomes = {"done": 0, "refused": 0, "told": 0, "stock": 0}
    for n in range(COUNT):
        rng = random.Random(f"prompts/{n}")
        graph = copy.deepcopy(rng.choice(graphs))
        last = "answer" if "answer" in graph else "sampler"
        for _ in range(rng.choice([1, 1, 2])):
            at = rng.choice(list(graph))
            names = [name for name in graph[at]["inputs"] if name not in FIXED]
            if names:
                graph[at]["inputs"][rng.choice(names)] = rng.choice(ODD)
        try:
            comfy.run(graph, [(last, 0)])
            outcomes["done"] += 1
        except RejectedError:
            outcomes["refused"] += 1
        except NodeFailedError as error:
            if not error.data["node_type"].removeprefix("Empty").startswith("Lance"):
                outcomes["stock"] += 1
                continue
            assert error.data["exception_type"].startswith("lance_core."), f"case {n}: {error}"
            assert len(error.message) < 500, f"case {n}"
            outcomes["told"] += 1
    print(f"{COUNT} prompts: {outcomes}")
    assert outcomes["refused"] + outcomes["told"] > 0
    assert comfy.value(lance(t2i()), "sampler")["samples"].isfinite().all()
