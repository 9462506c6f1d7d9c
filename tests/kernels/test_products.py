"""spmm and sddmm equal their dense formulas, forward and backward, on every back-end that can run here."""

import importlib
from types import ModuleType

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saelab.codes import Codes
from saelab.kernels import per_entry, products, sddmm, spmm, topk
from tests.kernels.problems import DTYPES, INTERPRETED, assert_rounded, at_pattern, problems, ragged, some


@pytest.fixture
def module(device: str) -> ModuleType:
    return products._backend(torch.empty(0, device=device))


@given(problem=problems())
@some(60)
def test_products_equal_the_dense_formulas(device: str, problem: tuple[Codes, Tensor, Tensor]) -> None:
    codes, table, left = (part.to(device) for part in problem)
    dense = codes.to_dense()
    torch.testing.assert_close(spmm(codes, table), dense @ table)
    module = products._backend(table)
    torch.testing.assert_close(module.spmm_transposed(codes, left), dense.T @ left)
    into = table.clone()
    module.spmm_transposed(codes, left, into)
    torch.testing.assert_close(into, table + dense.T @ left)
    bias, centre = table.sum(1), table.sum(0)
    torch.testing.assert_close(sddmm(codes, left, table), at_pattern(codes, left @ table.T))
    expected = at_pattern(codes, (left - centre) @ table.T + bias)
    torch.testing.assert_close(sddmm(codes, left, table, bias, centre=centre), expected)


@given(problem=problems())
@some(40)
def test_gradients_equal_those_of_the_dense_formulas(device: str, problem: tuple[Codes, Tensor, Tensor]) -> None:
    codes, table, left = (part.to(device) for part in problem)
    leaves = [t.clone().requires_grad_() for t in (codes.values, table, left, table.sum(1), table.sum(0))]
    values, table, left, bias, centre = leaves
    codes = codes.with_values(values)

    def all_gradients(decoded: Tensor, encoded: Tensor) -> tuple[Tensor, ...]:
        weights = torch.linspace(-1, 2, decoded.numel(), device=device, dtype=decoded.dtype).view_as(decoded)
        total = (weights * decoded).sum() + (encoded.square()).sum()
        return torch.autograd.grad(total, leaves)

    found = all_gradients(spmm(codes, table), sddmm(codes, left, table, bias, centre=centre))
    encoded = at_pattern(codes, (left - centre) @ table.T + bias)
    torch.testing.assert_close(found, all_gradients(codes.to_dense() @ table, encoded))


@given(problem=problems())
@some(40)
def test_numbers_of_features_and_their_gradient_equal_the_dense_formula(
    device: str, problem: tuple[Codes, Tensor, Tensor]
) -> None:
    codes, table, _ = (part.to(device) for part in problem)
    vector = table.sum(1).requires_grad_()
    found = per_entry(codes, vector)
    torch.testing.assert_close(found, vector.expand(codes.tokens, -1)[codes.row_of_entry(), codes.features])
    (gradient,) = torch.autograd.grad((found * codes.values).sum(), vector)
    torch.testing.assert_close(gradient, codes.to_dense().sum(0))


@pytest.mark.skipif(INTERPRETED, reason="about threads of a CPU")
def test_the_gradient_of_numbers_of_features_has_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index's gradient has not, from some million entries on, in two threads."""
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2048, 1024, generator=generator) < 0.5
    codes = Codes.from_mask(mask, torch.randn(2048, 1024, generator=generator))
    vector, threads = torch.ones(1024, requires_grad=True), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad((per_entry(codes, vector) * codes.values).sum(), vector)[0] for _ in range(8)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("seed", range(1 if INTERPRETED else 4))
def test_gradients_equal_finite_differences(device: str, seed: int) -> None:
    codes = ragged(4, 5, seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    shapes = ((codes.nnz,), (5, 3), (4, 3), (5,), (3,))
    leaves = [torch.randn(s, dtype=torch.float64, generator=generator).to(device) for s in shapes]
    values, table, left, bias, centre = (leaf.requires_grad_() for leaf in leaves)
    assert torch.autograd.gradcheck(lambda values, table: spmm(codes.with_values(values), table), (values, table))
    assert torch.autograd.gradcheck(
        lambda left, table, bias, centre: sddmm(codes, left, table, bias, centre=centre), (left, table, bias, centre)
    )


@pytest.mark.parametrize("table_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_summed_in_at_least_float32(device: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    exact = ragged(9, 12).to(device)
    codes = exact.with_values(exact.values.to(dtype).requires_grad_())
    torch.manual_seed(0)
    table = torch.randn(12, 21, dtype=torch.float64, device=device).to(table_dtype).requires_grad_()
    left = torch.randn(9, 21, dtype=torch.float64, device=device).to(dtype).requires_grad_()
    values = codes.values.detach().double()
    dense, wide, rows = exact.with_values(values).to_dense(), table.detach().double(), left.detach().double()
    decoded, encoded = spmm(codes, table), sddmm(exact, left, table)
    assert decoded.dtype == encoded.dtype == torch.promote_types(dtype, table_dtype)
    assert_rounded(decoded, dense @ wide, dense.abs() @ wide.abs(), 12)
    assert_rounded(encoded, at_pattern(exact, rows @ wide.T), at_pattern(exact, rows.abs() @ wide.abs().T), 21)

    grad = torch.randn_like(decoded)
    d_values, d_table = torch.autograd.grad(decoded, (codes.values, table), grad)
    assert d_values.dtype == dtype and d_table.dtype == table_dtype
    grad = grad.double()
    at, size = at_pattern(exact, grad @ wide.T), at_pattern(exact, grad.abs() @ wide.abs().T)
    assert_rounded(d_values, at, size, 21)
    assert_rounded(d_table, dense.T @ grad, dense.abs().T @ grad.abs(), 9)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_copy_in_bfloat16_is_read_and_its_gradients_reach_the_table(
    device: str, in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the copy is cast to float32 in several parts, as a large one is."""
    monkeypatch.setattr(products, "CAST_ELEMENTS", 40)
    codes = ragged(9, 12).to(device)
    values = codes.values.float().requires_grad_()
    table, a = torch.nn.Parameter(torch.randn(12, 21, device=device)), torch.randn(9, 21, device=device)
    bias, centre = (torch.randn(n, device=device, requires_grad=True) for n in (12, 21))
    copy = table.detach().bfloat16()
    if in_place:
        products.accumulate_in_place(table)
    decoded = spmm(codes.with_values(values), table, read=copy)
    encoded = sddmm(codes, a, table, bias, centre=centre, read=copy)
    (decoded.sin().sum() + encoded.cos().sum()).backward()
    found = [decoded.detach(), encoded.detach(), values.grad, table.grad, bias.grad, centre.grad]

    rounded = copy.double().requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in (values, bias, centre)]
    dense = torch.zeros(9, 12, dtype=torch.float64, device=device)
    dense = dense.index_put((codes.row_of_entry(), codes.features.long()), exact[0])
    products_ = [dense @ rounded, at_pattern(codes, (a.double() - exact[2]) @ rounded.T + exact[1])]
    (products_[0].sin().sum() + products_[1].cos().sum()).backward()
    expected = [*(each.detach() for each in products_), exact[0].grad, rounded.grad, exact[1].grad, exact[2].grad]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None and ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens, n_features", [(0, 3), (4, 3), (1, 1)])
def test_without_entries_products_are_zero_and_gradients_too(device: str, tokens: int, n_features: int) -> None:
    empty = torch.zeros(0, dtype=torch.long, device=device)
    offsets = torch.zeros(tokens + 1, dtype=torch.long, device=device)
    codes = Codes(torch.zeros(0, device=device, requires_grad=True), empty, offsets, n_features)
    table = torch.randn(n_features, 5, device=device, requires_grad=True)
    left = torch.randn(tokens, 5, device=device, requires_grad=True)
    bias, centre = (torch.randn(n, device=device, requires_grad=True) for n in (n_features, 5))
    decoded, encoded = spmm(codes, table), sddmm(codes, left, table, bias, centre=centre)
    assert decoded.shape == (tokens, 5) and not decoded.any() and encoded.shape == (0,)
    for gradient in torch.autograd.grad(decoded.sum() + encoded.sum(), (codes.values, table, left, bias, centre)):
        assert not gradient.any()


@pytest.mark.parametrize("d", [1, 130] if INTERPRETED else [1, 3, 130, 513])
def test_one_feature_on_every_token_and_long_segments_beside_it(device: str, d: int) -> None:
    n = 520 if INTERPRETED else 20_000  # more entries than one block or piece holds, in every back-end
    generator = torch.Generator().manual_seed(d)
    features = torch.stack([torch.zeros(n, dtype=torch.long), torch.arange(n) % 2 + 1], 1)  # the last feature: never
    codes = Codes.from_topk(torch.rand(n, 2, generator=generator), features, 4).to(device)
    left = torch.randn(n, d, generator=generator).to(device)
    table = torch.randn(4, d, generator=generator).to(device)
    dense, rows = codes.to_dense().double(), left.double()
    assert_rounded(spmm(codes, table), dense @ table.double(), dense @ table.double().abs(), 2)
    turned = products._backend(table).spmm_transposed(codes, left)
    assert_rounded(turned, dense.T @ rows, dense.T @ rows.abs(), 200)
    sizes = at_pattern(codes, rows.abs() @ table.double().abs().T)
    assert_rounded(sddmm(codes, left, table), at_pattern(codes, rows @ table.double().T), sizes, d)


def test_rows_that_are_not_contiguous_are_copied(device: str) -> None:
    codes = ragged(6, 8).to(device)
    table = torch.randn(5, 8, dtype=torch.float64, device=device).T.requires_grad_()
    left = torch.randn(6, 10, dtype=torch.float64, device=device)[:, ::2].requires_grad_()
    values = torch.randn(codes.nnz, 2, dtype=torch.float64, device=device)[:, 0].requires_grad_()
    codes = codes.with_values(values)
    decoded, encoded = spmm(codes, table), sddmm(codes, left, table)
    torch.testing.assert_close(decoded, codes.to_dense() @ table)
    torch.testing.assert_close(encoded, at_pattern(codes, left @ table.T))
    found = torch.autograd.grad(decoded.sum() + encoded.sum(), (values, table, left))  # sum's gradient is expanded
    dense = (codes.to_dense() @ table).sum() + at_pattern(codes, left @ table.T).sum()
    torch.testing.assert_close(found, torch.autograd.grad(dense, (values, table, left)))


def test_results_and_gradients_are_the_same_bits_every_time(
    device: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SPLIT", 8, raising=False)
    torch.manual_seed(0)
    tokens, n_features, d = (30, 3, 5) if INTERPRETED else (2000, 40, 100)
    pattern = Codes.from_topk(*torch.randn(tokens, n_features).topk(2), n_features).to(device)
    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((tokens, d), (n_features, d), (n_features,))]

    def step() -> tuple[Tensor, ...]:
        left, table, bias = leaves
        fresh = Codes(pattern.values, pattern.features, pattern.offsets, n_features)
        decoded = spmm(fresh.with_values(sddmm(fresh, left, table, bias, centre=left[0].detach())), table)
        return decoded, *torch.autograd.grad(decoded.square().sum(), leaves)

    first, second = step(), step()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_gradients_reach_the_rows_of_the_pattern_and_no_others(device: str) -> None:
    features = torch.tensor([1, 3, 1], device=device)
    codes = Codes(torch.ones(3, device=device), features, torch.tensor([0, 2, 2, 3], device=device), 5)
    table, other = (torch.randn(5, 4, device=device, requires_grad=True) for _ in range(2))
    left = torch.randn(3, 4, device=device, requires_grad=True)
    bias = torch.randn(5, device=device, requires_grad=True)
    (spmm(codes, table).sum() + sddmm(codes, left, other, bias).square().sum()).backward()
    for gradient in (table.grad, other.grad):
        assert gradient.any(1).tolist() == [False, True, False, True, False]
    assert bias.grad.bool().tolist() == [False, True, False, True, False]
    assert left.grad.any(1).tolist() == [True, False, True]


def test_values_of_a_pattern_are_not_read_and_receive_nothing(device: str) -> None:
    codes = ragged(4, 5).to(device)
    pattern = codes.with_values(torch.full_like(codes.values, torch.nan).requires_grad_())
    left, table = (torch.randn(n, 3, device=device, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    out = sddmm(pattern, left, table)
    out.sum().backward()
    assert out.isfinite().all() and table.grad.isfinite().all() and pattern.values.grad is None


def test_known_products_are_returned_and_still_differentiated(device: str) -> None:
    torch.manual_seed(0)
    pattern = ragged(3, 5).to(device)
    left, table = (torch.randn(n, 4, device=device, requires_grad=True) for n in (3, 5))
    bias, centre = (torch.randn(n, device=device, requires_grad=True) for n in (5, 4))
    known = torch.arange(float(pattern.nnz), device=device, requires_grad=True)
    leaves = (left, table, bias, centre)
    out = sddmm(pattern, left, table, bias, centre=centre, known=known)
    assert torch.equal(out, known)
    found = torch.autograd.grad(out.sum(), (*leaves, known), allow_unused=True)
    computed = torch.autograd.grad(sddmm(pattern, left, table, bias, centre=centre).sum(), leaves)
    torch.testing.assert_close(found[:4], computed)
    assert found[4] is None


def test_no_gradient_is_computed_for_what_needs_none(
    device: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With neither `left` nor values in need of a gradient, their products are not computed."""
    pattern = ragged(6, 5).to(device)
    left, table = (torch.randn(n, 4, device=device, dtype=torch.float64) for n in (6, 5))
    centre = torch.randn(4, device=device, dtype=torch.float64, requires_grad=True)
    encoded = sddmm(pattern, left, table.requires_grad_(), centre=centre)
    decoded = spmm(pattern, table)
    original = module.spmm

    def transposed_only(codes: Codes, rows: Tensor) -> Tensor:
        """The CPU's transposed product is an spmm itself, but of the codes of [features, tokens]."""
        assert codes.n_features != pattern.n_features, "the gradient of left, [tokens, d], was computed"
        return original(codes, rows)

    monkeypatch.setattr(module, "spmm", transposed_only)
    monkeypatch.setattr(module, "sddmm", lambda *_: pytest.fail("the gradient of the values, [nnz], was computed"))
    d_centre, d_encoder = torch.autograd.grad(encoded.sum(), (centre, table))
    (d_decoder,) = torch.autograd.grad(decoded.sum(), table)
    torch.testing.assert_close(d_centre, -table.detach()[pattern.features].sum(0))
    ones = pattern.with_values(torch.ones_like(pattern.values)).to_dense()
    torch.testing.assert_close(d_encoder, ones.T @ (left - centre.detach()))
    torch.testing.assert_close(d_decoder, pattern.to_dense().sum(0)[:, None].expand(5, 4))


def test_a_second_derivative_is_refused(device: str) -> None:
    codes, table = ragged(3, 4).to(device), torch.randn(4, 2, dtype=torch.float64, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(spmm(codes, table).square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor of floats that is made; Triton's interpreter also copies bytes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_is_as_large_as_the_dense_codes_or_all_gathered_rows(backend: str, device: str) -> None:
    if backend in ("reference", "dense"):
        pytest.skip("dense by design")
    tokens, n_features, k, d = (64, 96, 8, 24) if INTERPRETED else (256, 1024, 16, 96)
    torch.manual_seed(0)
    codes = Codes.from_topk(*torch.rand(tokens, n_features).topk(k), n_features).to(device)
    left, table = (torch.randn(n, d, device=device, requires_grad=True) for n in (tokens, n_features))
    codes = codes.with_values(codes.values.requires_grad_())
    with Largest() as largest:
        (spmm(codes, table).sum() + sddmm(codes, left, table).sum()).backward()
    assert 0 < largest.elements <= n_features * d < min(tokens * n_features, tokens * k * d)


class RefuseWaiting(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU, for a result or for its shape."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "repeat_interleave")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
        if (any(name.startswith(waits) for waits in self.WAITING) and not kwargs.get("output_size")) or masks:
            raise AssertionError(f"{func} waits for a GPU")
        return func(*args, **kwargs)


def test_nothing_in_a_step_would_wait_for_a_gpu(
    backend: str, device: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "triton":
        pytest.skip("the other back-ends may look at numbers")
    monkeypatch.setattr(module, "SPLIT", 4)
    torch.manual_seed(0)
    scores = torch.randn(20, 5, device=device)
    shapes = ((20, 4), (5, 4), (5,), (4,), (5, 4))
    leaves = left, w_enc, bias, centre, w_dec = [torch.randn(s, device=device, requires_grad=True) for s in shapes]
    with RefuseWaiting():
        pattern = Codes.from_topk(*topk(scores, 2), 5)
        codes = pattern.with_values(sddmm(pattern, left, w_enc, bias, centre=centre).relu())
        torch.autograd.grad(spmm(codes, w_dec).square().sum(), leaves)
        codes.firing_counts(), codes.l0()
    with RefuseWaiting(), pytest.raises(AssertionError, match="waits for a GPU"):
        codes.compact()


@pytest.mark.parametrize("shapes", [((4, 3), (5, 2)), ((4, 3), (6, 3)), ((3, 3), (5, 3)), ((4,), (5, 3))])
def test_shapes_that_do_not_fit_are_refused(device: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    codes = ragged(4, 5).to(device)
    left, table = (torch.zeros(shape, device=device) for shape in shapes)
    with pytest.raises(ValueError, match="do not fit codes of \\[4, 5\\]"):
        sddmm(codes, left, table)
    if len(table) != 5:
        with pytest.raises(ValueError, match="do not fit"):
            spmm(codes, table)


def test_back_ends_have_the_same_functions() -> None:
    for name in ("reference", "cpu", "dense", "gpu"):
        if name == "gpu":
            pytest.importorskip("triton")
        found = importlib.import_module(f"saelab.kernels.{name}")
        assert all(callable(getattr(found, f)) for f in ("spmm", "spmm_transposed", "sddmm", "topk"))
