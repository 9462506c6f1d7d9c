import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from saelab.errors import SaelabError
from saelab.runs.decoder import decoder_rows
from saelab.runs.summary import CURVE_POINTS, read_sweep, summarise


def test_a_summary_has_the_figures_of_its_files(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model: {name: demo}\nsite: blocks.0.hook_resid_post\nsae: {n_features: 12}\n"
    )
    (tmp_path / "train.json").write_text(json.dumps({"complete": False, "tokens": 5, "planned_tokens": 9}))
    found = summarise(tmp_path)
    assert (found.model, found.site, found.n_features, found.fvu) == ("demo", "blocks.0.hook_resid_post", 12, None)
    assert found.unfinished == "this run's training stopped after 5 of 9 tokens" and found.problem is None
    (tmp_path / "eval.json").write_text('{"fvu": 0.5, "l0": NaN, "delta_ce": "x", "never_active": 3, "n_features": 11}')
    lines = [json.dumps({"step": step, "fvu": 1 / (1 + step)}) for step in range(1000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = summarise(tmp_path)
    assert (found.fvu, found.l0, found.delta_ce, found.never_active, found.n_features) == (0.5, None, None, 3, 11)
    assert len(found.curve) == CURVE_POINTS and (found.curve[0], found.curve[-1]) == (1, 1 / 1000)
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "words", "alone"),
    [
        ("", "blocks.1.attn.hook_z", True),
        ("target: blocks.2.attn.hook_z", "blocks.1.attn.hook_z -> blocks.2.attn.hook_z", False),
        ("more_sites: [blocks.2.attn.hook_z]", "blocks.1.attn.hook_z + blocks.2.attn.hook_z", False),
    ],
)
def test_a_run_of_several_sites_is_not_one_of_its_last(tmp_path, more, words, alone):
    (tmp_path / "config.yaml").write_text(f"site: blocks.1.attn.hook_z\n{more}\n")
    found = summarise(tmp_path)
    assert found.site == words and found.only_at(".attn.hook_z") == alone and not found.only_at("resid_post")


def test_a_model_is_known_by_its_files_and_without_these_by_its_name(tmp_path):
    def made(name, model, fingerprint=None):
        run = tmp_path / name
        (run / "sae").mkdir(parents=True)
        (run / "config.yaml").write_text(f"model: {{name: {model}}}")
        metadata = {"saelab": {"model_fingerprint": fingerprint}} if fingerprint else {}
        (run / "sae" / "cfg.json").write_text(json.dumps({"metadata": metadata}))
        return summarise(run)

    here, moved, other = made("here", "a", "1"), made("moved", "b", "1"), made("other", "a", "2")
    imported = made("imported", "a")
    assert here.fingerprint == "1" and here.same_model(moved) and not here.same_model(other)
    assert here.same_model(imported) and not moved.same_model(imported)
    (tmp_path / "here" / "sae" / "cfg.json").write_text("[")
    damaged = summarise(tmp_path / "here")
    assert damaged.fingerprint is None and damaged.model == "a" and "cfg.json" in damaged.problem


def test_damaged_files_are_the_problem_of_a_summary_and_the_others_count(tmp_path):
    (tmp_path / "config.yaml").write_text("model: [")
    (tmp_path / "eval.json").write_text('{"fvu": 0.5}')
    (tmp_path / "metrics.jsonl").write_text("x\n{}\n")
    found = summarise(tmp_path)
    assert found.fvu == 0.5 and found.trained == 0
    assert "config.yaml" in found.problem and "metrics.jsonl, line 1" in found.problem


def test_a_sweep_has_its_runs_and_a_damaged_one_is_an_error(tmp_path):
    line = {"run": "k8", "varies": {"sae.k": 8}, "fvu": 0.1}
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": [line, line | {"failed": "no"}]}))
    found = [(run.name, run.varies, run.failed) for run in read_sweep(tmp_path)]
    assert found == [("k8", {"sae.k": 8}, None), ("k8", {"sae.k": 8}, "no")]
    for damaged in (
        "[",
        "{}",
        '{"runs": 1}',
        '{"runs": [1]}',
        '{"runs": [{"run": "a"}]}',
        '{"runs": [{"varies": {}}]}',
    ):
        (tmp_path / "sweep.json").write_text(damaged)
        with pytest.raises(SaelabError, match=r"sweep\.json.*`saelab sweep` with the same config"):
            read_sweep(tmp_path)


def test_the_rows_of_a_decoder_are_those_of_the_checkpoint(tmp_path):
    rows = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    with pytest.raises(SaelabError, match="there is no checkpoint"):
        decoder_rows(tmp_path)
    (tmp_path / "sae").mkdir()
    path = tmp_path / "sae" / "sae_weights.safetensors"
    save_file({"W_dec": rows}, path)
    assert np.array_equal(decoder_rows(tmp_path), rows)
    config = {"site_widths": [1, 2], "metadata": {"saelab": {"input_scale": [4.0, 0.5]}}}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(decoder_rows(tmp_path), rows * np.float32([4, 0.5, 0.5]))
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(config | {"site_widths": [10**12, 2]}))
    with pytest.raises(SaelabError, match="its sites have 1000000000002 dimensions, and W_dec 3"):
        decoder_rows(tmp_path)
    (tmp_path / "sae" / "cfg.json").unlink()
    for damaged in ({"W_enc": rows}, {"W_dec": rows * np.nan}, {"W_dec": rows[0]}):
        save_file(damaged, path)
        with pytest.raises(SaelabError, match=r"sae_weights\.safetensors: the decoder cannot be read"):
            decoder_rows(tmp_path)
