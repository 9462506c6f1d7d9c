"""A small made-up run folder with the same files as a real one, and with text that tries to break a page."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCRIPT = "<script>window.pwned = 1</script>"
HOSTILE = [
    SCRIPT,
    "</span>",
    '"',
    "&",
    "$x$",
    "\n",
    "\t",
    "",
    "🦊",
    "**bold**",
    "[a](http://example.invalid)",
    "`",
    "'",
    "<img src=x onerror='window.pwned=2'>",
    '" onmouseover="window.pwned=3',
    "-->",
    "&lt;b&gt;",
    "        ",
    "\r\n",
    "\x00",
    "\u202egnp.exe",
    "�",
    "<|bos|>",
    "</style>",
    ":red[text]",
    "$$",
    "_",
    "#",
]
WORDS = [
    " def",
    " return",
    " self",
    "import",
    " numpy",
    " class",
    "(",
    "):",
    " if",
    "_name",
    " None",
    " for",
    "=",
    " x",
]
TOKENS = HOSTILE + WORDS
NEVER_ACTIVE = 7
N_TOKENS = 300_032

FEATURE_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("density", pa.float64()),
        ("n_active", pa.int64()),
        ("mean_activation", pa.float32()),
        ("max_activation", pa.float32()),
        ("histogram", pa.list_(pa.int64())),
        ("top_logit_tokens", pa.list_(pa.string())),
        ("top_logits", pa.list_(pa.float32())),
        ("bottom_logit_tokens", pa.list_(pa.string())),
        ("bottom_logits", pa.list_(pa.float32())),
        ("neighbours", pa.list_(pa.int32())),
        ("neighbour_cosines", pa.list_(pa.float32())),
    ]
)
CONTEXT_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("rank", pa.int16()),
        ("row", pa.int32()),
        ("position", pa.int32()),
        ("activation", pa.float32()),
        ("peak", pa.int16()),
        ("tokens", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
    ]
)
EVALUATION = {
    "inputs": "0" * 64,
    "fvu": 0.1634,
    "l0": 31.87,
    "tokens": 300032,
    "ce_tokens": 65536,
    "cosine": 0.91,
    "never_active": 31,
    "n_features": 4096,
    "kl": 0.21,
    "ce_zero_ablated": 8.1,
    "ce_mean_ablated": 5.1,
    "delta_ce": 0.2011,
    "loss_recovered_zero": 0.965,
    "loss_recovered_mean": None,
    "never_active_share": 0.0075,
    "site": "blocks.2.hook_resid_post",
    "ce_clean": 2.3521,
    "ce_spliced": 2.5532,
    "something_new": 0.25,
}


def write_run(path: Path, n_features: int = 40, seed: int = 0, features: bool = True, evaluation: bool = True) -> Path:
    """Write a run folder. Contexts of feature 0 have every hostile token; feature `NEVER_ACTIVE` is never active."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("model: demo\nsite: blocks.2.hook_resid_post\nsae: {n_features: 40, k: 8}\n")
    (path / "train.json").write_text(json.dumps({"inputs": "0" * 64, "tokens": 10_000, "complete": True}))
    lines = [
        {
            "step": step,
            "tokens": 2048 * step,
            "lr": 1e-3,
            "fvu": float(1 / (1 + step)),
            "l0": 32.0,
            "aux": 0.5,
            "dead": 3,
            "gradient_norm": 1.0,
            "tokens_per_second": 9000.0,
            "note": "text is not drawn",
        }
        for step in range(0, 100, 10)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation:
        (path / "eval.json").write_text(json.dumps(EVALUATION))
    if features:
        write_features(path, n_features, rng)
    return path


def write_features(path: Path, n_features: int, rng: np.random.Generator) -> None:
    folder = path / "features"
    folder.mkdir()
    lines, windows = [], []
    for index in range(n_features):
        active = index != NEVER_ACTIVE
        n_active = int(10 ** rng.uniform(1, 4.5)) if active else 0
        largest = float(rng.uniform(2, 12)) if active else 0.0
        shares = np.exp(-np.linspace(0, 7, 50))
        others = [i for i in range(n_features) if i != index]
        top = HOSTILE[:10] if index == 0 else list(rng.choice(WORDS, 10))
        lines.append(
            {
                "feature": index,
                "density": n_active / N_TOKENS,
                "n_active": n_active,
                "mean_activation": largest / 3,
                "max_activation": largest,
                "histogram": (shares / shares.sum() * n_active).astype(int).tolist() if active else [0] * 50,
                "top_logit_tokens": top,
                "top_logits": sorted(rng.uniform(0, 3, 10).tolist(), reverse=True),
                "bottom_logit_tokens": list(rng.choice(TOKENS, 10)),
                "bottom_logits": sorted(rng.uniform(-3, 0, 10).tolist()),
                "neighbours": rng.choice(others, 10, replace=False).tolist(),
                "neighbour_cosines": sorted(rng.uniform(0, 1, 10).tolist(), reverse=True),
            }
        )
        for rank in range(20 if active else 0):
            tokens = [str(token) for token in rng.choice(WORDS if index else TOKENS, 32)]
            if index == 0:
                tokens[:28] = HOSTILE[rank:] + HOSTILE[:rank]
            peak = int(rng.integers(0, 32))
            activations = np.where(rng.random(32) < 0.2, rng.uniform(0, largest, 32), 0.0)
            activations[peak] = largest * (1 - rank / 40)
            windows.append(
                {
                    "feature": index,
                    "rank": rank,
                    "row": int(rng.integers(0, 1000)),
                    "position": int(rng.integers(1, 256)),
                    "activation": float(activations[peak]),
                    "peak": peak,
                    "tokens": tokens,
                    "activations": activations.tolist(),
                }
            )
    pq.write_table(pa.Table.from_pylist(lines, FEATURE_SCHEMA), folder / "features.parquet")
    pq.write_table(pa.Table.from_pylist(windows, CONTEXT_SCHEMA), folder / "contexts.parquet")
    summary = {
        "inputs": "0" * 64,
        "n_tokens": N_TOKENS,
        "n_features": n_features,
        "never_active": 1,
        "k": 8,
        "site": "blocks.2.hook_resid_post",
        "model": "demo",
        "d_in": 256,
    }
    (folder / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    import sys

    write_run(Path(sys.argv[1]))
