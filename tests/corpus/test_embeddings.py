"""Ids that the tokenizer has and the model's embedding lacks are an error before any pass, if a row can have them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from saelab.corpus import CorpusSettings, open_corpus
from saelab.errors import SaelabError
from saelab.lm.load import load_language_model
from saelab.lm.settings import ModelSettings
from saelab.runs.job import Job, settings_of
from tests.tiny import language_model, model_folder, text


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(text(300))
    return path


def extended(token: Any) -> Any:
    """The tiny Llama's tokenizer with one more entry, and the number of its entries before."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    n = len(tokenizer)
    tokenizer.add_tokens([token])
    assert len(tokenizer) == n + 1
    return tokenizer, n


def test_a_model_with_fewer_embeddings_than_text_gives_ids_is_refused_with_both_sizes(book: Path) -> None:
    tokenizer = language_model("llama").tokenizer
    n = len(tokenizer)
    settings = CorpusSettings(str(book), held_out=0.2)
    for embeddings in (n, n + 64, None):
        open_corpus(settings, tokenizer, 16, embeddings=embeddings)
    with pytest.raises(SaelabError, match=rf"has embeddings for {n - 1} tokens and its tokenizer has {n}"):
        open_corpus(settings, tokenizer, 16, embeddings=n - 1)


def test_entries_that_text_never_gives_may_be_beyond_the_embedding(book: Path) -> None:
    from transformers import AddedToken

    book.write_text(book.read_text() + "<|more|> " * 50)
    settings = CorpusSettings(str(book), held_out=0.2)
    tokenizer, n = extended(AddedToken("<|more|>", special=True))
    rows = [*open_corpus(settings, tokenizer, 16, embeddings=n).train_rows(seed=0)]
    assert max(int(row.max()) for row in rows) < n
    plain, _ = extended(AddedToken("more", special=False))
    with pytest.raises(SaelabError, match=rf"embeddings for {n} tokens and its tokenizer has {n + 1}"):
        open_corpus(settings, plain, 16, embeddings=n)
    tokenizer.eos_token = "<|more|>"  # every document ends with it
    with pytest.raises(SaelabError, match=rf"embeddings for {n} tokens"):
        open_corpus(settings, tokenizer, 16, embeddings=n)


def test_token_ids_beyond_the_embedding_are_refused_where_they_are_read(tmp_path: Path) -> None:
    from transformers import AddedToken

    tokenizer, n = extended(AddedToken("<|more|>", special=True))
    path = tmp_path / "ids.jsonl"
    rows = [[i % n for i in range(start, start + 16)] for start in range(0, 4000, 16)]
    rows[100][3] = n
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    settings = CorpusSettings(str(path), text_column="input_ids", held_out=0.2)
    with pytest.raises(
        SaelabError, match=rf"holds the token id {n}, but the model has 0 to {n - 1} \(its tokenizer, 0 to {n}"
    ):
        list(open_corpus(settings, tokenizer, 16, embeddings=n).train_rows(seed=0))
    list(open_corpus(settings, tokenizer, 16, embeddings=n + 1).train_rows(seed=0))


def test_a_run_knows_the_size_of_its_models_embedding(tmp_path: Path, book: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    lm = load_language_model(ModelSettings(str(folder)), "cpu")
    assert lm.embeddings == 300
    assert torch.equal(lm.model.get_input_embeddings().weight, model.get_input_embeddings().weight)  # type: ignore
    settings = {"model": str(folder), "corpus": str(book), "context": 16, "site": "blocks.1.hook_resid_post"}
    with pytest.raises(SaelabError, match="has embeddings for 300 tokens and its tokenizer has 4"):
        _ = Job(settings_of({**settings, "out": str(tmp_path / "run"), "device": "cpu"})).corpus
