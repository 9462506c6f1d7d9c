"""Every step of `saelab run`, written out as a script to copy and change. It replaces the run in runs/script.

python scripts/train.py
saelab app runs
"""

import json
from pathlib import Path

from saelab import (
    Batch,
    FromModel,
    RunSettings,
    SaeSettings,
    Trainer,
    TrainingSettings,
    bar,
    calibrate,
    calibration_rows,
    create_run,
    evaluate,
    index,
    input_map,
    load_language_model,
    new_autoencoder,
    open_corpus,
    save_run,
)

SETTINGS = RunSettings(
    out="runs/script",
    site="blocks.2.hook_resid_post",
    sae=SaeSettings(n_features=4096, k=32),  # allocation=AllocationSettings("mutual_choice"): a budget for the batch
    training=TrainingSettings(tokens=1_000_000, batch=1024, lr=2e-3),
)


def main(settings: RunSettings = SETTINGS) -> None:
    with create_run(settings, force=True) as run:  # keeps other processes out of the folder
        train(settings, run)
    print(evaluate(run, track=bar).to_frame().to_string())
    index(run, track=bar)


def train(settings: RunSettings, run: Path) -> None:
    site, training = settings.site, settings.training
    lm = load_language_model(settings.model, settings.device)
    corpus = open_corpus(settings.corpus, lm.tokenizer, settings.context, embeddings=lm.embeddings)

    # Activations of ordinary tokens (no BOS), in shuffled batches without end.
    source = FromModel(
        lm,
        corpus,
        site,
        settings.activations.stream,
        batch_tokens=training.batch,
        seed=settings.seed,
        gradients=settings.sae.needs_gradients,
        track=bar,
    )
    sample = source.sample()
    inputs = input_map(settings.activations.inputs, sample)  # makes E||x||^2 = d_in
    sae = new_autoencoder(settings.sae, inputs(sample), seed=settings.seed)

    trainer = Trainer(sae, training, settings.sae)
    with (run / "metrics.jsonl").open("w") as log:
        for batch in bar(source, "training", training.tokens, len):
            metrics = trainer.step(
                Batch(inputs(batch.values), gradients=inputs.gradients(batch.gradients, batch.values))
            )
            if metrics is not None:  # every `training.log_every` steps
                print(json.dumps(metrics), file=log, flush=True)
            if trainer.finished:
                break
    trainer.release()
    source.close()

    facts, densities = {}, trainer.trained().densities
    if densities is not None:  # the tokens of a batch shared a budget: inference needs thresholds
        rows = calibration_rows(corpus, settings.eval.tokens, print)
        facts = calibrate(sae, lm, rows, site, densities, inputs=inputs, track=bar)
    save_run(settings, lm, corpus, trainer, inputs, facts)  # the saved autoencoder takes activations as they are


if __name__ == "__main__":
    main()
