"""Fine-tune the demo language model on one kind of text, the topics that Python's ``help()`` prints, for a model diff.

Needs torch and transformers. Prints the loss on held-out topics and on held-out code before and after, and writes a
Hugging Face folder with the same tokenizer, the `second_model` of `configs/two_models.yaml`. Some two minutes on a CPU.

    python scripts/tune_demo_lm.py --out runs/tuned_lm
"""

import argparse
from pathlib import Path

import torch
from train_demo_lm import mean_loss, rows_of, token_losses
from transformers import AutoModelForCausalLM, AutoTokenizer

from saelab.demo import MODEL
from saelab.demo.stdlib import read_stdlib

TOPICS = "pydoc_data/topics/"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the finished Hugging Face folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=8, help="rows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the first step; it falls linearly to zero")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = read_stdlib()

    def rows(texts: dict[str, str], topics: bool) -> torch.Tensor:
        chosen = [each for name, each in texts.items() if name.startswith(TOPICS) == topics]
        return torch.from_numpy(
            rows_of([encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(chosen)], 0)
        ).long()

    train = rows(text.train, True)
    held_out = {"topics": rows(text.held_out, True)[:64], "code": rows(text.held_out, False)[:64]}

    def report(when: str) -> None:
        losses = ", ".join(f"{name} {mean_loss(model, each):.3f}" for name, each in held_out.items())
        print(f"{when}: loss on held-out {losses} nats per token", flush=True)

    report("before")
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    for step in range(args.steps):
        batch = train[torch.randint(len(train), (args.rows,))]
        optimiser.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        token_losses(model, batch, torch.float32).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    report(f"after {args.steps} steps on {len(train)} rows")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
