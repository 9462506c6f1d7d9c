"""What a notebook prints of an object: one short line, without numbers of tensors."""

from pathlib import Path

import torch

from saelab.activations.cache.reader import open_cache
from saelab.activations.settings import StreamSettings
from saelab.activations.source import FromCache, FromModel
from saelab.codes import Codes
from saelab.corpus import CorpusSettings, open_corpus
from saelab.features.database import open_database
from saelab.sae.new import bare_autoencoder
from saelab.sae.settings import AffinitySettings, SaeSettings
from tests.activations.cache import made
from tests.features.dense import made_up, write_database
from tests.tiny import CONTEXT, language_model, text

SITE = "blocks.1.hook_resid_post"


def test_objects_say_what_they_are_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "book\n.txt").write_text(text(100))
    lm = language_model("gpt2")
    corpus = open_corpus(CorpusSettings(str(tmp_path / "book\n.txt")), lm.tokenizer, CONTEXT)
    source = FromModel(lm, corpus, SITE, StreamSettings(80, 4), batch_tokens=40, seed=0, gradients=True)
    batch = next(source)
    made.write(tmp_path / "cache", made.identity(gradients=True))
    cache = open_cache(tmp_path / "cache")
    cached = FromCache(cache, made.SITE, batch_tokens=50, seed=0, buffer_tokens=100)
    cached.close()
    z, tokens = made_up(4, 8, 9, 5)
    database = open_database(write_database(tmp_path / "features", z, tokens, [b"<s>", b"a", b"b", b"c", b"d"]))
    codes = Codes.from_topk(torch.rand(3, 2), torch.tensor([[0, 1]] * 3), 5)
    for shown, parts in (
        (repr(lm), (lm.name, "parameters", "float32 on cpu", "sites")),
        (repr(corpus), ("book\\n.txt", f"context {CONTEXT}", f"BOS {corpus.bos}")),
        (repr(source), (SITE, lm.name, "batches of 40 tokens", "group 0", "epoch 0")),
        (repr(batch), ("40 tokens", "d_in 32", "float32 on cpu", "with gradients")),
        (repr(cache), (str(cache.folder), f"{cache.tokens:,} tokens", "float32", made.SITE, "with gradients")),
        (repr(cached), (made.SITE, str(cache.folder), "batches of at most 50 tokens")),
        (repr(database), (str(database.folder), "9 features", database.site, database.model, f"{database.n_tokens} t")),
        (repr(database.facts), (str(database.folder),)),
        (repr(codes), ("3 tokens", "5 features", "6 entries", "float32 on cpu")),
    ):
        assert all(part in shown for part in parts), shown
        assert "\n" not in shown and "tensor(" not in shown and len(shown) < 400


def test_a_new_autoencoder_prints_its_method() -> None:
    sae = bare_autoencoder(SaeSettings(16, 2, affinity=AffinitySettings("gradient")), 8)
    for part in (
        "d_in 8, 16 features",
        "float32 on cpu",
        "encoder linear, affinity gradient, allocation token_choice",
        "k 2",
    ):
        assert part in repr(sae)
