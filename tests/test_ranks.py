"""What processes exchange along an axis; the processes are threads."""

import pytest
import torch

from saelab.errors import SaelabError
from saelab.ranks import ALONE, ElsewhereError, LostProcessError, Ranks, shared, total
from tests.threads import run_threads


def test_a_mesh_of_threads_has_the_numbers_of_a_mesh_of_processes() -> None:
    found = run_threads(lambda r: (r.every.rank, r.data.rank, r.features.rank, r.first), data=2, features=3)
    assert found == [(i, i // 3, i % 3, i == 0) for i in range(6)]


def test_reductions_along_one_axis() -> None:
    def run(ranks: Ranks) -> list[int]:
        number = torch.tensor([ranks.every.rank])
        axes = (ranks.data.sum_, ranks.features.sum_, ranks.every.max_, ranks.every.min_)
        return [int(method(number.clone())) for method in axes]

    assert run_threads(run, data=2, features=2) == [[2, 1, 3, 0], [4, 1, 3, 0], [2, 5, 3, 0], [4, 5, 3, 0]]
    assert run(ALONE) == [0, 0, 0, 0]


def test_tensors_of_different_lengths_are_gathered() -> None:
    lengths = [3, 0, 5, 1]
    parts = [torch.randn(n, 2) for n in lengths]
    for found in run_threads(lambda ranks: ranks.every.gather(parts[ranks.every.rank]), data=4):
        assert all(torch.equal(one, part) for one, part in zip(found, parts, strict=True))


def test_each_process_gets_what_the_others_send_to_it() -> None:
    """Process i sends i + j rows to process j."""

    def run(ranks: Ranks) -> list[torch.Tensor]:
        i = ranks.every.rank
        return ranks.every.swap([torch.full((i + j, 2), 10 * i + j) for j in range(3)])

    for j, found in enumerate(run_threads(run, data=3)):
        for i, rows in enumerate(found):
            assert torch.equal(rows, torch.full((i + j, 2), 10 * i + j))
    rows = torch.ones(3)
    assert ALONE.every.swap([rows]) == [rows]


def test_the_gradient_of_a_loss_that_is_shared_out() -> None:
    """Each process has some columns of the weights: the loss of their sum, and its gradients, as with all columns."""
    x, weights = torch.randn(5, 3), torch.randn(3, 4)

    def loss(x: torch.Tensor, weights: torch.Tensor, ranks: Ranks) -> list[torch.Tensor]:
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        total((shared(x, ranks.features) @ weights).sum(1), ranks.features).square().sum().backward()
        assert x.grad is not None and weights.grad is not None
        return [x.grad, weights.grad]

    on_x, on_weights = loss(x, weights, ALONE)
    found = run_threads(lambda r: loss(x, weights[:, r.features.part(4)], r), features=2)
    for got in found:
        torch.testing.assert_close(got[0], on_x)
    torch.testing.assert_close(torch.cat([got[1] for got in found], 1), on_weights)


def test_an_error_in_one_thread_ends_the_others() -> None:
    seen: list[type[BaseException]] = []

    def run(ranks: Ranks) -> None:
        if ranks.every.rank == 1:
            raise ValueError("mine")
        try:
            ranks.every.sum_(torch.zeros(1))
        except LostProcessError as error:
            seen.append(type(error))
            raise

    with pytest.raises(ValueError, match="mine"):
        run_threads(run, data=3)
    assert seen == [LostProcessError] * 2


def test_of_an_action_that_fails_somewhere_one_process_raises_the_error() -> None:
    """The first of those in which it fails; the others know that it is reported."""

    def run(ranks: Ranks) -> tuple[list[int], str]:
        done = []
        ranks.every.together(lambda: done.append(1))
        ranks.once(lambda: done.append(2))

        def fail() -> None:
            if ranks.every.rank in (1, 3):
                raise SaelabError(f"of {ranks.every.rank}")

        try:
            ranks.every.together(fail)
        except ElsewhereError:
            return done, "elsewhere"
        except SaelabError as error:
            return done, str(error)
        return done, "nothing"

    assert run_threads(run, data=2, features=2) == [
        ([1, 2], "elsewhere"),
        ([1], "of 1"),
        ([1], "elsewhere"),
        ([1], "elsewhere"),
    ]
    assert run(ALONE) == ([1, 2], "nothing")


def test_the_largest_values_of_all_processes() -> None:
    found = run_threads(lambda r: r.every.largest(r.every.rank, -r.every.rank, r.every.rank == 1), data=3)
    assert found == [[2, 0, 1]] * 3 and ALONE.every.largest(7, False) == [7, False]
