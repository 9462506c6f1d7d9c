"""Another library's training step: its own TopK autoencoder in its own training loop, on the same batch as ours.

child.py calls it with the peers' interpreter: imports torch and the peer, nothing of saelab or of this folder. A step
lasts from one request for a batch to the next, so everything in the peer's loop counts: loss, backward, clipping,
optimiser, decoder norms, bookkeeping of dead features. The batch is the same at every step and in every process:
``randn [batch, d_in]`` of a fixed seed; the time of a step depends only on its shape. No feature can die in so few
steps, so no auxiliary loss is computed.

Variants: `as_shipped`, fp32 and the library's own call of torch.optim.Adam (never fused); `fp32_fused`, the same with
``fused=True``; `bf16_fused`, fused and under bf16 autocast, placed where the library places it.
"""

# The peers live in an environment of their own.
# pyright: reportMissingImports=false

import contextlib
import os
import statistics
import tempfile
import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

DISTRIBUTIONS = {
    "sparsify": "eai-sparsify",
    "sparsify_signum": "eai-sparsify",
    "dictionary_learning": "dictionary-learning",
    "sae_lens": "sae-lens",
}
VARIANTS = ("as_shipped", "fp32_fused", "bf16_fused")
VARIANTS_OF = dict.fromkeys(DISTRIBUTIONS, VARIANTS) | {"sparsify_signum": VARIANTS[:1]}
"""Variants of each peer; signum has no fused form."""

LEAVES_OUT = {
    "sparsify": (
        "sparsify's Trainer.fit over a stand-in for the language model. Left out: that model's forward pass and wandb. "
        "Its optimizer='adam' (without bitsandbytes: torch.optim.Adam), not its default. Its trainer clips no gradient."
    ),
    "sparsify_signum": (
        "The same with its default optimiser, schedule-free SignSGD, not Adam: this is what `python -m sparsify` runs."
    ),
    "dictionary_learning": (
        "dictionary_learning's trainSAE with TopKTrainer. Left out: its activation buffer, wandb, and the running "
        "threshold, which it starts at step 1000."
    ),
    "sae_lens": (
        "sae_lens' SAETrainer.fit with TopKTrainingSAE, dense activations (its default). Left out: activation store, "
        "evaluations and wandb. It does not renormalise the decoder: it scales activations by the decoder's norms."
    ),
}
"""What each peer's figures include and leave out."""


LONG_STEP = 2.0
"""Seconds: if the first step takes longer, it is all of the warm-up."""


class Enough(Exception):
    """Ends a peer's loop once its steps are timed."""


class Source:
    """Yields the batch and records times. Raises Enough after `steps` timed steps, or `seconds` and at least three."""

    def __init__(self, x: Tensor, warmup: int, steps: int, seconds: float) -> None:
        self.x, self.warmup, self.steps, self.seconds = x, warmup, steps, seconds
        self.asked: list[float] = []

    def __iter__(self) -> "Source":
        return self

    def __next__(self) -> Tensor:
        if self.x.is_cuda:
            torch.cuda.synchronize(self.x.device)
        self.asked.append(time.perf_counter())
        if len(self.asked) == 2 and self.asked[1] - self.asked[0] > LONG_STEP:
            self.warmup = min(self.warmup, 1)
        timed = self.asked[self.warmup :]
        if len(timed) > self.steps or (len(timed) > 3 and timed[-1] - timed[0] > self.seconds):
            raise Enough
        return self.x

    def step_ms(self) -> list[float]:
        """Milliseconds of each timed step."""
        timed = self.asked[self.warmup :]
        return [1000 * (end - begin) for begin, end in pairwise(timed)]


class StandIn(nn.Module):
    """The parts of a language model that sparsify's Trainer uses; its module `source` gives the batch."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = _Site(source)
        self.device = source.x.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.source(input_ids)


class _Site(nn.Module):
    def __init__(self, batches: Source) -> None:
        super().__init__()
        self.batches = batches

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] != len(self.batches.x):  # its probe for the width
            return self.batches.x[None, :1]
        return next(self.batches)[None]


def sparsify(source: Source, variant: str, n_features: int, k: int, optimiser: str = "adam") -> None:
    """sparsify/trainer.py: Trainer.__init__ and Trainer.fit, whole: its hook, loss, backward and optimiser calls."""
    if not source.x.is_cuda:  # it decodes with Triton's kernels if triton can be imported, also without a GPU
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
    from transformers import get_linear_schedule_with_warmup

    # sparse_coder.py decorates `forward` (encoder, decoder and loss; not the backward pass) with bf16 autocast on CUDA
    # devices only. On a CPU it ships as fp32; its bf16 variant is the same decoration for this device.
    plain = getattr(SparseCoder.forward, "__wrapped__", SparseCoder.forward)
    if variant == "fp32_fused":
        SparseCoder.forward = plain
    elif variant == "bf16_fused":
        SparseCoder.forward = torch.autocast(source.x.device.type, dtype=torch.bfloat16)(plain)

    batch = len(source.x)
    rows = [{"input_ids": torch.zeros(batch, dtype=torch.long)}] * 100_000  # one row of `batch` tokens is one step
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=n_features, k=k),
            batch_size=1,
            optimizer=optimiser,
            hookpoints=["source"],
            init_seeds=[0],
            save_dir=folder,
            log_to_wandb=False,
        )
        trainer = Trainer(config, rows, StandIn(source))
        if variant != "as_shipped":
            (shipped,) = trainer.optimizers
            (sae,) = trainer.saes.values()
            fused = torch.optim.Adam(sae.parameters(), lr=shipped.param_groups[0]["initial_lr"], fused=True)
            trainer.optimizers = [fused]
            trainer.lr_schedulers = [get_linear_schedule_with_warmup(fused, config.lr_warmup_steps, len(rows))]
        trainer.fit()


def sparsify_signum(source: Source, variant: str, n_features: int, k: int) -> None:
    sparsify(source, variant, n_features, k, optimiser="signum")


def dictionary_learning(source: Source, variant: str, n_features: int, k: int) -> None:
    """dictionary_learning/training.py trainSAE, with trainers/top_k.py TopKTrainer (its `update` is the step)."""
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.trainers.trainer import get_lr_schedule
    from dictionary_learning.training import trainSAE

    class FusedTopKTrainer(TopKTrainer):
        def __init__(self, **settings) -> None:
            super().__init__(**settings)
            self.optimizer = torch.optim.Adam(self.ae.parameters(), lr=self.lr, betas=(0.9, 0.999), fused=True)
            schedule = get_lr_schedule(self.steps, self.warmup_steps, decay_start=self.decay_start)
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_lambda=schedule)

    device = str(source.x.device)
    settings = {
        "trainer": TopKTrainer if variant == "as_shipped" else FusedTopKTrainer,
        "steps": 100_000,
        "seed": 0,
        "activation_dim": source.x.shape[1],
        "dict_size": n_features,
        "k": k,
        "layer": 0,
        "lm_name": "",
        "device": device,
    }
    bf16 = variant == "bf16_fused"
    # trainSAE runs each `update` under autocast, but not on a CPU: there this adds the same.
    with torch.autocast("cpu", torch.bfloat16) if bf16 and device == "cpu" else contextlib.nullcontext():
        trainSAE(
            source, [settings], steps=100_000, device=device, autocast_dtype=torch.bfloat16 if bf16 else torch.float32
        )


def sae_lens(source: Source, variant: str, n_features: int, k: int) -> None:
    """sae_lens/training/sae_trainer.py: SAETrainer.fit, on saes/topk_sae.py TopKTrainingSAE with its defaults."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.optim import get_lr_scheduler
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    batch, d_in = source.x.shape
    device = str(source.x.device)
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=n_features, k=k, device=device))
    config = SAETrainerConfig(
        total_training_samples=100_000 * batch,
        train_batch_size_samples=batch,
        lr_end=3e-5,
        device=device,
        autocast=variant == "bf16_fused",
    )
    trainer = SAETrainer(config, sae, source)
    if variant != "as_shipped":
        trainer.optimizer = torch.optim.Adam(
            sae.parameters(), lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), fused=True
        )
        trainer.lr_scheduler = get_lr_scheduler(
            config.lr_scheduler_name,
            optimizer=trainer.optimizer,
            training_steps=config.total_training_steps,
            lr=config.lr,
            warm_up_steps=config.lr_warm_up_steps,
            decay_steps=config.lr_decay_steps,
            lr_end=config.lr_end,
            num_cycles=config.n_restart_cycles,
        )
    trainer.fit()


PEERS = {f.__name__: f for f in (sparsify, sparsify_signum, dictionary_learning, sae_lens)}


def step(
    peer: str, variant: str, shape: list[int], steps: int, warmup: int = 2, seconds: float = 8.0, device: str = "cpu"
) -> dict[str, Any]:
    """``step_ms``, the median, and ``all_ms`` of the timed steps; `shape` is batch, d_in, n_features and k."""
    batch, d_in, n_features, k = shape
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(0)).to(device)
    source = Source(x, warmup, steps, seconds)
    with contextlib.suppress(Enough):
        PEERS[peer](source, variant, n_features, k)
    return {"step_ms": statistics.median(source.step_ms()), "all_ms": source.step_ms()}
