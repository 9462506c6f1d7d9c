"""Train the demo language model (saelab/demo): a 4-layer Llama of 4.5 M parameters on the Python standard library.

Needs torch >= 2.9, transformers, tokenizers and safetensors; the text comes from the interpreter that runs it, or from
`--corpus DIR`, another copy of the library. Rows are packed exactly as SAEs will see them (saelab.corpus.packing). Muon
for the hidden matrices, AdamW for embeddings and norms; the learning rate rises, stays, and falls linearly to zero over
the last `--decay` of the tokens. Run it again with the same `--work` folder to continue from its last checkpoint.

    python scripts/train_demo_lm.py --work runs/demo_lm --out saelab/demo/model --tokens 30e6
"""

import argparse
import json
import math
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saelab.corpus.packing import pack
from saelab.demo.stdlib import StdlibText, read_stdlib
from saelab.files import replace_file, write_json, write_whole

VOCAB, CONTEXT, SPECIAL = 4096, 256, "<|endoftext|>"
SAMPLE_ROWS = 64


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token that is both BOS and EOS, as in GPT-2."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[SPECIAL], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=SPECIAL, eos_token=SPECIAL, model_max_length=CONTEXT)


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=CONTEXT,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # residual-writing matrices start small, so that depth does not increase the variance
        for layer in model.model.layers:
            for matrix in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                matrix.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    return model


def rows_of(documents: list[list[int]], seed: int) -> np.ndarray:
    """Rows of the documents, ``[rows, context]``, in an order drawn from `seed`; another seed also cuts other rows."""
    rng = random.Random(seed)
    order = documents.copy()
    rng.shuffle(order)
    rows = np.stack(list(pack(order, CONTEXT, bos=0, eos=0)))
    return rows[np.random.default_rng(seed).permutation(len(rows))]


def repeat_segments(rows: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """The rows, a `share` of them replaced by BOS + a segment twice, from which a model learns induction soonest."""
    n = round(share * len(rows))
    if n:
        half = (CONTEXT - 1) // 2
        chosen = torch.randperm(len(rows), generator=generator)[:n]
        rows[chosen, 1 + half : 1 + 2 * half] = rows[chosen, 1 : 1 + half]
    return rows


def token_losses(model: LlamaForCausalLM, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Loss in nats of each next token, ``[rows, context - 1]``."""
    with torch.autocast(rows.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=rows).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), -1)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, rows: torch.Tensor, batch: int = 32) -> float:
    """Nats per predicted token, in fp32, over positions whose input and target are both ordinary tokens."""
    total = count = 0.0
    for piece in rows.split(batch):
        keep = (piece[:, 1:] != 0) & (piece[:, :-1] != 0)
        total += token_losses(model, piece, torch.float32)[keep].double().sum().item()
        count += keep.sum().item()
    return total / count


@torch.no_grad()
def induction(model: LlamaForCausalLM, held_out: torch.Tensor) -> dict[str, float]:
    """Loss on the first and on the second copy of a repeated segment of 100 tokens, random and natural.

    The first token of either copy is left out: nothing predicts that the segment begins again.
    """
    n, length = 64, 100
    generator = torch.Generator().manual_seed(0)
    random_segment = torch.randint(1, VOCAB, (n, length), generator=generator).to(held_out.device)
    natural_segment = held_out[torch.randperm(len(held_out), generator=generator)[:n], 1 : 1 + length]
    found = {}
    for name, segment in (("random", random_segment), ("natural", natural_segment)):
        bos = torch.zeros(len(segment), 1, dtype=segment.dtype, device=segment.device)
        losses = token_losses(model, torch.cat([bos, segment, segment], 1), torch.float32)
        found[f"{name}_first"] = losses[:, 1:length].mean().item()
        found[f"{name}_second"] = losses[:, length + 1 :].mean().item()
    return found


def make_optimisers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not (n.startswith("model.layers") and p.ndim == 2)]
    muon = torch.optim.Muon(
        hidden, lr=args.lr, weight_decay=args.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [muon, adam]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and log; continues from the last")
    parser.add_argument("--out", type=Path, required=True, help="the finished Hugging Face folder")
    parser.add_argument("--corpus", type=Path, help="a Python library folder (default: the running interpreter's)")
    parser.add_argument("--tokens", type=float, default=30e6)
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--decay", type=float, default=0.5, help="share of the tokens over which the rate falls")
    parser.add_argument("--repeat-share", type=float, default=0.0, help="share of rows that are a segment twice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    dtype = torch.float32 if args.fp32 else torch.bfloat16

    text = read_stdlib(args.corpus, tests=True)
    tokenizer_dir = args.work / "tokenizer"
    if tokenizer_dir.is_dir():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    else:
        tokenizer = train_tokenizer(list(text.train.values()))
        tokenizer.save_pretrained(tokenizer_dir)
    documents = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(list(text.train.values()))]
    held_documents = [e.ids for e in tokenizer.backend_tokenizer.encode_batch(list(text.held_out.values()))]
    held_out = torch.from_numpy(rows_of(held_documents, 0)).long().to(args.device)
    held_bytes = sum(len(t.encode()) for t in text.held_out.values())
    bytes_per_token = held_bytes / sum(map(len, held_documents))
    print(
        f"{sum(map(len, documents)):,} training tokens, {sum(map(len, held_documents)):,} held out, "
        f"{bytes_per_token:.3f} bytes per token",
        flush=True,
    )

    model = make_model().to(args.device)
    run = torch.compile(model) if args.compile else model
    optimisers = make_optimisers(model, args)
    step = tokens = epoch = cursor = 0
    seconds = 0.0
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        step, tokens, epoch, cursor, seconds = (state[k] for k in ("step", "tokens", "epoch", "cursor", "seconds"))
        print(f"resumed at step {step}", flush=True)

    total, per_step = int(args.tokens), args.rows * CONTEXT
    log = (args.work / "log.jsonl").open("a")
    rows = rows_of(documents, epoch)
    last_save = time.monotonic()
    while tokens < total:
        begin = time.monotonic()
        if cursor + args.rows > len(rows):
            epoch, cursor = epoch + 1, 0
            rows = rows_of(documents, epoch)
        batch = torch.from_numpy(rows[cursor : cursor + args.rows]).long()
        cursor += args.rows
        batch = repeat_segments(batch, args.repeat_share, torch.Generator().manual_seed(step)).to(args.device)
        rate = min(1.0, (step + 1) / args.warmup, (total - tokens) / (args.decay * total))
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = args.lr * rate
        loss = token_losses(run, batch, dtype).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        step, tokens = step + 1, tokens + per_step
        seconds += time.monotonic() - begin
        if step % 50 == 0:
            record = {
                "step": step,
                "tokens": tokens,
                "epoch": epoch,
                "loss": loss.item(),
                "rate": rate,
                "seconds": seconds,
            }
            if step % 500 == 0:
                record |= {"held_out": mean_loss(model, held_out[:128])} | induction(model, held_out)
            print(json.dumps(record), flush=True)
            log.write(json.dumps(record) + "\n")
            log.flush()
        if time.monotonic() - last_save > 120 or tokens >= total:
            state = {
                "model": model.state_dict(),
                "optimisers": [o.state_dict() for o in optimisers],
                "step": step,
                "tokens": tokens,
                "epoch": epoch,
                "cursor": cursor,
                "seconds": seconds,
            }
            with replace_file(checkpoint) as unfinished:
                torch.save(state, unfinished)
            last_save = time.monotonic()

    finish(model, tokenizer, held_out, text, args, bytes_per_token, tokens, seconds)


def finish(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: torch.Tensor,
    text: StdlibText,
    args: argparse.Namespace,
    bytes_per_token: float,
    tokens: int,
    seconds: float,
) -> None:
    """Write the model in 16 bits, the held-out sample, and figures measured on the written weights."""
    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    saved = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device).eval()
    sample = held_out[:SAMPLE_ROWS]
    loss = mean_loss(saved, held_out)
    figures = {
        "held_out_loss": loss,
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "bytes_per_token": bytes_per_token,
        "sample_loss": mean_loss(saved, sample),
        "held_out_tokens": int((held_out != 0).sum()),
        "training_tokens": tokens,
        "training_seconds": round(seconds),
        "device": "cpu, 2 cores" if args.device == "cpu" else torch.cuda.get_device_name(),
        "repeat_share": args.repeat_share,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dropped_held_out": text.dropped,
        "induction": induction(saved, held_out),
    }
    write_json(args.out / "measured.json", figures)
    licence = "Token ids of text from the Python standard library, (c) Python Software Foundation, PSF-2.0."
    rows = {"licence": licence, "rows": sample.tolist()}
    write_whole(args.out / "held_out_sample.json", json.dumps(rows) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
