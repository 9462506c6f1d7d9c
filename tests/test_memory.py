"""Free memory is the system's available memory or the rest of a cgroup; the peak counts every tensor while it lives."""

from pathlib import Path

import pytest
import torch

from saelab.memory import Need, free_memory, free_on_disk, fullest, peak_bytes, size


def test_needs_of_different_phases_are_not_there_at_once() -> None:
    always, reading = Need("model", 5, "memory", ""), Need("pass", 30, "memory", "", ("reading",))
    step, both = Need("step", 20, "memory", "", ("step",)), Need("buffer", 7, "memory", "", ("reading", "step"))
    assert fullest([always, reading, step, both]) == ("reading", [always, reading, both])
    more = Need("selection", 15, "memory", "", ("step",))
    assert fullest([always, reading, step, both, more]) == ("step", [always, step, both, more])
    assert fullest([always]) == ("", [always]) and fullest([]) == ("", [])


def test_sizes_have_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1000, 137_363_456, 1_048_000_000, 25_300_000_000, 3 * 10**15)] == [
        "0 bytes",
        "999 bytes",
        "1.00 kB",
        "137 MB",
        "1.05 GB",
        "25.3 GB",
        "3,000 TB",
    ]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n"}


def test_without_a_limit_all_available_memory_is_free(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert free_memory(write(tmp_path, MEMINFO)) == 4000 * 1024
    unlimited = {
        "proc/self/cgroup": "0::/user\n",
        "sys/fs/cgroup/user/memory.max": "max\n",
        "sys/fs/cgroup/user/memory.current": "5\n",
    }
    assert free_memory(write(tmp_path, unlimited)) == 4000 * 1024
    ours = free_memory()
    assert ours is not None and ours > 1 << 20


def test_the_tightest_cgroup_around_the_process_decides(tmp_path: Path) -> None:
    write(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "3000000",
            "sys/fs/cgroup/outer/inner/memory.current": "100000",
            "sys/fs/cgroup/outer/memory.max": "1000000",
            "sys/fs/cgroup/outer/memory.current": "700000",
            "sys/fs/cgroup/outer/memory.stat": "anon 400000\ninactive_file 50000\n",
        },
    )
    assert free_memory(tmp_path) == 350_000  # page cache that can be dropped is free
    write(tmp_path, {"sys/fs/cgroup/outer/memory.current": "2000000"})
    assert free_memory(tmp_path) == 0


@pytest.mark.parametrize("group", ["docker/abc/", ""])  # a container may see its own group as the mount
def test_the_first_version_of_cgroups_counts_too(tmp_path: Path, group: str) -> None:
    write(
        tmp_path,
        MEMINFO
        | {
            "proc/self/cgroup": "12:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n0::/docker/abc\n",
            f"sys/fs/cgroup/memory/{group}memory.limit_in_bytes": "2000000\n",
            f"sys/fs/cgroup/memory/{group}memory.usage_in_bytes": "1500000\n",
            f"sys/fs/cgroup/memory/{group}memory.stat": "cache 9\ntotal_inactive_file 1000\n",
        },
    )
    assert free_memory(tmp_path) == 501_000


def test_a_folder_to_be_made_is_on_the_disk_of_its_nearest_parent(tmp_path: Path) -> None:
    here, below = free_on_disk(tmp_path), free_on_disk(tmp_path / "not" / "there" / "yet")
    assert here is not None and below is not None and abs(here - below) < 1 << 30  # others write meanwhile


def test_a_tensor_is_counted_while_it_lives() -> None:
    x = torch.ones(1000)

    def run() -> None:
        y = x + 1  # 4,000 bytes
        z = y.view(10, 100) * 2  # as many again
        y.add_(1)  # in place, nothing new
        del y
        torch.cat([z, z])  # 8,000 beside z

    assert peak_bytes(run) == 12_000
    assert peak_bytes(lambda: x.view(10, 100).t().add_(1)) == 0  # views of existing tensors count as 0 bytes


def test_a_graph_is_counted_until_its_backward_pass() -> None:
    x = torch.ones(1000, requires_grad=True)

    def run() -> None:
        y = x
        for _ in range(5):
            y = y.exp()  # each result is kept for its own gradient
        torch.autograd.grad(y.sum(), x)

    assert peak_bytes(run) >= 5 * 4000 and peak_bytes(run) < 9 * 4000
