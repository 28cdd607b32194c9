"""Benchmarks of speed and memory, as ratios to the simplest alternative.

    python scripts/benchmarks/bench.py rank                 # exact selection over 110M weights
    python scripts/benchmarks/bench.py rank --millions 350
    python scripts/benchmarks/bench.py nm                   # 2:4 masks
    python scripts/benchmarks/bench.py step                 # overhead of a training step
    python scripts/benchmarks/bench.py dist                 # a prune step of sharded weights
    python scripts/benchmarks/bench.py oneshot              # one-shot pruning
    python scripts/benchmarks/bench.py structured           # a prune step of neurons and heads
    python scripts/benchmarks/bench.py others               # a prune step and a training step in other ways

Each file describes its measurements; rank and nm are in ranking.py.
"""

from __future__ import annotations

import argparse

import dist
import oneshot
import others
import ranking
import step
import structured


# Name: summary, options, and function.
BENCHES = {
    "rank": ("Exact selection, in reads of the weights.", ranking.add_arguments, ranking.rank),
    "nm": ("2:4 masks, in reads of the weights.", ranking.add_layer, ranking.nm),
    **{
        name: (module.__doc__.splitlines()[0], module.add_arguments, module.run)
        for name, module in {
            "step": step,
            "dist": dist,
            "oneshot": oneshot,
            "structured": structured,
            "others": others,
        }.items()
    },
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, (says, add_arguments, run) in BENCHES.items():
        command = commands.add_parser(name, help=says, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(run=run)
        add_arguments(command)
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
