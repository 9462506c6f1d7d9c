"""What every test gets: two threads, Hugging Face libraries offline and out of the user's cache, and `no_network`."""

import atexit
import inspect
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# No deadline: how long an example takes depends on what else the machine does. The same examples in every run, so that
# a run that passed passes again; `pytest --hypothesis-profile explore` looks for others.
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")

# Read by torch and the Hugging Face libraries when they are first imported, so set before any test module is; torch
# itself is not imported here, since many tests do without it.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(max(1, 2 // _workers))
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # else threads that wait take the cores from whatever else runs
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.update(dict.fromkeys(OFFLINE, "1"))
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder of the process that started them
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="saelab-tests-hf-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


# A script's background job ignores SIGINT, `nohup` ignores SIGHUP, and so would the commands that tests send them to.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


def block_network(log: str) -> None:
    """Let Python's sockets reach only this machine; every other attempt fails and is written to the file `log`.

    Stands alone, because `no_network` also hands its source to child processes. Libraries that bring their own sockets
    (hf-xet, gRPC) are not caught.
    """
    import ipaddress
    import socket

    def check(host: object) -> None:
        if isinstance(host, bytes):
            host = host.decode()
        if not isinstance(host, str) or host in ("", "localhost"):
            return
        try:
            local = ipaddress.ip_address(host.split("%")[0]).is_loopback
        except ValueError:
            local = False
        if not local:
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{host}\n")
            raise OSError(f"no network in this test: {host}")

    def guard(name: str, address_at: int) -> None:
        original = getattr(socket.socket, name)

        def method(self: socket.socket, *args: object) -> object:
            address = args[address_at]
            if isinstance(address, tuple):  # else the path of a Unix socket
                check(address[0])
            return original(self, *args)

        setattr(socket.socket, name, method)

    guard("connect", 0)
    guard("connect_ex", 0)
    guard("sendto", -1)
    lookup = socket.getaddrinfo

    def getaddrinfo(host: object, *args: object, **kwargs: object) -> object:
        check(host)
        return lookup(host, *args, **kwargs)  # type: ignore[arg-type]

    socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Only loopback can be reached, here and in Python child processes; an attempt to go further fails the test.

    Yields the file that attempts are listed in, one host per line; a test that means to be refused deletes it.
    Child processes do not see HF_HUB_OFFLINE and its like, for a user without a network has not set them either.
    """
    import socket

    folder = tmp_path_factory.mktemp("no_network")
    log = folder / "attempts.txt"
    for name in ("connect", "connect_ex", "sendto"):  # noted by monkeypatch, which puts them back
        monkeypatch.setattr(socket.socket, name, getattr(socket.socket, name))
    monkeypatch.setattr(socket, "getaddrinfo", socket.getaddrinfo)
    block_network(str(log))

    start = folder / "sitecustomize.py"
    start.write_text(f"{inspect.getsource(block_network)}\n\nblock_network({str(log)!r})\n", encoding="utf-8")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    for variable in OFFLINE:
        monkeypatch.delenv(variable, raising=False)
    yield log
    attempts = log.read_text(encoding="utf-8").split() if log.exists() else []
    assert not attempts, f"reached for the network: {sorted(set(attempts))}"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an autoencoder of 64 features on the tiny GPT-2, without a database; tests do not change it.

    Its weights are those that a training starts from.
    """
    import json

    import saelab
    from tests.tiny import CONTEXT, language_model, model_folder, random_rows, text

    folder, site, lm = tmp_path_factory.mktemp("trained"), "blocks.1.hook_resid_post", language_model("gpt2")
    (folder / "book.txt").write_text(text(100))
    settings = saelab.settings_of(
        {
            "model": str(model_folder("gpt2")),
            "site": site,
            "corpus": str(folder / "book.txt"),
            "context": CONTEXT,
            "device": "cpu",
            "sae": {"n_features": 64, "k": 4},
            "out": str(folder / "tiny"),
        }
    )
    rows = random_rows(lm, 8)
    sae = saelab.new_autoencoder(settings.sae, lm.activations(rows, [site])[site][lm.ordinary(rows)], seed=0)
    sae.metadata |= {"hook_name": site, "saelab": {"model_fingerprint": lm.fingerprint}}
    with saelab.create_run(settings) as run:
        saelab.save_sae(sae, run / "sae")
        (run / "train.json").write_text(json.dumps({"complete": True, "tokens": 10_000}))
    return run


def pytest_report_header() -> str:
    return f"saelab tests: {os.environ['OMP_NUM_THREADS']} torch threads, {sys.executable}"
