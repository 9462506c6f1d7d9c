"""The wheel works away from the repository, imports are light, and no file names the machine it was written on."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "sae.n_features=128",
    "sae.k=8",
    "training.tokens=8192",
    "training.batch=256",
    "activations.stream.buffer_tokens=8192",
    "eval.tokens=2048",
    "features.tokens=4096",
]


def run(command: list[str | Path], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `cwd` without this process' PYTHONPATH; a failure shows everything it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT], out)
    (path,) = out.glob("saelab-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it, which borrows everything else from the one that runs the tests.

    A path in a .pth file is added without reading the .pth files inside it, so an editable saelab is not borrowed.
    Returns its bin folder.
    """
    environment = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", environment], environment)
    python = environment / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel], environment)
    (site,) = environment.glob("lib/python3.*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return environment / "bin"


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_wheel_has_what_a_run_needs(wheel: Path) -> None:
    """Nothing left behind: every file of saelab/, app/ and configs/, each in its place."""
    names = contents(wheel).keys()
    expected = {
        f"{inside}/{path.relative_to(ROOT / outside).as_posix()}"
        for outside, inside in (("saelab", "saelab"), ("app", "saelab/_app"), ("configs", "saelab/_configs"))
        for path in (ROOT / outside).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith((".pyc", ".tmp"))
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"saelab/_configs/quickstart.yaml", "saelab/demo/model/model.safetensors", "saelab/py.typed"} <= expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("scripts" in name or "planted" in name for name in names), "benchmarks are scripts of the checkout"


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    # Without --wheel: the sdist, then the wheel out of it.
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT], tmp_path)
    (again,) = tmp_path.glob("saelab-*.whl")
    assert contents(again) == contents(wheel)


def test_wheel_is_what_gets_imported(installed: Path, tmp_path: Path) -> None:
    where = run([installed / "python", "-c", "import saelab; print(saelab.__file__)"], tmp_path).stdout.strip()
    assert Path(where).is_relative_to(installed.parent)


def test_installed_commands_print_help(installed: Path, tmp_path: Path) -> None:
    assert "train" in run([installed / "saelab", "--help"], tmp_path).stdout
    assert "app" in run([installed / "saelab", "app", "--help"], tmp_path).stdout


def test_installed_wheel_trains(installed: Path, tmp_path: Path) -> None:
    """The demo's first step, in small, from a folder where neither the repository nor its configs can be seen."""
    out = tmp_path / "run"
    run([installed / "saelab", "train", "quickstart", *TINY, f"out={out}"], tmp_path)
    assert (out / "sae" / "sae_weights.safetensors").is_file()
    assert (out / "sae" / "cfg.json").is_file()


HEAVY = ("datasets", "pandas", "pyarrow", "streamlit", "torch", "transformer_lens", "transformers")
LIGHT = [
    pytest.param("import saelab", id="import"),
    pytest.param("import sys; sys.argv = ['saelab', '--help']; from saelab.cli import main; main()", id="help"),
]


def user_seconds(code: str, cwd: Path) -> float:
    """User CPU time of `python -c code`, start of the interpreter included; unlike wall time, not the neighbours'."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code], cwd=cwd, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_utime


@pytest.mark.parametrize("code", LIGHT)
def test_start_is_quick(code: str, tmp_path: Path) -> None:
    """Under 1 s of user CPU: the best of up to five runs, since a first one also compiles and reads cold files."""
    times: list[float] = []
    while len(times) < 5 and min(times, default=9.0) >= 1.0:
        times.append(user_seconds(code, tmp_path))
    assert min(times) < 1.0, f"user CPU seconds: {times}"


@pytest.mark.parametrize("code", LIGHT)
def test_start_leaves_heavy_libraries_alone(code: str, tmp_path: Path) -> None:
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', [m for m in {HEAVY} if m in sys.modules], file=sys.stderr))\n{code}"
    )
    done = run([sys.executable, "-c", program], tmp_path, PYTHONPATH=str(ROOT))
    assert "LOADED []" in done.stderr


def test_no_machine_paths() -> None:
    """No project file names a place that exists on its author's machine only."""
    machine = re.compile(r"(?<![\w.~-])/(?:root|work|opt|home/\w+|Users/\w+)/|\b[A-Z]:\\Users\\")
    folders = [ROOT / name for name in ("saelab", "app", "configs", "notebooks", "scripts", "tests", "docs", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*") if "__pycache__" not in path.parts]
    files += list(ROOT.iterdir())
    found = []
    for path in files:
        if not path.is_file() or path.name == ".gitignore" or path.suffix in (".safetensors", ".parquet", ".png"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if machine.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert not found, "\n".join(found)
