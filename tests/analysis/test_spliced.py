"""Splicing into a Hugging Face model gives what our own spliced runs give, in `generate` too, and leaves no trace."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saelab
from saelab.analysis.settings import Intervention
from saelab.analysis.steering import steered
from saelab.errors import SaelabError
from saelab.lm.in_memory import named_ids
from saelab.sae.model import SparseAutoencoder
from tests.tiny import ADDS_IN_PLACE, KINDS, language_model, model_folder, random_rows

SITES = ("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z", "blocks.2.hook_resid_pre")
STEER, CLAMP = {5: 4.0}, {7: 9.0, 11: 0.0}
CHANGES = [Intervention(5, "add", 4.0), Intervention(7, "clamp", 9.0), Intervention(11, "ablate")]


@functools.cache
def user_model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(kind), dtype=dtype)


def autoencoder(site: str = SITES[0], width: int = 32, seed: int = 3) -> SparseAutoencoder:
    torch.manual_seed(seed)
    sae = SparseAutoencoder(width, 48, 6, {"hook_name": site})
    for weights in (sae.W_enc, sae.W_dec):
        nn.init.normal_(weights)
    nn.init.normal_(sae.b_dec, std=0.1)
    return sae.requires_grad_(False)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def generated(model: Any, ids: Tensor, cache: bool = True, **options: Any) -> Tensor:
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, use_cache=cache, **options)


@pytest.mark.parametrize("kind", [*KINDS, ADDS_IN_PLACE])
@pytest.mark.parametrize("site", SITES)
def test_logits_are_those_of_our_own_spliced_runs(kind: str, site: str) -> None:
    lm, model, sae = language_model(kind), user_model(kind), autoencoder(site)
    rows = random_rows(lm, 3)
    clean = model(input_ids=rows).logits
    for error in (True, False):
        with saelab.spliced(model, sae, site, steer=STEER, clamp=CLAMP, error=error):
            found = model(input_ids=rows).logits
        expected = lm.spliced_logits(rows, site, lambda x, error=error: steered(sae, x, CHANGES, error=error))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - clean).abs().max() > 0.1
    with saelab.spliced(model, sae, site, error=False):
        torch.testing.assert_close(
            model(input_ids=rows).logits, lm.spliced_logits(rows, site, sae), rtol=1e-5, atol=1e-5
        )
    with saelab.spliced(model, sae, site):
        assert torch.equal(model(input_ids=rows).logits, clean)


def test_a_reconstruction_with_changes_decodes_the_changed_codes() -> None:
    sae, x = autoencoder(), torch.randn(9, 32)
    z = sae.encode(x).to_dense()
    z[:, 5] += 4.0
    z[:, 7], z[:, 11] = 9.0, 0.0
    found = steered(sae, x, CHANGES, error=False)
    torch.testing.assert_close(found, z @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [True, False])
def test_generate_writes_the_same_with_and_without_a_cache(kind: str, error: bool) -> None:
    model, sae = user_model(kind), autoencoder()
    ids = random_rows(language_model(kind), 3, 10, seed=1)
    with saelab.spliced(model, sae, steer=STEER, clamp=CLAMP, error=error):
        greedy = [generated(model, ids, cache) for cache in (True, False)]
        sampled = [generated(model, ids, cache, do_sample=True, top_k=0) for cache in (True, False)]
        beams = [generated(model, ids, cache, num_beams=3) for cache in (True, False)]
    for with_cache, without in (greedy, sampled, beams):
        assert torch.equal(with_cache, without)
    assert not torch.equal(greedy[0], sampled[0])
    assert not torch.equal(greedy[0], generated(model, ids))
    again, ends = ids, named_ids(model)  # greedy by hand, with our own spliced runs
    lm, row = language_model(kind), greedy[0]
    for _ in range(row.shape[1] - ids.shape[1]):
        logits = lm.spliced_logits(again, SITES[0], lambda x: steered(sae, x, CHANGES, error=error))
        again = torch.cat([again, logits[:, -1].argmax(1, keepdim=True)], 1)
    for mine, theirs in zip(again[:, 10:].tolist(), row[:, 10:].tolist(), strict=True):
        length = next((i for i, token in enumerate(mine) if token in ends), len(mine))
        assert mine[:length] == theirs[:length]


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind: str) -> None:
    """Padding with an ordinary token: the mask says that it is padding."""
    model, sae = user_model(kind), autoencoder()
    ids = random_rows(language_model(kind), 2, 8, seed=2)
    short = ids[1:, 3:]
    padded = torch.cat([ids[:1], torch.cat([torch.full((1, 3), 9), short], 1)])
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    with saelab.spliced(model, sae, clamp={2: 20.0}):
        expected = [generated(model, each)[0, each.shape[1] :] for each in (ids[:1], short)]
        for cache in ({}, {"cache": False}, {"cache_implementation": "static"}):
            found = generated(model, padded, attention_mask=mask, **cache)[:, 8:]
            for mine, own in zip(found, expected, strict=True):
                assert torch.equal(mine[: len(own)], own)


def test_special_tokens_stay_clean_and_a_tokenizer_names_more_of_them() -> None:
    lm, model, sae = language_model("llama"), user_model("llama"), autoencoder()
    rows = torch.tensor([[0, 40, 1, 77, 120]])

    class Tokenizer:
        all_special_ids, all_special_tokens, added_tokens_decoder = [0, 77], ["a", "b"], {}

    seen: list[Tensor] = []

    def run(inputs: dict[str, Tensor]) -> None:
        handle = model.model.layers[1].register_forward_hook(lambda _, __, output: seen.append(output))
        model(**inputs)
        handle.remove()

    def changed(inputs: dict[str, Tensor], **options: Any) -> list[bool]:
        run(inputs)
        with saelab.spliced(model, sae, steer={2: 9.0}, **options):
            run(inputs)
        return (seen[-1] != seen[-2]).any(-1)[0].tolist()

    ids = {"input_ids": rows}
    assert changed(ids) == [False, True, False, True, True] == changed(ids, tokenizer=lm.tokenizer)
    assert changed(ids, tokenizer=Tokenizer()) == [False, True, True, False, True]
    # without ids all tokens are ordinary, unless they are padding
    embedded = {"inputs_embeds": model.get_input_embeddings()(rows)}
    assert changed(embedded) == [True] * 5
    assert changed(embedded | {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}) == [False] + [True] * 4


def test_contexts_nest_at_two_sites_and_at_one() -> None:
    lm, model = language_model("gpt2"), user_model("gpt2")
    rows = random_rows(lm, 2)
    low, high = autoencoder("blocks.0.hook_resid_post"), autoencoder("blocks.1.hook_resid_post", seed=4)
    low.W_enc.zero_()  # reconstructs every token as b_dec, so that nothing above it could be measured
    sites = [low.metadata["hook_name"], high.metadata["hook_name"]]
    lm.measure(sites)
    with saelab.spliced(model, low, error=False), saelab.spliced(model, high, steer={3: 2.0}):
        found = model(input_ids=rows).logits
    with (
        lm.spliced(rows, sites[0], low),
        lm.spliced(rows, sites[1], lambda x: steered(high, x, [Intervention(3, "add", 2.0)])),
    ):
        expected = lm.logits(rows)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with saelab.spliced(model, high, steer={3: 2.0}), saelab.spliced(model, high, steer={3: -2.0}):
        torch.testing.assert_close(model(input_ids=rows).logits, lm.logits(rows), rtol=1e-4, atol=1e-4)


def test_the_model_is_as_before_even_after_an_error() -> None:
    model, sae = user_model("gpt_neox"), autoencoder()
    ids = torch.tensor([[0, 40, 77]])
    model.requires_grad_(True)
    before, clean = hooks(model), model(input_ids=ids).logits

    def fail() -> None:
        with saelab.spliced(model, sae, steer=STEER):
            assert hooks(model) == before + 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with pytest.raises(SaelabError), saelab.spliced(model, sae, steer={99: 1.0}):
        pass
    assert hooks(model) == before and torch.equal(model(input_ids=ids).logits, clean)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_activations_keep_the_models_dtype() -> None:
    model, sae = user_model("llama", torch.bfloat16), autoencoder()
    rows = random_rows(language_model("llama"), 2)
    wide = user_model("llama")
    with saelab.spliced(model, sae, steer=STEER, error=False), saelab.spliced(wide, sae, steer=STEER, error=False):
        low, expected = (each(input_ids=rows).logits for each in (model, wide))
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "blocks.9.hook_resid_post"}, "no site 'blocks.9.hook_resid_post'. Nearest: blocks.*hook_resid_post"),
        ({"site": "blocks.1.mlp.hook_post"}, "width 64, the autoencoder has d_in 32"),
        ({"steer": {48: 1.0}}, "no feature 48: features are 0 to 47"),
        ({"clamp": {-1: 1.0}}, "no feature -1"),
        ({"steer": {3: 1.0}, "clamp": {3: 0.0}}, "feature 3 is named twice"),
        ({"steer": {3: float("nan")}}, "the value nan of feature 3"),
    ],
)
def test_what_cannot_be_done_is_said(options: dict, message: str) -> None:
    with pytest.raises(SaelabError, match=message), saelab.spliced(user_model(), autoencoder(), **options):
        pass


def test_models_and_autoencoders_that_do_not_fit_are_refused() -> None:
    model, sae = user_model(), autoencoder()
    for wrong, message in (
        (language_model("llama").model.model, "LlamaModel"),
        (nn.Linear(2, 2), "not a transformers"),
    ):
        with pytest.raises(SaelabError, match=message), saelab.spliced(wrong, sae):
            pass
    with pytest.raises(SaelabError, match="transcoder"):
        saelab.spliced(model, SparseAutoencoder(32, 8, 2, {"hook_name": SITES[0]}, d_out=32)).__enter__()
    with pytest.raises(SaelabError, match="pass site="):
        saelab.spliced(model, SparseAutoencoder(32, 8, 2)).__enter__()
    with saelab.spliced(model, sae), pytest.raises(SaelabError, match="call the whole model"):
        model.model.layers[1](
            torch.zeros(1, 3, 32),
            position_embeddings=model.model.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None]),
        )
    model.train()
    try:
        with pytest.raises(SaelabError, match=r"model.eval\(\)"):
            saelab.spliced(model, sae).__enter__()
    finally:
        model.eval()
