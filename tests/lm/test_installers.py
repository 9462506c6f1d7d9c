"""Loading a model starts no package installer and changes no installed package, whichever library asks."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from saelab.errors import SaelabError
from saelab.lm import installers as module
from saelab.lm.installers import no_installers
from saelab.lm.load import load_language_model
from saelab.lm.settings import ModelSettings
from tests.lm.shaped import shaped_folder


@pytest.fixture
def installers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs with the names of installers come first on PATH; the file lists those that ran."""
    log, folder = tmp_path / "ran.txt", tmp_path / "bin"
    folder.mkdir()
    for name in ("pip", "pip3", "pip3.11", "uv", "conda", "mamba", "ls"):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "{name} $@" >> {log}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def installed() -> dict[str, float]:
    """When each distribution of this environment was last changed."""
    paths = [Path(str(found.locate_file(""))) for found in importlib.metadata.distributions()]
    return {str(entry): entry.stat().st_mtime for path in set(paths) for entry in path.glob("*.dist-info")}


def in_a_shell(command: str) -> Callable[[], object]:
    return lambda: subprocess.run(command, shell=True, check=True)


def forked(run: Callable[[], object]) -> None:
    """`run` in a child process that must not return from it; raises what it raises."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__} {error}".encode())
        finally:
            os._exit(1)
    os.close(writing)
    os.waitpid(child, 0)
    said = os.read(reading, 10_000).decode()
    os.close(reading)
    if said.startswith("SaelabError"):
        raise SaelabError(said)


WAYS: dict[str, Callable[[], object]] = {
    "call": lambda: subprocess.check_call(["pip", "install", "x"]),
    "version": lambda: subprocess.run(["pip3.11", "install", "x"], check=True),
    "path": lambda: subprocess.Popen(["/usr/bin/pip3", "install", "x"]),
    "bytes": lambda: subprocess.Popen([b"pip", b"install", b"x"]),
    "one word": lambda: subprocess.Popen("pip"),
    "module": lambda: subprocess.check_output([sys.executable, "-m", "pip", "install", "x"]),
    "module, isolated": lambda: subprocess.check_output([sys.executable, "-I", "-m", "pip", "install", "x"]),
    "uv": lambda: subprocess.check_call(["uv", "pip", "install", "x", "-q"]),
    "conda": lambda: subprocess.call(["conda", "install", "x"]),
    "mamba": lambda: subprocess.call(["mamba", "install", "x"]),
    "env": lambda: subprocess.call(["env", "A=1", "pip", "install", "x"]),
    "shell": in_a_shell("pip install x"),
    "shell, later": in_a_shell("cd / && PIP_QUIET=1 pip install x"),
    "system": lambda: os.system("true; uv pip install x"),
    "popen": lambda: os.popen("pip install x").read(),
    "exec": lambda: forked(lambda: os.execvp("pip", ["pip", "install", "x"])),
    "exec python": lambda: forked(lambda: os.execv(sys.executable, [sys.executable, "-m", "pip", "list"])),
    "spawn": lambda: os.posix_spawn("/usr/bin/env", ["env", "pip", "install", "x"], os.environ),
    "import": lambda: __import__("ensurepip"),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_start_an_installer_is_open(way: str, installers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ensurepip", raising=False)
    with (
        pytest.raises(
            SaelabError, match=r"asked to install a package \(`(pip|uv|conda|mamba).*install the package your"
        ),
        no_installers(),
    ):
        WAYS[way]()
    assert not installers.exists()


def test_other_programs_run_and_installers_run_outside_the_context(installers: Path) -> None:
    with no_installers():
        for command in (["ls", "pip"], ["sh", "-c", "ls uv"], [sys.executable, "-c", "pass", "pip"]):
            subprocess.check_call(command)
    subprocess.check_call(["pip", "list"])
    assert installers.read_text().split("\n")[:-1] == ["ls pip", "ls uv", "pip list"]


def test_an_error_that_follows_a_swallowed_refusal_says_what_was_asked_for(installers: Path) -> None:
    def asks() -> None:
        try:
            subprocess.check_call(["pip", "install", "torchvision"])
        except Exception:
            raise ImportError("no torchvision") from None

    with pytest.raises(SaelabError, match="`pip install torchvision`") as error, no_installers():
        asks()
    assert "no torchvision" in str(error.value.__cause__)
    with pytest.raises(ImportError, match="something else"), no_installers():
        raise ImportError("something else")


@pytest.mark.parametrize("kind", ["gemma3", "llava", "idefics3", "qwen2_vl"])
def test_loading_a_model_of_images_installs_nothing(
    kind: str, installers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"started {args}")

    for name in ("Popen", "check_call", "run", "call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    before = installed()
    assert len(before) > 20
    load_language_model(ModelSettings(str(shaped_folder(kind))), "cpu")
    assert installed() == before
    assert not installers.exists()


def test_what_transformer_lens_asks_for_is_refused(installers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs pip if a model of images is loaded in the usual way, which saelab does not take."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    asked: list[str] = []
    monkeypatch.setattr(module, "_refusal", lambda command: asked.append(command) or SaelabError(command))
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as if it were not installed
    folder = str(shaped_folder("llava"))
    load_language_model(ModelSettings(folder), "cpu")
    assert not asked
    with no_installers():  # TransformerLens swallows the refusal, for the model runs without the package
        TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    assert asked == ["uv pip install torchvision -q"]
    assert not installers.exists()
