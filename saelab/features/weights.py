"""What the weights say of each feature, without any text: the tokens that it promotes, and its neighbours."""

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from saelab.features.statistics import lists
from saelab.lm.model import LanguageModel
from saelab.lm.selfcheck import in_residual_stream
from saelab.sae.model import SparseAutoencoder

LIST_LENGTH = 10
"""Top and bottom logits, and neighbours, per feature."""
LOGIT_ROWS = 256
"""Features whose logits are computed at once."""
COSINES = 1 << 26
"""Most cosines computed at once, 256 MB."""


@torch.no_grad()
def top_logits(sae: SparseAutoencoder, lm: LanguageModel, site: str, vocabulary: list[str]) -> dict[str, pa.Array]:
    """The tokens whose logit each decoder row raises or lowers most: the product of W_dec and the unembedding.

    The final norm is left out, as in a plain logit lens. The lists are empty if the site is not `in_residual_stream`,
    because then the product means nothing.
    """
    unembedding = lm.unembedding.float()
    columns: dict[str, pa.Array] = {}
    fits = unembedding.shape[1] == sae.d_in and in_residual_stream(lm, site)
    n = min(LIST_LENGTH, len(unembedding)) if fits else 0
    tops: dict[str, list[Tensor]] = {"top": [], "bottom": []}
    ids: dict[str, list[Tensor]] = {"top": [], "bottom": []}
    for rows in sae.W_dec.float().split(LOGIT_ROWS):
        logits = rows @ unembedding.T if fits else rows.new_empty(len(rows), 0)
        for end in tops:
            top = logits.topk(n, dim=1, largest=end == "top")
            tops[end].append(top.values.cpu())
            ids[end].append(top.indices.cpu())
    for end in tops:
        strings = pa.array(vocabulary, pa.string()).take(pa.array(torch.cat(ids[end]).flatten().numpy()))
        columns[f"{end}_logit_tokens"] = lists(strings, n, sae.n_features)
        columns[f"{end}_logits"] = lists(pa.array(torch.cat(tops[end]).flatten().numpy()), n, sae.n_features)
    return columns


@torch.no_grad()
def neighbours(W_dec: Tensor) -> dict[str, pa.Array]:
    """For each feature, the other features whose decoder rows have the largest cosine with its own."""
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    n = min(LIST_LENGTH, len(unit) - 1)
    found, cosines = [], []
    for block in unit.split(max(1, min(1024, COSINES // len(unit)))):
        own = torch.arange(len(block), device=block.device)
        cosine = block @ unit.T
        cosine[own, own + sum(map(len, found))] = -torch.inf
        top = cosine.topk(n, dim=1)
        found.append(top.indices.int().cpu())
        cosines.append(top.values.cpu())
    return {
        "neighbours": lists(pa.array(torch.cat(found).flatten().numpy()), n, len(unit)),
        "neighbour_cosines": lists(pa.array(torch.cat(cosines).flatten().numpy()), n, len(unit)),
    }


def displayed_vocabulary(tokenizer: Any, size: int) -> list[str]:
    """Every token id below `size` as text: bytes that alone are not UTF-8 as U+FFFD, ids without a token as <id>."""
    n = len(tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(list(range(n)))
    decoded = tokenizer.batch_decode([[i] for i in range(n)], clean_up_tokenization_spaces=False)
    # SentencePiece marks a leading space with U+2581, and decoding a single token loses it
    shown = [p.replace("\u2581", " ") if p and "\u2581" in p else d for p, d in zip(pieces, decoded, strict=True)]
    return shown + [f"<{i}>" for i in range(n, size)]
