"""Dead features on planted data whose mean is 10 times as long as what varies, with and without centring.

    python scripts/bench/large_mean.py [--seeds 3]

Tokens are sums of 8 of 128 random directions in 32 dimensions, with strengths of 0.5 to 1.5 and a little noise, and a
mean of 10 times their root mean square norm. TopK, 256 features, k 8, no auxiliary loss, 300 steps of 256 tokens. Dead:
active on none of 20,000 other tokens.
"""

import argparse
import math

import torch
from torch import Tensor

from saelab import AuxSettings, Batch, SaeSettings, Trainer, TrainingSettings, input_map, new_autoencoder

D, DIRECTIONS, FEATURES, BATCH, STEPS, TIMES = 32, 128, 256, 256, 300, 10


def varying(tokens: int, seed: int, directions: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, DIRECTIONS, generator=generator).topk(8).indices
    x = (directions[chosen] * (torch.rand(tokens, 8, 1, generator=generator) + 0.5)).sum(1)
    return x + 0.02 * torch.randn(tokens, D, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    print("| seed | b_dec begins as | inputs | can be active at the start | dead | FVU |\n|---|---|---|---|---|---|")
    for seed in range(parser.parse_args().seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        directions = torch.nn.functional.normalize(torch.randn(DIRECTIONS, D, generator=generator), dim=1)
        first = varying(8192, 1, directions)
        deviation = (first - first.mean(0)).square().mean().sqrt()
        mean = TIMES * math.sqrt(D) * torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
        shift = mean - first.mean(0)
        for b_dec_init in ("zero", "mean"):
            for inputs in ("scale", "centre"):
                found = trained(seed, b_dec_init, inputs, directions, deviation, shift)
                print(
                    f"| {seed} | {b_dec_init} | {inputs} | {found[0]:.1%} | {found[1]:.1%} | {found[2]:.3f} |",
                    flush=True,
                )


def trained(
    seed: int, b_dec_init: str, inputs: str, directions: Tensor, deviation: Tensor, shift: Tensor
) -> tuple[float, float, float]:
    """The share of features that some token can activate at the start, the dead share at the end, and the FVU."""

    def data(tokens: int, part: int) -> Tensor:
        return varying(tokens, part, directions) / deviation + shift

    settings = SaeSettings(FEATURES, 8, aux=AuxSettings("none"), b_dec_init=b_dec_init)
    sample = data(8192, 2)
    mapped = input_map(inputs, sample)
    sae = new_autoencoder(settings, mapped(sample), seed=seed)
    alive = (sae.pre_activations(mapped(sample[:4096])) > 0).any(0).float().mean().item()
    trainer = Trainer(sae, TrainingSettings(STEPS * BATCH, BATCH, lr=2e-3), settings)
    for step in range(STEPS):
        trainer.step(Batch(mapped(data(BATCH, 1000 + step))))
    test, saved = data(20_000, 3), mapped.folded(sae)
    codes = saved.encode(test)
    error = (test - saved.decode(codes)).square().sum() / (test - test.mean(0)).square().sum()
    return alive, (codes.firing_counts() == 0).float().mean().item(), error.item()


if __name__ == "__main__":
    main()
