"""The bytes of a text's ids, joined, are the text, for every kind of tokenizer."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from saelab.demo import MODEL
from saelab.features.token_bytes import token_bytes

TEXTS = (
    "\u65e5\u672c\u8a9e\u306e\u6587\u3002 caf\u00e9 na\u00efve \u00c9",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 and \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "a\0b\tdef f(x):\n    return  x ** 2\r\n",
    "<0x41> \u0120x \u00c3\u00a9 x" + 3000 * "\u8a9e" + " unaffordable",
)
LETTERS = sorted({letter for text in TEXTS for letter in text} - {" "})
LONG = "x" + 3000 * "\u8a9e"
BLANK = "\u2581"


def byte_level(form: str) -> Tokenizer:
    """GPT-2's kind; `form` is where its table stands."""
    tokenizer = Tokenizer(models.BPE())
    table = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=form != "sequence")
    split = pre_tokenizers.Split("\n", "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, table]) if form == "sequence" else table
    if form == "normalizer":
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.ByteLevel(), split
    if form != "no decoder":
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel()]) if form == "sequence" else decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return tokenizer


def sentencepiece(prefix: bool) -> Tokenizer:
    """Llama 2's kind, with a byte for each character that is no piece; Gemma's has no prefix."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), BLANK, *"abcdefx\u65e5", BLANK + "a", BLANK * 2]
    merges = [(BLANK, "a"), (BLANK, BLANK)]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    replace = normalizers.Replace(" ", BLANK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), replace]) if prefix else replace
    steps = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def metaspace(kind: str) -> Tokenizer:
    """T5's kind, and the same with BPE; all letters are pieces, because nothing stands for others."""
    pieces = ["<unk>", BLANK, *LETTERS, LONG, BLANK + "x", "<0x41>"]
    model = (
        models.Unigram([(piece, -float(len(piece) < 3)) for piece in pieces], 0, False)
        if kind == "unigram"
        else models.BPE({piece: i for i, piece in enumerate(pieces)}, [(BLANK, "x")], unk_token="<unk>")
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return tokenizer


def spaces_in_pieces() -> Tokenizer:
    return Tokenizer(
        models.Unigram([("<unk>", 0.0), (" ", -1.0), (" x", -1.0), *((c, -1.0) for c in LETTERS)], 0, False)
    )


def demo() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def loaded(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def joined(tokenizer: Any, text: str) -> str:
    vocabulary = token_bytes(tokenizer, len(tokenizer))
    return b"".join(vocabulary[i] for i in tokenizer.encode(text, add_special_tokens=False)).decode()


EXACT: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level("plain"),
    "byte-level in a sequence": lambda: byte_level("sequence"),
    "byte-level normalizer": lambda: byte_level("normalizer"),
    "byte-level without decoder": lambda: byte_level("no decoder"),
    "byte fallback": lambda: sentencepiece(False),
    "spaces in pieces": spaces_in_pieces,
    "demo": demo,
}
WITH_PREFIX: dict[str, Callable[[], Tokenizer]] = {
    "byte fallback": lambda: sentencepiece(True),
    "unigram": lambda: metaspace("unigram"),
    "bpe": lambda: metaspace("bpe"),
}


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("text", TEXTS, ids=["japanese", "emoji", "blanks", "signs"])
def test_the_bytes_of_a_text_are_the_text(kind: str, text: str) -> None:
    assert joined(loaded(EXACT[kind]()), text) == text


@pytest.mark.parametrize("kind", WITH_PREFIX)
@pytest.mark.parametrize("text", TEXTS, ids=["japanese", "emoji", "blanks", "signs"])
def test_sentencepiece_puts_a_space_in_front_of_a_text(kind: str, text: str) -> None:
    assert joined(loaded(WITH_PREFIX[kind]()), text) == " " + text


@settings(max_examples=60, deadline=None)
@given(st.text())
@pytest.mark.parametrize("kind", ["byte-level in a sequence", "byte fallback", "demo"])
def test_any_text_comes_back(kind: str, text: str) -> None:
    assert joined(_once(kind), text) == text


_made: dict[str, Any] = {}


def _once(kind: str) -> Any:
    return _made.setdefault(kind, loaded(EXACT[kind]()))


def wordpiece(cleanup: bool) -> Tokenizer:
    pieces = ["[UNK]", "[CLS]", "un", "##afford", "##able", "\u65e5", "##\u672c", "caf\u00e9", ",", LONG]
    tokenizer = Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]", max_input_chars_per_word=9999)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    return tokenizer


def test_words_of_wordpiece_have_a_space_in_front_as_its_decoder_writes_it() -> None:
    text = f"unaffordable,   un \u65e5\u672c caf\u00e9 {LONG}"
    assert joined(loaded(wordpiece(True)), text) == f" unaffordable, un \u65e5\u672c caf\u00e9 {LONG}"
    assert joined(loaded(wordpiece(False)), text) == f" unaffordable , un \u65e5\u672c caf\u00e9 {LONG}"


def test_words_that_end_with_a_sign_have_a_space_after() -> None:
    pieces = ["<unk>", *"abc", "a</w>", "b</w>", "c</w>"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    assert joined(loaded(tokenizer), "abc  ab a") == "abc ab a "


def test_words_of_a_tokenizer_without_a_decoder_have_the_space_that_decode_writes() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert joined(loaded(tokenizer), "the  cat") == " the cat"


ALL = (
    EXACT | {f"{kind} with prefix": make for kind, make in WITH_PREFIX.items()} | {"wordpiece": lambda: wordpiece(True)}
)


@pytest.mark.parametrize("kind", ALL)
def test_added_and_special_tokens_are_their_content_and_other_ids_their_number(kind: str) -> None:
    tokenizer = loaded(ALL[kind]())
    n = len(tokenizer)
    # Letters of the byte table, SentencePiece's sign in a special token, WordPiece's sign, blanks, 10 kB, NUL.
    added = ["caf\u00e9\u0120\u00c3\u00a9", "<\uff5cbegin\u2581of\uff5c>", "##\u0120x", "  \t", "\u8a9e" * 3334, "\0"]
    for content in added:
        tokenizer.add_tokens([AddedToken(content, special="\uff5c" in content, normalized=False)])
    ids = [tokenizer.convert_tokens_to_ids(content) for content in added]
    found = token_bytes(tokenizer, n + 10)
    assert len(found) == n + 10
    assert [found[i].decode() for i in ids] == added
    assert found[len(tokenizer) :] == [f"<{i}>".encode() for i in range(len(tokenizer), n + 10)]
    assert token_bytes(tokenizer, 3) == found[:3]
    text = "".join(added)
    if kind != "wordpiece" and "with prefix" not in kind:
        assert b"".join(found[i] for i in tokenizer.encode(text, add_special_tokens=False)).decode() == text


def test_runs_of_spaces_that_gemma_adds_are_spaces() -> None:
    tokenizer = loaded(sentencepiece(False))
    tokenizer.add_tokens([AddedToken(BLANK * 2, normalized=False), AddedToken(BLANK * 3, normalized=False)])
    assert joined(tokenizer, "a  b   c") == "a  b   c"
    assert token_bytes(tokenizer, len(tokenizer))[-1] == b"   "


def test_an_id_that_no_token_has_is_its_number() -> None:
    tokenizer = loaded(Tokenizer(models.WordLevel({"[UNK]": 0, "the": 5}, "[UNK]")))
    assert token_bytes(tokenizer, 7) == [b"[UNK]", b"<1>", b"<2>", b"<3>", b"<4>", b"the", b"<6>"]
