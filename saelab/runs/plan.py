"""What a training, a cache or a feature database needs of memory and disk, and whether it is there.

Training and caching check that before anything is allocated.

The rooms state what they need (their needs.py), and in which phases. What is there at once is added up here, and the
phase with the largest sum is compared with what is free. Left out are the program itself, which is loaded by then, and
what libraries use inside a single operation.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saelab.activations.array.rows import Array, open_array
from saelab.activations.cache.needs import writer_needs
from saelab.activations.cache.reader import open_cache
from saelab.activations.needs import array_need, cached_needs, gathered_need, pass_need, stream_needs
from saelab.activations.source import SAMPLE_TOKENS
from saelab.analysis.needs import evaluation_needs
from saelab.corpus.needs import text_needs
from saelab.errors import SaelabError
from saelab.features.needs import index_needs
from saelab.lm.load import outlined_language_model, resolve_device
from saelab.lm.model import LanguageModel
from saelab.lm.needs import Uncountable, site_widths, weights_needs
from saelab.memory import READING, THRESHOLDS, Need, Place, free_memory, free_on_disk, fullest, size
from saelab.ranks import Ranks, layout
from saelab.runs import folder
from saelab.runs.calibration import calibration_tokens
from saelab.runs.config import RunSettings
from saelab.runs.feed import cache_group_tokens
from saelab.runs.job import Say, check_model
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.needs import input_needs
from saelab.sae.new import widths_of
from saelab.sae.thresholds import CALIBRATION_TOKENS
from saelab.torchrun import processes
from saelab.training.needs import training_needs
from saelab.training.traffic import Traffic, activation_traffic, step_traffic

if TYPE_CHECKING:
    from rich.table import Table


def _libraries(measured: int) -> Need:
    """What libraries add once they are used: measured as the growth of a process, and rounded up."""
    return Need("libraries", measured, "memory", "loaded when they are first used; measured")


@dataclass(frozen=True)
class Plan:
    needs: tuple[Need, ...]
    free: dict[str, int]
    """Free bytes by place; a place is missing if they are not known."""
    traffic: tuple[Traffic, ...] = ()
    """What a process exchanges with others in a step; empty if there is one process."""

    def fullest(self, where: str) -> tuple[str, list[Need]]:
        """The phase in which most is needed of a place, and what is there then."""
        return fullest(need for need in self.needs if need.where == where)

    def total(self, where: str) -> int:
        """Most bytes that are needed of a place at once."""
        return sum(need.bytes for need in self.fullest(where)[1])

    def check(self) -> None:
        """Raises SaelabError, with the numbers, if a place has less free than is needed of it."""
        for where, free in self.free.items():
            total = self.total(where)
            if total > free:
                parts = sorted(self.fullest(where)[1], key=lambda need: -need.bytes)
                listed = "; ".join(f"{need.what} {size(need.bytes)} ({need.how})" for need in parts[:3])
                raise SaelabError(
                    f"{_PLACES[where]}: {size(total)} ({total:,} bytes) are needed, and {size(free)} ({free:,} bytes) "
                    f"are free; most goes into: {listed}. {_ADVICE[where]}"
                )

    def lines(self) -> list[str]:
        """A line of words for each place."""
        return [
            f"{_PLACES[where]}: {size(self.total(where))} for "
            + ", ".join(f"{need.what} {size(need.bytes)}" for need in self.fullest(where)[1])
            + (f"; {size(self.free[where])} are free" if where in self.free else "")
            for where in dict.fromkeys(need.where for need in self.needs)
        ]

    def table(self, title: str) -> "Table":
        """The needs, and for each place the most that is there at once and what is free."""
        from rich.table import Table

        table = Table(title=title, title_justify="left")
        for name in ("what", "where", "bytes", "when", "how"):
            table.add_column(name, justify="right" if name == "bytes" else "left", no_wrap=name == "bytes")
        for need in self.needs:
            table.add_row(need.what, _PLACES[need.where], size(need.bytes), ", ".join(need.phases), need.how)
        table.add_section()
        for where in dict.fromkeys(need.where for need in self.needs):
            free = f"{size(self.free[where])} are free" if where in self.free else "how much is free is not known"
            table.add_row("at once", _PLACES[where], size(self.total(where)), self.fullest(where)[0], free)
        return table

    def traffic_table(self) -> "Table":
        """The bytes that a process exchanges in a step, by kind, and their sum."""
        from rich.table import Table

        table = Table(title="each process sends in a step, and receives", title_justify="left")
        for name, justify in (("what", "left"), ("bytes", "right"), ("how", "left")):
            table.add_column(name, justify=justify, no_wrap=name == "bytes")  # type: ignore[arg-type]
        for each in self.traffic:
            table.add_row(each.what, size(each.bytes), each.how)
        table.add_section()
        table.add_row("total", size(sum(each.bytes for each in self.traffic)), "")
        return table


_PLACES = {"memory": "memory", "gpu": "GPU memory", "disk": "disk"}
_LESS = (
    "To need less, set `model.dtype=bf16`, fewer `rows_per_forward` or `buffer_tokens` (of `activations.stream` or "
    "`activations.cache`), fewer `cache.rows_per_forward` or `cache.shard_tokens`, a smaller `sae.n_features` or "
    "`training.batch`, or a larger `training.accumulate`."
)
_ADVICE = {
    "memory": _LESS,
    "gpu": f"{_LESS} `model.device_map=auto` spreads the model over several GPUs.",
    "disk": (
        "Make room or choose another folder. A cache is smaller with fewer tokens or sites, or with `cache.dtype=bf16` "
        "instead of fp32; a run, with a lower `training.checkpoint.keep`; a feature database, with fewer "
        "`features.tokens`."
    ),
}


def plan_training(settings: RunSettings, *others: RunSettings, loaded: bool = False, resumed: bool = False) -> Plan:
    """What `saelab train` needs. `loaded`: the model is in memory already; `resumed`: training goes on from a state.

    `others` are runs of a sweep that are trained on the same batches and may differ in autoencoder and site. If several
    processes share the training (`layout_of`), each needs the memory; that of those on this machine is added up. The
    disk is needed once.

    Raises SaelabError if the model, its site or the cache cannot be loaded, as training does; Uncountable if the
    model does not run without its weights.
    """
    where, ranks, needs = _device_place(settings), layout_of(settings), []
    runs, stream = [settings, *others], settings.activations.stream
    source = settings.activations.cache or settings.activations.array
    sites, batch = _sites(runs), settings.training.batch
    gradients = any(run.sae.needs_gradients for run in runs)
    calibrated = any(allocation_of(run.sae).calibrated for run in runs)
    with _outlined(settings, sites) as (lm, widths):
        traffic = step_traffic(settings.sae, settings.training, widths_of(settings.sites, widths), ranks)
        if not loaded:
            needs += _weights(lm, settings, where)
        if source is None and not isinstance(lm, Array):
            rows, context = stream.rows_per_forward, settings.context
            one = pass_need(lm, sites, rows, context, where, gradients=gradients, phases=(READING,))
            needs += [one, gathered_need(lm, sites, rows, context, one, ranks.every.size, gradients=gradients)]
            traffic.append(activation_traffic(sum(widths.values()), batch, lm.dtype.itemsize, gradients, ranks))
        if calibrated:
            rows, what = settings.eval.rows_per_forward, "pass over held-out text"
            needs.append(_pass(lm, sites, rows, settings.context, where, what=what, phases=(THRESHOLDS,)))
    array = lm if isinstance(lm, Array) else None
    if source is None:
        sample = min(SAMPLE_TOKENS, settings.training.tokens)
        d_in = sum(widths.values())
        needs += stream_needs(stream, d_in, where, batch_tokens=batch, sample_tokens=sample, gradients=gradients)
    else:
        stored, group = array or open_cache(source.path), cache_group_tokens(settings, source)
        sample = min(SAMPLE_TOKENS, stored.tokens)
        needs += cached_needs(stored, sites, where, batch_tokens=batch, buffer_tokens=group, gradients=gradients)
    needs += training_needs(
        [(run.sae, widths_of(run.sites, widths)) for run in runs],
        settings.training,
        where,
        sample_tokens=sample,
        calibration_tokens=CALIBRATION_TOKENS if array else calibration_tokens(settings.context),
        resumed=resumed,
        ranks=ranks,
    )
    inputs, keep = settings.activations.inputs, settings.training.checkpoint.keep
    for width in {run.sites: widths_of(run.sites, widths).d_in for run in runs}.values():
        needs += input_needs(inputs, width, sample, where)
        mapped = {"centre": 4 * width, "whiten": 4 * width * (width + 1)}.get(inputs, 0)
        needs.append(
            Need("input map", (keep + 1) * len(runs) * mapped, "disk", "the mean and whitening, in each state")
        )
    out = Path(settings.out)
    states = sum(folder.bytes_of_states(Path(run.out)) for run in runs)
    needs = [need.less(states) if need.what == "states" else need for need in needs]
    libraries = _libraries(180_000_000 if gradients and source is None else 150_000_000)
    needs = [need for need in (*needs, *_text(settings), libraries) if need.bytes]
    needs = _on_this_machine(needs, processes().local)
    return Plan(tuple(needs), _free(settings, needs, out), tuple(each for each in traffic if each.bytes))


@contextmanager
def _outlined(settings: RunSettings, sites: Sequence[str]) -> Iterator[tuple[LanguageModel | Array, dict[str, int]]]:
    """Yields what gives the activations, a model without its weights or an array, and d_in of each of `sites`.

    Raises SaelabError if it cannot be loaded, or has no such site.
    """
    array = settings.activations.array
    if array is not None:
        opened = open_array(array, settings.corpus.held_out)
        yield opened, dict.fromkeys(sites, opened.d_in)
        return
    with outlined_language_model(settings.model, settings.second_model) as lm:
        check_model(lm, settings, sites)
        yield lm, site_widths(lm, sites)


def _weights(lm: LanguageModel | Array, settings: RunSettings, where: Place) -> list[Need]:
    """Needs of the weights of a model, or of both; an array has none."""
    if isinstance(lm, Array):
        return []
    found = weights_needs(lm.models[0], settings.model, where)
    for second in lm.models[1:]:
        theirs = weights_needs(second, settings.second_model or settings.model, where)
        found += [replace(need, what=f"second {need.what}") for need in theirs]
    return found


def _pass(
    lm: LanguageModel | Array, sites: Sequence[str], rows: int, context: int, where: Place, **options: Any
) -> Need:
    """The need of a pass of a model, or of as many rows of an array."""
    if isinstance(lm, Array):
        return array_need(lm, rows * context, where, options["phases"])
    return pass_need(lm, sites, rows, context, where, **options)


def _text(settings: RunSettings) -> list[Need]:
    """Needs of the text, which an array has none of."""
    return [] if settings.activations.array is not None else text_needs()


def layout_of(settings: RunSettings) -> Ranks:
    """The largest of the processes of `parallel`; if it leaves their number open, of those that torchrun started."""
    parallel = settings.parallel
    return layout(parallel.data or max(1, processes().world // parallel.features), parallel.features)


def plan_evaluation(settings: RunSettings, *others: RunSettings, loaded: bool = False) -> Plan:
    """What `saelab eval` needs of a run with these settings, and a sweep of all its runs, which it evaluates together.

    `loaded`: the model is in memory already. Raises as `plan_training` does.
    """
    where, runs, needs = _device_place(settings), [settings, *others], []
    with _outlined(settings, _sites(runs)) as (lm, widths):
        needs += [] if loaded else _weights(lm, settings, where)
        saes = [(run.sae, run.sites) for run in runs]
        needs += evaluation_needs(saes, widths, lm, settings.eval, settings.context, where)
    needs += [*_text(settings), _libraries(150_000_000)]
    return Plan(tuple(needs), _free(settings, needs, Path(settings.out)))


def fitting(settings: Sequence[RunSettings], plan_of: Callable[..., Plan]) -> int:
    """How many of the runs, the first ones, fit into memory at once, at least 1; all if needs cannot be counted.

    `plan_of` is called with the settings of some runs (`plan_training`, `plan_evaluation`).
    """
    least, most = 1, len(settings)
    while least < most:  # `least` fit, more than `most` do not; all is the first guess
        n = most if most == len(settings) else (least + most + 1) // 2
        try:
            plan = plan_of(*settings[:n])
        except Uncountable:
            return len(settings)
        if all(plan.total(where) <= free for where, free in plan.free.items() if where != "disk"):
            least = n
        else:
            most = n - 1
    return least


def plan_cache(settings: RunSettings, out: Path, tokens: int, local: int = 1) -> Plan:
    """What `saelab cache` needs to write `tokens` tokens into `out`, of which a part may be there already.

    `local` processes write on this machine at once, each with memory and, if there are GPUs, a GPU of its own. Raises
    SaelabError if the model or a site cannot be loaded; Uncountable as `plan_training`.
    """
    where, write, gradients, needs = _device_place(settings), settings.cache, settings.writes_gradients, []
    sites = write.sites or settings.sites.all
    with outlined_language_model(settings.model, settings.second_model) as lm:
        check_model(lm, settings, sites)
        widths = site_widths(lm, sites)
        needs += _weights(lm, settings, where)
        needs.append(pass_need(lm, sites, write.rows_per_forward, settings.context, where, gradients=gradients))
    needs += writer_needs(write, widths, gradients, settings.context, tokens, out)
    needs += [*text_needs(), _libraries(250_000_000)]
    needs = _on_this_machine(needs, local)
    return Plan(tuple(needs), _free(settings, needs, out))


def plan_index(settings: RunSettings) -> Plan:
    """What `saelab index` needs of a run with these settings.

    Raises SaelabError if the model or its site cannot be loaded; Uncountable as `plan_training`.
    """
    where, s, context = _device_place(settings), settings.features, settings.context
    sites = settings.sites.all
    with _outlined(settings, sites) as (lm, widths):
        needs = _weights(lm, settings, where)
        needs.append(_pass(lm, sites, s.rows_per_forward, context, where, phases=("reading",)))
        if isinstance(lm, Array):  # each of its rows is one of text
            vocabulary = len(lm.held_out_rows(s.tokens))
            s, context = replace(s, tokens=vocabulary, rows_per_forward=s.rows_per_forward * context), 1
        else:
            vocabulary = len(lm.unembedding)
    needs += index_needs(s, settings.sae, widths_of(settings.sites, widths), vocabulary, context, where)
    needs += [replace(need, phases=("tokenising",)) for need in _text(settings)]
    needs = [need for need in (*needs, _libraries(150_000_000)) if need.bytes]
    return Plan(tuple(needs), _free(settings, needs, Path(settings.out)))


def checked_plan(plan: Callable[[], Plan], say: Say, *, lines: bool = False) -> None:
    """Raises SaelabError if what `plan` returns does not fit; says first, with `lines`, what is needed.

    If the needs of a model cannot be counted, a note says so, and nothing is refused.
    """
    try:
        found = plan()
    except Uncountable as error:
        say(f"note: {error}, so it is not checked whether there is enough memory and disk")
        return
    for line in found.lines() if lines else ():
        say(line)
    found.check()


def _sites(runs: Iterable[RunSettings]) -> list[str]:
    """All sites that some runs read, each once."""
    return list(dict.fromkeys(site for run in runs for site in run.sites.all))


def _on_this_machine(needs: Iterable[Need], local: int) -> list[Need]:
    """The needs of `local` processes, which share the memory and, if there are GPUs, have one each."""
    return [replace(need, bytes=local * need.bytes) if need.where == "memory" else need for need in needs]


def _device_place(settings: RunSettings) -> Place:
    return "gpu" if resolve_device(settings.device).type == "cuda" else "memory"


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
    """Free bytes of the GPU that is used, or of all GPUs that the model is spread over."""
    if settings.model.device_map is None:
        return torch.cuda.mem_get_info(resolve_device(settings.device))[0]
    return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
