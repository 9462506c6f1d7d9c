"""Tokens per second of a training by one process or by several: the side of ranks.py that a process of its own runs."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BUFFER = 16_384
"""Tokens that the model gives at a time."""
STEPS = BUFFER // 1024
"""Steps of the quickstart for which they last."""


def rate(*, data: int, features: int, threads: int, tokens: int) -> float:
    """Tokens per second of the quickstart trained by data x features processes of `threads` threads each.

    Of the second half of the tokens, with the passes of the model that give them. Loading and connecting are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, world = Path(folder) / "run", data * features
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
        settings = [f"out={out}", f"training.tokens={tokens}", f"parallel.data={data}", f"parallel.features={features}"]
        settings += [f"activations.stream.buffer_tokens={BUFFER}", f"training.log_every={STEPS}"]
        command = [sys.executable, *start, "-m", "saelab", "train", "quickstart", *settings]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # each of these steps is the first one of a buffer, and its time includes the buffer
    times = {line["tokens"]: line["tokens"] / line["tokens_per_second"] for line in lines if line["step"] % STEPS == 0}
    last = max(times)
    half = min(times, key=lambda tokens: abs(tokens - last / 2))
    return (last - half) / (times[last] - times[half])
