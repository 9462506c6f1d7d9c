"""One notion of special tokens: by name, by mark and by spelling, the same for rows, text and figures."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from saelab.corpus import Corpus
from saelab.corpus.encoder import Encoder
from saelab.corpus.special import special_ids, special_tokens
from saelab.lm.load import load_language_model
from saelab.lm.settings import ModelSettings
from tests.corpus.made import TEXTS, make_tokenizer, opened, tokenised, write
from tests.tiny import model_folder

MARKED = ["<|eot_id|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<fim_prefix>"]
SPELT = ["<|im_start|>", "<|fim_middle|>", "<\uff5cUser\uff5c>"]
"""Added tokens that their tokenizers do not mark as special."""
TEXT = ["<tool_call>", "    ", "<table>", "<|", "||>", "<0x0A>"]


def chat_tokenizer(model: str = "bpe", **names: str):
    """A tokenizer with added tokens of each kind; none of them has a named attribute."""
    tokenizer = make_tokenizer(model, **names)
    marked = [AddedToken(name, special=True) for name in MARKED]
    tokenizer.add_tokens([*marked, *(AddedToken(name, special=False) for name in [*SPELT, *TEXT])])
    return tokenizer


def test_named_marked_and_spelt_tokens_are_special_and_other_added_tokens_are_text() -> None:
    tokenizer = chat_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>", sep_token="[SEP]")
    names = ["<s>", "</s>", "<pad>", "[SEP]", *MARKED, *SPELT]
    ids = tokenizer.convert_tokens_to_ids(names)
    assert special_tokens(tokenizer) == dict(zip(ids, names, strict=True))
    assert special_ids(tokenizer) == set(ids)


@pytest.mark.parametrize("model", ["bpe", "unigram", "words"])
def test_text_that_spells_a_marker_does_not_become_one(model: str) -> None:
    tokenizer = chat_tokenizer(model)
    text = " ".join(f"alpha {name} beta{name}" for name in [*MARKED, *SPELT, *TEXT])
    (ids,) = Encoder(tokenizer).encode([text])
    unknown = tokenizer.unk_token_id if model != "bpe" else None
    assert special_ids(tokenizer).isdisjoint(set(ids) - {unknown})
    if model == "bpe":
        assert tokenizer.decode(ids) == text
        assert set(tokenizer.convert_tokens_to_ids(TEXT)) <= set(ids), "added tokens that are text are found in it"


def test_text_that_the_tokenizer_cannot_spell_stays_in_the_rows_and_out_of_the_figures(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("words")
    corpus = opened(write(tmp_path / "a.jsonl", [f"{text} zzz{n}" for n, text in enumerate(TEXTS)]), tokenizer)
    train = np.stack(list(corpus.train_rows(seed=0)))
    assert (train == tokenizer.unk_token_id).any() and tokenizer.unk_token_id in corpus.special_ids


def chat_model(folder: Path) -> str:
    """A tiny GPT-2 whose tokenizer has `<|eot_id|>` and `<|user|>`; ids 1 and 2 are theirs instead of two bytes'."""
    folder.mkdir()
    for path in model_folder("gpt2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for i, name, special in ((1, "<|eot_id|>", True), (2, "<|user|>", False)):
        (old,) = (text for text, found in tokenizer["model"]["vocab"].items() if found == i)
        tokenizer["model"]["vocab"][name] = tokenizer["model"]["vocab"].pop(old)
        added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({"id": i, "content": name, "special": special, **added})
    tokenizer["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


def test_the_model_and_the_corpus_agree(tmp_path: Path) -> None:
    lm = load_language_model(ModelSettings(chat_model(tmp_path / "model")), "cpu")
    ids = [[0, 1, 2, *range(3 + n, 16 + n)] for n in range(50)]
    corpus = opened(write(tmp_path / "ids.jsonl", ids, "input_ids"), lm.tokenizer)
    assert set(lm.special_ids.tolist()) == corpus.special_ids == {0, 1, 2}
    assert lm.ordinary(torch.tensor(ids)).sum() == 50 * 13 and not lm.ordinary(torch.tensor(ids))[:, :3].any()
    assert len(corpus.held_out_rows(14)) == 2, "ordinary tokens are counted alike"


def test_the_fingerprint_covers_which_tokens_are_special() -> None:
    """It is part of the identity of a cache, of a state and of a result. If all special tokens have names, it is the
    fingerprint of earlier versions, to which only those were special."""
    marker = AddedToken("<|eot_id|>", special=True)
    unnamed, named, unmarked = (make_tokenizer() for _ in range(3))
    unnamed.add_tokens([marker])
    named.add_special_tokens({"sep_token": marker})
    unmarked.add_tokens([AddedToken("<|eot_id|>", special=False)])
    files = [json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (unnamed, named)]
    assert files[0] == files[1], "the names are not in this file"
    found = [Encoder(tokenizer).fingerprint for tokenizer in (make_tokenizer(), unnamed, named, unmarked)]
    assert len(set(found)) == 4
    text = json.dumps(files[1] | {"truncation": None, "padding": None}, sort_keys=True)
    assert found[2] == hashlib.blake2b(f"0 0 {text}".encode(), digest_size=16).hexdigest()


@pytest.mark.parametrize(
    ("rows", "begins"),
    [
        (tokenised(40), True),
        ([row[1:] + row[:1] for row in tokenised(40)], False),
        ([row if n % 2 else row[1:] + row[:1] for n, row in enumerate(tokenised(40))], False),
    ],
    ids=["all", "none", "some"],
)
def test_rows_of_token_ids_begin_with_bos_if_they_do(tmp_path: Path, rows: list[list[int]], begins: bool) -> None:
    corpus = opened(write(tmp_path / "ids.jsonl", rows, "input_ids"), make_tokenizer())
    assert corpus.begins_with_bos is begins and corpus.bos is None


def test_rows_of_text_begin_with_bos_if_the_tokenizer_has_one(tmp_path: Path) -> None:
    def corpus(**names: str) -> Corpus:
        return opened(write(tmp_path / "a.jsonl"), make_tokenizer(**names))

    assert corpus().begins_with_bos and corpus(eos_token="</s>").begins_with_bos
    assert not corpus(pad_token="<pad>").begins_with_bos
