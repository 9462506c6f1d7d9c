"""Explanations of two autoencoders compared: the dense formula, 1 for the same one, nothing above chance by chance."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from saelab.autointerp.embedders import tfidf
from saelab.autointerp.similarity import Described, ExplanationSimilarities, PairedExplanations, compare_explanations

N = 60
RNG = np.random.default_rng(0)
WORDS = [f"word{chr(97 + i)}{chr(97 + j)}" for i in range(10) for j in range(10)]
TEXTS = {f: " ".join(["the tokens", *RNG.choice(WORDS, 4, replace=False)]) for f in range(N)}
ROWS = RNG.standard_normal((N, 32)).astype(np.float32)
A = Described(TEXTS, ROWS, "lexical")
EMBED = tfidf(list(TEXTS.values()))


@pytest.mark.parametrize("by", ["decoder", "explanation"])
def test_the_same_autoencoder_permuted_gives_the_permutation_and_similarity_1(by: str) -> None:
    order = RNG.permutation(N)
    b = Described({new: TEXTS[int(old)] for new, old in enumerate(order)}, ROWS[order])
    found = compare_explanations(A, b, EMBED, by=by)
    assert len(found.pairs) == N and (order[found.pairs[:, 1]] == found.pairs[:, 0]).all()
    np.testing.assert_allclose(found.cosine, 1, atol=1e-6)
    figures = found.figures()
    assert figures["similarity of explanations"] == pytest.approx((1, 1, 1))
    assert figures["share of pairs with a cosine of at least 0.5"] == (1, 1, 1)
    less, chance = figures["similarity less chance"], figures["similarity, by chance"]
    assert less[0] == pytest.approx(1 - chance) and less[1] > 0.5  # type: ignore[index,operator]


def test_explanations_that_belong_to_other_features_are_not_above_chance() -> None:
    found = [
        compare_explanations(A, replace(A, texts=dict(enumerate(RNG.permutation(list(TEXTS.values()))))), EMBED)
        for _ in range(40)
    ]
    assert all((each.pairs[:, 0] == each.pairs[:, 1]).all() for each in found)
    less = [(each.cosine - each.expected).mean() for each in found]
    assert abs(np.mean(less)) < 3 * np.std(less) / len(less) ** 0.5 and np.std(less) < 0.05


@pytest.mark.parametrize("by", ["decoder", "explanation"])
def test_figures_equal_the_dense_formula(by: str) -> None:
    """Not every feature has an explanation, and the two autoencoders are of different sizes."""
    a = replace(A, texts={f: text for f, text in TEXTS.items() if f % 3})
    b = Described({f: TEXTS[(7 * f) % N] for f in range(1, 40, 2)}, ROWS[:40] + RNG.standard_normal((40, 32)))
    found = compare_explanations(a, b, EMBED, by=by, threshold=0.3)
    of_a, of_b = sorted(a.texts), sorted(b.texts)
    if by == "decoder":
        unit_a, unit_b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a.rows, b.rows))
        left, right = linear_sum_assignment(np.maximum(unit_a @ unit_b.T, 0), maximize=True)
        pairs = {(i, j) for i, j in zip(left, right, strict=True) if i in a.texts and j in b.texts}
        assert 5 < len(pairs) < 20
    else:
        full = EMBED([a.texts[f] for f in of_a]) @ EMBED([b.texts[f] for f in of_b]).T
        left, right = linear_sum_assignment(full, maximize=True)
        pairs = {(of_a[i], of_b[j]) for i, j in zip(left, right, strict=True)}
        assert len(pairs) == len(of_b)
    if by == "decoder":
        assert set(map(tuple, found.pairs.tolist())) == pairs
    texts_a, texts_b = ([of.texts[f] for f in found.pairs[:, i]] for i, of in enumerate((a, b)))
    cosines = EMBED(texts_a) @ EMBED(texts_b).T
    np.testing.assert_allclose(found.cosine, np.diag(cosines), atol=1e-6)
    np.testing.assert_allclose(found.expected, (cosines.mean(0) + cosines.mean(1)) / 2, atol=1e-6)
    if by == "explanation":  # another assignment may have the same sum
        assert found.cosine.sum() == pytest.approx(full[left, right].sum(), abs=1e-4)
    assert found.share_by_chance == pytest.approx((cosines >= 0.3).mean())
    figures = found.figures()
    assert figures["similarity, by chance"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert figures["pairs"] == len(pairs) and figures["features with an explanation"] == len(of_b)


def test_without_a_pair_there_are_no_figures_and_names_are_escaped_in_the_plot() -> None:
    def figures(b: Described) -> PairedExplanations:
        return compare_explanations(A, b, EMBED, name="<b>run</b>", site="blocks.1")

    empty = figures(Described({}, ROWS))
    assert empty.figures()["pairs"] == 0 and np.isnan(empty.figures()["similarity of explanations"][0])  # type: ignore[index]
    result = ExplanationSimilarities("blocks.1", N, "lexical", "TF-IDF", (empty, figures(A)))
    assert "&lt;b&gt;" in result.plot().data[0].x[0]
    frame = result.to_frame()
    assert frame.loc["<b>run</b>: similarity of explanations", "value"] == pytest.approx(1)
