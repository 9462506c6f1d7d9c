"""The steps of `saelab train`, `eval` and `features` as a script to copy and change. It overwrites runs/script.

python scripts/train.py
"""

import itertools
import math
from pathlib import Path

import torch

from saelab import (
    CorpusSettings,
    ModelSettings,
    SparseAutoencoder,
    fidelity,
    load_language_model,
    open_corpus,
    save_sae,
)
from saelab.activations.shuffle import shuffled
from saelab.activations.stream import read_activations
from saelab.features.index import build_features
from saelab.features.settings import FeatureSettings
from saelab.progress import bar
from saelab.sae.model import Batch
from saelab.sae.settings import SaeSettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import train

OUT = Path("runs/script")
SITE, CONTEXT, SEED = "blocks.2.hook_resid_post", 256, 0
SAE = SaeSettings(n_features=4096, k=32)
TRAINING = TrainingSettings(tokens=1_000_000, batch=1024, lr=2e-3)


def main() -> None:
    lm = load_language_model(ModelSettings("demo"), device="auto")
    corpus = open_corpus(CorpusSettings("demo"), lm.tokenizer, CONTEXT)

    # Activations of ordinary tokens, without BOS; the first ones also set where the autoencoder starts.
    activations = read_activations(lm, corpus.train_rows(seed=SEED), SITE, rows_per_forward=32)
    head = list(itertools.islice(activations, 4))
    sample = torch.cat([batch.values for batch in head])
    scale = math.sqrt(sample.shape[1] / sample.square().sum(1).mean().item())  # E||x||^2 = d_in
    torch.manual_seed(SEED)
    sae = SparseAutoencoder(sample.shape[1], SAE.n_features, SAE.k).to(lm.device)
    sae.initialise(sample * scale)

    batches = shuffled(itertools.chain(head, activations), TRAINING.batch, buffer_tokens=131_072, seed=SEED)
    batches = bar(batches, "training", TRAINING.tokens, len)
    train(sae, (Batch(batch.values * scale) for batch in batches), TRAINING, SAE)

    sae = sae.folded(scale).requires_grad_(False)  # from here on it takes activations as the model gives them
    sae.metadata |= {"model_name": lm.name, "hook_name": SITE, "context_size": CONTEXT}
    save_sae(sae, OUT / "sae")

    rows = torch.from_numpy(corpus.held_out_rows(300_000))
    print(fidelity(sae, lm, rows, track=bar).to_frame().to_string())
    build_features(sae, lm, rows, SITE, OUT / "features", FeatureSettings(), inputs="scripts/train.py", track=bar)


if __name__ == "__main__":
    main()
