"""Runs that share the layers below a site are full runs to the bit, and a model that they would not suit is noticed."""

import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.lm.sites import Site
from saelab.lm.splice import SplicedRuns, blocks_below
from tests.tiny import ADDS_IN_PLACE, KINDS, language_model, random_rows

IN_A_BLOCK = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "ln2.hook_out", "hook_mlp_out", "hook_resid_post")
IN_NO_BLOCK = ("embed.hook_out", "ln_final.hook_in", "ln_final.hook_out", "unembed.hook_out")
REPLACEMENTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: 0.5 * x,
    torch.zeros_like,
    lambda x: x.mean(0).expand_as(x),
]


def assert_shared_runs_are_full_runs(lm: LanguageModel, site: str, rows: Tensor) -> SplicedRuns:
    runs = SplicedRuns(lm, site)
    found = list(runs(rows, REPLACEMENTS))
    full = [lm.logits(rows), *(lm.spliced_logits(rows, site, replace) for replace in REPLACEMENTS)]
    assert len(found) == len(full)
    for one, other in zip(found, full, strict=True):
        assert torch.equal(one, other), site
    assert not torch.equal(full[0], full[2])
    return runs


@pytest.mark.parametrize("kind", [*KINDS, ADDS_IN_PLACE])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_shared_runs_are_full_runs_at_sites_in_a_block(kind: str, block: int) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 5)
    names = [f"blocks.{block}.{name}" for name in IN_A_BLOCK if f"blocks.{block}.{name}" in lm.sites]
    assert len(names) >= 4
    for name in names:
        runs = assert_shared_runs_are_full_runs(lm, name, rows)
        assert runs.shared(rows) == (block > 0 or name.endswith("resid_post"))  # else there is nothing below


@pytest.mark.parametrize("kind", [*KINDS, ADDS_IN_PLACE])
@pytest.mark.parametrize("site", IN_NO_BLOCK)
def test_shared_runs_are_full_runs_at_sites_in_no_block(kind: str, site: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 5)
    assert not assert_shared_runs_are_full_runs(lm, site, rows).shared(rows)


@pytest.mark.parametrize("kind", [*KINDS, ADDS_IN_PLACE])
def test_what_is_below_the_site_runs_once(kind: str) -> None:
    lm = language_model(kind)
    rows = random_rows(lm, 5)
    runs = SplicedRuns(lm, "blocks.1.hook_resid_post")
    assert runs.shared(rows)
    ran: list[int] = []
    modules = [lm.model.get_submodule(lm.site(f"blocks.{block}.mlp.hook_out").module) for block in range(3)]
    handles = [module.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, module in enumerate(modules)]
    list(runs(rows, REPLACEMENTS))
    for handle in handles:
        handle.remove()
    assert [ran.count(block) for block in range(3)] == [1, 1, 1 + len(REPLACEMENTS)]


def test_the_blocks_below_a_site_end_with_the_block_whose_output_it_is() -> None:
    lm = language_model("gpt2")
    h = list(lm.model.get_submodule("transformer.h"))
    for name, count in [
        ("blocks.0.hook_resid_pre", 0),
        ("blocks.0.hook_resid_post", 1),
        ("blocks.1.hook_resid_pre", 1),
        ("blocks.1.hook_mlp_out", 1),
        ("blocks.2.hook_resid_post", 3),
        ("ln_final.hook_out", 0),
    ]:
        assert blocks_below(lm.model, lm.site(name)) == h[:count], name


def test_a_models_own_forwards_are_back_after_a_run_and_after_a_failed_one() -> None:
    tiny = language_model("gpt2")
    lm = LanguageModel("gpt2", copy.deepcopy(tiny.model), tiny.tokenizer, tiny.sites, "")
    blocks = list(lm.model.get_submodule("transformer.h"))
    rows, before = random_rows(lm, 2), lm.logits(random_rows(lm, 2))
    blocks[0].forward = own = partial(blocks[0].forward)  # as accelerate puts one in front
    runs = SplicedRuns(lm, "blocks.1.hook_resid_post")

    def fail(_: Tensor) -> Tensor:
        raise SaelabError("no reconstruction")

    with pytest.raises(SaelabError, match="no reconstruction"):
        list(runs(rows, [torch.zeros_like, fail]))
    assert runs.shared(rows)
    assert blocks[0].forward is own and all("forward" not in vars(block) for block in blocks[1:])
    assert torch.equal(lm.logits(rows), before)


class Stack(nn.Module):
    """A small model in which blocks hand on what they compute in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.config = way, SimpleNamespace()
        self.embed, self.head = nn.Embedding(400, 8), nn.Linear(8, 400)
        self.layers = nn.ModuleList(Layer(way) for _ in range(4))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden, more = self.embed(input_ids), None
        shared: list[Tensor] = []
        for layer in self.layers:
            before, given = hidden, layer(hidden, more, self.layers[0], shared)
            hidden, more = given if isinstance(given, tuple) else (given, None)
            if self.way == "around blocks":
                hidden = hidden + before
        return SimpleNamespace(logits=self.head(hidden))


class Layer(nn.Module):
    memory: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.mix = way, nn.Linear(8, 8)

    def forward(self, hidden: Tensor, more: Any, first: "Layer", shared: list[Tensor]) -> Any:
        new = self.mix(hidden).tanh()
        if self is first:
            self.memory = new
            shared.append(new)
        match self.way:
            case "in place":
                return hidden.add_(new)
            case "tuple":
                more = new.mean(-1, keepdim=True) if more is None else more
                return hidden + new + more, more
            case "dict":
                return hidden + new, {"a": "state"}
            case "module":
                return hidden + new + first.memory
            case "list":
                return hidden + new + shared[0]
        return hidden + new


@pytest.mark.parametrize(
    ("way", "shared"),
    [
        ("plain", True),
        ("in place", True),
        ("tuple", True),
        ("dict", False),  # not known to be copied
        ("around blocks", False),  # what is added around a skipped block is another value
        ("module", False),  # a state in a module, which is of the last full run
        ("list", False),  # a state that a skipped block does not make: the run fails
    ],
)
def test_a_model_that_sharing_does_not_suit_gets_full_runs(way: str, shared: bool) -> None:
    torch.manual_seed(0)
    sites = {f"{i}": Site(f"layers.{i}", "hook_out") for i in (1, 2)} | {"2.mix": Site("layers.2.mix", "hook_out")}
    lm = LanguageModel(way, Stack(way), language_model("gpt2").tokenizer, sites, "")
    rows = random_rows(lm, 4)
    for site in sites:
        assert assert_shared_runs_are_full_runs(lm, site, rows).shared(rows) == shared
