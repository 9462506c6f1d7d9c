"""A run for interactive use: its model and autoencoder in memory, for text that a user types.

    live = open_live("runs/quickstart")
    text = live.read("import numpy as np")
    text.at(3)                                         # the features on the fourth token

Loading takes seconds and the memory of the model. Torch is imported when a run is opened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from saelab.analysis.short_text import ShortText
from saelab.errors import SaelabError
from saelab.features.database import Database
from saelab.features.token_bytes import token_bytes
from saelab.features.vocabulary import as_text
from saelab.runs import folder

if TYPE_CHECKING:
    from saelab.analysis.attention.circuit import Circuit
    from saelab.analysis.attention.prompt import Prompt
    from saelab.analysis.settings import Intervention
    from saelab.analysis.steering import Steering
    from saelab.corpus.encoder import Encoder
    from saelab.lm.lens import Lens
    from saelab.lm.model import LanguageModel
    from saelab.sae.model import SparseAutoencoder


@dataclass(frozen=True, eq=False)
class Live:
    """The model and the autoencoder of a run; `open_live` makes it. Its methods may be called from several threads."""

    lm: "LanguageModel"
    sae: "SparseAutoencoder"
    site: str
    encoder: "Encoder"
    target: str | None = None
    """The site that a transcoder reconstructs."""
    more_sites: tuple[str, ...] = ()
    """Further sites of a crosscoder."""
    lock: Lock = field(default_factory=Lock)
    """Passes with hooks on a shared model must not overlap."""

    @cached_property
    def _bytes(self) -> list[bytes]:
        return token_bytes(self.lm.tokenizer, self.lm.embeddings)

    def token_ids(self, text: str, bos: bool = True) -> list[int]:
        """The token ids of a text, after BOS if `bos` and if the tokenizer has one.

        Raises SaelabError if the text has no token, more than the model takes, or one that the model does not know.
        """
        ids = next(self.encoder.encode([text]))
        if bos and self.encoder.bos is not None:
            ids = [self.encoder.bos, *ids]
        most = self.lm.max_context
        if most is not None and len(ids) > most:
            raise SaelabError(
                f"The text has {len(ids):,} tokens, and {self.lm.name} takes at most {most:,}; shorten it."
            )
        if not ids:
            raise SaelabError("The text has no token; type something, or begin with BOS.")
        return ids

    def tokens(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each of consecutive tokens."""
        return as_text([self._bytes[token] for token in token_ids])

    def read(self, text: str, bos: bool = True) -> ShortText:
        """The features on a text that a user typed. Raises SaelabError if it has no token, or too many."""
        return self.encode(self.token_ids(text, bos))

    def encode(self, token_ids: Sequence[int]) -> ShortText:
        """The features on a row of token ids. Raises SaelabError if activations are NaN or infinite."""
        import torch

        from saelab.activations.sites import Sites
        from saelab.encoded import encoded

        sites = Sites(self.site, self.target, self.more_sites)
        rows = torch.tensor([list(token_ids)], device=self.lm.device)
        counts, norms, errors = np.zeros(len(token_ids), np.int64), *np.zeros((2, len(token_ids)), np.float32)
        features, values = np.zeros(0, np.int64), np.zeros(0, np.float32)
        with self.lock:
            for block in encoded(self.sae, self.lm, rows, sites, 1):  # one, or none if all tokens are special
                order = (block.codes.row_of_entry() * self.sae.n_features + block.codes.features).argsort()
                features = block.codes.features[order].long().cpu().numpy()
                values = block.codes.values[order].float().cpu().numpy()
                at = block.positions.cpu().numpy()
                counts[at] = block.codes.l0().cpu().numpy()
                norms[at] = block.output.norm(dim=1).cpu().numpy()
                errors[at] = (block.output - self.sae.decode(block.codes, block.x)).norm(dim=1).cpu().numpy()
        offsets = np.concatenate([[0], np.cumsum(counts)])
        return ShortText(np.array(token_ids), self.tokens(token_ids), offsets, features, values, norms, errors)

    @cached_property
    def lens(self) -> "Lens | None":
        """From features to logits (`saelab.lm.attention.direct_lens`); None if logits are not linear in them."""
        from saelab.lm.attention import direct_lens

        with self.lock:
            return None if self.more_sites else direct_lens(self.lm, self.target or self.site)

    def next_token(self, token_ids: Sequence[int]) -> int:
        """The token that the model expects most after these."""
        import torch

        with self.lock:
            return int(self.lm.logits(torch.tensor([list(token_ids)], device=self.lm.device))[0, -1].argmax())

    def logit_effects(self, text: ShortText, token: int, target: int) -> np.ndarray | None:
        """The direct effect of each feature on a token on the logit of the token id `target` there, ``[features]``.

        It is activation times decoder row, through the final norm with its scale in the clean run, times the
        unembedding of `target`: what the logit would lose without the feature if no later layer read it. In the order
        of ``text.at(token)``. None without a `lens`.
        """
        import torch

        from saelab.lm.lens import norm_scale

        features, values = text.at(token)
        lens = self.lens
        if lens is None:
            return None
        with self.lock, torch.no_grad():
            directions = self.sae.W_dec[torch.from_numpy(features).to(self.lm.device)].float()
            logits = lens.at_head(directions) @ lens.unembedding[target].float()
            scale = norm_scale(self.lm, lens, torch.from_numpy(text.token_ids[None]))[0, token]
            return values * (logits / scale).cpu().numpy()

    def circuit(self, runs: Sequence[Path] = ()) -> "Circuit":
        """This autoencoder and those of other `runs` of the model, for attribution from layer to layer.

        Runs whose model or site does not fit are left out; of two runs of one site, the first counts. Raises
        SaelabError if this run's site is not ``blocks.N.attn.hook_z``, or if the model's attention cannot be taken
        apart.
        """
        from saelab.analysis.attention.circuit import open_circuit, takes_part
        from saelab.analysis.attention.prompt import check_heads
        from saelab.sae.checkpoint import load

        check_heads(self.sae, self.lm, self.site)
        saes = {self.site: self.sae}
        for run in runs:
            sae = load(run, self.lm.device)
            site = sae.metadata.get("hook_name")
            model = (sae.metadata.get("saelab") or {}).get("model_fingerprint")
            if (
                site is not None
                and takes_part(site)
                and model == self.lm.fingerprint
                and not sae.transcodes
                and len(sae.site_widths) == 1
            ):
                saes.setdefault(site, sae)
        with self.lock:
            return open_circuit(self.lm, saes)

    def attend(self, circuit: "Circuit", token_ids: Sequence[int]) -> "Prompt":
        """A row of token ids as attribution reads it."""
        with self.lock:
            return circuit.read(token_ids)

    def steer(self, token_ids: Sequence[int], interventions: "Sequence[Intervention]", **options: Any) -> "Steering":
        """A clean and a steered continuation; `options` are those of `saelab.analysis.steering.steer`."""
        from saelab.analysis.steering import steer

        with self.lock:
            return steer(self.sae, self.lm, token_ids, interventions, self.site, **options)


def open_live(run: Path | str) -> Live:
    """The model and the autoencoder of the run in a folder, on the device of its settings.

    Raises SaelabError if there is no checkpoint, if the model cannot be loaded or is not the one of the training, or if
    the site has another width than the autoencoder.
    """
    from saelab.corpus.encoder import Encoder
    from saelab.runs.job import Job, settings_of
    from saelab.runs.reopen import check_width
    from saelab.sae.checkpoint import load

    run = Path(run)
    folder.check_run(run)
    job = Job(settings_of(run / folder.SETTINGS))
    sae = load(run, job.lm.device)
    trained = sae.metadata.get("saelab") or {}
    for lm, name in zip(job.lm.models, ("model_fingerprint", "second_model_fingerprint"), strict=False):
        if trained.get(name) not in (None, lm.fingerprint):
            raise SaelabError(
                f"{run}: the model {lm.name} is not what it was in training, so the autoencoder does not fit it; "
                "restore its files"
            )
    check_width(run, job, sae)
    return Live(job.lm, sae, job.settings.site, Encoder(job.lm.tokenizer), job.settings.target, job.settings.more_sites)


def text_at(database: Database, row: int) -> ShortText:
    """A row of a database's text with its features; needs no model. Raises SaelabError if there is no such row."""
    database.at(row, 0)
    facts, context = database.facts, database.facts.rows.shape[1]
    found = [facts.at(row, position) for position in range(context)]
    ids = np.array(facts.rows[row], np.int64)
    return ShortText(
        token_ids=ids,
        tokens=database.vocabulary.window(ids),
        offsets=np.concatenate([[0], np.cumsum([len(at.features) for at in found])]),
        features=np.concatenate([at.features for at in found]).astype(np.int64),
        values=np.concatenate([at.values for at in found]),
    )
