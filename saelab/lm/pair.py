"""Two language models that read the same token ids, such as a base model and a fine-tuned one, as one model.

A site `NAME@second` is the site `NAME` of the second model. All else is the first model's: its tokenizer makes the
rows, and its special tokens are left out at the sites of both.
"""

from collections.abc import Iterable

from torch import Tensor

from saelab.corpus.encoder import Encoder
from saelab.corpus.special import special_ids
from saelab.errors import SaelabError
from saelab.lm.model import LanguageModel
from saelab.lm.settings import SECOND, is_second, models_in_words
from saelab.lm.sites import Site


class ModelPair(LanguageModel):
    """`first`, with `second` beside it. A pass runs one model after the other, each up to its last site."""

    def __init__(self, first: LanguageModel, second: LanguageModel) -> None:
        """`second` takes over the special tokens of `first`.

        Raises SaelabError, with the first difference, if the ids of a text mean other tokens to `second`.
        """
        vars(self).update(vars(first))
        _check_vocabulary(first, second)
        second.special_ids = first.special_ids.to(second.device)
        self._pair = (first, second)
        self.name = models_in_words(first.name, second.name)
        contexts = [model.max_context for model in self.models if model.max_context is not None]
        self.max_context = min(contexts, default=None)

    def __repr__(self) -> str:
        return f"ModelPair({', '.join(map(repr, self.models))})"

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        return self._pair

    @property
    def embeddings(self) -> int:
        return min(model.embeddings for model in self.models)

    def owner(self, site: str) -> tuple[LanguageModel, str]:
        return self.models[is_second(site)], site.removesuffix(SECOND)

    def site(self, name: str) -> Site:
        model, own = self.owner(name)
        return model.site(own)

    def activations(self, rows: Tensor, sites: Iterable[str]) -> dict[str, Tensor]:
        found = {}
        for model, names in self._divided(sites):
            for name, value in model.activations(rows, [own for _, own in names]).items():
                found |= {site: value.to(self.device) for site, own in names if own == name}
        return found

    def activations_and_gradients(
        self, rows: Tensor, sites: Iterable[str]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As `LanguageModel.activations_and_gradients`, each gradient being that of the loss of the site's model."""
        values, gradients = {}, {}
        for model, names in self._divided(sites):
            parts = model.activations_and_gradients(rows, [own for _, own in names])
            for found, part in zip((values, gradients), parts, strict=True):
                found |= {site: part[own].to(self.device) for site, own in names}
        return values, gradients

    def _divided(self, sites: Iterable[str]) -> list[tuple[LanguageModel, list[tuple[str, str]]]]:
        """Each model that has some of `sites`, with their names here and there."""
        names = list(dict.fromkeys(sites))
        parts = [[(site, self.owner(site)[1]) for site in names if is_second(site) == second] for second in (0, 1)]
        return [(model, part) for model, part in zip(self.models, parts, strict=True) if part]


def _check_vocabulary(first: LanguageModel, second: LanguageModel) -> None:
    """Raises SaelabError unless each id that rows may have is the same token of both, and `second` has an embedding
    for it.

    Special tokens besides BOS and EOS do not occur in rows of text, so those of a chat model may differ.
    """
    encoder = Encoder(first.tokenizer)
    control = special_ids(first.tokenizer) - {encoder.bos, encoder.eos}
    ours, theirs = ({i: token for token, i in lm.tokenizer.get_vocab().items()} for lm in (first, second))
    for i in sorted(ours.keys() - control):
        if theirs.get(i) != ours[i]:
            there = "nothing" if i not in theirs else repr(theirs[i][:40])
            raise SaelabError(
                f"second_model: the models read different tokens: id {i} is {ours[i][:40]!r} in {first.name} and "
                f"{there} in {second.name}; choose two models with one vocabulary"
            )
    if encoder.last_id >= second.embeddings:
        raise SaelabError(
            f"second_model: {second.name} has embeddings for {second.embeddings:,} tokens, and the text may have ids "
            f"up to {encoder.last_id:,}; choose two models with one vocabulary"
        )
