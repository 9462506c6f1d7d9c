"""What a training or a cache needs of memory and disk, and whether it is there, before anything is allocated.

Most needs are the sizes of tensors. What a pass of the model holds is found by running it without numbers: the model's
own code decides which tensors there are, and no memory is taken. Left out are the program itself, which is loaded by
then, and what libraries use inside a single operation.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from saelab.activations.cache.layout import (
    BLOCK_TOKENS,
    TOKENS,
    UNFINISHED,
    File,
    activations_file,
    files_of,
    gradients_file,
    read_manifest,
)
from saelab.activations.settings import CacheSource
from saelab.activations.shuffle import group_tokens
from saelab.activations.source import SAMPLE_TOKENS
from saelab.corpus.encoder import BATCH
from saelab.corpus.rows import WINDOW
from saelab.errors import SaelabError
from saelab.lm.load import outlined_language_model, resolve_device
from saelab.lm.model import LanguageModel
from saelab.lm.outline import no_numbers
from saelab.memory import free_memory, free_on_disk, held_by, size
from saelab.runs.config import RunSettings
from saelab.runs.feed import shuffled_together
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.encoder import Linear, Scratch, tiles
from saelab.sae.losses import MULTI_FACTOR
from saelab.sae.thresholds import BLOCK_ENTRIES, CALIBRATION_TOKENS, keys_held

if TYPE_CHECKING:
    from rich.table import Table

Place = Literal["memory", "gpu", "disk"]

# What follows was measured on a CPU, as tensors alive at once and as resident memory, and rounded up.
_LIBRARIES = 250_000_000
_STEP_VECTORS = 10
"""Of a step, ``[tokens, d_in]`` float32: x, the reconstruction, their difference, and the like."""
_ENTRY_BYTES = 100
"""Of an active entry, with its place among the tokens and among the features."""
_AUX_BYTES = 60
"""Of an entry of the auxiliary loss."""
_CANDIDATE_BYTES = {"memory": 8, "gpu": 48}
"""Of a pre-activation that may decide a threshold: its key, which a CPU sorts in place. What a GPU's sort takes beside
it is reckoned, not measured: its result, indices before and after, and as much again as two of these for radix sort."""
_CALIBRATED_BYTES = 12
"""Of a pre-activation among those that are looked through at once: itself, and all that is made of it."""
_LIFTED = 4096
"""Features that are lifted together."""
_TOKENISED_BYTES = 100
"""Of a character being tokenised, each counted as a token."""


@dataclass(frozen=True)
class Need:
    what: str
    bytes: int
    where: Place
    how: str
    """The sum behind `bytes`, in words."""


@dataclass(frozen=True)
class Plan:
    needs: tuple[Need, ...]
    free: dict[str, int]
    """Free bytes by place; a place of which that is not known is missing."""

    def total(self, where: str) -> int:
        """Bytes needed of a place."""
        return sum(need.bytes for need in self.needs if need.where == where)

    def check(self) -> None:
        """Raises SaelabError, with the numbers, where a place cannot hold what is needed of it."""
        for where, free in self.free.items():
            total = self.total(where)
            if total > free:
                parts = sorted((need for need in self.needs if need.where == where), key=lambda need: -need.bytes)
                listed = "; ".join(f"{need.what} {size(need.bytes)} ({need.how})" for need in parts[:3])
                raise SaelabError(
                    f"{_PLACES[where]}: {size(total)} ({total:,} bytes) are needed, and {size(free)} ({free:,} bytes) "
                    f"are free; most goes into: {listed}. {_ADVICE[where]}"
                )

    def lines(self) -> list[str]:
        """In words, a line for each place."""
        return [
            f"{_PLACES[where]}: {size(self.total(where))} for "
            + ", ".join(f"{need.what} {size(need.bytes)}" for need in self.needs if need.where == where)
            + (f"; {size(self.free[where])} are free" if where in self.free else "")
            for where in dict.fromkeys(need.where for need in self.needs)
        ]

    def table(self, title: str) -> "Table":
        """The needs, and for each place their sum and what is free."""
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for name, justify in (("what", "left"), ("where", "left"), ("bytes", "right"), ("how", "left")):
            table.add_column(name, justify=justify, no_wrap=name == "bytes")  # type: ignore[arg-type]
        for need in self.needs:
            table.add_row(need.what, _PLACES[need.where], size(need.bytes), need.how)
        table.add_section()
        for where in dict.fromkeys(need.where for need in self.needs):
            free = f"{size(self.free[where])} are free" if where in self.free else "how much is free is not known"
            table.add_row("together", _PLACES[where], size(self.total(where)), free)
        return table


_PLACES = {"memory": "memory", "gpu": "GPU memory", "disk": "disk"}
_LESS = (
    "Smaller are: `model.dtype=bf16`, fewer `rows_per_forward` or `buffer_tokens` (of `activations.stream` or "
    "`activations.cache`), fewer `cache.rows_per_forward` or `cache.shard_tokens`, a smaller `sae.n_features` or "
    "`training.batch`."
)
_ADVICE = {
    "memory": _LESS,
    "gpu": f"{_LESS} `model.device_map=auto` spreads the model over several GPUs.",
    "disk": "Make room, choose another folder, or write fewer tokens or sites; `cache.dtype=bf16` is half of fp32.",
}


def plan_training(settings: RunSettings) -> Plan:
    """What `saelab train` needs. Raises SaelabError where the model, its site or the cache cannot be had."""
    where, needs = _device_place(settings), []
    source, gradients = settings.activations.cache, settings.sae.needs_gradients
    with outlined_language_model(settings.model) as lm:
        needs += _model_needs(settings, lm, where)
        d_in = lm.width(settings.site)
        stream = settings.activations.stream
        if source is None:
            needs.append(_pass_need(lm, settings, [settings.site], stream.rows_per_forward, gradients, where))
        elif allocation_of(settings.sae).calibrated:  # thresholds are set on held-out text
            rows = settings.eval.rows_per_forward
            needs.append(_pass_need(lm, settings, [settings.site], rows, False, where))
    if source is None:
        needs += _stream_buffers(settings, d_in, gradients, where)
    else:
        needs.append(_cache_buffers(settings, source, d_in, gradients))
    needs += _sae_needs(settings, d_in, where)
    needs += [_text_need(), _libraries()]
    return Plan(tuple(needs), _free(settings, needs, Path(settings.out)))


def plan_cache(settings: RunSettings, out: Path, tokens: int, processes: int = 1) -> Plan:
    """What `saelab cache` needs to write `tokens` tokens into `out`, of which a part may be there already.

    `processes` write together on this machine, each with memory, and where there are GPUs one, of its own.
    Raises SaelabError where the model or a site cannot be had.
    """
    where, write, needs = _device_place(settings), settings.cache, []
    sites = write.sites or (settings.site,)
    with outlined_language_model(settings.model) as lm:
        needs += _model_needs(settings, lm, where)
        needs.append(_pass_need(lm, settings, sites, write.rows_per_forward, settings.writes_gradients, where))
        widths = {site: lm.width(site) for site in sites}
    files = files_of({"sites": widths, "dtype": write.dtype, "gradients": settings.writes_gradients})
    each = _token_bytes(files)
    pass_tokens = write.rows_per_forward * settings.context
    passes = max(1, write.shard_tokens // pass_tokens)
    shard = min(passes, math.ceil(tokens / write.lanes / pass_tokens) + 1) * pass_tokens
    needs.append(Need("shards", 2 * shard * each, "memory", f"2 x {shard:,} tokens x {each:,} bytes"))
    needs += [_text_need(), _libraries()]
    needs.append(_cache_on_disk(files, out, tokens + write.lanes * pass_tokens, write.lanes, shard))
    if processes > 1:
        each_has = [replace(need, bytes=processes * need.bytes) for need in needs if need.where == "memory"]
        needs = each_has + [need for need in needs if need.where != "memory"]
    return Plan(tuple(needs), _free(settings, needs, out))


def _device_place(settings: RunSettings) -> Place:
    return "gpu" if resolve_device(settings.device).type == "cuda" else "memory"


def _model_needs(settings: RunSettings, lm: LanguageModel, where: Place) -> list[Need]:
    shape = lm.shape()
    how = f"{shape.parameters:,} parameters in {settings.model.dtype}"
    needs = [Need("model", shape.bytes, where, how)]
    if where == "gpu" and settings.model.device_map is None:
        needs.append(Need("model, while it is loaded", shape.bytes, "memory", how))
    return needs


def _pass_need(
    lm: LanguageModel, settings: RunSettings, sites: Iterable[str], rows: int, gradients: bool, where: Place
) -> Need:
    """One pass of `rows` rows, and the activations that are taken from it."""
    sites = list(sites)
    together = min(rows, lm.rows_at_once(settings.context)) if gradients else rows
    ids = torch.zeros(together, settings.context, dtype=torch.long, device=lm.device)
    held = held_by(lambda: lm.activations_and_gradients(ids, sites) if gradients else lm.activations(ids, sites))
    width, each = sum(lm.width(site) for site in sites), getattr(torch, settings.model.dtype).itemsize
    # what comes out is joined, then the tokens that count are picked and made float32
    taken = 2 * rows * settings.context * width * (each + 4)
    logits = f", logits and backward pass of {together} at a time" if gradients else ""
    return Need(
        "pass of the model",
        held + taken,
        where,
        f"{rows} rows x {settings.context} tokens at {len(sites)} site{'s' * (len(sites) > 1)}{logits}, counted",
    )


def _stream_buffers(settings: RunSettings, d_in: int, gradients: bool, where: Place) -> list[Need]:
    """What `FromModel` keeps: a group, or the sample if that is larger; and the order of a group."""
    group = group_tokens(settings.activations.stream.buffer_tokens, settings.training.batch)
    tokens, each = max(group, min(SAMPLE_TOKENS, settings.training.tokens)), (8 if gradients else 4) * d_in + 24
    return [
        Need("shuffle buffer", tokens * each, where, f"{tokens:,} tokens x {each:,} bytes"),
        Need("order of the buffer", 8 * group, "memory", f"{group:,} tokens x 8 bytes"),
    ]


def _cache_buffers(settings: RunSettings, source: CacheSource, d_in: int, gradients: bool) -> Need:
    manifest = read_manifest(Path(source.path).expanduser())
    dtype, block = manifest.identity["dtype"], manifest.identity["block_tokens"]
    files = [TOKENS, activations_file(settings.site, d_in, dtype)]
    files += [gradients_file(settings.site, d_in, dtype)] if gradients else []
    blocks = sum(math.ceil(shard["tokens"] / block) for shard in manifest.shards)
    tokens = min(max(1, shuffled_together(settings, source) // block), blocks) * block
    each = _token_bytes(files)
    return Need("shuffle buffers", 2 * tokens * each, "memory", f"2 x {tokens:,} tokens x {each:,} bytes")


def _sae_needs(settings: RunSettings, d_in: int, where: Place) -> list[Need]:
    """What training itself holds: parameters, what is as large as they are, and what a step makes on its way."""
    sae, batch = settings.sae, settings.training.batch
    whole_columns, aux = allocation_of(sae).whole_columns, sae.aux.name != "none"
    numbers = 2 * sae.n_features * d_in + sae.n_features + d_in
    sizes = f"(2 x {sae.n_features:,} x {d_in:,} + {sae.n_features:,} + {d_in:,}) numbers x 4 bytes"

    tile = _tile_bytes(settings, d_in, where)
    copies = aux + (2 if whole_columns and where == "gpu" else 0)  # for what the auxiliary loss wants; of all columns
    lifted = 4 * min(_LIFTED, sae.n_features) * (batch + d_in) if aux and sae.aux.lift else 0
    dense = f"{batch:,} x {sae.n_features:,} in {sae.selection}"
    if tile > 4 * batch * sae.n_features:
        dense += ", with the gradient's part beside it"

    vectors = _STEP_VECTORS + (3 if sae.needs_gradients else 0)
    entries = sae.k * (1 + MULTI_FACTOR if sae.multi_topk else 1)
    chosen = (sae.aux.features or max(1, d_in // 2)) if aux else 0
    step = batch * (4 * vectors * d_in + _ENTRY_BYTES * entries + _AUX_BYTES * chosen)
    each = f"{vectors} x {d_in:,} x 4 + {entries} x {_ENTRY_BYTES} + {chosen} x {_AUX_BYTES} bytes"

    during = 12 * numbers + tile + step
    needs = [
        Need("autoencoder", 4 * numbers, where, sizes),
        Need("its gradients", 4 * numbers, where, "as the autoencoder"),
        Need("optimiser", 8 * numbers, where, "Adam: 2 x the autoencoder"),
        Need("pre-activations", tile, where, f"tiles of {dense}, one at a time, and the weights in that precision"),
        Need("selection", max(copies * tile, lifted), where, "copies of a tile in which features are looked for"),
        Need("training step", step, where, f"{batch:,} tokens x ({each})"),
        Need("start", 2 * 4 * d_in * SAMPLE_TOKENS, where, f"2 x {SAMPLE_TOKENS:,} tokens x {d_in:,} x 4 bytes"),
        Need("checkpoint", 4 * numbers, "disk", sizes),
    ]
    if allocation_of(sae).calibrated:
        tokens = -(-CALIBRATION_TOKENS // (settings.context - 1)) * settings.context  # whole rows
        largest = sae.k * tokens + 2 * sae.n_features  # two beyond its density are looked at of each feature
        candidates = keys_held(largest, sae.n_features, tokens * sae.n_features)
        each, block = _CANDIDATE_BYTES[where], max(BLOCK_ENTRIES, sae.n_features)
        calibration = each * candidates + _CALIBRATED_BYTES * block
        how = f"{candidates:,} x {each} bytes + {block:,} x {_CALIBRATED_BYTES} bytes, less what a step needed"
        needs.append(Need("thresholds", max(0, calibration - during), where, how))
    return needs


def _tile_bytes(settings: RunSettings, d_in: int, where: Place) -> int:
    """What selection holds of pre-activations, and of weights in low precision, at once."""
    sae, batch, scratch = settings.sae, settings.training.batch, Scratch()
    with no_numbers():
        device = torch.device("cuda" if where == "gpu" else "cpu")
        encoder = Linear(torch.empty(sae.n_features, d_in, device=device), torch.empty(sae.n_features, device=device))
        bf16 = sae.selection == "bfloat16"
        centred = torch.empty(batch, d_in, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        for tile in tiles(batch, sae.n_features, device, bf16, allocation_of(sae).whole_columns):
            encoder.scores(centred, tile, scratch)
        return scratch.bytes * (2 if sae.needs_gradients else 1)  # the gradient's part has the same shapes


def _text_need() -> Need:
    how = f"{WINDOW:,} characters x 4 bytes that are shuffled, {BATCH:,} x {_TOKENISED_BYTES} bytes being tokenised"
    return Need("text", 4 * WINDOW + _TOKENISED_BYTES * BATCH, "memory", how)


def _libraries() -> Need:
    return Need("libraries", _LIBRARIES, "memory", "loaded when they are first used; measured")


def _cache_on_disk(files: list[File], out: Path, tokens: int, lanes: int, shard: int) -> Need:
    """`tokens` tokens in files of at most `shard`; what lies there already need not be written."""
    shards = lanes + tokens // shard
    entries = shards * sum(400 + 24 * len(file.columns) * -(-shard // BLOCK_TOKENS) for file in files)
    begun = (out.expanduser() / UNFINISHED).is_dir()
    written = sum(path.stat().st_size for path in out.expanduser().glob("*/*.safetensors")) if begun else 0
    each, headers = _token_bytes(files), shards * sum(len(file.header(shard)) for file in files)
    how = f"{tokens:,} tokens x {each:,} bytes, {size(headers + entries)} for headers and checksums"
    if written:
        how += f", less {size(written)} that are there"
    return Need("cache", max(0, tokens * each + headers + entries - written), "disk", how)


def _token_bytes(files: Iterable[File]) -> int:
    return sum(column.token_bytes for file in files for column in file.columns)


def _free(settings: RunSettings, needs: Iterable[Need], folder: Path) -> dict[str, int]:
    """Free bytes of the places that `needs` names, as far as they can be known."""
    ask: dict[str, Callable[[], int | None]] = {
        "memory": free_memory,
        "gpu": lambda: _free_on_gpus(settings),
        "disk": lambda: free_on_disk(folder),
    }
    found = {where: ask[where]() for where in dict.fromkeys(need.where for need in needs)}
    return {where: free for where, free in found.items() if free is not None}


def _free_on_gpus(settings: RunSettings) -> int:
    """Of the GPU that is used, or of all over which the model is spread."""
    if settings.model.device_map is None:
        return torch.cuda.mem_get_info(resolve_device(settings.device))[0]
    return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
