"""The runs that a config with `sweep:` describes: every combination of the values of some settings."""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from saelab.errors import SaelabError
from saelab.files import expanded
from saelab.runs.config import (
    RunSettings,
    find_config,
    leaves,
    located,
    read_config,
    set_override,
    set_value,
    settings_from,
)
from saelab.runs.job import Config

_VARIED = ("site", "target", "training.lr", "training.warmup", "training.decay", "training.schedule", "training.clip")
"""Settings besides those of `sae` that may differ between runs on the same batches."""


@dataclass(frozen=True)
class GridRun:
    """A run of a sweep."""

    name: str
    """Name of its folder, below that of the sweep: what varies, such as k16-lr0.001."""
    varies: dict[str, Any]
    """The settings that vary, with the values of this run."""
    settings: RunSettings


def grid(config: Config, overrides: Iterable[str] = ()) -> list[GridRun]:
    """The runs of `config`, in the order of its lists; the last setting varies fastest.

    `sweep` maps names of settings to lists of values, as does ``sweep.NAME=[VALUE,...]`` in `overrides`. Without it
    there is one run, named "". Raises SaelabError for settings that cannot vary on the same batches, for anything that
    is not a list of different values, and for settings of a run that are wrong.
    """
    where = "config"
    if isinstance(config, RunSettings):
        raw: dict[str, Any] = asdict(config)
    elif isinstance(config, Mapping):
        raw = copy.deepcopy(dict(config))
    else:
        path = find_config(config)
        raw, where = read_config(path), str(path)
    for override in overrides:
        set_override(raw, override)
    lists = raw.pop("sweep", {})
    if not isinstance(lists, Mapping):
        raise SaelabError(f"{where}: sweep: must map names of settings to lists, such as `sae.k: [16, 32]`")
    axes = leaves(lists)
    for name, values in axes.items():
        _check_axis(where, name, values)
    runs = []
    for values in product(*axes.values()):
        varies, tree = dict(zip(axes, values, strict=True)), copy.deepcopy(raw)
        for name, value in varies.items():
            set_value(tree, name, value, f"sweep.{name}")
        run = "-".join(_part(name, value) for name, value in varies.items())
        if run and isinstance(raw.get("out"), str) and raw["out"]:
            tree["out"] = str(Path(expanded(raw["out"], "out")) / run)
        runs.append(GridRun(run, varies, located(settings_from(tree, (), f"{where}, {run}" if run else where))))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise SaelabError(f"{where}: sweep: two runs would be named {max(names, key=names.count)}; give other values")
    return runs


def sweep_folder(runs: list[GridRun]) -> Path:
    """The folder that holds the run folders of a sweep."""
    return Path(runs[0].settings.out).parent


def _check_axis(where: str, name: str, values: Any) -> None:
    """Raises SaelabError unless `name` may vary and `values` are a list of different ones."""
    begin = f"{where}: sweep.{name}:"
    if name == "seed":
        raise SaelabError(
            f"{begin} the run's seed also decides the order of the text, and all runs of a sweep train on the same "
            "batches; sweep.sae.seed varies the initial weights"
        )
    if not name.startswith("sae.") and name not in _VARIED:
        raise SaelabError(
            f"{begin} cannot vary, because all runs of a sweep train on the same batches for as long; what can is "
            f"sae.* and {', '.join(_VARIED)}"
        )
    if not isinstance(values, list) or not values:
        raise SaelabError(f"{begin} must be a list of values, such as sweep.sae.k=[16,32]")
    if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
        raise SaelabError(f"{begin} has the same value twice")


def _part(name: str, value: Any) -> str:
    """What a setting adds to the name of a run, in characters that every file system and shell takes as they are."""
    last = name.rpartition(".")[2]
    if isinstance(value, Mapping):
        shown = "_".join(str(each) for each in leaves(value).values())
    else:
        shown = str(value).lower() if isinstance(value, bool | None) else str(value)
        if isinstance(value, float) and float(f"{value:g}") == value:
            shown = f"{value:g}"
    shown = re.sub(r"[^A-Za-z0-9._+]+", "_", shown)
    if name in ("site", "target"):
        return shown
    return f"{last}{shown}" if shown[:1].isdigit() else f"{last}_{shown}"
