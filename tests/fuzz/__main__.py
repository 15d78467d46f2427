"""`python tests/fuzz [CAMPAIGN ...] [--count N] [--seed S] [--jobs J]`: long runs of damaged files and odd
requests, counted.

Exit status 1 if anything was untyped, hung, grew over 2 GB, killed its worker or was told in over 500
characters.
"""

from __future__ import annotations

import argparse
import sys

import runner

COUNTS = {"media": 10_000, "checkpoints": 5_000, "requests": 5_000}


def main() -> int:
    """Run the campaigns asked for, all without any, and print their counts."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=(__doc__ or "").split(":")[0])
    parser.add_argument(
        "campaigns", nargs="*", choices=[*COUNTS, []], help=f"default: all ({', '.join(COUNTS)})"
    )
    parser.add_argument(
        "--count",
        type=int,
        help="cases of each; default: " + ", ".join(f"{c} {n}" for c, n in COUNTS.items()),
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    bad = 0
    for campaign in args.campaigns or COUNTS:
        count = args.count or COUNTS[campaign]
        found = runner.run(
            campaign, count, args.seed, args.jobs, lambda text: print(text, file=sys.stderr, flush=True)
        )
        print(f"{campaign}: {count} cases in {found['seconds']:.0f} s: {found['counts']}", flush=True)
        for one in found["bad"][:50]:
            print(f"  case {one['case']}: {one['outcome']}: {one['what']}", flush=True)
        bad += len(found["bad"])
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
