"""Gradients of the model's loss at sites: against autograd and finite differences, and what they do not depend on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab.errors import SaelabError
from saelab.lm import model as lm_module
from saelab.lm.model import LanguageModel
from saelab.lm.sites import hook
from tests.tiny import ADDS_IN_PLACE, CONTEXT, KINDS, language_model, random_rows

GRADIENT_SITES = [
    "blocks.1.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_mlp_out",
]


def summed_loss(lm: LanguageModel, logits: Tensor, rows: Tensor) -> Tensor:
    """The loss as papers define it, token by token."""
    ordinary, log_p = lm.ordinary(rows), logits.log_softmax(-1)
    scored = [
        (row, t)
        for row in range(rows.shape[0])
        for t in range(rows.shape[1] - 1)
        if ordinary[row, t] and ordinary[row, t + 1]
    ]
    assert scored
    return torch.stack([-log_p[row, t, rows[row, t + 1]] for row, t in scored]).sum()


def at_one_site(lm: LanguageModel, rows: Tensor, site: str) -> tuple[Tensor, Tensor]:
    values, gradients = lm.activations_and_gradients(rows, [site])
    assert set(values) == set(gradients) == {site}
    return values[site], gradients[site]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", GRADIENT_SITES)
def test_gradients_are_autograds_on_the_plain_model(kind: str, site: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 4)
    values, gradients = at_one_site(lm, rows, site)
    torch.testing.assert_close(values, lm.activations(rows, [site])[site], rtol=1e-5, atol=1e-5)

    plain = copy.deepcopy(lm.model).requires_grad_(True)  # nothing is frozen, so the graph has every layer
    kept: list[Tensor] = []

    def keep(value: Tensor) -> None:
        value.retain_grad()
        kept.append(value)

    point = lm.site(site)
    module = plain.get_submodule(point.module)
    if point.side == "hook_in":
        module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        module.register_forward_hook(lambda _, __, out: keep(out[0] if isinstance(out, tuple) else out))
    summed_loss(lm, plain(input_ids=rows, use_cache=False).logits, rows).backward()
    expected = kept[0].grad
    assert expected is not None and expected.norm() > 1
    assert gradients.dtype == torch.float32
    torch.testing.assert_close(gradients, expected.reshape(gradients.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, ADDS_IN_PLACE])
def test_a_sites_values_do_not_depend_on_which_other_sites_are_requested(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 4)
    sites = ["blocks.0.hook_mlp_out", "blocks.0.hook_attn_out", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"]
    values = lm.activations(rows, sites)
    for site in sites:
        assert torch.equal(values[site], lm.activations(rows, [site])[site])


@pytest.mark.parametrize("kind", [*KINDS, ADDS_IN_PLACE])
def test_a_sites_gradient_does_not_depend_on_which_other_sites_are_requested(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 4)
    several = [
        "blocks.2.hook_resid_pre",  # out of order: the first in the model may be the last here
        "blocks.1.ln1.hook_in",  # the skip connection carries this tensor past the module, too
        "blocks.1.hook_resid_pre",
        "blocks.1.attn.hook_z",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_in",  # another name of the same site
        "blocks.1.hook_resid_post",
        "blocks.0.hook_resid_post",
    ]
    assert lm.site("blocks.1.hook_in") == lm.site("blocks.1.hook_resid_pre")
    values, gradients = lm.activations_and_gradients(rows, several)
    assert list(values) == list(gradients) == several
    for site in several:
        single = at_one_site(lm, rows, site)
        assert torch.equal(values[site], single[0])
        torch.testing.assert_close(values[site], lm.activations(rows, [site])[site])
        torch.testing.assert_close(gradients[site], single[1], rtol=1e-5, atol=1e-6)
        assert not values[site].requires_grad and not gradients[site].requires_grad
    # The modules that read the normalised branch are only some of those that read the residual stream.
    assert (gradients["blocks.1.ln1.hook_in"] - gradients["blocks.1.hook_resid_pre"]).norm() > 1
    torch.testing.assert_close(gradients["blocks.0.hook_resid_post"], gradients["blocks.1.hook_resid_pre"])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences_of_the_summed_loss(kind: str) -> None:
    tiny = language_model(kind)
    lm = LanguageModel(kind, copy.deepcopy(tiny.model).double(), tiny.tokenizer, tiny.sites, "")
    rows, site = random_rows(lm, 3), "blocks.1.hook_resid_post"
    step, tolerance = (1e-3, 1e-3) if kind == "llama" else (1e-5, 1e-5)  # Llama's norms are always in float32
    values, gradients = at_one_site(lm, rows, site)
    assert values.dtype == torch.float64
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        direction = torch.randn(values.shape, generator=generator, dtype=torch.float64)

        def loss(sign: float, direction: Tensor = direction) -> float:
            with hook(lm.model, lm.site(site), lambda x: x + sign * step * direction):
                return summed_loss(lm, lm.logits(rows), rows).item()

        slope = (loss(1) - loss(-1)) / (2 * step)
        expected = (gradients.double() * direction).sum().item()
        assert slope == pytest.approx(expected, abs=tolerance * gradients.norm().item())


def test_a_rows_gradients_depend_on_no_other_row_and_not_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model("gpt2")
    rows, site = random_rows(lm, 7), "blocks.1.hook_resid_post"
    values, gradients = at_one_site(lm, rows, site)
    single = at_one_site(lm, rows[2:3], site)[1]
    torch.testing.assert_close(single, gradients[2:3], rtol=1e-4, atol=1e-5)
    forwards = []
    handle = lm.model.register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(lm_module, "LOGITS_AT_ONCE", 2 * CONTEXT * len(lm.unembedding))
    split = at_one_site(lm, rows, site)
    monkeypatch.setattr(lm_module, "LOGITS_AT_ONCE", 1)
    one_by_one = at_one_site(lm, rows, site)
    handle.remove()
    assert len(forwards) == 4 + 7
    for found in (split, one_by_one):
        torch.testing.assert_close(found[0], values, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1], gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_seen_the_tokens_that_follow_so_evaluation_does_not_use_them(kind: str) -> None:
    lm = language_model(kind)
    rows, site, position = random_rows(lm, 2), "blocks.1.hook_resid_post", 20
    other = rows.clone()
    other[:, position] = torch.where(rows[:, position] == 50, 51, 50)
    values, gradients = at_one_site(lm, rows, site)
    others, changed = at_one_site(lm, other, site)
    torch.testing.assert_close(values[:, :position], others[:, :position], rtol=1e-4, atol=1e-5)
    moved = (gradients - changed).abs().amax(-1)
    assert (moved[1, 1:position] > 1e-3).all()  # row 0 has a special token at 16; later tokens still matter
    assert moved[0, position - 1] > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_in_no_loss_and_the_last_position_has_no_gradient(kind: str) -> None:
    lm = language_model(kind)
    rows, site = random_rows(lm, 3), "blocks.2.hook_resid_post"  # the last: each position affects only its own logits
    scored = lm.scored(rows)
    assert scored.shape == rows.shape and not scored[:, 0].any() and not scored[:, -1].any()
    middle = CONTEXT // 2
    assert not scored[0, middle - 1 : middle + 1].any() and scored[0, middle + 1] and scored[1, middle]
    assert int(scored.sum()) == 3 * (CONTEXT - 2) - 2
    gradients = at_one_site(lm, rows, site)[1]
    assert torch.equal(gradients.abs().amax(-1) > 0, scored)
    earlier = at_one_site(lm, rows, "blocks.0.hook_resid_post")[1]
    assert (earlier[:, -1] == 0).all() and (earlier[:, 0] != 0).any()
    rows[0, 10:] = lm.tokenizer.eos_token_id
    cut_short = at_one_site(lm, rows, "blocks.0.hook_resid_post")[1]
    assert (cut_short[0, 9:] == 0).all() and (cut_short[0, 8] != 0).any()
    nothing = torch.full((2, 5), lm.tokenizer.bos_token_id)
    assert (at_one_site(lm, nothing, site)[1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_touch_no_parameter_and_nothing_below_the_site(kind: str) -> None:
    lm = language_model(kind)
    lm.measure(["blocks.1.hook_resid_post"])  # which runs the model
    below: list[bool] = []
    module = lm.model.get_submodule(lm.site("blocks.0.hook_out").module)
    handle = module.register_forward_hook(
        lambda _, __, out: below.append((out[0] if isinstance(out, tuple) else out).requires_grad)
    )
    with torch.no_grad():  # the caller's mode makes no difference
        values, gradients = at_one_site(lm, random_rows(lm, 2), "blocks.1.hook_resid_post")
    handle.remove()
    assert below == [False]
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert not values.requires_grad and not gradients.requires_grad


def test_gradients_of_a_bfloat16_model_are_float32_and_errors_name_the_site() -> None:
    tiny = language_model("llama")
    lm = LanguageModel("tiny", copy.deepcopy(tiny.model).bfloat16(), tiny.tokenizer, tiny.sites, "")
    rows, site = random_rows(lm, 2), "blocks.1.hook_resid_post"
    values, gradients = at_one_site(lm, rows, site)
    assert values.dtype == torch.bfloat16 and gradients.dtype == torch.float32
    wide = at_one_site(tiny, rows, site)[1]
    assert F.cosine_similarity(gradients.flatten(), wide.flatten(), dim=0) > 0.99
    with pytest.raises(SaelabError, match="holds token ids"):
        at_one_site(lm, rows, "embed.hook_in")
    with pytest.raises(SaelabError, match=r"Nearest: .*blocks\.1\.hook_resid_post"):
        at_one_site(lm, rows, "blocks.1.hook_residpost")
    module = lm.model.get_submodule(lm.site("blocks.2.hook_out").module)
    module.register_forward_hook(lambda _, __, out: out.detach() if isinstance(out, Tensor) else (out[0].detach(),))
    with pytest.raises(SaelabError, match=r"does not depend on blocks\.1\.hook_resid_post"):
        at_one_site(lm, rows, site)
