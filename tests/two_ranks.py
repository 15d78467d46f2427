"""One of two processes that train the recorded two-rank batch together; prints nothing, writes its result.

python two_ranks.py RANK RENDEZVOUS OUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import training_cases as cases
from safetensors.torch import save_file

from lance_core.training import loss, parallel, sharding

BATCHES = ("packed_i2i_i2t", "packed_all_six")


def main(rank: int, rendezvous: str, out: str, sharded: str = "") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    experts, made = cases.load_experts(), cases.batch(BATCHES[rank])
    own = [sum(counts) for counts in zip(*(s.loss_tokens for s in made.samples), strict=True)]
    totals = parallel.summed(*own)
    listed = list(zip(made.samples, made.noise, made.times, strict=True))
    padding = sharding.padding(cases.checkpoint().tokenizer) if sharded else []
    if sharded:
        sharding.shard(experts)
    parts = zip(*listed, *padding, strict=True)
    found = loss(experts, *parts, as_released=True, totals=totals, world=2, padding=len(padding))
    found.total.backward()
    weights = cases.parameters(experts)
    if sharded:
        for weight in weights.values():
            assert sharding.is_sharded(weight)
    else:
        parallel.average_gradients(weights)
    gradients = {n: sharding.whole(g) for n, g in cases.gradients(weights).items()}
    told = {"loss": found.total.detach(), "totals": torch.tensor(totals), "own": torch.tensor(own)}
    save_file(told | {f"grad.{n}": g for n, g in gradients.items()}, out)
    parallel.stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
