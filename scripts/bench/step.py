"""Our training step: tokens per second, milliseconds by stage, peak memory; with --peers other libraries' steps too.

    python scripts/bench/step.py                                       # minutes, on a CPU
    python scripts/bench/step.py --peers .venv-peers/bin/python --json bench.json
    python scripts/bench/step.py --device cuda --shape 8192,2048,65536,64

Every figure comes from its own process (ours_step.py, peer_step.py), and processes alternate, so that a drift of the
machine affects all: each round measures, for each peer, ours in every precision and then the peer's variants. A ratio
is of two measurements of one round, and the median of the rounds is reported.

If a peer fails, its row says so, the rest is measured, and the exit code is 1.
"""

import statistics
from pathlib import Path
from typing import Any

import command
import ours_memory
import ours_step
import peer_step
import torch
from ours_step import ALLOCATIONS, PRECISIONS, STAGES, Shape
from processes import Processes, add_options, failures, heading
from table import table

GROWTH_FEATURES = tuple(2**n for n in range(12, 18))
GROWTH_K = (8, 16, 32, 64, 128, 256)
GROWTH_BATCH = 256


def measure(
    shape: Shape,
    *,
    rounds: int = 2,
    steps: int = 8,
    threads: int | None = None,
    device: str = "cpu",
    peers: Path | None = None,
    growth: bool = False,
) -> dict[str, Any]:
    """The record that --json writes.

    `peers` is the interpreter of the environment with the other libraries. Raises SaelabError if it is not an
    interpreter or has none of them, if there is no such device, or if one of our measurements fails. A peer's variant
    that fails is not measured again; ``failures`` of the record has the reason.
    """
    cuda = command.device(device) != "cpu"
    run = Processes(threads, peers, tuple(dict.fromkeys(peer_step.DISTRIBUTIONS.values())))
    names = [name for name, distribution in peer_step.DISTRIBUTIONS.items() if distribution in run.peer_versions]
    precisions = (*PRECISIONS, "fp32_tf32") if cuda else tuple(PRECISIONS)
    against: dict[str, dict[str, str]] = {}
    for name in names:  # sparsify turns TF32 on, so on a GPU its fp32 is compared with ours with TF32 on
        fp32 = "fp32_tf32" if cuda and name.startswith("sparsify") else "fp32"
        against[name] = {"as_shipped": "bf16_selection", "fp32_fused": fp32, "bf16_fused": "bf16_selection"}
    dtype = "bfloat16" if cuda else "float32"
    given: Any = {"shape": shape, "steps": steps, "device": device}

    def step_ms(case: str) -> float:
        return run.ours(ours_step.step, case=case, **given)["step_ms"]

    ours: dict[str, list[float]] = {case: [] for case in precisions}
    theirs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    relative: dict[str, list[float]] = {case: [] for case in ALLOCATIONS}
    matmul: dict[str, list[dict[str, float]]] = {case: [] for case in precisions}
    for turn in range(1, rounds + 1):
        run.label = f"round {turn} of {rounds}"
        for name in names or [""]:
            block = {case: step_ms(case) for case in precisions}
            for case, ms in block.items():
                ours[case].append(ms)
            for variant in peer_step.VARIANTS_OF.get(name, ()):
                if (row := f"{name}, {variant}") in run.failures:
                    continue
                with run.row(row):
                    ms = run.peer(peer_step.step, peer=name, variant=variant, **given)["step_ms"]
                    theirs.setdefault((name, variant), []).append((ms, ms / block[against[name][variant]]))
        for case in precisions:
            matmul[case].append(run.ours(ours_step.matmul, case=case, dtype=dtype, **given))
        block = {case: step_ms(case) for case in ALLOCATIONS}
        for case, ms in block.items():
            relative[case].append(block["token_choice"] / ms)

    run.label = "once"
    record: dict[str, Any] = {
        **run.facts("torch", "numpy"),
        "device": device,
        "shape": shape._asdict(),
        "rounds": rounds,
        "steps": steps,
        "ours": {
            case: {
                "tokens_per_s": 1000 * shape.batch / statistics.median(ours[case]),
                "ms_per_step": statistics.median(ours[case]),
                "ms": run.ours(ours_step.stages, case=case, **given),
                **run.ours(ours_memory.memory, case=case, shape=shape, device=device),
            }
            for case in precisions
        },
        "peers": {name: {} for name in names},
        "peer_notes": {name: peer_step.LEAVES_OUT[name] for name in names},
        "peer_against": against,
        "encoder_matmul_dtype": dtype,
        "encoder_matmul_ratio": {case: statistics.median(row["ratio"] for row in matmul[case]) for case in precisions},
        "encoder_matmul_ms": statistics.median(row["matmul_ms"] for rows in matmul.values() for row in rows),
        "allocations": {case: statistics.median(values) for case, values in relative.items()},
        "decoder": run.ours(ours_step.decoder, shape=shape, device=device),
    }
    for (name, variant), pairs in theirs.items():
        if f"{name}, {variant}" in run.failures:
            continue
        record["peers"][name][variant] = {
            "tokens_per_s": 1000 * shape.batch / statistics.median(ms for ms, _ in pairs),
            "ratio": statistics.median(ratio for _, ratio in pairs),
            "ratios": [ratio for _, ratio in pairs],
        }
    if cuda:
        record["machine"]["gpu"] = torch.cuda.get_device_name(device)
        wait = {"shape": shape, "device": device}
        record["waits"] = {case: run.ours(ours_step.waits, case=case, **wait) for case in ("fp32", *ALLOCATIONS)}
    if growth:
        batch = min(shape.batch, GROWTH_BATCH)
        record["growth"] = [
            {"n_features": n_features, "k": int(k), "batch": batch, "ms": ms}
            for n_features in GROWTH_FEATURES
            for k, ms in run.ours(
                ours_step.growth,
                shape=shape._replace(batch=batch, n_features=n_features),
                ks=GROWTH_K,
                steps=min(steps, 3),
                device=device,
            ).items()
        ]
    return record | run.outcome()


def report(record: dict[str, Any]) -> str:
    """The record as tables."""
    shape = ", ".join(f"{name} {value}" for name, value in record["shape"].items())
    ours, ratios = record["ours"], record["encoder_matmul_ratio"]
    matmul = f"{record['encoder_matmul_dtype']} encoder matmul ({record['encoder_matmul_ms']:.1f} ms)"
    scores = 2 * record["shape"]["batch"] * record["shape"]["n_features"]
    rows = [[stage, *(f"{row['ms'][stage]:.1f}" for row in ours.values())] for stage in (*STAGES, "rest")]
    rows += [
        ["step", *(f"{row['ms_per_step']:.1f}" for row in ours.values())],
        ["tokens/s", *(f"{row['tokens_per_s']:,.0f}" for row in ours.values())],
        [f"step / one {matmul}", *(f"{ratios[case]:.3f}" for case in ours)],
        ["peak MB above parameters, gradients, Adam", *(f"{row['peak_bytes'] / 1e6:.1f}" for row in ours.values())],
        [
            f"the same / bf16 pre-activations ({scores / 1e6:.1f} MB)",
            *(f"{row['peak_bytes'] / scores:.2f}" for row in ours.values()),
        ],
    ]
    parts = [
        heading(record, shape, f"medians of {record['rounds']} rounds of {record['steps']} steps"),
        table(["one training step, ms by stage", *ours], rows),
    ]
    if record["peers"]:
        rows = [
            [
                f"{name}, {variant}",
                f"{row['tokens_per_s']:,.0f}",
                record["peer_against"][name][variant],
                f"{row['ratio']:.2f}x",
                _listed(row["ratios"]),
            ]
            for name, variants in record["peers"].items()
            for variant, row in variants.items()
        ]
        rows += [[name, "failed", "", "", ""] for name in record["failures"]]
        notes = "\n".join(f"- {name}: {note}" for name, note in record["peer_notes"].items())
        parts += [table(["peer", "tokens/s", "ours", "ours / peer", "of the rounds"], rows), failures(record), notes]
    labels = {"gradient": "token_choice, gradient affinity"}
    rows = [[labels.get(name, name), f"{value:.3f}"] for name, value in record["allocations"].items()]
    parts.append(table(["allocation, bf16 selection", "tokens/s / token choice's"], rows))
    rows = [
        [name, *(f"{row[key]:.3g}" for key in ("ms", "gb_per_s", "copy_gb_per_s", "share"))]
        for name, row in record["decoder"].items()
    ]
    parts.append(table(["decoder's product", "ms", "GB/s", "GB/s of a copy", "share"], rows))
    if "waits" in record:
        parts += [f"{case} waits for the GPU: {what or 'never'}" for case, what in record["waits"].items()]
    if "growth" in record:
        ms = {(row["n_features"], row["k"]): f"{row['ms']:.1f}" for row in record["growth"]}
        head = f"ms per step of {record['growth'][0]['batch']} tokens, n_features"
        rows = [[f"{n:,}", *(ms[n, k] for k in GROWTH_K)] for n in GROWTH_FEATURES]
        parts.append(table([head, *(f"k {k}" for k in GROWTH_K)], rows))
    return "\n\n".join(filter(None, parts))


def _listed(ratios: list[float]) -> str:
    return " ".join(f"{ratio:.2f}" for ratio in ratios)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--shape", type=Shape.parse, default="2048,768,24576,32", metavar="BATCH,D_IN,N_FEATURES,K")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--rounds", type=command.whole(1), default=2, help="number of rounds (2)")
    parser.add_argument("--steps", type=command.whole(3), default=8, help="steps timed in each process (8)")
    parser.add_argument("--growth", action="store_true", help="also a table over n_features and k (minutes)")
    add_options(parser)
    options = vars(parser.parse_args())
    json_file = options.pop("json")
    record = measure(**options)
    command.write_json(json_file, record)
    print(report(record))
    command.check(record)


if __name__ == "__main__":
    command.run(main)
