"""A language model on this machine, as a `Client` that is asked and as a `BaseModel` that gives log-probabilities.

Messages go through the tokenizer's chat template; a tokenizer without one, as of a base model, gets

    the system's text, a blank line, then "User: ..." and "Assistant: ..." in turns

and its answer ends where it begins a turn of the user. Text that spells a special token of the model, such as
``<|im_end|>``, does not become one, or a window of text could end its block: a blank is put into it.

Nothing but the model decides the answer: settings in its folder, such as a repetition penalty, are not used. An answer
keeps to its schema (`form.py`): what the schema fixes is written for the model, which chooses among what it allows.
"""

import inspect
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from saelab.autointerp.llm.form import Part, before_quote, parts
from saelab.autointerp.llm.protocol import Reply, Request
from saelab.corpus.special import special_tokens
from saelab.errors import SaelabError, brief
from saelab.lm.load import load_language_model
from saelab.lm.model import LOGITS_AT_ONCE, LanguageModel
from saelab.lm.settings import ModelSettings

Alternatives = tuple[tuple[str, float], ...]
"""The likeliest tokens, each with its log-probability."""
_TURN = "\nUser:"
"""Ends the answer of a model without chat template."""


def load_local_model(settings: ModelSettings, device: str = "auto") -> "LocalModel":
    """The model of `settings` on `device`, loaded like any other. Raises SaelabError if it cannot be loaded."""
    return LocalModel(load_language_model(settings, device))


class LocalModel:
    """A language model that is asked one question at a time. May be called from several threads."""

    concurrency = 1

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        precision = "" if lm.dtype == torch.float32 else f", {str(lm.dtype).removeprefix('torch.')}"
        self.name = f"{PurePath(lm.name).name} ({lm.fingerprint[:8]}{precision})"
        self._tokenizer = lm.tokenizer
        self._lock = threading.Lock()
        names = sorted(special_tokens(lm.tokenizer).values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, filter(None, names))) or r"(?!)")
        self._last = _ending_ids(lm)
        takes = inspect.signature(lm.model.forward).parameters
        self._only_last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._remembers = "past_key_values" in takes

    def __repr__(self) -> str:
        return f"LocalModel({self.name})"

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._ids(text))

    def ask(self, request: Request) -> Reply:
        """The answer; the likeliest token at each step if the temperature is 0, else sampled with the request's seed.

        Log-probabilities are those of the model, at temperature 1. Raises SaelabError if the prompt leaves no room in
        the model's context, and if the chat template refuses the messages.
        """
        prompt, plain = self._prompt(request)
        room = request.max_tokens if self.lm.max_context is None else self.lm.max_context - len(prompt)
        if room < 1:
            raise SaelabError(
                f"{self.name}: the prompt has {len(prompt):,} tokens, and the model takes {self.lm.max_context:,} with "
                "the answer; show fewer or shorter windows, or choose another model"
            )
        with self._lock:
            ids, alternatives = self._written(prompt, min(room, request.max_tokens), request, plain)
        text = self._text(ids)
        if plain and _TURN in text:
            text = text.split(_TURN)[0]
            ids = ids[: next(n for n in range(len(ids) + 1) if len(self._text(ids[:n])) >= len(text))]
        logprobs = tuple(alternatives[: len(ids)]) if request.top_logprobs else None
        return Reply(text.strip() if plain else text, logprobs, len(prompt), len(ids))

    @torch.no_grad()
    def logprobs(self, texts: list[str]) -> list[tuple[list[str], list[float]]]:
        """For each text its tokens, which together are the text, and their log-probabilities; see `BaseModel`.

        The model reads BOS before each text if its tokenizer has one; the first token's log-probability is 0 all the
        same. Texts are passed in batches of similar length. Memory: at most three float32 copies of ``2**26`` logits,
        or of the logits of one text.
        """
        encoded = [self._encoded(text) for text in texts]
        ids = [self._after_bos(each) for _, each in encoded]
        found: list[list[float]] = [[] for _ in texts]
        for batch in self._batches([len(each) for each in ids]):
            rows = torch.zeros(len(batch), max(1, *(len(ids[i]) for i in batch)), dtype=torch.long)
            for row, i in zip(rows, batch, strict=True):
                row[: len(ids[i])] = torch.tensor(ids[i])  # what follows a token does not change its logits
            with self._lock:
                logits = self.lm.logits(rows).float()[:, :-1]
            picked = logits.gather(-1, rows[:, 1:, None].to(logits.device))[..., 0] - logits.logsumexp(-1)
            for row, i in zip(picked.tolist(), batch, strict=True):
                first = len(ids[i]) - len(encoded[i][1])
                found[i] = [0.0, *row[first : len(ids[i]) - 1]] if encoded[i][1] else []
        return [(tokens if values else [], values) for (tokens, _), values in zip(encoded, found, strict=True)]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of the texts that fit, longest first, so many that their padded logits are at most LOGITS_AT_ONCE."""
        most = LOGITS_AT_ONCE // self.lm.embeddings
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if self.lm.max_context is not None and lengths[i] > self.lm.max_context:
                continue
            if batch and (len(batch) + 1) * lengths[batch[0]] > most:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _encoded(self, text: str) -> tuple[list[str], list[int]]:
        """A text's tokens, as parts of it, and their ids; no part of it becomes a special token.

        A character that takes several tokens is in the first of them, and the others are empty.
        """
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        found = self._tokenizer(text, **options)
        ends = [end for _, end in found.offset_mapping]
        ends[-1:] = [len(text)] * bool(ends)
        begins = [0, *ends][: len(ends)]
        return [text[begin:end] for begin, end in zip(begins, ends, strict=True)], list(found.input_ids)

    def _after_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _prompt(self, request: Request) -> tuple[list[int], bool]:
        """Token ids of the messages, and whether they are in the plain form."""
        messages = [
            (role, self._special.sub(lambda name: f"{name[0][0]} {name[0][1:]}", t)) for role, t in request.messages
        ]
        if getattr(self._tokenizer, "chat_template", None):
            text = self._templated(messages)
            return self._ids(text), False
        turns = [text if role == "system" else f"{role.capitalize()}: {text}" for role, text in messages]
        text = "\n\n".join([*turns, "Assistant:"])
        return self._after_bos(self._ids(text)), True

    def _templated(self, messages: list[tuple[str, str]]) -> str:
        systems = [text for role, text in messages if role == "system"]
        turns = [(role, text) for role, text in messages if role != "system"]
        without = [(role, "\n\n".join([*systems, text]) if not i else text) for i, (role, text) in enumerate(turns)]
        error: Exception | None = None
        for form in (messages, without):  # some templates refuse a system message
            try:
                chat = [{"role": role, "content": text} for role, text in form]
                return self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            except Exception as problem:  # whatever the template raises
                error = error or problem
        why = brief(error) if error else ""
        raise SaelabError(f"{self.name}: its chat template refuses the messages ({why}); choose another model")

    @torch.no_grad()
    def _written(
        self, prompt: list[int], most: int, request: Request, plain: bool
    ) -> tuple[list[int], list[Alternatives]]:
        """Ids of the answer, without the token that ends it, and the alternatives to each."""
        after, generator = _Reader(self), torch.Generator().manual_seed(request.seed)
        pick = partial(_picked, temperature=request.temperature, generator=generator)
        form = parts(request.schema) if request.schema is not None else None
        if form is not None:
            return self._filled(form, prompt, most, request.top_logprobs, after, pick)
        ids: list[int] = []
        alternatives: list[Alternatives] = []
        while len(ids) < most and not (plain and _TURN in self._text(ids[-8:])):
            log_p = after(ids[-1:] or prompt)
            token = pick(log_p)
            if token in self._last:
                break
            ids.append(token)
            alternatives.append(self._alternatives(log_p, request.top_logprobs))
        return ids, alternatives

    def _filled(
        self, form: list[Part], prompt: list[int], most: int, top: int, after: "_Reader", pick: Callable[[Tensor], int]
    ) -> tuple[list[int], list[Alternatives]]:
        """The same of an answer in a form: the model is asked only where there is something to choose.

        Alternatives are then those that the form allows; a token without any has log-probability 0. The model reads at
        most `most` tokens of its answer: a text is closed there, and an answer with more to choose ends.
        """
        ids: list[int] = []
        alternatives: list[Alternatives] = []
        unread = list(prompt)

        def write(token: int, log_p: Tensor | None = None) -> None:
            ids.append(token)
            unread.append(token)
            only = ((self._tokenizer.decode([token]), 0.0),) if top else ()
            alternatives.append(only if log_p is None else self._alternatives(log_p, top))

        def read() -> Tensor:
            log_p = after(unread)
            unread.clear()
            return log_p

        for part, following in zip(form, [*form[1:], ""], strict=True):
            if isinstance(part, str):
                for token in self._ids(part):
                    write(token)
            elif part is None:
                begin = len(ids)
                while len(ids) < most:
                    log_p = read()
                    token = pick(log_p)
                    text = self._text([*ids[begin:], token])
                    if token in self._last:
                        break
                    if (kept := before_quote(text)) is not None:
                        for each in self._ids(kept[len(self._text(ids[begin:])) :]):
                            write(each)
                        break
                    write(token, log_p)
            elif len(ids) >= most:
                break
            else:
                end = self._ids(str(following))[0]  # tells 1 from the beginning of 10
                options, depth = [[*self._ids(option), end] for option in part], 0
                while True:
                    allowed = sorted({option[depth] for option in options})
                    log_p, token = None, allowed[0]
                    if len(allowed) > 1:
                        found = read()
                        log_p = torch.full_like(found, -math.inf)
                        log_p[allowed] = found[allowed]
                        token = pick(log_p)
                    options = [option for option in options if option[depth] == token]
                    depth += 1
                    if depth == len(options[0]):
                        break
                    write(token, log_p)
        return ids, alternatives

    def _alternatives(self, log_p: Tensor, n: int) -> Alternatives:
        """The `n` likeliest tokens, without impossible ones."""
        top = log_p.topk(min(n, len(log_p)))
        names = [self._tokenizer.decode([i]) for i in top.indices.tolist()]
        return tuple((name, p) for name, p in zip(names, top.values.tolist(), strict=True) if p > -math.inf)

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


class _Reader:
    """Reads one text from the beginning, some tokens at a time."""

    def __init__(self, model: LocalModel) -> None:
        self.lm, self.remembers, self.only_last = model.lm, model._remembers, model._only_last
        self.past: Any = None
        self.ids: list[int] = []

    def __call__(self, new: Sequence[int]) -> Tensor:
        """Log-probabilities of the token after `new`, at least one token more of the text, ``[vocabulary]``."""
        self.ids += new
        rows = torch.tensor([self.ids if self.past is None else list(new)], device=self.lm.device)
        cache = {"past_key_values": self.past, "use_cache": True} if self.remembers else {}
        found = self.lm.model(input_ids=rows, **cache, **self.only_last)
        self.past = getattr(found, "past_key_values", None) if self.remembers else None  # None: it reads all again
        return found.logits[0, -1].float().log_softmax(-1).cpu()


def _picked(log_p: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(log_p.argmax())
    return int(torch.multinomial((log_p / temperature).softmax(-1), 1, generator=generator))


def _ending_ids(lm: LanguageModel) -> frozenset[int]:
    """The tokens that end an answer: those that the tokenizer or the model's settings name."""
    settings = (getattr(lm.model, "generation_config", None), lm.model.config, lm.tokenizer)
    named = [getattr(each, "eos_token_id", None) for each in settings]
    return frozenset(i for each in named for i in (each if isinstance(each, list) else [each]) if i is not None)
