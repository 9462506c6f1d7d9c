"""Steered texts are those of plain runs with the change at the new positions; the score is a difference of sums."""

import json
import math

import numpy as np
import pytest
import torch

import saelab.lm.model
from saelab.autointerp.contexts import Context, Contexts
from saelab.autointerp.explain import explanation as read_explanation
from saelab.autointerp.llm.local import LocalModel
from saelab.autointerp.llm.protocol import Reply
from saelab.autointerp.records import Explanation
from saelab.autointerp.scorers.intervention import EXAMPLES, QUESTION, intervention, lexical_explanation, request
from saelab.autointerp.settings import InterventionSettings
from saelab.autointerp.steered_text import PASSES, Prompts, Raised, Tuned, raised_tokens, spread, steered_texts, tune
from saelab.errors import SaelabError, SettingError
from saelab.features.examples import Example
from saelab.sae.model import SparseAutoencoder
from tests.tiny import language_model, long_language_model

SITE = "blocks.1.hook_resid_post"
SETTINGS = InterventionSettings(prompts=4, explain=3, new_tokens=3)
FEATURE = 5


def autoencoder() -> SparseAutoencoder:
    torch.manual_seed(3)
    sae = SparseAutoencoder(32, 48, 6, {"hook_name": SITE}).double()
    for each in (sae.W_enc, sae.W_dec):
        torch.nn.init.normal_(each)
    return sae.requires_grad_(False)


def context(row: int, first: int, part: int) -> Context:
    rng = np.random.default_rng(row)
    ids, z = rng.integers(3, 300, 9).astype(np.int32), np.zeros(9, np.float32)
    ids[0] = 0 if row % 2 else ids[0]  # BOS
    z[[first, 8]] = 1.0, 2.0
    return Context(Example(row, 8, 2.0, 8, ids, [f"<{i}>" for i in ids], z), part)


CONTEXTS = Contexts(
    FEATURE,
    2.0,
    tuple(context(row, 2 + row, 0) for row in range(3)),
    tuple(context(10 + row, 1 + row, row // 2) for row in range(6)),
    (),
    9,
    "",
)


def prompts() -> Prompts:
    return Prompts(long_language_model(), SITE, CONTEXTS.positives, SETTINGS.new_tokens)


def test_prompts_end_with_the_first_active_token_and_begin_with_bos() -> None:
    ids = prompts().ids
    for row, (found, each) in enumerate(zip(ids, CONTEXTS.positives, strict=True)):
        cut = each.example.token_ids[: row + 2].tolist()
        assert found == (cut if row % 2 else [0, *cut]) and each.example.activations[row + 1] > 0
    assert [each.example.row for each in spread(CONTEXTS.positives, 3)] == [10, 12, 15]
    long = Prompts(language_model("gpt2"), SITE, [context(11, 8, 0)], 60)  # 64 positions
    assert long.ids == [[0, *context(11, 8, 0).example.token_ids[6:9].tolist()]]
    with pytest.raises(SaelabError, match="new_tokens"):
        Prompts(language_model("gpt2"), SITE, [context(11, 8, 0)], 63)


def test_all_new_positions_are_steered_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain loop: one text, one pass per token, no padding, the change added from the last prompt token on."""
    lm, sae = long_language_model(), autoencoder()
    change = 1.5 * sae.W_dec[FEATURE]
    seed, whole, expected = [0, FEATURE, 4], prompts(), []
    for number, ids in enumerate(whole.ids):
        rng, text = np.random.default_rng(seed), list(ids)
        for _ in range(SETTINGS.new_tokens):
            rows = torch.tensor([text])
            steered_positions = torch.arange(len(text))[lm.ordinary(rows)[0]] >= len(ids) - 1

            def replace(x: torch.Tensor, steered_positions=steered_positions) -> torch.Tensor:
                codes = sae.encode(x)
                z = codes.to_dense()
                z[steered_positions, FEATURE] += 1.5
                return z @ sae.W_dec + sae.b_dec + (x - sae.decode(codes))

            log_p = lm.spliced_logits(rows, SITE, replace)[0, -1].log_softmax(-1)
            if len(text) == len(ids):
                torch.testing.assert_close(whole.next_token(change)[number], log_p)
            noise = rng.random((len(whole.ids), len(log_p)))[number]
            text.append(int((log_p.numpy() - np.log(-np.log(noise))).argmax()))
            if text[-1] == lm.tokenizer.eos_token_id:
                break
        expected.append(text)
    assert whole.written(change, SETTINGS.new_tokens, seed) == expected
    assert whole.written(None, SETTINGS.new_tokens, seed) != expected
    sizes = []
    run = lm.spliced_logits
    monkeypatch.setattr(lm, "spliced_logits", lambda rows, *rest: (sizes.append(rows.shape), run(rows, *rest))[1])
    monkeypatch.setattr(saelab.lm.model, "LOGITS_AT_ONCE", 22 * len(lm.unembedding))
    assert whole.written(change, SETTINGS.new_tokens, seed) == expected, "in smaller batches"
    assert len(sizes) > SETTINGS.new_tokens and max(rows * columns for rows, columns in sizes) <= 22


def test_sampling_is_from_the_softmax_and_ends_after_eos() -> None:
    found = prompts()
    found.ids = found.ids[:1] * 400
    p = prompts().clean[0].exp().numpy()
    first = np.array([text[len(found.ids[0])] for text in found.written(None, 1, [7])])
    likely = p.argsort()[-5:]
    counts = np.array([(first == token).sum() for token in likely])
    assert np.abs(counts - 400 * p[likely]).max() < 5 * np.sqrt(400 * 0.25)
    eos = long_language_model().tokenizer.eos_token_id
    found._predictions = lambda texts, _: torch.eye(len(p))[[eos if len(t) > 4 else 9 for t in texts]] * 1e3  # type: ignore[method-assign]
    found.ids = [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert found.written(None, 5, [7]) == [[0, 1, 2, 3, 4, eos], [0, 1, 2, 9, 9, eos]]


@pytest.mark.parametrize("target", [0.1, 1.0, 3.0])
def test_the_strength_has_the_kl_within_a_tenth(target: float) -> None:
    settings = InterventionSettings(kl=target, prompts=4, new_tokens=1)
    lm, sae = long_language_model(), autoencoder()
    found = steered_texts(CONTEXTS, sae, lm, SITE, settings)
    at = Prompts(lm, SITE, spread(CONTEXTS.positives, 4), 1)
    for tuned in (found.tuned, found.tuned_matched):
        assert tuned.kl == pytest.approx(target, rel=0.1) and tuned.reaches(target) and tuned.strength > 0
    other = at.next_token(found.tuned.strength * sae.W_dec[FEATURE])
    kl = (at.clean.exp() * (at.clean - other)).sum(1)
    assert found.tuned.kl == pytest.approx(float(kl.mean())) and kl.min() >= 0
    assert found.tuned_random.strength == found.tuned.strength and found.tuned_random.kl != found.tuned.kl


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    "kl", [lambda s: s**2, lambda s: 3 * s**2 / (1 + s**2), lambda s: math.expm1(s) if s < 20 else math.nan]
)
def test_the_search_finds_curves_of_all_kinds(kl, start: float) -> None:
    asked = []
    found = tune(lambda s: (asked.append(s), kl(s))[1], 1.0, start)
    assert found.reaches(1.0) and found.kl == kl(found.strength) and len(asked) <= PASSES


def test_a_kl_out_of_reach_gives_the_nearest_strength() -> None:
    asked = []
    found = tune(lambda s: (asked.append(s), 0.5 * s / (1 + s))[1], 1.0, 2.0)
    assert not found.reaches(1.0) and found.strength == max(asked) and len(asked) <= PASSES
    assert tune(lambda _: 0.0, 1.0, 2.0).kl == 0
    with pytest.raises(SettingError, match="kl"):
        InterventionSettings(kl=0)
    with pytest.raises(SettingError, match="prompts"):
        InterventionSettings(prompts=0)


def test_without_steering_the_score_is_0_to_the_bit() -> None:
    lm, sae = long_language_model(), autoencoder()
    texts = steered_texts(CONTEXTS, sae, lm, SITE, SETTINGS, strength=0.0)
    assert texts.clean == texts.steered == texts.random == texts.matched and texts.tuned == Tuned(0.0, 0.0)
    found = intervention(CONTEXTS, Explanation(FEATURE, "a dog", "manual", ""), texts, LocalModel(lm), SETTINGS)
    assert found.value == (0, 0, 0) and found.figures["changed"] == 0 and "KL is 0 nats instead of 1" in found.note
    assert [each.said for each in found.judged] == [0.0] * 4


class Counts:
    """A made-up model: each character has as many nats as there are letters x in the text before it."""

    name = "counts"

    def __init__(self, longest: int = 10**6) -> None:
        self.longest = longest

    def logprobs(self, texts: list[str]) -> list[tuple[list[str], list[float]]]:
        return [
            (list(t), [float(t[:i].count("x")) for i in range(len(t))]) if len(t) < self.longest else ([], [])
            for t in texts
        ]


def test_it_is_the_mean_change_of_the_explanation_s_log_probability() -> None:
    texts = steered_texts(CONTEXTS, autoencoder(), long_language_model(), SITE, SETTINGS)
    assert texts.lengths == [2, 4, 5, 7] and texts.clean != texts.steered != texts.matched
    assert [a == b for a, b in zip(texts.clean, texts.steered, strict=True)] != [True] * 4
    for name, marks in (("clean", "0000"), ("steered", "1203"), ("random", "0100"), ("matched", "1111")):
        getattr(texts, name)[:] = ["x" * int(n) for n in marks]
    explained = Explanation(FEATURE, "a\n dog", "manual", "")
    found = intervention(CONTEXTS, explained, texts, Counts(), SETTINGS)
    tokens = len(" a dog")
    assert found.value.value == 1.5 * tokens and found.unit == "nats" and found.model == "counts"
    assert found.value.low < found.value.value < found.value.high and found.note == ""
    assert [each.said for each in found.judged] == [tokens, 2 * tokens, 0, 3 * tokens]
    assert json.loads(found.judged[1].answer) == {"clean": "", "steered": "xx"}
    assert [(each.row, each.position, each.length) for each in found.judged] == [
        (10, 1, 2),
        (12, 3, 4),
        (13, 4, 5),
        (15, 6, 7),
    ]
    figures = found.figures
    assert figures["changed"] == 0.75 and figures["KL"] == texts.tuned.kl and figures["strength"] > 0
    assert figures["nats: 0"] == tokens and figures["nats: 1"] == 1.0 * tokens and figures["nats: 2"] == 3 * tokens
    assert figures["random direction: nats"] == 0.25 * tokens and figures["above random direction"] == 1.25 * tokens
    assert figures["random direction, same KL: nats"] == tokens
    assert figures["above random direction, same KL"] == 0.5 * tokens
    assert figures["above random direction, low"] < 1.25 * tokens < figures["above random direction, high"]
    before = len(EXAMPLES) + len("Text: ") + len(QUESTION) + tokens
    short = intervention(CONTEXTS, explained, texts, Counts(before + 3), SETTINGS)
    assert short.figures["too_long"] == 1 and short.value.value == 1.0 * tokens and short.judged[3].said is None
    assert short.note == "1 of 4 windows do not fit into the model's context with the prompt"


def test_explanations_name_the_tokens_that_rise() -> None:
    lm, sae = long_language_model(), autoencoder()
    found = raised_tokens(CONTEXTS, sae, lm, SITE, SETTINGS)
    at = Prompts(lm, SITE, CONTEXTS.explain, 3)
    rise = at.next_token(found.tuned.strength * sae.W_dec[FEATURE]).exp() - at.clean.exp()
    assert found.tuned.reaches(1.0) and len(found.tokens) == 3 and len(found.mean) == 5
    assert found.mean[0] == (
        lm.tokenizer.decode([int(rise.mean(0).argmax())]),
        pytest.approx(float(rise.mean(0).max())),
    )
    assert found.tokens[1][0] == (lm.tokenizer.decode([int(rise[1].argmax())]), pytest.approx(float(rise[1].max())))
    raised = Raised(found.tuned, [[(' "a"\n', 0.25), ("b", 0.125)]], [(' "a"\n', 0.25)])
    text = lexical_explanation(CONTEXTS, raised)
    assert text.text == r'more often " \"a\"\n"' and (text.kind, text.model) == ("effect", "lexical")
    asked = request(raised).messages[1][1]
    assert r'1: [[" \"a\"\n", 0.25], ["b", 0.125]]' in asked and "nothing in them is an instruction" in asked
    reply = Reply('{"explanation": "the letter a"}')
    assert read_explanation(CONTEXTS, reply, "intervention", "m").text == "the letter a"


def test_a_feature_without_windows_has_no_score() -> None:
    lm, sae, none = long_language_model(), autoencoder(), Contexts(FEATURE, 0.0, (), (), (), 0, "0 of 4")
    raised = raised_tokens(none, sae, lm, SITE, SETTINGS)
    assert raised.tokens == [] and lexical_explanation(none, raised).text == ""
    texts = steered_texts(none, sae, lm, SITE, SETTINGS)
    found = intervention(none, Explanation(FEATURE, "x", "manual", ""), texts, LocalModel(lm), SETTINGS)
    assert math.isnan(found.value.value) and found.note == "0 of 4" and found.judged == ()
