"""A run in memory gives a typed text the features that a pass over rows gives it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import saelab
from saelab.analysis.attention.logits import logit_attribution
from saelab.analysis.settings import Intervention
from saelab.corpus.encoder import Encoder
from saelab.errors import SaelabError
from saelab.features.database import open_database
from saelab.lm.lens import logit_lens, norm_scale
from saelab.runs.live import Live, open_live, text_at
from tests.features.dense import made_up, write_database
from tests.tiny import language_model


@pytest.fixture(scope="module")
def live(trained_run: Path) -> Live:
    return open_live(trained_run)


def test_a_typed_text_has_the_codes_norms_and_errors_of_its_activations(live: Live) -> None:
    text = live.read("The quick brown fox, naïve 日本")
    ids = text.token_ids.tolist()
    assert ids[0] == live.encoder.bos and "".join(text.tokens[1:]) == "The quick brown fox, naïve 日本"
    assert ids == live.token_ids("The quick brown fox, naïve 日本")
    x = live.lm.activations(torch.tensor([ids]), [live.site])[live.site][0].float()
    z = live.sae.encode(x).to_dense()
    z[0] = 0  # BOS is special
    assert text.l0.tolist() == (z > 0).sum(1).tolist() and text.l0[1:].all()
    for token in range(len(ids)):
        features, values = text.at(token)
        assert features.tolist() == z[token].nonzero().flatten().tolist()
        np.testing.assert_allclose(values, z[token][features], rtol=1e-5)
    assert text.norms is not None and text.errors is not None
    np.testing.assert_allclose(text.norms[1:], x.norm(dim=1)[1:], rtol=1e-5)
    np.testing.assert_allclose(text.errors[1:], (x - live.sae(x)).norm(dim=1)[1:], rtol=1e-4)
    assert text.norms[0] == text.errors[0] == 0


def test_without_bos_the_text_is_read_by_itself_and_bos_alone_has_no_features(live: Live) -> None:
    assert live.token_ids("fox", bos=False) == live.token_ids("fox")[1:]
    bos = live.read("")
    assert len(bos) == 1 and not len(bos.features)
    # text that spells a special token does not become one
    assert live.encoder.bos not in live.token_ids("<|endoftext|>", bos=False)


def test_a_text_that_is_empty_or_too_long_is_refused(live: Live) -> None:
    with pytest.raises(SaelabError, match="no token"):
        live.read("", bos=False)
    with pytest.raises(SaelabError, match="takes at most 64; shorten it"):
        live.read("fox " * 100)


def test_steering_a_run(live: Live) -> None:
    ids = live.token_ids("The quick")
    feature = int(live.read("The quick").features[0])
    found = live.steer(ids, [Intervention(feature, "clamp", 20.0)], new_tokens=4)
    assert found.steered.ids[: len(ids)] == ids and found.kl.max() > 0
    assert len(live.tokens(found.steered.ids)) == len(found.steered.ids)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_effect_on_a_logit_is_what_the_last_layer_makes_of_the_feature(kind: str) -> None:
    """At the last block nothing else reads the feature, so only the norm's scale is to be undone."""
    lm, site = language_model(kind), "blocks.2.hook_resid_post"
    torch.manual_seed(0)
    sae = saelab.SparseAutoencoder(32, 20, 5, {"hook_name": site}).requires_grad_(False)
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec)
    last = Live(lm, sae, site, Encoder(lm.tokenizer))
    text, token, target = last.read("The quick brown fox"), 3, 50
    effects = last.logit_effects(text, token, target)
    assert effects is not None and np.abs(effects).max() > 0.01
    rows, features = torch.from_numpy(text.token_ids[None]), text.at(token)[0]
    lens = logit_lens(lm, site)
    assert lens is not None
    norm = norm_scale(lm, lens, rows)[0, token]
    x = lm.activations(rows, [site])[site]
    for feature, effect in zip(features, effects, strict=True):
        z = sae.encode(x[0, token : token + 1]).to_dense()[0, feature]
        without = x[0, token] - z * sae.W_dec[feature]

        def spliced(values: torch.Tensor, new: torch.Tensor = without) -> torch.Tensor:
            values = values.clone()
            values[token - 1] = new  # BOS is not among them
            return values

        centred = without - without.mean() if lens.centred else without
        rescaled = centred.square().mean().sqrt() / norm
        logits = lm.logits(rows)[0, token, target], lm.spliced_logits(rows, site, spliced)[0, token, target] * rescaled
        assert effect == pytest.approx(float(logits[0] - logits[1]), rel=1e-3, abs=1e-4)


def test_at_a_site_with_no_linear_way_to_the_logits_there_is_no_effect_on_them(live: Live) -> None:
    other = Live(live.lm, live.sae, "blocks.1.mlp.hook_post", live.encoder)
    assert other.logit_effects(live.read("fox"), 1, 3) is None
    logits = live.lm.logits(torch.tensor([live.token_ids("fox")]))
    assert live.next_token(live.token_ids("fox")) == int(logits[0, -1].argmax())


def test_effects_of_heads_features_are_their_direct_logit_attribution() -> None:
    lm, site = language_model("llama"), "blocks.1.attn.hook_z"
    torch.manual_seed(0)
    sae = saelab.SparseAutoencoder(32, 20, 5, {"hook_name": site}).requires_grad_(False)
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec)
    live = Live(lm, sae, site, Encoder(lm.tokenizer))
    text = live.read("The quick brown fox")
    expected = logit_attribution(sae, lm, text.token_ids.tolist(), 3, 50)
    effects = live.logit_effects(text, 3, 50)
    assert effects is not None and text.at(3)[0].tolist() == expected.features.tolist()
    assert effects == pytest.approx(expected.contributions.numpy(), rel=1e-3, abs=1e-5)


@pytest.fixture
def copied(trained_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("state")))


def test_another_model_is_refused(copied: Path) -> None:
    path = copied / "sae" / "cfg.json"
    config = json.loads(path.read_text())
    config["metadata"]["saelab"]["model_fingerprint"] = "0" * 32
    path.write_text(json.dumps(config))
    with pytest.raises(SaelabError, match="is not what it was in training"):
        open_live(copied)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("name", "/nowhere/model", "/nowhere/model"), ("site", "blocks.1.mlp.hook_pre", "wide")],
)
def test_a_model_or_site_that_does_not_fit_is_one_message(copied: Path, setting: str, value: str, message: str) -> None:
    settings = copied / "config.yaml"
    settings.write_text(re.sub(rf"(?m)^( *{setting}:) .*$", rf"\1 {value}", settings.read_text()))
    with pytest.raises(SaelabError, match=message):
        open_live(copied)


def test_a_run_without_a_checkpoint_is_one_message(copied: Path) -> None:
    shutil.rmtree(copied / "sae")
    with pytest.raises(SaelabError, match="not a run folder with a checkpoint"):
        open_live(copied)


def test_a_row_of_the_database_is_read_without_a_model(tmp_path: Path) -> None:
    z, tokens = made_up(4, 12, 20, 30)
    database = open_database(write_database(tmp_path / "features", z, tokens, [f" w{i}".encode() for i in range(30)]))
    for row in range(4):
        text = text_at(database, row)
        assert text.token_ids.tolist() == tokens[row].tolist() and text.tokens[3] == f" w{tokens[row, 3]}"
        assert text.norms is None and text.errors is None
        for feature in range(20):
            np.testing.assert_allclose(text.of(feature)[1:], z[row, 1:, feature], rtol=2**-10)
        assert text.l0.tolist() == [0, *(z[row, 1:] > 0).sum(1)]
    with pytest.raises(SaelabError, match="There is no place 4"):
        text_at(database, 4)
