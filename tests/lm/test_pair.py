"""Two models as one give at each site what the model of the site gives, and refuse vocabularies that differ."""

from types import SimpleNamespace

import pytest
import torch

from saelab.errors import SaelabError
from saelab.lm.load import load_language_model, outlined_language_model
from saelab.lm.model import LanguageModel
from saelab.lm.needs import pass_bytes, site_widths
from saelab.lm.pair import ModelPair
from saelab.lm.settings import ModelSettings
from saelab.memory import peak_bytes
from tests.tiny import CONTEXT, language_model, model_folder, planted_folder, random_rows

OURS, THEIRS, WIDE = "blocks.0.hook_resid_post", "blocks.0.hook_resid_post@second", "blocks.1.mlp.hook_post@second"


def planted() -> LanguageModel:
    return load_language_model(ModelSettings(str(planted_folder())), "cpu")


def test_each_site_is_that_of_its_model() -> None:
    first, second = language_model("gpt2"), planted()
    both = ModelPair(first, second)
    rows = random_rows(both, 4)
    found = both.activations(rows, [WIDE, OURS, THEIRS])
    theirs = second.activations(rows, [OURS, "blocks.1.mlp.hook_post"])
    assert torch.equal(found[OURS], first.activations(rows, [OURS])[OURS])
    assert torch.equal(found[THEIRS], theirs[OURS]) and not torch.equal(found[THEIRS], found[OURS])
    assert torch.equal(found[WIDE], theirs["blocks.1.mlp.hook_post"])
    assert [both.width(site) for site in (OURS, THEIRS, WIDE)] == [32, 32, 128]
    assert both.name == f"{first.name} (@second: {second.name})" and repr(second) in repr(both)
    assert both.owner(THEIRS) == (second, OURS) and both.owner(OURS) == (first, OURS)
    values, slopes = both.activations_and_gradients(rows, [THEIRS, OURS])
    for site, model in ((OURS, first), (THEIRS, second)):
        value, slope = model.activations_and_gradients(rows, [OURS])
        assert torch.equal(values[site], value[OURS]) and torch.equal(slopes[site], slope[OURS])
    with pytest.raises(SaelabError, match=r"no site 'blocks\.9\.hook_resid_post'"):
        both.site("blocks.9.hook_resid_post@second")


def test_a_pair_takes_rows_of_both_and_leaves_out_the_special_tokens_of_the_first() -> None:
    first, second = language_model("gpt2"), planted()
    second.max_context, second.special_ids = 48, torch.tensor([5, 6])
    rows = random_rows(first, 3)
    assert ModelPair(first, second).max_context == 48
    assert torch.equal(second.ordinary(rows), first.ordinary(rows))


def test_vocabularies_that_differ_are_refused() -> None:
    first, second = language_model("gpt2"), planted()
    with pytest.raises(SaelabError, match=r"id 0 is '<\|endoftext\|>' in .* and '<s>' in"):
        ModelPair(first, language_model("llama"))
    vocabulary = {i: token for token, i in first.tokenizer.get_vocab().items()}
    for changed, there in (({300: "<b>\u202e"}, r"'<b>\\u202e'"), ({300: "x" * 99}, f"'{'x' * 40}'"), ({}, "nothing")):
        theirs = {i: token for i, token in vocabulary.items() if i != 300} | changed
        second.tokenizer = SimpleNamespace(get_vocab=lambda theirs=theirs: {token: i for i, token in theirs.items()})
        with pytest.raises(SaelabError, match=f"id 300 is '.*' in .* and {there} in"):
            ModelPair(first, second)


def test_embeddings_may_be_more_than_tokens_and_not_fewer() -> None:
    first, second = language_model("gpt2"), planted()
    n = len(first.tokenizer)
    second.model.resize_token_embeddings(n + 16)  # type: ignore[operator]
    assert ModelPair(first, second).embeddings == n
    second.model.resize_token_embeddings(n - 1)  # type: ignore[operator]
    with pytest.raises(
        SaelabError, match=f"has embeddings for {n - 1} tokens, and the text may have ids up to {n - 1}"
    ):
        ModelPair(first, second)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_pass_counted_without_numbers_holds_what_the_real_one_holds(gradients: bool) -> None:
    both, sites = ModelPair(language_model("gpt2"), planted()), [OURS, THEIRS]
    rows = random_rows(both, 6)
    both.activations(rows, sites)  # measures the layouts
    measured = peak_bytes(
        lambda: both.activations_and_gradients(rows, sites) if gradients else both.activations(rows, sites)
    )
    settings = [ModelSettings(str(folder)) for folder in (model_folder("gpt2"), planted_folder())]
    with outlined_language_model(*settings) as outline:
        assert pass_bytes(outline, 6, CONTEXT, sites, gradients=gradients) == measured
        assert site_widths(outline, sites) == {OURS: 32, THEIRS: 32}
