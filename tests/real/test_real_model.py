"""saelab on a real language model, SmolLM2-135M-Instruct, that scripts/real_model.py fetches: `make test-real`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import real_model
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import saelab
from saelab.autointerp.embedders import sentence_transformer
from saelab.autointerp.llm.local import LocalModel
from saelab.autointerp.settings import ContextSettings
from saelab.autointerp.store import explanations
from saelab.features.database import open_database
from saelab.lm.model import LanguageModel
from saelab.runs import folder as run_folder
from tests.lm.test_splice import assert_shared_runs_are_full_runs

pytestmark = pytest.mark.real
SITE = "blocks.15.hook_resid_post"
SITES = [
    "blocks.0.hook_resid_pre",
    "blocks.3.hook_mlp_out",
    "blocks.10.attn.hook_z",
    "blocks.15.hook_attn_out",
    SITE,
    "blocks.29.hook_resid_post",
]
TOKENS = 32_768


@pytest.fixture(scope="module")
def config() -> Path:
    folder = real_model.default_folder()
    if missing := [name for name in (real_model.MODEL, real_model.TEXT) if not (folder / name).exists()]:
        pytest.skip(f"{folder} has no {', '.join(missing)}: run `python scripts/real_model.py --only-fetch`")
    return real_model.prepare(folder)


@pytest.fixture(scope="module")
def lm(config: Path) -> LanguageModel:
    return saelab.load_language_model(saelab.settings_of(config).model, "cpu")


@pytest.fixture(scope="module")
def rows(config: Path, lm: LanguageModel) -> Tensor:
    """Two rows of real text, BOS first."""
    with (config.parent / real_model.TEXT).open(encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(2)]
    return torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(text).input_ids[:47]] for text in texts])


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small training with its evaluation and features."""
    small = [
        f"out={tmp_path_factory.mktemp('real') / 'run'}",
        f"activations.stream.buffer_tokens={TOKENS // 2}",
        f"training.tokens={TOKENS}",
        "training.batch=512",
        "eval.tokens=8e3",
        "eval.ce_tokens=3e3",
        "features.tokens=8e3",
    ]
    return saelab.run(config, small)


def test_the_converted_model_knows_the_capital_of_france(lm: LanguageModel) -> None:
    ids = lm.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert lm.tokenizer.decode(lm.logits(ids)[0, -1].argmax()) == " Paris"


def test_activations_equal_the_bridges_at_every_kind_of_site(config: Path, lm: LanguageModel, rows: Tensor) -> None:
    """Each vector by its own length: BOS, an attention sink, is 150 times as long as the others at the middle layer."""
    from transformer_lens.model_bridge import TransformerBridge

    folder = config.parent / real_model.MODEL
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(rows)
    found = lm.activations(rows, SITES)
    for site in SITES:
        expected = cache[site].reshape(found[site].shape)
        error = (found[site] - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < 1e-4, site


@pytest.mark.parametrize("site", ["blocks.10.attn.hook_z", SITE])
def test_splicing_in_the_same_activations_changes_nothing(site: str, lm: LanguageModel, rows: Tensor) -> None:
    assert torch.equal(lm.spliced_logits(rows, site, lambda x: x), lm.logits(rows))


@pytest.mark.parametrize("site", ["blocks.10.attn.hook_z", SITE])
def test_runs_that_share_layers_equal_full_runs_to_the_bit(site: str, lm: LanguageModel, rows: Tensor) -> None:
    assert assert_shared_runs_are_full_runs(lm, site, rows).shared(rows)


def test_a_short_training_learns_and_its_evaluation_is_plausible(run: Path) -> None:
    """The ranges, and why.

    - FVU: 1 is the mean's, and 64 steps are enough to explain a third of the variance. One row in 40 begins with a
      token that becomes a sink, and such a row can lower FVU to 0.1; below 0.05, sinks are all that is measured.
    - CE of the clean run: a model of this size has 3 to 4 nats per token on news and reviews. The reconstruction keeps
      more than the mean, and zeros are further from any activation than the mean.
    - Loss recovered: more than half, because even after 64 steps the reconstruction has each vector's direction.
    """
    logged = run_folder.metrics(run)["fvu"]
    assert logged.iloc[-1] < 0.8 * logged.iloc[0]

    found = run_folder.evaluation(run)
    assert found is not None
    assert all(math.isfinite(value) for value in found.values() if isinstance(value, float))
    assert 0.05 < found["fvu"] < 0.67 and found["l0"] == 32
    assert 2.5 < found["ce_clean"] < 4.5
    assert found["ce_clean"] < found["ce_spliced"] < found["ce_mean_ablated"] < found["ce_zero_ablated"]
    assert 0.5 < found["loss_recovered_mean"] < found["loss_recovered_zero"] < 1
    assert found["never_active"] < 0.25 * found["n_features"]


def test_the_features_agree_with_the_evaluation(run: Path, lm: LanguageModel) -> None:
    features, found = run_folder.features(run), run_folder.evaluation(run)
    assert found is not None
    database = open_database(features)
    table = database.table
    assert database.n_features == found["n_features"] and database.n_tokens == found["tokens"]
    assert table["n_active"].sum() / database.n_tokens == pytest.approx(found["l0"])
    assert (table["n_active"] == 0).sum() == database.arrays.manifest["never_active"] == found["never_active"]

    strongest = database.feature(int(table["maximum"].argmax()))
    assert database.examples(strongest.index)[0].activation == strongest.maximum
    words = {lm.tokenizer.decode(token) for token in range(len(lm.tokenizer))}
    assert words.issuperset(each.text for each in strongest.top_logits)


def test_the_database_is_what_transformers_and_the_weights_give(run: Path, config: Path) -> None:
    """Without saelab's forward pass, encoder and lens: activations on four rows, and logits of four features."""
    database = open_database(run_folder.features(run))
    weights = load_file(run_folder.weights(run))
    folder = str(config.parent / real_model.MODEL)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    special = torch.tensor(AutoTokenizer.from_pretrained(folder).all_special_ids)
    ids = torch.from_numpy(np.array(database.facts.rows[:4])).long()
    with torch.no_grad():
        x = model(ids, output_hidden_states=True).hidden_states[16].flatten(0, 1)
    strongest = ((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu().topk(32)
    expected = torch.zeros(len(x), database.n_features).scatter(1, strongest.indices, strongest.values)
    expected[torch.isin(ids.flatten(), special)] = 0
    found = torch.zeros_like(expected)
    for place in range(len(x)):
        features, values = database.at(*divmod(place, ids.shape[1]))
        found[place, torch.tensor(features).long()] = torch.tensor(values)
    assert ((found > 0) != (expected > 0)).sum() <= 2, "the 32nd and 33rd strongest may be equal but for rounding"
    both = (found > 0) & (expected > 0)
    torch.testing.assert_close(found[both], expected[both], rtol=2e-3, atol=2e-3)

    table = database.table
    for feature in range(0, 4000, 1000):
        with torch.no_grad():
            logits = model.lm_head.weight @ (model.model.norm.weight * weights["W_dec"][feature])
        top = torch.tensor(table["top_logits"][feature])
        torch.testing.assert_close(logits.topk(10).values, top, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[table["top_logit_tokens"][feature].tolist()], top, rtol=1e-4, atol=1e-5)


def test_it_explains_features_and_judges_explanations(run: Path, lm: LanguageModel) -> None:
    """End to end, and every answer can be read. How good a model of this size is at it: docs/results.md."""
    client, few = LocalModel(lm), ContextSettings(explain=5, positives=5, negatives=5)
    made = saelab.explain(run, "random:3", llm=client, settings=few)
    assert (made.explained, made.unreadable, made.explainer) == (3, 0, client.name)
    inputs = open_database(run_folder.features(run)).arrays.manifest["inputs"]
    texts = [each.text for each, _ in explanations(run / run_folder.AUTOINTERP, inputs)]
    assert len(set(texts)) == 3
    found = saelab.score(run, ["detection", "fuzzing", "surprisal"], llm=client, base=client)
    assert {line.score for line in found.lines} == {"detection", "fuzzing", "surprisal"}
    for line in found.lines:
        assert (line.n, line.unread, line.judge) == (3, 0, client.name) and 0 <= line.mean.value <= 1


def test_sentence_embeddings_know_what_is_alike(config: Path, run: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = config.parent / real_model.EMBEDDER
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: run `python scripts/real_model.py --only-fetch --embedder`")
    rows = sentence_transformer(str(folder))(["names of months", "May, June and July", "a closing bracket"])
    assert rows.shape == (3, 384) and np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2
    found = saelab.score(run, ["example_embedding"], "random:3", embed=str(folder))
    (line,) = [line for line in found.lines if line.score == "example_embedding"]
    assert line.judge == real_model.EMBEDDER and line.n == 3
