"""A profile of the training step, before our speed-ups and with them: milliseconds by kind of work.

    python benchmarks/where_time_goes.py [--task tiny8] [--batch 32]

*before*: products by torch's default, one pass a resolution, glibc's own thresholds. torch's profiler, own time of
each operation on the CPU, mean of 3 steps.
"""

import argparse
import multiprocessing
import re
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.table import Table

import ablation
from side_by_side import save

KINDS = {
    "matrix products": r"_linear_pointwise|addmm|::mm$|::bmm$|::matmul",
    "attention": r"scaled_dot_product|flash_attention",
    "copies": r"::copy_|::cat$|::clone|::contiguous|::_to_copy|::index_select|::fill_|::zero_|::empty",
    "GELU": r"gelu",
    "LayerNorm": r"layer_norm",
    "residuals and sums": r"::add_?$|::addcmul|::sum$|::mul_?$|::sub_?$|::div_?$",
    "patches and positions": r"convolution|upsample",
    "optimizer, clip, teacher": r"adamw|lerp|vector_norm|_foreach",
    "softmax and loss": r"softmax|logsumexp|::exp_?$|::log_?$|::amax",
}


def profiled(pipe: Connection, names: list[str], options: dict[str, Any]) -> None:
    from torch.profiler import ProfilerActivity, profile

    for name in names:
        run = ablation.make(name, options)
    run()
    run()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(3):
            run()
    found = dict.fromkeys([*KINDS, "the rest"], 0.0)
    for event in seen.key_averages():
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "the rest")
        found[kind] += event.self_cpu_time_total / 3000
    pipe.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="tiny8")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    options = {"task": args.task, "device": "cpu", "batch": args.batch, "steps": 1}
    columns = {}
    for title, names in {"before": [name for name in ablation.VARIANTS if "without" in name], "now": ["all"]}.items():
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=profiled, args=(theirs, names, options))
        process.start()
        columns[title] = ours.recv()
        process.join()
    table = Table("ms a step", "before", "now", "now, share", title=f"{args.task}, batch {args.batch}")
    totals = {title: sum(column.values()) for title, column in columns.items()}
    for kind in columns["now"]:
        now = columns["now"][kind]
        table.add_row(kind, f"{columns['before'][kind]:.0f}", f"{now:.0f}", f"{now / totals['now']:.0%}")
    table.add_row("sum", f"{totals['before']:.0f}", f"{totals['now']:.0f}", "")
    Console(width=100).print(table)
    save("where_time_goes", {"options": options, "milliseconds": columns}, "cpu")


if __name__ == "__main__":
    main()
