"""The store of torchrun's processes; tests/runs/test_torchrun.py has real ones."""

import threading

import pytest
from torch.distributed import HashStore

from saelab import torchrun


def test_processes_that_are_started_again_find_nothing_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps its store. The restarted ones took the addresses of the dead for those of each other, and hung."""
    kept = HashStore()
    monkeypatch.setattr(torchrun, "_torchruns_store", lambda: kept)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        monkeypatch.setattr(torchrun, "_connections", 0)  # a new process
        met: list[object] = []
        first = threading.Thread(target=lambda found=met: found.append(torchrun.meet()))
        first.start()
        first.join(0.3)
        assert not met, "one waits for the other, after a restart too"
        monkeypatch.setattr(torchrun, "_connections", 0)
        store = torchrun.meet()
        first.join(10)
        assert met and not store.check(["address"])
        store.set("address", "of a process that ends")
        torchrun.announce(ValueError())  # and one that fails is no failure of the next
