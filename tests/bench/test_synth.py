"""SynthSAEBench: the world is as its recipe says, the scores are what they are defined as, and cells are resumed."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import synth
import torch
import torch.nn.functional as F
from synth_scores import hits, matched_cosine, score
from synth_world import Drawn, Recipe, World, build, compensated, draw, drawn, spread_apart, zipf

from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder
from saelab.training.settings import TrainingSettings

SMALL = Recipe(
    120, 24, 0.5, 0.6, 0.02, roots=5, branching=3, depth=2, rank=4, correlation=0.2, spread=(0.3, 0.1), steps=3
)
FREE = slice(5 * (1 + 3 + 9), 120)
"""The features outside of the hierarchy."""
N = 20_000


@pytest.fixture(scope="module")
def sampled() -> tuple[World, Drawn, torch.Tensor]:
    world = build(SMALL)
    found = draw(world, N, torch.Generator().manual_seed(1))
    return world, found, found.truth.to_dense()


def test_the_defaults_are_the_published_recipe() -> None:
    recipe = synth.SCALES["full"].recipe
    assert recipe == Recipe() and (recipe.n_true, recipe.d_in, recipe.seed) == (16_384, 768, 42)
    assert [part.stop - part.start for part in recipe.generations] == [128, 512, 2048, 8192]
    planned = zipf(recipe)
    assert planned[0] == pytest.approx(0.4) and planned[-1] == pytest.approx(5e-4)
    assert bool((planned.diff() < 0).all())
    middle = ((100**-0.5) - 16_384**-0.5) / (1 - 16_384**-0.5) * (0.4 - 5e-4) + 5e-4
    assert planned[99].item() == pytest.approx(middle)
    small = synth.SCALES["small"]
    assert small.latents * 4 == small.recipe.n_true and small.recipe.roots * 128 == small.recipe.n_true


def test_a_child_fires_only_with_its_parent_and_without_its_siblings(sampled: tuple) -> None:
    _, _, magnitudes = sampled
    for above, below in itertools.pairwise(SMALL.generations):
        children = (magnitudes[:, below] > 0).view(N, -1, SMALL.branching)
        assert not (children & (magnitudes[:, above] == 0)[..., None]).any()
        assert children.sum(2).max() == 1 and bool(children.any(0).all())


def test_features_fire_as_often_as_planned(sampled: tuple) -> None:
    world, found, magnitudes = sampled
    rates = (magnitudes > 0).double().mean(0)
    deviation = (world.probabilities * (1 - world.probabilities) / N).sqrt()
    for part in (SMALL.generations[0], FREE):
        assert bool(((rates - world.probabilities).abs() < 5 * deviation)[part].all())
    assert found.truth.nnz / N == pytest.approx(rates.sum().item())
    for part in SMALL.generations[1:]:  # children together as frequent as their parent cannot all be as planned
        assert 0.2 < rates[part].sum() / world.probabilities[part].sum() < 1


def test_probabilities_of_children_are_raised_for_parents_and_siblings() -> None:
    recipe = Recipe(9, 4, roots=2, branching=2, depth=1)
    planned = torch.tensor([0.5, 0.4, 0.1, 0.05, 0.2, 0.3, 0.1, 0.1, 0.1], dtype=torch.float64)
    raised = compensated(planned, recipe)
    expected = [0.5, 0.4, 0.1 / 0.5 * (1 + 0.05 / 0.5), 0.05 / 0.5 * (1 + 0.1 / 0.5)]
    expected += [0.2 / 0.4 * (1 + 0.3 / 0.4), 1.0, 0.1, 0.1, 0.1]  # 0.3 / 0.4 * 1.5 is above 1
    torch.testing.assert_close(raised, torch.tensor(expected, dtype=torch.float64))


def test_of_several_children_each_wins_as_often() -> None:
    recipe = Recipe(4, 4, exponent=1e-9, p_max=0.5, p_min=0.5 - 1e-6, roots=1, branching=3, depth=1, steps=0)
    world = build(replace(recipe, correlation=0.0))._replace(bound=torch.full((4,), -9.0), deviation=torch.zeros(4))
    counts = draw(world, 9000, torch.Generator().manual_seed(0)).truth.firing_counts()
    assert counts[0] == 9000 and counts[1:].sum() == 9000
    assert bool(((counts[1:] / 9000 - 1 / 3).abs() < 0.025).all())


def test_magnitudes_fall_with_the_rank_and_those_of_children_follow_their_parents(sampled: tuple) -> None:
    world, _, magnitudes = sampled
    assert world.magnitude[0] == 5 and world.magnitude[-1] == 4
    fires = magnitudes > 0
    means = magnitudes.sum(0) / fires.sum(0)
    assert bool(((means - world.magnitude).abs() < 0.25)[FREE].all())
    still = world._replace(deviation=torch.zeros(SMALL.n_true))
    exact = draw(still, 2000, torch.Generator().manual_seed(2)).truth.to_dense()
    torch.testing.assert_close(exact, (exact > 0) * world.magnitude)  # parents at their means: a factor of 1
    child = SMALL.generations[1].start
    both = fires[:, child]
    correlation = torch.corrcoef(torch.stack([magnitudes[both, 0], magnitudes[both, child]]))[0, 1]
    alone = world.deviation[child] / world.magnitude[child], world.deviation[0] / world.magnitude[0]
    assert correlation.item() == pytest.approx((alone[1] / (alone[0] ** 2 + alone[1] ** 2).sqrt()).item(), abs=0.1)


def test_features_fire_together_as_their_loadings_say() -> None:
    recipe = Recipe(40, 8, 0.01, 0.31, 0.29, roots=1, branching=2, depth=0, rank=1, correlation=0.8, steps=0)
    world = build(recipe)
    torch.testing.assert_close(world.loadings.square().sum(1) + world.own.square(), torch.ones(40))
    fires = (draw(world, 20_000, torch.Generator().manual_seed(0)).truth.to_dense() > 0).double()
    found = torch.corrcoef(fires.T)[~torch.eye(40, dtype=torch.bool)]
    planned = (world.loadings @ world.loadings.T)[~torch.eye(40, dtype=torch.bool)].double()
    assert torch.corrcoef(torch.stack([found, planned]))[0, 1] > 0.97
    unrelated = draw(build(replace(recipe, correlation=0.0)), 20_000, torch.Generator().manual_seed(0)).truth.to_dense()
    assert torch.corrcoef((unrelated > 0).double().T).fill_diagonal_(0).abs().max() < 0.04


def test_x_is_the_sum_of_the_active_features_and_the_bias(sampled: tuple) -> None:
    world, found, magnitudes = sampled
    torch.testing.assert_close(found.x, magnitudes @ world.directions + world.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(SMALL.n_true))
    assert world.bias.norm().item() == pytest.approx(0.5)
    parts = [each.x for each in drawn(world, 500, 7, 200)]
    assert [len(part) for part in parts] == [200, 200, 100]
    assert torch.equal(torch.cat(parts), torch.cat([each.x for each in drawn(world, 500, 7, 200)]))
    assert not torch.equal(parts[0], next(drawn(world, 200, 8, 200)).x)


def test_directions_are_pushed_apart_by_the_loss_of_all_pairs() -> None:
    start = F.normalize(torch.randn(1100, 5, generator=torch.Generator().manual_seed(0)), dim=1)  # more than one block
    moved = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([moved], lr=1e-3)
    for _ in range(2):
        adam.zero_grad()
        products = moved @ moved.T
        lengths = products.diagonal()
        (products.square().sum() - lengths.square().sum() + 1100 * (lengths - 1).square().sum()).backward()
        adam.step()
    torch.testing.assert_close(spread_apart(start, 2, 1e-3), F.normalize(moved.detach(), dim=1))


def perfect(d: int = 8) -> tuple[SparseAutoencoder, list[Drawn]]:
    """An autoencoder whose latents are the planted features, which are the axes; and samples of 0.3 of them."""
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(d, d, 1)
    sae.threshold = torch.zeros(1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
    x = (torch.rand(600, d, generator=generator) < 0.3) * (1 + torch.rand(600, d, generator=generator))
    return sae.requires_grad_(False), [Drawn(part, Codes.from_mask(part > 0, part)) for part in x.split(250)]


def test_an_autoencoder_with_the_planted_features_has_full_scores() -> None:
    sae, samples = perfect()
    found = score(sae, torch.eye(8), samples, 1.0)
    for name in ("f1", "precision", "recall", "mcc", "uniqueness"):
        assert getattr(found, name) == pytest.approx(1)
    assert found.explained_variance == pytest.approx(1) and found.dead == 0 and found.samples == 600
    assert found.l0 == pytest.approx(found.true_l0) and found.f1_by_quarter == pytest.approx((1, 1, 1, 1))
    assert score(sae, -torch.eye(8), samples, 1.0).mcc == pytest.approx(1)  # absolute cosines


def test_known_mistakes_have_known_scores() -> None:
    sae, samples = perfect()
    x = torch.cat([each.x for each in samples])
    share = (x > 0).double().mean(0)
    with torch.no_grad():
        sae.b_enc[0] = 5  # always active
        sae.b_enc[1] = -9  # never active
        sae.W_dec[2] = sae.W_dec[3]  # a second detector of 3, of feature 2
    found = score(sae, torch.eye(8), samples, 1.0)
    both, either = ((x[:, 2] > 0) & (x[:, 3] > 0)).double().mean(), share[2] + share[3]
    always, twin = 2 * share[0] / (1 + share[0]), 2 * both / either
    assert found.f1 == pytest.approx(((always + 0 + twin + 5) / 8).item())
    assert found.precision == pytest.approx(((share[0] + 0 + both / share[2] + 5) / 8).item())
    assert found.recall == pytest.approx(((1 + 0 + both / share[3] + 5) / 8).item())
    assert found.dead == 1 / 8 and found.uniqueness == 7 / 8 and found.mcc == pytest.approx(7 / 8)
    assert found.l0 == pytest.approx((share.sum() - share[0] + 1 - share[1]).item())
    residual, reconstruction = x.double(), sae.decode(sae.encode(x)).double()
    fvu = (residual - reconstruction).square().sum() / (residual - residual.mean(0)).square().sum()
    assert found.explained_variance == pytest.approx(1 - fvu.item(), abs=1e-6)


def test_hits_are_counted_for_the_feature_of_each_latent() -> None:
    latents = torch.tensor([[1.0, 0, 2], [1, 0, 0], [0, 3, 0]])
    truth = torch.tensor([[1.0, 0], [0, 2], [0, 1]])
    found = hits(*(Codes.from_mask(each > 0, each) for each in (latents, truth)), torch.tensor([0, 1, 1]))
    assert found.tolist() == [[2, 1, 1], [1, 2, 2], [1, 1, 0]]


def test_the_matched_cosine_is_the_best_of_all_pairings() -> None:
    cosines = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    pairings = itertools.permutations(range(6), 4)
    best = max(cosines.abs()[range(4), list(columns)].mean().item() for columns in pairings)
    assert matched_cosine(cosines) == pytest.approx(best)
    assert matched_cosine(cosines.T) == pytest.approx(best)


def test_a_search_for_a_coefficient_comes_near_the_l0() -> None:
    def l0_of(coefficient: float) -> float:
        return 3 * coefficient**-1.4

    tried: list[list[float]] = []
    for _ in range(4):
        coefficient = synth.next_coefficient(tried, 20.0)
        tried.append([coefficient, l0_of(coefficient)])
    assert l0_of(synth.next_coefficient(tried, 20.0)) == pytest.approx(20, rel=0.01)
    assert synth.next_coefficient([[0.2, 0.0]], 20.0) == pytest.approx(0.2 / 16)  # no further than a factor of 16


TINY = synth.Scale(replace(SMALL, steps=0), 32, TrainingSettings(2048, 256, 1e-3), 1000, kept=True)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "FIRST", 1000)
    monkeypatch.setattr(synth, "CALIBRATION", 1000)
    monkeypatch.setattr(synth, "L0S", (4,))
    monkeypatch.setitem(synth.SCALES, "small", TINY)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_every_method_is_trained_and_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["synth.py", "--out", str(tmp_path), "--seeds", "1"])
    synth.main()
    cells = synth.finished(tmp_path)
    assert {cell["method"] for cell in cells} == set(synth.NAMES) and len(cells) == len(synth.NAMES)
    for cell in cells:
        budgeted = cell["method"] not in ("relu", "gated", "jumprelu", "group_max")
        assert not budgeted or cell["scores"]["l0"] == pytest.approx(4, rel=0.1)
        assert (cell["coefficient"] is None) == (cell["method"] not in ("relu", "gated"))


@pytest.mark.usefixtures("tiny")
def test_cells_are_made_once_and_written_as_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = ["synth.py", "--out", str(tmp_path), "--seeds", "1", "--only", "token,relu"]
    monkeypatch.setattr(sys, "argv", command)
    synth.main()
    cells = synth.finished(tmp_path)
    assert [cell["method"] for cell in cells] == ["relu", "token"]
    tried = json.loads((tmp_path / "coefficients relu.json").read_text())
    assert len(tried) == 4 and cells[0]["coefficient"] in [coefficient for coefficient, _ in tried]

    monkeypatch.setattr(synth, "build", None)  # nothing is made again
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(tmp_path / "all")])
    synth.main()
    assert json.loads((tmp_path / "all").read_text())["cells"] == cells
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- synth -->\nold\n<!-- /synth -->\nafter\n")
    monkeypatch.setattr(sys, "argv", [*command, "--write", str(page)])
    synth.main()
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text and "| token" in text


@pytest.mark.usefixtures("tiny")
def test_samples_that_are_not_kept_are_the_same(tmp_path: Path) -> None:
    scores = []
    for kept in (True, False):
        out = tmp_path / str(kept)
        out.mkdir()
        bench = synth.Bench(replace(TINY, kept=kept), out, "cpu", lambda line: None)
        batches = [batch.x for batch in bench._batches(3)]
        assert [batch.shape for batch in batches] == [(256, 24)] * 8
        assert torch.cat(batches).square().sum(1).mean().item() == pytest.approx(24, rel=0.2)
        held_out = torch.cat([each.x for each in bench._held_out(3)])
        assert len(held_out) == 1000
        scores.append(held_out)
    assert torch.equal(*scores)


def test_tables_have_the_published_figures_and_the_best_first() -> None:
    def cell(method: str, f1: float, seed: int) -> dict:
        scores = dict.fromkeys(["l0", "precision", "recall", "mcc", "uniqueness", "explained_variance", "dead"], 0.5)
        scores |= {"f1": f1, "f1_by_quarter": [0.9, 0.5, 0.4, 0.3], "true_l0": 31.0}
        return {"method": method, "l0": 20, "seed": seed, "scores": scores, "scale": scale}

    scale = json.loads(json.dumps(synth.asdict(synth.SCALES["small"])))
    text = synth.report([cell("token", 0.4, 0), cell("token", 0.5, 1), cell("mutual", 0.6, 0)])
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows[2:4]] == ["mutual", "token"]
    assert rows[2][4].strip() == "0.818 (BatchTopK)" and rows[3][4].strip() == ""
    assert rows[3][3].strip() == "0.450 ± 0.071" and rows[3][1].strip() == "2" and rows[2][3].strip() == "0.600"


def test_missing_cells_and_cells_of_two_worlds_are_reported(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="no cell is finished"):
        synth.finished(tmp_path)
    for seed, scale in enumerate(synth.SCALES.values()):
        path = synth.cell_file(tmp_path, "token", 20, seed)
        path.write_text(json.dumps({"scale": synth.asdict(scale)}))
    with pytest.raises(SaelabError, match="different worlds or trainings"):
        synth.finished(tmp_path)
