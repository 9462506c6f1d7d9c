"""Every page of the explorer opens on a run that was adopted, of an autoencoder that normalises each token too."""

import json

import pytest

import saelab
from tests.app.shown import check_inert
from tests.sae.interop.peers import saelens, weights
from tests.tiny import CONTEXT, model_folder, text

PAGES = ("runs", "run", "features", "feature", "map", "prompt", "steer", "dead", "dark_matter", "attention")
PAGES += ("explanations", "audit")


@pytest.mark.slow
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_every_page_opens(explorer, tmp_path, normalisation):
    options = {"architecture": "topk", "k": 5, "normalize_activations": normalisation}
    checkpoint, book = saelens(tmp_path / "theirs", weights(32), **options), tmp_path / "book.txt"
    book.write_text(text(600))
    sizes = [
        f"context={CONTEXT}",
        "corpus.held_out=0.2",
        "eval.tokens=600",
        "eval.ce_tokens=300",
        "features.tokens=600",
    ]
    given = {"model": str(model_folder("gpt2")), "site": "blocks.1.hook_resid_post", "corpus": str(book)}
    run = saelab.adopt(checkpoint, **given, out=tmp_path / "run", overrides=sizes)
    saelab.evaluate(run)
    saelab.index(run)
    saelab.explain(run, features="0:4")
    saelab.score(run)
    for page in PAGES:
        app = explorer(run, page=page, feature="0", prompt="a fox jumps over the dog")
        check_inert(app)
        assert not app.error, (page, [each.value for each in app.error])
    assert json.loads((run / "train.json").read_text())["adopted"]["trainer"] == "SAELens"
