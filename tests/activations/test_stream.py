"""Every ordinary token comes out once, with its own activation, in an order that depends only on the seed."""

import numpy as np
import pytest
import torch

from saelab.activations.settings import StreamSettings
from saelab.activations.stream import ActivationBatch, read_activations
from saelab.errors import SaelabError, SettingError
from saelab.lm.model import LanguageModel
from tests.activations.shuffled import shuffled
from tests.tiny import CONTEXT, KINDS, language_model, random_rows

SITE = "blocks.1.hook_resid_post"


def stream(
    lm: LanguageModel, rows: np.ndarray, *, batch: int = 50, buffer: int = 200, seed: int = 0
) -> list[ActivationBatch]:
    return list(shuffled(read_activations(lm, rows, SITE, 4), batch, buffer, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_every_ordinary_token_comes_out_once_with_its_own_activation(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 21)
    batches = stream(lm, rows.numpy())
    assert all(len(batch) == 50 for batch in batches[:-1]) and 0 < len(batches[-1]) <= 50
    places = torch.cat([b.rows * CONTEXT + b.positions for b in batches])
    assert torch.equal(places.sort().values, lm.ordinary(rows).flatten().nonzero().squeeze(1))
    clean = lm.activations(rows, [SITE])[SITE]
    for b in batches:
        assert torch.equal(b.tokens, rows[b.rows, b.positions])
        torch.testing.assert_close(b.values, clean[b.rows, b.positions], rtol=1e-4, atol=1e-5)
    assert batches[0].values.dtype == torch.float32


def test_the_order_depends_only_on_the_seed_and_mixes_rows() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 21).numpy()

    def order(seed: int) -> torch.Tensor:
        return torch.cat([b.rows * CONTEXT + b.positions for b in stream(lm, rows, seed=seed)])

    assert torch.equal(order(3), order(3))
    assert not torch.equal(order(3), order(4))
    assert len(stream(lm, rows)[0].rows.unique()) > 5  # a buffer of 200 tokens holds some 7 rows


def test_bos_with_a_hundred_times_the_norm_reaches_nothing() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 8)
    embedding = lm.model.get_input_embeddings().weight
    bos = lm.tokenizer.bos_token_id
    before = embedding[bos].clone()
    try:
        embedding.data[bos] = 100 * before.norm() * torch.nn.functional.normalize(torch.ones_like(before), dim=0)
        norms = lm.activations(rows, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"].norm(dim=-1)
        assert norms[:, 0].min() > 10 * norms[lm.ordinary(rows)].max()
        values = torch.cat(
            [b.values for b in shuffled(read_activations(lm, rows.numpy(), "blocks.0.hook_resid_pre", 4), 50, 200, 0)]
        )
        assert values.norm(dim=1).max() < norms[:, 0].min() / 10
    finally:
        embedding.data[bos] = before


def test_nan_activations_stop_with_site_row_and_position() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 6)
    rows[rows == 17] = 18
    rows[5, 9] = 17
    site = "blocks.0.hook_resid_pre"  # later, attention carries it to earlier positions too: 0 * NaN is NaN
    embedding = lm.model.get_input_embeddings().weight
    before = embedding[17].clone()
    try:
        embedding.data[17] = torch.nan
        with pytest.raises(SaelabError, match=rf"{site}.*row 5, position 9"):
            list(read_activations(lm, rows.numpy(), site, 2))
        with pytest.raises(SaelabError, match=rf"{site}.*row 103, position 9"):
            list(read_activations(lm, rows.numpy()[2:], site, 2, first_row=100))
    finally:
        embedding.data[17] = before


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_travel_with_their_tokens_and_last_positions_stay_out(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 21)
    batches = list(shuffled(read_activations(lm, rows.numpy(), SITE, 4, gradients=True), 50, 200, 0))
    places = torch.cat([b.rows * CONTEXT + b.positions for b in batches])
    expected = lm.ordinary(rows)
    expected[:, -1] = False
    assert torch.equal(places.sort().values, expected.flatten().nonzero().squeeze(1))
    values, gradients = (found[SITE] for found in lm.activations_and_gradients(rows, [SITE]))
    for b in batches:
        assert torch.equal(b.tokens, rows[b.rows, b.positions])
        torch.testing.assert_close(b.values, values[b.rows, b.positions], rtol=1e-4, atol=1e-5)
        assert b.gradients is not None and b.gradients.dtype == torch.float32
        torch.testing.assert_close(b.gradients, gradients[b.rows, b.positions], rtol=1e-4, atol=1e-4)
    assert all(batch.gradients is None for batch in stream(lm, rows.numpy()))


def test_positions_that_no_loss_depends_on_stay_out_and_those_before_an_inner_special_token_do_not() -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 3)
    middle = CONTEXT // 2  # special in row 0: the token before it has no loss of its own, but later ones read it
    rows[1, -1] = lm.tokenizer.eos_token_id
    rows[2, 9:] = lm.tokenizer.eos_token_id
    (batch,) = read_activations(lm, rows.numpy(), SITE, 4, gradients=True)
    found = [batch.positions[batch.rows == row].tolist() for row in range(3)]
    inside = [t for t in range(1, CONTEXT - 1) if t != middle]
    assert found == [inside, list(range(1, CONTEXT - 2)), list(range(1, 8))]
    assert batch.gradients is not None and (batch.gradients.abs().amax(1) > 0).all()


def test_infinite_gradients_stop_with_site_row_and_position(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("gpt2")
    rows = random_rows(lm, 6)
    clean = lm.activations_and_gradients

    def spoilt(ids: torch.Tensor, sites: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        values, gradients = clean(ids, sites)
        gradients[SITE][1, -1] = torch.nan  # of no token that is read
        gradients[SITE][1, 9, 3] = torch.inf
        return values, gradients

    monkeypatch.setattr(lm, "activations_and_gradients", spoilt)
    with pytest.raises(SaelabError, match=rf"{SITE}.*infinite gradients at row 1, position 9"):
        list(read_activations(lm, rows.numpy(), SITE, 2, gradients=True))


def test_impossible_settings_name_their_field() -> None:
    with pytest.raises(SettingError, match="buffer_tokens: 0"):
        StreamSettings(buffer_tokens=0)
