"""Settings of a run: the rooms' sections in one tree, read from YAML and overrides.

A section is a frozen dataclass that checks itself. Here each unknown key and each wrong type becomes one message that
names the field. Numbers follow YAML 1.2: ``2e6`` and ``1e-4`` are numbers.
"""

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from saelab.activations.settings import ActivationSettings, CacheSettings
from saelab.analysis.settings import EvalSettings
from saelab.corpus import CorpusSettings
from saelab.errors import SaelabError, SettingError, did_you_mean
from saelab.features.settings import FeatureSettings
from saelab.lm.settings import ModelSettings
from saelab.sae.settings import SaeSettings
from saelab.training.settings import TrainingSettings


@dataclass(frozen=True)
class RunSettings:
    out: str
    """The run folder."""
    site: str
    """The hook point where activations are read, by TransformerLens' name."""
    seed: int = 0
    """Seed of the order of the text, of the shuffling and of the initial weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    context: int = 256
    """Tokens per row, BOS included."""
    model: ModelSettings = field(default_factory=ModelSettings)
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    activations: ActivationSettings = field(default_factory=ActivationSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    sae: SaeSettings = field(default_factory=SaeSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)

    def __post_init__(self) -> None:
        if self.context < 2:
            raise SettingError(f"context: {self.context} leaves no room for a token after BOS; it must be at least 2")
        if not self.out:
            raise SettingError("out: is empty; name the run folder")

    @property
    def writes_gradients(self) -> bool:
        """Whether `saelab cache` writes gradients: as its section says, or else if the affinity needs them."""
        return self.sae.needs_gradients if self.cache.gradients is None else self.cache.gradients

    def to_yaml(self) -> str:
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


_ADAPTER = TypeAdapter(RunSettings)
_SHORT = {
    "model": "name",
    "corpus": "source",
    "activations.cache": "path",
    "sae.encoder": "name",
    "sae.affinity": "name",
    "sae.allocation": "name",
    "sae.aux": "name",
    "sae.sparsity": "name",
}
"""Sections that may be written as one string: `model: gpt2` means `model: {name: gpt2}`."""


class _Loader(yaml.SafeLoader):
    """YAML with the numbers and booleans of version 1.2."""


_OLDER = {f"tag:yaml.org,2002:{name}" for name in ("float", "bool", "int", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _OLDER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def find_config(name: str | Path) -> Path:
    """The file `name`, or the shipped config of that name (``quickstart``). Raises SaelabError if there is neither."""
    path = Path(name)
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
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise SaelabError(f"{path}: not a text file (byte {error.start} is not UTF-8); a config is YAML") from error
    except (OSError, yaml.YAMLError) as error:
        raise SaelabError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(raw, dict):
        raise SaelabError(f"{path}: a config is a mapping of settings, not {type(raw).__name__}")
    return settings_from(raw, overrides, str(path))


def settings_from(raw: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "config") -> RunSettings:
    """Settings from a mapping, with overrides. Raises SaelabError naming every bad field and the nearest good ones."""
    tree: dict[str, Any] = copy.deepcopy(dict(raw))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise SaelabError(f"{override!r}: an override is written section.key=value, for example sae.k=64")
        *sections, last = key.split(".")
        target = tree
        for i, section in enumerate(sections):
            _expand(tree, ".".join(sections[: i + 1]))
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise SaelabError(f"{override!r}: {section} is a single value without keys; write {section}=VALUE")
        try:
            target[last] = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError as error:
            raise SaelabError(f"{override!r}: the value cannot be read as YAML: {error}") from error
    for section in _SHORT:
        _expand(tree, section)
    problems = _unknown_keys(tree, RunSettings, "")
    if not problems:
        try:
            return _ADAPTER.validate_python(tree)
        except ValidationError as error:
            problems = [_explain(details) for details in error.errors()]
    raise SaelabError(f"{where}: " + "; ".join(problems))


def _expand(tree: dict[str, Any], path: str) -> None:
    """Replace the section at `path` by a mapping if it is written as one string."""
    *above, section = path.split(".")
    for key in above:
        tree = tree.get(key, {})
        if not isinstance(tree, dict):
            return
    if path in _SHORT and isinstance(tree.get(section), str):
        tree[section] = {_SHORT[path]: tree[section]}


def _unknown_keys(tree: Mapping[str, Any], cls: Any, prefix: str) -> list[str]:
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    problems = []
    for key, value in tree.items():
        if key not in fields:
            known = did_you_mean(str(key), fields) or f" Known: {', '.join(fields)}."
            problems.append(f"{prefix}{key}: no such setting.{known}")
        elif isinstance(value, Mapping):
            for section in filter(dataclasses.is_dataclass, (fields[key], *get_args(fields[key]))):
                problems += _unknown_keys(value, section, f"{prefix}{key}.")
    return problems


def _explain(details: Any) -> str:
    """The message for one of pydantic's errors, beginning with the setting's name."""
    name = ".".join(map(str, details["loc"]))
    if details["type"] == "value_error":  # a section checked itself, and its message begins with the field's name
        return (f"{name}." if name else "") + details["msg"].removeprefix("Value error, ")
    if details["type"] == "dataclass_type":
        return f"{name}: must be a section of settings, not {details['input']!r}"
    if details["type"] == "tuple_type":
        return f"{name}: must be a list, such as {name}=[a,b], not {details['input']!r}"
    if details["type"] == "missing":
        return f"{name}: is required"
    return f"{name}: {details['msg'][0].lower()}{details['msg'][1:]}, not {details['input']!r}"
