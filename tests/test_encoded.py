"""Blocks of a pass are what the formulas say; readers that share a pass get what each gets by itself."""

import pytest
import torch
from torch import Tensor

from saelab.activations.sites import Sites
from saelab.codes import Codes
from saelab.encoded import Block, Reader, encoded, read_together
from saelab.errors import SaelabError
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder
from tests.tiny import CONTEXT, KINDS, language_model, random_rows

SITE = "blocks.1.hook_resid_post"


class Counting(SparseAutoencoder):
    """Remembers how many tokens each call of `encode` was given."""

    def __init__(self) -> None:
        super().__init__(32, 48, 3)
        self.calls: list[int] = []

    def encode(self, x: Tensor, *args, **kwargs) -> Codes:
        self.calls.append(len(x))
        return super().encode(x, *args, **kwargs)


def autoencoder(kind: str) -> Counting:
    torch.manual_seed(0)
    lm = language_model(kind)
    rows, sae = random_rows(lm, 12), Counting()
    initialise(sae, lm.activations(rows, [SITE])[SITE][lm.ordinary(rows)])
    return sae


def assert_same(found: list[Block], expected: list[Block]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("rows", "positions", "x"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        for name in ("values", "features", "offsets"):
            assert torch.equal(getattr(one.codes, name), getattr(other.codes, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_ordinary_tokens_their_activations_and_codes(kind: str) -> None:
    lm, sae = language_model(kind), autoencoder(kind)
    rows = random_rows(lm, 11)
    rows[4:8] = lm.tokenizer.bos_token_id  # the second block has no ordinary token
    blocks = list(encoded(sae, lm, rows, SITE, 4))
    assert [len(block.rows) for block in blocks] == [4, 3]
    assert torch.equal(torch.cat([block.positions for block in blocks]), lm.ordinary(rows).flatten().nonzero()[:, 0])
    for block, part in zip(blocks, (rows[:4], rows[8:]), strict=True):
        assert torch.equal(block.rows, part) and block.rows.dtype == torch.int64
        x = lm.activations(part, [SITE])[SITE][lm.ordinary(part)]
        assert torch.equal(block.x, x)
        assert torch.equal(block.codes.to_dense(), sae.encode(x).to_dense())
        assert not block.codes.values.requires_grad


def test_with_gradients_features_are_selected_with_them() -> None:
    lm, sae = language_model("gpt2"), autoencoder("gpt2")
    sae.beta = 3.0
    rows = random_rows(lm, 4)
    (block,) = encoded(sae, lm, rows, SITE, 4, gradients=True)
    values, gradients = (found[SITE][lm.ordinary(rows)] for found in lm.activations_and_gradients(rows, [SITE]))
    assert torch.equal(block.x, values)
    assert torch.equal(block.codes.to_dense(), sae.encode(values, gradients=gradients).to_dense())
    (plain,) = encoded(sae, lm, rows, SITE, 4)
    assert not torch.equal(block.codes.to_dense(), plain.codes.to_dense())


@pytest.mark.parametrize(
    ("readers", "passes"),
    [
        ([(11, 4)], [(0, 4), (4, 8), (8, 11)]),
        ([(11, 4), (11, 4)], [(0, 4), (4, 8), (8, 11)]),
        ([(8, 4), (11, 4)], [(0, 4), (4, 8), (8, 11)]),
        ([(11, 4), (6, 4)], [(0, 4), (4, 6), (4, 8), (8, 11)]),  # rows 4 and 5: the end of one, the middle of the other
        ([(11, 4), (11, 8)], [(0, 4), (0, 8), (4, 8), (8, 11)]),
        ([(20, 4), (3, 20), (11, 4)], [(0, 3), (0, 4), (4, 8), (8, 11)]),  # more than there are
        ([(11, 4, 8)], [(8, 11)]),  # from a later row on
        ([(11, 4, 4), (11, 4)], [(0, 4), (4, 8), (8, 11)]),
        ([(11, 4, 11), (6, 4)], [(0, 4), (4, 6)]),  # has them all already
    ],
)
def test_readers_together_get_what_each_gets_by_itself(
    readers: list[tuple[int, ...]], passes: list[tuple[int, int]]
) -> None:
    lm, sae = language_model("llama"), autoencoder("llama")
    rows = random_rows(lm, 11)
    found: list[list[Block]] = [[] for _ in readers]
    sae.calls.clear()
    taking_part = [Reader(blocks.append, *reader) for blocks, reader in zip(found, readers, strict=True)]
    read_together(sae, lm, rows, SITE, taking_part)
    assert sae.calls == [int(lm.ordinary(rows[start:stop]).sum()) for start, stop in passes]
    for blocks, (n, rows_per_forward, *first_row) in zip(found, readers, strict=True):
        expected = list(encoded(sae, lm, rows[:n], SITE, rows_per_forward))
        assert_same(blocks, expected[sum(first_row) // rows_per_forward :] if sum(first_row) < n else [])


def test_progress_counts_every_token_that_is_encoded() -> None:
    lm, sae = language_model("gpt2"), autoencoder("gpt2")
    rows = random_rows(lm, 11)
    seen = []

    def track(items, label, total, size):
        items = list(items)
        seen.append((label, total, sum(map(size, items))))
        return iter(items)

    list(encoded(sae, lm, rows, SITE, 4, track=track))
    read_together(sae, lm, rows, SITE, [Reader(lambda _: None, 11, 4), Reader(lambda _: None, 6, 4)], track=track)
    assert seen == [("encoding", 11 * CONTEXT, 11 * CONTEXT), ("encoding", 13 * CONTEXT, 13 * CONTEXT)]


@pytest.mark.parametrize(
    "sites", [Sites(SITE, "blocks.2.hook_resid_post"), Sites(SITE, None, ("blocks.2.hook_resid_post",))]
)
def test_gradients_at_several_sites_are_refused(sites: Sites) -> None:
    lm, sae = language_model("gpt2"), autoencoder("gpt2")
    with pytest.raises(SaelabError, match="the gradient affinity is that of an autoencoder of one site"):
        next(encoded(sae, lm, random_rows(lm, 2), sites, 2, gradients=True))


def test_a_site_without_activations_is_said() -> None:
    lm, sae = language_model("gpt2"), autoencoder("gpt2")
    with pytest.raises(SaelabError, match="holds token ids"):
        list(encoded(sae, lm, random_rows(lm, 2), "embed.hook_in", 4))
    with pytest.raises(SaelabError, match="Nearest: "):
        list(encoded(sae, lm, random_rows(lm, 2), "blocks.1.hook_residpost", 4))
