"""A small made-up run folder with the same files as a real one, and with text that tries to break a page."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.features.dense import made_up, write_database

SCRIPT = "<script>window.pwned = 1</script>"
LONG = "w" * 10_000
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
    LONG,
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
# 日 and é, each in two tokens; an emoji that is joined of three; a word from right to left; half a character alone.
PIECES = [b"\xe6\x97", b"\xa5", "本語".encode(), b"\xc3", b"\xa9", "👩‍👩‍👧".encode(), "שלום".encode(), b"\xe6"]
VOCABULARY = [b"<|bos|>", *(token.encode() for token in HOSTILE + WORDS), *PIECES]
"""The bytes of each token id; id 0 is special."""
NEVER_ACTIVE = 7
N_ROWS, CONTEXT = 64, 64
N_TOKENS = N_ROWS * (CONTEXT - 1)
HOSTILE_ROWS = 24
"""The first rows are of `HOSTILE` tokens, all of them in any 29 tokens; feature 0 is active there only."""
D_IN = 16
SITE = "blocks.2.hook_resid_post"
OTHER = "<img src=x onerror='window.pwned=4'> $x$ **b**"
"""The name of a run."""

EVALUATION = {
    "inputs": "0" * 64,
    "fvu": 0.1634,
    "l0": 31.87,
    "tokens": 300032,
    "ce_tokens": 65536,
    "cosine": 0.91,
    "never_active": 1,
    "n_features": 40,
    "kl": 0.21,
    "ce_zero_ablated": 8.1,
    "ce_mean_ablated": 5.1,
    "delta_ce": 0.2011,
    "loss_recovered_zero": 0.965,
    "loss_recovered_mean": None,
    "never_active_share": 0.025,
    "site": SITE,
    "ce_clean": 2.3521,
    "ce_spliced": 2.5532,
    "something_new": 0.25,
}


def write_run(
    path: Path,
    n_features: int = 40,
    seed: int = 0,
    features: bool = True,
    evaluation: bool = True,
    model: str = "demo",
    site: str = SITE,
) -> Path:
    """Write a run folder. Feature 0's examples have every hostile token; feature `NEVER_ACTIVE` is never active."""
    path.mkdir(parents=True)
    settings = f"model: {json.dumps(model)}\nsite: {site}\nsae: {{n_features: {n_features}, k: 8}}\n"
    (path / "config.yaml").write_text(settings)
    (path / "train.json").write_text(json.dumps({"inputs": "0" * 64, "tokens": 10_000, "complete": True}))
    lines = [
        {
            "step": step,
            "tokens": 2048 * step,
            "lr": 1e-3,
            "fvu": float(1 / (1 + step)),
            "l0": 32.0,
            "aux": 0.5 - step / 1000,
            "dead": 3 + step,
            "gradient_norm": 1.0 + 0.01 * step,
            "tokens_per_second": 9000.0 + step,
            "note": "text is not drawn",
        }
        for step in range(0, 100, 10)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_checkpoint(path, n_features, seed)
    if evaluation:
        found = EVALUATION | {"n_features": n_features, "site": site, "l0": EVALUATION["l0"] + seed}
        (path / "eval.json").write_text(json.dumps(found))
    if features:
        write_features(path, n_features, seed, model=model, site=site)
    return path


SWEPT = ({"k": 8, "kind": "a"}, {"k": 16, "kind": "a"}, {"k": 8, "kind": SCRIPT}, {"k": 16, "kind": "b"})


def write_sweep(path: Path) -> Path:
    """Write a sweep of the runs `0` to `3`, which vary as `SWEPT` says. `2` failed early and has no folder, and `3` has
    one without an evaluation; their messages are hostile."""
    summary = []
    for i, varies in enumerate(SWEPT):
        line = {"run": str(i), "varies": {f"sae.{name}": value for name, value in varies.items()}, "site": SITE}
        if i != 2:
            run = write_run(path / str(i), features=False, evaluation=i < 2)
        if i < 2:
            found = EVALUATION | {"n_features": 40, "l0": float(varies["k"]), "fvu": 0.3 - i / 10, "delta_ce": 0.5 + i}
            (run / "eval.json").write_text(json.dumps(found))
        summary.append(line | ({"failed": f"{SCRIPT} of {i}"} if i > 1 else {}))
    (path / "sweep.json").write_text(json.dumps({"runs": summary}))
    return path


def write_checkpoint(path: Path, n_features: int, seed: int) -> None:
    """The weights that `write_database` draws from the same seed."""
    W_enc, W_dec = np.random.default_rng(seed).standard_normal((2, n_features, D_IN)).astype(np.float32)
    (path / "sae").mkdir()
    zeros = {"b_enc": np.zeros(n_features, np.float32), "b_dec": np.zeros(D_IN, np.float32)}
    save_file({"W_enc": W_enc.T.copy(), "W_dec": W_dec, **zeros}, path / "sae" / "sae_weights.safetensors")
    config = {"architecture": "topk", "d_in": D_IN, "d_sae": n_features, "k": 8, "dtype": "float32", "metadata": {}}
    (path / "sae" / "cfg.json").write_text(json.dumps(config))


def write_features(path: Path, n_features: int, seed: int, **facts: str) -> None:
    """Write the run's feature database; `facts` go into its manifest."""
    rng = np.random.default_rng(seed)
    first_word = 1 + len(HOSTILE)
    z, tokens = made_up(N_ROWS, CONTEXT, n_features, len(VOCABULARY) - first_word + 1, seed)
    tokens[:, 1:] += first_word - 1
    cycle = np.arange(HOSTILE_ROWS)[:, None] + np.arange(CONTEXT - 1)
    tokens[:HOSTILE_ROWS, 1:] = 1 + cycle % len(HOSTILE)
    active = (rng.random((HOSTILE_ROWS, CONTEXT)) < 0.2) * rng.uniform(0, 6, (HOSTILE_ROWS, CONTEXT))
    active[:, 40] = 12 - np.arange(HOSTILE_ROWS) / 4
    z[..., 0] = 0
    z[:HOSTILE_ROWS, :, 0] = active
    write_database(path / "features", z, tokens, VOCABULARY, d_in=D_IN, seed=seed, **facts)


if __name__ == "__main__":
    import sys

    write_run(Path(sys.argv[1]))
