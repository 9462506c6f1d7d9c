"""Steering changes what it should by exactly as much as it should, and nothing else."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from saelab.analysis.settings import Intervention
from saelab.analysis.steering import Steering, activations_of, steer, steered
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder
from tests.tiny import KINDS, language_model, random_rows

SITES = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z")
PROMPT = [0, 40, 77, 120, 33]


def autoencoder(site: str = SITES[0], n_features: int = 48, k: int = 6, seed: int = 3) -> SparseAutoencoder:
    """One with random weights, decoder rows of different lengths, and an error that is far from 0."""
    torch.manual_seed(seed)
    sae = SparseAutoencoder(32, n_features, k, {"hook_name": site})
    torch.nn.init.normal_(sae.W_enc)
    torch.nn.init.normal_(sae.W_dec)
    torch.nn.init.normal_(sae.b_dec, std=0.1)
    return sae.requires_grad_(False)


def active(sae: SparseAutoencoder, x: Tensor) -> list[int]:
    """The features that are active on most tokens."""
    return sae.encode(x).firing_counts().argsort(descending=True)[:3].tolist()


def same(one: Steering, other: Steering) -> bool:
    return (
        one.clean.ids == other.clean.ids
        and one.steered.ids == other.steered.ids
        and torch.equal(one.kl, other.kl)
        and torch.equal(one.steered.log_probs, other.steered.log_probs)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [None, 0.0, 3.0], ids=["topk", "relu", "jumprelu"])
def test_x_changes_by_the_change_of_the_contribution_and_keeps_its_error(
    dtype: torch.dtype, threshold: float | None
) -> None:
    torch.manual_seed(0)
    sae, x = autoencoder(), torch.randn(20, 32).to(dtype)
    sae.threshold = None if threshold is None else torch.full((48,), threshold)
    codes = sae.encode(x)
    added, clamped, ablated = active(sae, x)
    changes = [Intervention(added, "add", 2.5), Intervention(clamped, "clamp", 7.0), Intervention(ablated, "ablate")]
    new = steered(sae, x, changes)
    z = codes.to_dense()
    goal = z.clone()
    goal[:, added] += 2.5
    goal[:, clamped] = 7.0
    goal[:, ablated] = 0.0
    assert new.dtype == dtype
    expected = x.float() + (goal - z) @ sae.W_dec
    torch.testing.assert_close(new.float(), expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    if dtype == torch.float32:  # the same as: the contribution is the one asked for, the error is that of x
        error = x - sae.decode(codes)
        torch.testing.assert_close(new, goal @ sae.W_dec + sae.b_dec + error, rtol=1e-4, atol=1e-4)


def test_a_clamped_feature_encodes_to_the_value_if_its_rows_allow_it() -> None:
    """With encoder = decoder rows that are orthonormal, what is set is what is encoded afterwards."""
    torch.manual_seed(0)
    sae = SparseAutoencoder(32, 32, 32)
    sae.W_dec.data.copy_(torch.linalg.qr(torch.randn(32, 32)).Q)
    sae.W_enc.data.copy_(sae.W_dec.data)
    sae.requires_grad_(False)
    x = torch.randn(12, 32)
    before = sae.encode(x).to_dense()
    after = sae.encode(steered(sae, x, [Intervention(3, "clamp", 5.0), Intervention(4, "ablate")])).to_dense()
    was = before[:, 3] > 0
    torch.testing.assert_close(after[was, 3], torch.full((int(was.sum()),), 5.0))
    assert was.any() and (after[~was, 3] < 5).all()  # a negative pre-activation is part of the error, which stays
    assert (before[:, 4] > 0.1).any() and (after[:, 4] < 1e-5).all()
    others = [f for f in range(32) if f not in (3, 4)]
    torch.testing.assert_close(after[:, others], before[:, others], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", SITES)
def test_without_steering_the_model_is_the_clean_one_to_the_bit(kind: str, site: str) -> None:
    lm, sae = language_model(kind), autoencoder(site)
    for changes in ([], [Intervention(5), Intervention(9, "add", 0.0)]):
        found = steer(sae, lm, PROMPT, changes, new_tokens=6, temperature=0.8)
        assert found.steered.ids == found.clean.ids and found.clean.ids[:5] == PROMPT
        assert torch.equal(found.steered.log_probs, found.clean.log_probs)
        assert torch.equal(found.clean_log_probs, found.clean.log_probs)
        assert not found.kl.any()
        rows = torch.tensor([found.clean.ids])
        expected = lm.logits(rows)[0, :-1].double().log_softmax(-1).gather(1, rows[0, 1:, None]).squeeze(1)
        assert torch.equal(found.clean.log_probs[1:], expected) and found.clean.log_probs[0] == 0


@pytest.mark.parametrize("site", SITES)
def test_kl_and_log_probs_are_those_of_a_run_with_the_changed_activations(site: str) -> None:
    lm, sae = language_model("gpt2"), autoencoder(site)
    x = lm.activations(random_rows(lm, 4), [site])[site].flatten(0, 1)
    changes = [Intervention(active(sae, x)[0], "ablate"), Intervention(7, "add", 4.0)]
    found = steer(sae, lm, PROMPT, changes, new_tokens=8, temperature=1.0, seed=4)
    rows = torch.tensor([found.steered.ids])
    clean = lm.logits(rows)[0, :-1].double().log_softmax(-1)
    other = lm.spliced_logits(rows, site, lambda x: steered(sae, x, changes))[0, :-1].double().log_softmax(-1)
    torch.testing.assert_close(found.kl[1:], (clean.exp() * (clean - other)).sum(1))
    torch.testing.assert_close(found.steered.log_probs[1:], other.gather(1, rows[0, 1:, None]).squeeze(1))
    assert (found.kl >= 0).all() and found.kl[2:].max() > 1e-3  # BOS is clean, and so is the prediction after it
    assert found.kl[1] == 0
    frame = found.to_frame()
    assert frame["written"].sum() == len(found.steered.ids) - found.prompt_tokens
    assert frame["kl"].tolist() == found.kl.tolist()


def test_special_tokens_stay_clean_and_only_new_tokens_are_steered_if_asked() -> None:
    lm, sae = language_model("llama"), autoencoder()
    seen: list[Tensor] = []
    site, original = SITES[0], lm.spliced_logits

    def recorded(rows: Tensor, site: str, replace_x) -> Tensor:
        clean = lm.activations(rows, [site])[site]
        new = clean.clone()
        keep = lm.ordinary(rows)
        new[keep] = replace_x(clean[keep])
        seen.append((new != clean).any(-1)[0])
        return original(rows, site, replace_x)

    prompt = [0, 40, 1, 77, 120]  # BOS, and EOS inside
    lm.spliced_logits = recorded  # type: ignore[method-assign]
    try:
        steer(sae, lm, prompt, [Intervention(2, "add", 9.0)], site, new_tokens=3)
        everywhere = seen[2].tolist()
        seen.clear()
        steer(sae, lm, prompt, [Intervention(2, "add", 9.0)], site, new_tokens=3, where="new")
    finally:
        del lm.spliced_logits
    assert everywhere[:5] == [False, True, False, True, True] and all(everywhere[5:])
    assert seen[2].tolist() == [False] * 5 + [True] * (len(seen[2]) - 5)
    assert not seen[0].any()


def test_a_prompt_of_special_tokens_only_is_continued() -> None:
    lm, sae = language_model("gpt2"), autoencoder()
    found = steer(sae, lm, [0], [Intervention(2, "clamp", 30.0)], new_tokens=3)
    assert found.prompt_tokens == 1 and len(found.steered.ids) >= 2 and found.kl[1] == 0


def test_a_seed_repeats_a_text_and_another_seed_writes_another() -> None:
    lm, sae = language_model("gpt2"), autoencoder()
    changes = [Intervention(2, "clamp", 8.0)]

    def text(seed: int, temperature: float = 1.0) -> Steering:
        return steer(sae, lm, PROMPT, changes, new_tokens=12, temperature=temperature, seed=seed)

    assert same(text(1), text(1))
    assert text(1).clean.ids != text(2).clean.ids
    assert same(text(1, 0.0), text(2, 0.0))  # greedy draws nothing


def test_samples_have_the_models_probabilities() -> None:
    lm, sae = language_model("gpt2"), autoencoder()
    p = (lm.logits(torch.tensor([PROMPT]))[0, -1].double() / 0.5).softmax(-1)
    top = int(p.argmax())
    n = 150
    drawn = [steer(sae, lm, PROMPT, [], new_tokens=1, temperature=0.5, seed=s).clean.ids[-1] for s in range(n)]
    share = drawn.count(top) / n
    assert abs(share - p[top].item()) < 4 * (p[top].item() * (1 - p[top].item()) / n) ** 0.5
    greedy = steer(sae, lm, PROMPT, [], new_tokens=1).clean.ids[-1]
    assert greedy == top


def test_a_continuation_ends_after_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sae = language_model("llama"), autoencoder()
    first = steer(sae, lm, PROMPT, [], new_tokens=5).clean.ids
    monkeypatch.setattr(lm, "tokenizer", SimpleNamespace(eos_token_id=first[6]))
    assert steer(sae, lm, PROMPT, [], new_tokens=5).clean.ids == first[: first.index(first[6], 5) + 1]


def test_activations_of_some_features_are_columns_of_the_dense_codes() -> None:
    sae, x = autoencoder(), torch.randn(9, 32)
    codes, features = sae.encode(x), torch.tensor([4, 0, 31])
    assert torch.equal(activations_of(codes, features), codes.to_dense()[:, features])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ([Intervention(48)], {}, "there is no feature 48: features are 0 to 47"),
        ([Intervention(-1)], {}, "there is no feature -1"),
        ([Intervention(1, "set")], {}, "'set' is not a mode; use add, clamp, ablate"),  # type: ignore[arg-type]
        ([Intervention(1), Intervention(1, "ablate")], {}, "feature 1 is named twice"),
        ([Intervention(1, "add", float("nan"))], {}, "the value nan of feature 1"),
        ([], {"temperature": -1.0}, "temperature"),
        ([], {"new_tokens": 0}, "new_tokens=0"),
        ([], {"new_tokens": 60}, "more than the 64"),
        ([], {"where": "some"}, "use all or new"),
        ([], {"prompt": []}, "the prompt has no token"),
        ([], {"prompt": [99999]}, "token id"),
        ([], {"site": "blocks.9.hook_resid_post"}, "Nearest"),
        ([], {"site": "blocks.1.mlp.hook_pre"}, "width"),
        ([Intervention(1, "add", 1e38)], {}, "NaN or infinite"),
    ],
)
def test_what_cannot_be_done_is_said(changes: list, options: dict, message: str) -> None:
    lm, sae = language_model("gpt2"), autoencoder()
    with pytest.raises(SaelabError, match=message):
        steer(sae, lm, options.pop("prompt", PROMPT), changes, **options)


def test_a_transcoder_and_an_autoencoder_of_no_site_are_refused() -> None:
    lm = language_model("gpt2")
    with pytest.raises(SaelabError, match="transcoder"):
        steer(SparseAutoencoder(32, 8, 2, {"hook_name": SITES[0]}, d_out=32), lm, PROMPT, [])
    with pytest.raises(SaelabError, match="pass site="):
        steer(SparseAutoencoder(32, 8, 2), lm, PROMPT, [])
    assert replace(Intervention(3), value=2.0) == Intervention(3, "add", 2.0)
