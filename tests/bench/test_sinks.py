"""The comparison of ways to train with attention sinks: what clipping does to a token, and the table."""

import sinks
import torch

import saelab
from saelab.progress import quiet
from saelab.runs.job import Job, settings_of
from tests.tiny import model_folder, text


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    x[::10] *= 100
    x[1] = 0
    bound = 10 * x.norm(dim=1).median().item()
    cut, long = sinks.clipped(x, bound), x.norm(dim=1) > bound
    assert long.sum() == 4 and torch.equal(cut[~long], x[~long])
    torch.testing.assert_close(cut[long].norm(dim=1), torch.full((4,), bound))
    torch.testing.assert_close(torch.cosine_similarity(cut[long], x[long]), torch.ones(4))
    assert torch.equal(sinks.clipped(x, float("inf")), x)


def test_the_table_has_the_mean_and_half_the_range_of_each_way():
    found = [
        {"way": way, **{name: i + seed for i, name in enumerate(sinks.COLUMNS)}}
        for way in sinks.WAYS
        for seed in (0, 1, 4)
    ]
    head, _, *lines = sinks.report(found).splitlines()
    assert len(lines) == 3 and head.count("|") == 2 + len(sinks.COLUMNS)
    assert all("| 1.6667 ± 2.0000 |" in line.replace("  ", " ") for line in lines)


def test_without_sinks_all_ways_train_the_same_autoencoder(tmp_path):
    (tmp_path / "text.txt").write_text(text(400))
    config = {
        "out": str(tmp_path / "run"),
        "model": str(model_folder("gpt2")),
        "corpus": str(tmp_path / "text.txt"),
        "site": "blocks.1.hook_resid_post",
        "context": 32,
        "sae": {"n_features": 64, "k": 4},
        "training": {"tokens": 1000, "batch": 50},
        "eval": {"tokens": 200, "ce_tokens": 64},
    }
    cache = saelab.cache(config, tmp_path / "cache")
    job = Job(settings_of(config, [f"activations.cache={cache}"]), quiet)
    arms = sinks.train(job, [0, 1])
    figures = [each.to_dict() for each in sinks.evaluate(job, arms)]
    assert [(arm.way, arm.seed) for arm in arms] == [(way, seed) for way in sinks.WAYS for seed in (0, 1)]
    assert all(arm.trainer.tokens >= 1000 and arm.inputs.left_out == 0 for arm in arms)
    assert figures[0::2] == [figures[0]] * 3 and figures[1::2] == [figures[1]] * 3
    assert 0 < figures[0]["fvu"] < 1 and figures[0] != figures[1]
