"""Tables of a benchmark's record, on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from saelab.bench.ours import PRECISIONS, STAGES

_WIDTH = 110


def show_train(record: dict[str, Any]) -> None:
    """Print what `saelab.bench.train.bench` returned."""
    console = Console(width=_WIDTH, highlight=False)
    machine, shape = record["machine"], record["shape"]
    console.print(
        f"{machine['processor']}, {record['threads']} threads, torch {record['versions']['torch']}\n"
        + ", ".join(f"{name} {value}" for name, value in shape.items())
        + f"; medians of {record['rounds']} rounds of {record['steps']} steps"
    )
    others = record["used_by_others"]
    console.print(f"others used {others['median']:.0%} of the processors meanwhile, {others['max']:.0%} at most")
    console.print(_ours(record))
    if record["peers"]:
        console.print(_peers(record))
        for name, note in record["peer_notes"].items():
            console.print(f"{name}: {note}")
    console.print(_allocations(record))
    if "growth" in record:
        console.print(_growth(record["growth"]))


def _ours(record: dict[str, Any]) -> Table:
    table = Table("ours", *PRECISIONS, title="One training step, ms by stage")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage in (*STAGES, "rest"):
        table.add_row(stage, *(f"{record['ours'][case]['ms'][stage]:.1f}" for case in PRECISIONS))
    table.add_section()
    table.add_row("step", *(f"{record['ours'][case]['ms_per_step']:.1f}" for case in PRECISIONS))
    table.add_row("tokens/s", *(f"{record['ours'][case]['tokens_per_s']:,.0f}" for case in PRECISIONS))
    label = f"step / one fp32 encoder matmul ({record['encoder_matmul_ms']:.1f} ms)"
    table.add_row(label, *(f"{record['encoder_matmul_ratio'][case]:.3f}" for case in PRECISIONS))
    scores = 2 * record["shape"]["batch"] * record["shape"]["n_features"]
    table.add_row(
        "peak MB above parameters, gradients, Adam",
        *(f"{record['ours'][case]['peak_bytes'] / 1e6:.1f}" for case in PRECISIONS),
    )
    table.add_row(
        f"  / bf16 pre-activations ({scores / 1e6:.1f} MB)",
        *(f"{record['ours'][case]['peak_bytes'] / scores:.2f}" for case in PRECISIONS),
    )
    return table


def _peers(record: dict[str, Any]) -> Table:
    table = Table("peer", "variant", "tokens/s", "ours / peer", "of the rounds", title="Ours against other libraries")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, variants in record["peers"].items():
        for variant, figures in variants.items():
            rounds = " ".join(f"{ratio:.2f}" for ratio in figures["ratios"])
            table.add_row(name, variant, f"{figures['tokens_per_s']:,.0f}", f"{figures['ratio']:.2f}x", rounds)
    table.caption = "as_shipped and bf16_fused against ours with bf16 selection, fp32_fused against ours in fp32"
    return table


def _allocations(record: dict[str, Any]) -> Table:
    table = Table("allocation", "tokens/s of token choice's", title="What is selected, bf16 selection")
    table.columns[1].justify = "right"
    for name, relative in record["allocations"].items():
        table.add_row("token_choice, gradient affinity" if name == "gradient" else name, f"{relative:.3f}")
    return table


def _growth(rows: list[dict[str, float]]) -> Table:
    sizes, ks = sorted({row["n_features"] for row in rows}), sorted({row["k"] for row in rows})
    title = f"ms per step of {rows[0]['batch']} tokens, bf16 selection"
    table = Table("n_features", *(f"k {k}" for k in ks), title=title)
    ms = {(row["n_features"], row["k"]): row["ms"] for row in rows}
    for column in table.columns:
        column.justify = "right"
    for size in sizes:
        table.add_row(f"{size:,}", *(f"{ms[size, k]:.1f}" for k in ks))
    return table
