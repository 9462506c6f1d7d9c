"""A local model: what it writes and how likely, equal to plain passes of the same model."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from saelab.autointerp.explain import read
from saelab.autointerp.llm import local
from saelab.autointerp.llm.answers import answers
from saelab.autointerp.llm.form import before_quote
from saelab.autointerp.llm.local import LocalModel, load_local_model
from saelab.autointerp.llm.protocol import Request
from saelab.autointerp.prompts import probabilities, verdicts
from saelab.errors import SaelabError
from saelab.lm.settings import ModelSettings
from tests.tiny import KINDS, language_model

ASKED = Request((("user", "a dog"),), max_tokens=12, top_logprobs=3)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


def with_template(template: str, kind: str = "llama") -> LocalModel:
    lm = copy.copy(language_model(kind))
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.chat_template = template
    return LocalModel(lm)


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_answer_is_that_of_plain_passes(kind: str) -> None:
    lm = language_model(kind)
    model = LocalModel(lm)
    positions: list[tuple[int, int]] = []
    spy = lm.model.register_forward_hook(
        lambda _module, _args, named, out: positions.append((named["input_ids"].shape[1], out.logits.shape[1])),
        with_kwargs=True,
    )
    reply = model.ask(ASKED)
    spy.remove()
    assert positions == [(reply.prompt_tokens, 1), *[(1, 1)] * 11], "no token is read twice, no logits are left over"
    assert model.ask(ASKED) == reply and reply.answer_tokens == 12
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer("User: a dog\n\nAssistant:", add_special_tokens=False).input_ids]
    assert reply.prompt_tokens == len(ids)
    written: list[int] = []
    for alternatives in reply.logprobs or ():  # every step from the beginning, without a cache
        log_p = lm.logits(torch.tensor([ids + written]))[0, -1].log_softmax(-1)
        top = log_p.topk(3)
        assert [text for text, _ in alternatives] == [lm.tokenizer.decode([i]) for i in top.indices]
        assert [value for _, value in alternatives] == pytest.approx(top.values.tolist(), abs=1e-4)
        written.append(int(top.indices[0]))
    assert len(written) == 12 and reply.text == lm.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert model.ask(Request((("user", "a dog"),), max_tokens=5)).logprobs is None


def test_sampled_answers_depend_on_the_seed_and_the_temperature() -> None:
    model = LocalModel(language_model("gpt2"))

    def ask(seed: int, temperature: float) -> str:
        return model.ask(Request((("user", "a dog"),), 8, temperature, seed=seed)).text

    assert ask(1, 1.0) == ask(1, 1.0) != ask(2, 1.0)
    assert ask(1, 1e-6) == ask(2, 1e-6) == ask(0, 0.0)
    p, generator = torch.tensor([0.5, 0.3, 0.2]), torch.Generator().manual_seed(0)
    picked = torch.tensor([local._picked(p.log(), 0.5, generator) for _ in range(4000)])
    assert (picked.bincount() / 4000).tolist() == pytest.approx((p**2 / (p**2).sum()).tolist(), abs=0.03)


def test_messages_go_through_the_chat_template_and_text_becomes_no_special_token() -> None:
    model = with_template("<s>" + TEMPLATE)
    messages = (("system", "Judge."), ("user", "of </s> and <s>[assistant]1"))
    ids, plain = model._prompt(Request(messages))
    assert (
        not plain and model._tokenizer.decode(ids) == "<s>[system]Judge.[user]of < /s> and < s>[assistant]1[assistant]"
    )
    assert [ids.count(i) for i in model._tokenizer.all_special_ids] == [1, 0]
    plain_ids, plain = LocalModel(language_model("llama"))._prompt(Request(messages))
    text = "<s>Judge.\n\nUser: of < /s> and < s>[assistant]1\n\nAssistant:"
    assert plain and model._tokenizer.decode(plain_ids) == text


def test_a_template_without_system_messages_gets_them_with_the_first_question() -> None:
    model = with_template(NO_SYSTEM)
    ids, _ = model._prompt(Request((("system", "Judge."), ("user", "this"), ("assistant", "no"), ("user", "that"))))
    assert model._tokenizer.decode(ids) == "[user]Judge.\n\nthis[assistant]no[user]that[assistant]"
    with pytest.raises(SaelabError, match=r"its chat template refuses the messages \(never\); choose another model"):
        with_template("{{ raise_exception('never') }}").ask(ASKED)


class Scripted(nn.Module):
    """Writes a text token by token, whatever it is asked, with EOS after it."""

    def __init__(self, ids: list[int], config: Any) -> None:
        super().__init__()
        self.ids, self.config, self.read = ids, config, 0
        self.head = nn.Linear(1, config.vocab_size)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, input_ids: torch.Tensor) -> Any:
        n = input_ids.shape[1]
        self.read = self.read or n
        logits = torch.zeros(1, n, self.config.vocab_size)
        logits[0, -1, self.ids[n - self.read]] = 20
        return SimpleNamespace(logits=logits)


def scripted(text: str, template: str | None = None) -> LocalModel:
    lm = copy.copy(language_model("llama"))
    ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    if template:
        lm.tokenizer = copy.deepcopy(lm.tokenizer)
        lm.tokenizer.chat_template = template
    lm.model = Scripted([*ids, lm.tokenizer.eos_token_id], lm.model.config)
    return LocalModel(lm)


def test_an_answer_ends_at_the_models_end_or_where_a_base_model_asks_itself() -> None:
    asked = Request((("user", "?"),), max_tokens=40, top_logprobs=1)
    reply = scripted("[1, 0]\nUser: a dog\n\nAssistant: [0, 0]").ask(asked)
    assert reply.text == "[1, 0]" == "".join(alternatives[0][0] for alternatives in reply.logprobs or ())
    assert scripted("[1, 0]").ask(asked).text == "[1, 0]"
    chat = scripted(" [1]\nUser: x", TEMPLATE).ask(asked)
    assert chat.text == " [1]\nUser: x" and chat.answer_tokens == len(chat.logprobs or ())
    assert scripted("abcdefgh").ask(Request((("user", "?"),), max_tokens=2)).answer_tokens == 2


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_of_texts_are_those_of_one_pass_each(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = language_model(kind)
    model = LocalModel(lm)
    texts = ["The quick dog", "", "x", "a \N{SNOWMAN}\U0001f600 b </s><|endoftext|> é", " for i in range(10): print(i)"]
    found = model.logprobs(texts)
    monkeypatch.setattr(local, "LOGITS_AT_ONCE", 30 * lm.embeddings)
    assert list(model._batches([14, 3, 15, 16, 3])) == [[3], [2, 0], [1, 4]]
    again = model.logprobs(texts)
    for text, (tokens, values), (_, in_smaller_batches) in zip(texts, found, again, strict=True):
        ids = lm.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert not set(ids) & set(lm.tokenizer.all_special_ids) and len(tokens) == len(values) == len(ids)
        assert "".join(tokens) == text and values[:1] == [0.0][: len(ids)]
        rows = torch.tensor([[lm.tokenizer.bos_token_id, *ids]])
        log_p = lm.logits(rows)[0].log_softmax(-1)
        expected = [float(log_p[i, token]) for i, token in enumerate(ids)]
        assert values[1:] == pytest.approx(expected[1:], abs=1e-4)
        assert values == pytest.approx(in_smaller_batches, abs=1e-4)


def test_too_much_text_says_what_to_do() -> None:
    model = LocalModel(language_model("gpt2"))  # 64 positions
    words = " dog" * 200
    with pytest.raises(SaelabError, match="show fewer or shorter windows, or choose another model"):
        model.ask(Request((("user", words),)))
    assert model.logprobs([words, "a dog"]) == [([], []), *model.logprobs(["a dog"])]
    short = Request((("user", "dog"),), max_tokens=500)
    reply = model.ask(short)
    assert reply.prompt_tokens + reply.answer_tokens <= 64, "an answer has the room that the prompt leaves"


def test_the_demo_model_answers_from_its_cache(tmp_path) -> None:
    model = load_local_model(ModelSettings(self_check=False), "cpu")
    assert model.name.startswith("demo (") and model.concurrency == 1 and repr(model) == f"LocalModel({model.name})"
    requests = [(i, Request((("user", f"def f{i}("),), max_tokens=6, top_logprobs=2)) for i in range(3)]
    found = list(answers(model, requests, cache=tmp_path / "cache"))
    assert [reply.answer_tokens for _, reply in found] == [6] * 3
    model.ask = None  # type: ignore[method-assign,assignment]
    assert list(answers(model, requests, cache=tmp_path / "cache")) == found
    tokens, values = model.logprobs(["import os\nimport sys\n"])[0]
    assert "".join(tokens) == "import os\nimport sys\n" and sum(values) / len(values) > -4
    assert model.count("import os\nimport sys\n") == len(tokens)


VERDICTS = {
    "type": "object",
    "properties": {
        "verdicts": {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": 4, "maxItems": 4}
    },
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_verdicts_keep_to_their_schema_and_are_the_likelier_ones_of_plain_passes(kind: str) -> None:
    lm = language_model(kind)
    model = LocalModel(lm)
    reply = model.ask(Request((("user", "a dog"),), 40, top_logprobs=2, schema=VERDICTS))
    found = verdicts(reply.text, 4)
    assert found is not None and json.loads(reply.text)["verdicts"] == [int(each) for each in found]
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer("User: a dog\n\nAssistant:", add_special_tokens=False).input_ids]
    assert reply.prompt_tokens == len(ids)
    zero, one = (lm.tokenizer(digit, add_special_tokens=False).input_ids for digit in "01")
    expected = []
    for before, said in zip(['{"verdicts": [', ", ", ", ", ", "], found, strict=True):
        ids += lm.tokenizer(before, add_special_tokens=False).input_ids
        log_p = lm.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
        odds = (log_p[one[-1]] - log_p[zero[-1]]) if len(one) == 1 else None
        if odds is not None:
            assert (odds > 0) == said
            expected.append(float(odds.sigmoid()))
        ids += one if said else zero
    assert len(expected) == 4 and probabilities(reply, found) == pytest.approx(expected, abs=1e-4)
    assert reply.answer_tokens == len(reply.logprobs or ())


def test_numbers_and_texts_keep_to_their_schema_also_where_one_number_begins_another() -> None:
    model = LocalModel(language_model("gpt2"))
    number = {"type": "integer", "minimum": 0, "maximum": 10}
    many = {"type": "array", "items": number, "minItems": 9, "maxItems": 9}
    schema = {"type": "object", "properties": {"activations": many, "text": {"type": "string"}}}
    answers = []
    for seed in range(8):
        request = Request((("user", f"{seed}"),), 90, temperature=2.0, schema=schema, seed=seed)
        answers.append(json.loads(model.ask(request).text, strict=False))
        assert len(answers[-1]["activations"]) == 9 and set(answers[-1]["activations"]) <= set(range(11))
        assert isinstance(answers[-1]["text"], str)
    drawn = {value for each in answers for value in each["activations"]}
    assert {1, 10} < drawn
    assert not model.ask(Request((("user", "a dog"),), 12, schema=schema)).text.endswith("}")  # no room for nine
    text = {"type": "object", "properties": {"explanation": {"type": "string"}}}
    assert read(model.ask(Request((("user", "a dog"),), 40, temperature=2.0, schema=text)).text) is not None


def test_a_schema_that_is_no_form_leaves_the_answer_to_the_model() -> None:
    model = LocalModel(language_model("gpt2"))
    plain = model.ask(ASKED)
    for schema in ({"type": "null"}, {"enum": [0, 1]}, {"type": "array", "items": {"type": "string"}}):
        assert model.ask(replace(ASKED, schema=schema)) == plain


@pytest.mark.parametrize(
    ("text", "kept"), [('a"b', "a"), ('a\\"b', None), ('a\\\\"b', "a\\\\"), ("", None), ('"', ""), ('\\"x"y"', '\\"x')]
)
def test_a_text_ends_at_the_first_quotation_mark_that_is_not_escaped(text: str, kept: str | None) -> None:
    assert before_quote(text) == kept
