"""Settings of a run: the rooms' sections in one tree, read from YAML and overrides.

A section is a frozen dataclass that checks itself. Here each unknown key and each wrong type becomes one message that
names the field. yaml12.py reads the YAML.
"""

import copy
import dataclasses
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from saelab.activations.settings import NORMALISED, ActivationSettings, CacheSettings
from saelab.activations.sites import Sites
from saelab.analysis.settings import AnalysisSettings, EvalSettings
from saelab.corpus import CorpusSettings
from saelab.errors import SaelabError, SettingError, did_you_mean
from saelab.features.settings import FeatureSettings
from saelab.files import expanded
from saelab.lm.settings import SECOND, ModelSettings, is_second
from saelab.runs.yaml12 import parse
from saelab.sae.settings import SaeSettings
from saelab.training.settings import ParallelSettings, TrainingSettings


@dataclass(frozen=True)
class RunSettings:
    out: str
    """The run folder."""
    site: str = ""
    """The hook point where activations are read, by TransformerLens' name. For an array, any name; default: its
    file's."""
    target: str | None = None
    """A transcoder: the hook point that is reconstructed from the activations at `site`. null: `site` itself."""
    more_sites: tuple[str, ...] = ()
    """A crosscoder: hook points that are read and reconstructed together with `site`, by one set of features. A name
    that ends in ``@second`` is a hook point of `second_model`."""
    seed: int = 0
    """Seed of the order of the text, of the shuffling and of the initial weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    context: int = 256
    """Tokens per row, BOS included."""
    model: ModelSettings = field(default_factory=ModelSettings)
    second_model: ModelSettings | None = None
    """A crosscoder of two models: the model, with the same vocabulary, whose sites `more_sites` names with
    ``@second``."""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    activations: ActivationSettings = field(default_factory=ActivationSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    sae: SaeSettings = field(default_factory=SaeSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    analysis: AnalysisSettings = field(default_factory=AnalysisSettings)

    def __post_init__(self) -> None:
        if self.context < 2:
            raise SettingError(f"context: {self.context} leaves no room for a token after BOS; it must be at least 2")
        if not self.out:
            raise SettingError("out: is empty; name the run folder")
        self._check_array()
        if not self.site:
            raise SettingError("site: is required")
        if self.target == self.site:
            raise SettingError("target: is the site itself; leave it out for an autoencoder of that site")
        if self.target is not None and self.activations.inputs in NORMALISED:
            raise SettingError(
                f"activations.inputs: {self.activations.inputs} goes with one site; use scale, centre or whiten with "
                "`target`"
            )
        try:
            self.sae.check_sites(transcodes=self.target is not None, crosses=bool(self.more_sites))
        except SettingError as error:
            raise SettingError(f"sae.{error}") from error
        twice = [site for site, times in Counter(self.sites.inputs).items() if times > 1]
        if twice:
            raise SettingError(f"more_sites: {twice[0]} is given twice, or is `site` itself; name each site once")
        if self.more_sites and self.target is not None:
            raise SettingError(
                "target: a crosscoder reconstructs the sites that it reads; leave out target or more_sites"
            )
        if self.more_sites and self.activations.inputs not in ("scale", "centre"):
            raise SettingError(
                f"activations.inputs: {self.activations.inputs} goes with one site; use scale or centre with more_sites"
            )
        self._check_second_model()
        object.__setattr__(self, "out", expanded(self.out, "out"))

    def _check_second_model(self) -> None:
        """Raises SettingError unless there are sites of a second model, as further sites, if and only if there is
        one."""
        for name in ("site", "target"):
            if is_second(getattr(self, name) or ""):
                raise SettingError(
                    f"{name}: {getattr(self, name)} is a site of the second model; name it in more_sites, beside a "
                    "site of `model`"
                )
        theirs = [site for site in (*self.more_sites, *self.cache.sites) if is_second(site)]
        if theirs and self.second_model is None:
            raise SettingError(f"second_model: is required: {theirs[0]} is a site of a second model")
        if self.second_model is not None and not theirs:
            raise SettingError(
                f"more_sites: names no site of second_model; write, for example, more_sites=[{self.site}{SECOND}], or "
                "remove second_model"
            )

    def _check_array(self) -> None:
        """Names the site of an array. Raises SettingError for settings that need a language model."""
        array = self.activations.array
        if array is None:
            return
        if not self.site:
            object.__setattr__(self, "site", Path(array.path).stem)
        for name in ("target", "more_sites"):
            if getattr(self, name):
                raise SettingError(f"{name}: an array has one site; remove it")
        if self.second_model is not None:
            raise SettingError("second_model: an array needs no language model; remove it")
        if self.sae.needs_gradients:
            raise SettingError(
                "sae.affinity: gradient needs the gradients of a language model, and an array has none; use activation"
            )

    @property
    def sites(self) -> Sites:
        """The sites that the autoencoder reads and reconstructs."""
        return Sites(self.site, self.target, self.more_sites)

    @property
    def weights_seed(self) -> int:
        """Seed of the initial weights."""
        return self.seed if self.sae.seed is None else self.sae.seed

    @property
    def writes_gradients(self) -> bool:
        """Whether `saelab cache` writes gradients: as its section says, or else if the affinity needs them."""
        return self.sae.needs_gradients if self.cache.gradients is None else self.cache.gradients

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


_ADAPTER = TypeAdapter(RunSettings)
_SHORT = {
    "model": "name",
    "second_model": "name",
    "corpus": "source",
    "activations": "array",
    "activations.array": "path",
    "activations.cache": "path",
    "sae.encoder": "name",
    "sae.affinity": "name",
    "sae.allocation": "name",
    "sae.aux": "name",
    "sae.sparsity": "name",
}
"""Sections that may be written as one string: `model: gpt2` means `model: {name: gpt2}`."""
_LARGEST = 10**15
"""Largest number in a setting, apart from the seed: sizes in bytes are products of several, below 2**63."""
_LARGEST_SEED = 2**63 - 1


def find_config(name: str | Path) -> Path:
    """The file `name`, or the shipped config of that name (``quickstart``). Raises SaelabError if there is neither."""
    path = Path(expanded(name))
    if path.is_file():
        return path
    package = Path(__file__).parents[1]
    folder = next((f for f in (package / "_configs", package.parent / "configs") if f.is_dir()), None)
    shipped = {p.stem: p for p in sorted(folder.glob("*.yaml"))} if folder else {}
    if str(name) in shipped:
        return shipped[str(name)]
    near = did_you_mean(path.name, [*shipped, *(p.name for p in path.parent.glob("*.y*ml"))])
    raise SaelabError(f"{name}: no such file, and no shipped config ({', '.join(shipped)}).{near}")


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunSettings:
    """Settings from a YAML file, then ``section.key=value`` overrides. Raises SaelabError naming every bad field."""
    return settings_from(read_config(path), overrides, str(path))


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, its settings not yet checked. Raises SaelabError if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SaelabError(f"{path}: not a text file (byte {error.start} is not UTF-8); a config is YAML") from error
    except OSError as error:
        raise SaelabError(f"{path}: cannot be read ({error.strerror})") from error
    raw = parse(text, str(path))
    if not isinstance(raw, dict):
        found = "it is empty" if raw is None else f"not {_shown(raw)}"
        raise SaelabError(f"{path}: a config is a mapping of settings, such as `site: ...`; {found}")
    return raw


_GONE = ("contexts", "window")
"""Settings of the feature database in the run folders of earlier versions, without an effect now."""


def settings_from(raw: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "config") -> RunSettings:
    """Settings from a mapping, with overrides. Raises SaelabError naming every bad field and the nearest good ones."""
    tree: dict[str, Any] = copy.deepcopy(dict(raw))
    if isinstance(tree.get("features"), dict):
        tree["features"] = {name: value for name, value in tree["features"].items() if name not in _GONE}
    for override in overrides:
        set_override(tree, override)
    if "sweep" in tree:
        raise SaelabError(f"{where}: sweep: describes several runs; `saelab sweep` trains them")
    for section in _SHORT:
        _expand(tree, section)
    problems = _problems(tree, RunSettings, "")
    if not problems:
        try:
            return _ADAPTER.validate_python(tree)
        except ValidationError as error:
            problems = [_explain(details) for details in error.errors()]
    raise SaelabError(f"{where}: " + "; ".join(problems))


def set_override(tree: dict[str, Any], override: str) -> None:
    """Set the key of ``section.key=value`` in `tree`."""
    key, equals, value = override.partition("=")
    shown = _shown(override)
    if not equals or not all(key.split(".")):
        raise SaelabError(f"{shown}: an override is written section.key=value, for example sae.k=64")
    set_value(tree, key, parse(value, shown), shown)


def set_value(tree: dict[str, Any], key: str, value: Any, shown: str) -> None:
    """Set ``section.key`` of `tree` to `value`; errors begin with `shown`."""
    *sections, last = key.split(".")
    target = tree
    for i, section in enumerate(sections):
        _expand(tree, ".".join(sections[: i + 1]))
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise SaelabError(f"{shown}: {section} is a single value without keys; write {section}=VALUE")
    target[last] = value


def located(settings: RunSettings) -> RunSettings:
    """`settings` with absolute paths of models, corpus, cache, array and checkpoint: the same from every folder.

    A name that is no file or folder here stays as it is, and so does `demo`: it is embedded, or the id of something on
    the Hub. Where there is a folder with the name of a Hub id, the folder is what such a name means.
    """
    corpus, activations = settings.corpus, settings.activations
    if activations.cache is not None:
        cache = replace(activations.cache, path=str(Path(activations.cache.path).absolute()))
        activations = replace(activations, cache=cache)
    if activations.array is not None:
        array = activations.array
        labels = None if array.labels is None else str(Path(array.labels).absolute())
        array = replace(array, path=str(Path(array.path).absolute()), labels=labels)
        activations = replace(activations, array=array)
    model, second = _located(settings.model), settings.second_model and _located(settings.second_model)
    if corpus.source != "demo" and os.path.exists(corpus.source):
        corpus = replace(corpus, source=str(Path(corpus.source).absolute()))
    sae = settings.sae
    if sae.init_from is not None and os.path.exists(sae.init_from):
        sae = replace(sae, init_from=str(Path(sae.init_from).absolute()))
    return replace(settings, model=model, second_model=second, corpus=corpus, activations=activations, sae=sae)


def _located(model: ModelSettings) -> ModelSettings:
    if model.name == "demo" or not os.path.isdir(model.name):
        return model
    return replace(model, name=str(Path(model.name).absolute()))


def leaves(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The single settings of a nested mapping, by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return found


def _expand(tree: dict[str, Any], path: str) -> None:
    """Replace the section at `path` by a mapping if it is written as one string."""
    *above, section = path.split(".")
    for key in above:
        tree = tree.get(key, {})
        if not isinstance(tree, dict):
            return
    if path in _SHORT and isinstance(tree.get(section), str):
        tree[section] = {_SHORT[path]: tree[section]}


def _problems(tree: Mapping[str, Any], cls: Any, prefix: str) -> list[str]:
    """What is wrong with the keys and values of a section, as far as pydantic would not say it, or not clearly."""
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    problems = []
    for key, value in tree.items():
        name = f"{prefix}{_key(key)}"
        if key not in fields:
            problems.append(f"{name}: no such setting.{_nearest(str(key), fields)}")
            continue
        kinds, limit = (fields[key], *get_args(fields[key])), _LARGEST_SEED if key == "seed" else _LARGEST
        section = next(filter(dataclasses.is_dataclass, kinds), None)
        if section is not None and isinstance(value, Mapping):
            problems += _problems(value, section, f"{name}.")
        elif section is not None and not (value is None and type(None) in kinds):
            problems.append(f"{name}: {_no_section(name, value, section)}")
        elif isinstance(value, bool) and bool not in kinds:
            problems.append(f"{name}: must be {_KINDS.get(kinds[0], 'text or a number')}, not {str(value).lower()}")
        elif isinstance(value, int | float) and limit < abs(value) < math.inf:
            problems.append(f"{name}: {_shown(value)} is too large")
        elif isinstance(value, str) and not _is_name(value):
            problems.append(f"{name}: {_shown(value)} is no name: it is too long, or has half a character or NUL in it")
    return problems


def _no_section(name: str, value: Any, section: Any) -> str:
    """Why `value` is no section of settings."""
    if value is None:
        return "is empty; write its settings below it, or remove the line"
    short = f"one {_SHORT[name]}, or " if name in _SHORT else ""
    keys = ", ".join(f.name for f in dataclasses.fields(section))
    return f"must be {short}a section with some of the settings {keys}; not {_shown(value)}"


def _nearest(key: str, fields: Iterable[str]) -> str:
    above, dot, below = key.partition(".")
    if dot and above in fields:
        return f" In a file, sections are nested: {above}: {{{_key(below)}: ...}}."
    return did_you_mean(key[:100], fields) or f" Known: {', '.join(fields)}."


_KINDS = {int: "a whole number", float: "a number", str: "text"}
_TYPE_ERRORS = {
    "int": "a whole number, such as 2000000 or 2e6",
    "float": "a number, such as 2e-3",
    "bool": "true or false",
}


def _explain(details: Any) -> str:
    """The message for one of pydantic's errors, beginning with the setting's name."""
    name, kind, value = ".".join(map(str, details["loc"])), details["type"], details["input"]
    if kind == "value_error":  # a section checked itself, and its message begins with the field's name
        return (f"{name}." if name else "") + details["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return f"{name}: is required"
    if value is None:
        return f"{name}: is empty; give a value, or remove the setting to use its default"
    if kind == "tuple_type":
        return f"{name}: must be a list, such as {name}=[a,b], not {_shown(value)}"
    if kind == "string_type":
        quoted = f'; in quotes it is: "{value}"' if isinstance(value, int | float) else ""
        return f"{name}: must be text, not {_shown(value)}{quoted}"
    expected = next((text for start, text in _TYPE_ERRORS.items() if kind.startswith((start, "finite"))), None)
    if expected is None:
        return f"{name}: {details['msg'][0].lower()}{details['msg'][1:]}, not {_shown(value)}"
    return f"{name}: must be {expected}, not {_shown(value)}"


def _is_name(value: str) -> bool:
    """Whether `value` can be the path of a file, in UTF-8, as the names in all text settings are."""
    try:
        path = value.encode()
    except UnicodeEncodeError:  # half of a character
        return False
    return b"\0" not in path and len(path) < 4096 and max(map(len, path.split(b"/"))) < 256


def _key(key: Any) -> str:
    """A key as it is written, cut if it is long."""
    text = str(key)
    return text if len(text) <= 100 else f"{text[:100]}..."


class _Brief(reprlib.Repr):
    """Short forms of values of any size: aliases of aliases may describe billions of values in a few lines."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 80, 80, 40

    def repr_str(self, x: str, level: int) -> str:
        return repr(x if len(x) <= self.maxstring else f"{x[: self.maxstring]}...")


_shown = _Brief().repr
