"""Many requests: in order, at most so many at once, repeated if they fail, each answered once, within the budget."""

import shutil
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from saelab.autointerp.llm import answers as answers_module
from saelab.autointerp.llm.answers import AHEAD, TRIES, answers
from saelab.autointerp.llm.budget import Budget, BudgetSpent, Price, estimate
from saelab.autointerp.llm.cache import open_cache
from saelab.autointerp.llm.protocol import Reply, Request, TemporaryError
from saelab.errors import SaelabError, SettingError


class Fake:
    """A client that answers with the question and a number, and counts."""

    def __init__(self, concurrency: int = 3, ask: Callable[[str, int], Reply | Exception] | None = None) -> None:
        self.name, self.concurrency = "fake at nowhere", concurrency
        self.asked: list[str] = []
        self.most_at_once = self._under_way = 0
        self._ask, self._lock = ask, threading.Lock()

    def ask(self, request: Request) -> Reply:
        text = request.messages[-1][1]
        with self._lock:
            self.asked.append(text)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
            before = self.asked.count(text) - 1
        try:
            found = self._ask(text, before) if self._ask else Reply(f"to {text}", None, 10, 5)
            if isinstance(found, Exception):
                raise found
            return found
        finally:
            with self._lock:
                self._under_way -= 1

    def count(self, text: str) -> int:
        return 6  # and 4 for the message


def asked(*texts: object) -> list[tuple[object, Request]]:
    return [(text, Request((("user", str(text)),), max_tokens=5)) for text in texts]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "FIRST_WAIT", 1e-3)


def test_replies_come_in_order_whatever_their_time_and_at_most_so_many_are_under_way() -> None:
    def ask(text: str, _: int) -> Reply:
        time.sleep(0.001 * (int(text) * 7 % 10))
        return Reply(text)

    client = Fake(4, ask)
    found = list(answers(client, asked(*range(60)), cache=None))
    assert found == [(i, Reply(str(i))) for i in range(60)]
    assert client.most_at_once == 4 and sorted(map(int, client.asked)) == list(range(60))


def test_requests_are_read_as_places_free_up() -> None:
    taken = [0]

    def endless() -> Iterator[tuple[int, Request]]:
        while True:
            taken[0] += 1
            yield taken[0], asked(taken[0])[0][1]

    made: list[weakref.ref[Reply]] = []

    def ask(text: str, _: int) -> Reply:
        reply = Reply(text)
        made.append(weakref.ref(reply))
        return reply

    found = answers(Fake(3, ask), endless(), cache=None)
    for n in range(1, 200):
        assert next(found)[0] == n and taken[0] <= n + 3 * AHEAD
    assert sum(reply() is not None for reply in made) <= 3 * AHEAD + 4, "answers are not kept in memory"
    found.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saelab-llm")]


@pytest.mark.parametrize("on_disk", [False, True])
def test_equal_requests_are_one(tmp_path: Path, on_disk: bool) -> None:
    client = Fake(3, lambda text, _: Reply(text) if time.sleep(0.002) is None else Reply(""))
    texts = [0, 0, 1, 0, *range(2, 50), 0, 49]  # under way, and long answered
    found = list(answers(client, asked(*texts), cache=tmp_path / "new" / "cache" if on_disk else None))
    assert found == [(i, Reply(str(i))) for i in texts]
    assert sorted(map(int, client.asked)) == list(range(50))


def test_nothing_is_asked_again_in_a_later_run(tmp_path: Path) -> None:
    first, again = Fake(), Fake()
    found = list(answers(first, asked(*range(10)), cache=tmp_path / "cache"))
    assert list(answers(again, asked(*range(12)), cache=tmp_path / "cache"))[:10] == found
    assert sorted(again.asked) == ["10", "11"]
    again.name = "another"
    assert len(list(answers(again, asked(1), cache=tmp_path / "cache"))) == 1 and again.asked[2:] == ["1"]


CHANGES = {
    "messages": (("system", "a"),),
    "max_tokens": 6,
    "temperature": 0.5,
    "top_logprobs": 5,
    "schema": {"type": "object"},
    "seed": 1,
}


def test_every_field_of_a_request_is_in_its_key(tmp_path: Path) -> None:
    assert set(CHANGES) == {field.name for field in fields(Request)}
    ((_, request),) = asked("a")
    different = [request, *(replace(request, **{name: value}) for name, value in CHANGES.items())]
    client = Fake()
    assert len(list(answers(client, list(enumerate(different)), cache=tmp_path / "cache"))) == len(different)
    assert len(client.asked) == len(different)


def test_replies_are_cached_as_they_are(tmp_path: Path) -> None:
    odd = Reply("half \ud800 \0 '\" \u2028", ((("1", -0.1), ("\udfff", float("-inf"))), ()), 3, 4)
    for _ in range(2):
        assert list(answers(Fake(1, lambda *_: odd), asked("a"), cache=tmp_path / "cache")) == [("a", odd)]


def test_temporary_errors_are_repeated(tmp_path: Path) -> None:
    def ask(text: str, before: int) -> Reply | Exception:
        return Reply(text) if before == TRIES - 1 else TemporaryError("busy")

    client = Fake(2, ask)
    assert list(answers(client, asked("a", "b"), cache=None)) == [("a", Reply("a")), ("b", Reply("b"))]
    assert len(client.asked) == 2 * TRIES
    client = Fake(1, lambda text, _: Reply(text) if text != "b" else TemporaryError("status 500 (oh)"))
    found = answers(client, asked(*"abc"), cache=tmp_path / "cache")
    assert next(found) == ("a", Reply("a"))
    with pytest.raises(SaelabError) as raised:
        next(found)
    assert str(raised.value) == (
        "fake at nowhere: no answer after 7 tries: status 500 (oh); what was answered is kept; see to the server, "
        "lower the concurrency (1) if it has too much to do, and run again"
    )
    assert client.asked == ["a", *["b"] * TRIES], "c is not sent after the failure"


def test_waits_double_with_jitter_unless_the_server_asks_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, seconds=None: waits.append(seconds))
    monkeypatch.setattr(answers_module, "FIRST_WAIT", 1.0)
    asking = answers_module._Asking(Fake(1, lambda *_: TemporaryError("busy")), None, None, resumable=False)  # type: ignore[arg-type]
    with pytest.raises(SaelabError):
        asking.repeated(asked("a")[0][1])
    assert len(waits) == TRIES - 1 and all(0.5 * 2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits))
    assert len({wait / 2**i for i, wait in enumerate(waits)}) == TRIES - 1
    waits.clear()
    asking.client = Fake(1, lambda text, before: Reply(text) if before else TemporaryError("busy", 20))  # type: ignore[assignment]
    assert asking.repeated(asked("a")[0][1]) == Reply("a") and 20 <= waits[0] <= 21
    asking.client = Fake(1, lambda *_: TemporaryError("quota", 86400.0))  # type: ignore[assignment]
    with pytest.raises(SaelabError, match="after 1 try: quota, and it asks to wait 86,400 s; see"):
        asking.repeated(asked("a")[0][1])


def test_at_an_error_what_is_under_way_is_kept_and_nothing_more_is_sent(tmp_path: Path) -> None:
    fails = threading.Event()

    def ask(text: str, _: int) -> Reply | Exception:
        if text == "2":
            fails.wait()
            return SaelabError("refused")
        if text == "3":
            fails.set()
            time.sleep(0.05)
        return Reply(text)

    client = Fake(2, ask)
    found = answers(client, asked(*range(9)), cache=tmp_path / "cache")
    assert [next(found)[0], next(found)[0]] == [0, 1]
    with pytest.raises(SaelabError) as raised:
        next(found)
    assert (
        str(raised.value) == "refused"
        and client.asked[:2] == ["0", "1"]
        and sorted(client.asked) == ["0", "1", "2", "3"]
    )
    with open_cache(tmp_path / "cache") as cache:
        kept = [cache.get(request.key(client.name)) for _, request in asked(*range(5))]
    assert kept == [Reply("0"), Reply("1"), None, Reply("3"), None]


def test_the_error_that_came_first_is_reported() -> None:
    def ask(text: str, before: int) -> Exception:
        if text == "0":
            return TemporaryError("busy", 100)  # waits until the other fails
        time.sleep(0.01)
        return SaelabError("refused")

    with pytest.raises(SaelabError) as raised:
        list(answers(Fake(2, ask), asked(0, 1), cache=None))
    assert str(raised.value) == "refused"


def test_a_budget_in_tokens_is_never_exceeded(tmp_path: Path) -> None:
    def ask(text: str, _: int) -> Reply:
        time.sleep(0.003)  # several are under way, and reserve more than they take
        return Reply(text, None, 10, 2)

    client, budget, found = Fake(4, ask), Budget(tokens=100), []
    with pytest.raises(BudgetSpent) as raised:
        found.extend(answers(client, asked(*range(50)), cache=tmp_path / "cache", budget=budget))
    # a request of at most 15 tokens that takes 12 fits while at most 85 are used
    assert (budget.prompt_tokens, budget.answer_tokens) == (80, 16) and len(client.asked) == 8
    assert str(raised.value) == (
        "fake at nowhere: the cap of 100 tokens leaves no room for the next request: 96 are used; what was answered is "
        "kept; raise the cap and run again to continue"
    )
    budget = Budget(tokens=50 * 15)
    assert len(list(answers(client, asked(*range(50)), cache=tmp_path / "cache", budget=budget))) == 50
    assert len(client.asked) == 50 and budget.prompt_tokens == 420, "answers from the cache cost nothing"


def test_a_budget_in_money_needs_a_price() -> None:
    client, budget = Fake(3), Budget(money=0.001, price=Price(10, 20))  # 0.0002 a request
    replies = answers(client, asked(*range(9)), cache=None, budget=budget)
    with pytest.raises(BudgetSpent, match=r"the cap of 0.001 in money .*: 0.0010 are spent; raise the cap$"):
        list(replies)
    assert len(client.asked) == 5 and budget.spent == pytest.approx(0.001)
    with pytest.raises(SettingError, match="money: the model's price is not known"):
        Budget(money=1.0)
    for settings in ({"tokens": 0}, {"money": -1.0, "price": Price(1, 1)}, {"price": Price(-1, 1)}):
        with pytest.raises(SettingError):
            Budget(**settings)
    assert Budget().spent is None


def test_the_estimate_is_what_a_run_uses_at_most() -> None:
    client, budget = Fake(3), Budget(price=Price(1.0, 2.0))
    requests = asked(*range(20))
    found = estimate(client, [request for _, request in requests[:3]], 20, budget.price)
    list(answers(client, requests, cache=None, budget=budget))
    assert (found.prompt_tokens, found.answer_tokens) == (budget.prompt_tokens, budget.answer_tokens) == (200, 100)
    assert found.money == budget.spent == pytest.approx(400e-6) and found.tokens == 300
    unknown = estimate(client, [requests[0][1]], 1)
    assert unknown.money is None and "price is not known" in str(unknown)
    with pytest.raises(SettingError):
        estimate(client, [], 20)


def test_progress_counts_the_tokens_of_replies() -> None:
    seen = []

    def track(items, label, total, size, note):
        for item in items:
            seen.append((label, total, size(item), note()))
            yield item

    list(answers(Fake(), asked(1, 1), cache=None, budget=Budget(price=Price(1e5, 0)), expected=30, track=track))
    note = "2 answers, 1 requests not sent as their answer was known, 1.00 spent"
    assert [each[:3] for each in seen] == [("asking fake at nowhere", 30, 15)] * 2 and seen[1][3] == note


def test_a_cache_cut_short_by_a_kill_keeps_its_whole_answers(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with open_cache(path) as cache:
        for i in range(20):
            cache.put(str(i), Reply(f"answer {i}"))
        for end in ("", "-wal"):  # what a kill leaves
            shutil.copy(f"{path}{end}", f"{tmp_path}/killed{end}")
    log = tmp_path / "killed-wal"
    log.write_bytes(log.read_bytes()[:-3000])
    with open_cache(tmp_path / "killed") as cache:
        found = [cache.get(str(i)) for i in range(20)]
        whole = sum(reply is not None for reply in found)
        assert 15 < whole < 20 and found[:whole] == [Reply(f"answer {i}") for i in range(whole)]
        for text in ("once", "again"):
            cache.put("19", Reply(text))
    with open_cache(tmp_path / "killed") as cache:
        assert cache.get("19") == Reply("again")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database, but longer than the header of one" * 9)
    with pytest.raises(SaelabError, match="text: cannot be used: it is no cache of answers; move it away"):
        list(answers(Fake(), asked(1), cache=tmp_path / "text"))
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE mine (a)")
    other.close()
    with pytest.raises(SaelabError, match="other: is no cache of answers of this version"):
        list(answers(Fake(), asked(1), cache=tmp_path / "other"))
    with pytest.raises(SaelabError, match="see to the permissions"):
        list(answers(Fake(), asked(1), cache=tmp_path))
    with open_cache(tmp_path / "cache"), pytest.raises(SaelabError, match=r"cache: .* another process is using it"):
        list(answers(Fake(), asked(1), cache=tmp_path / "cache"))
    with pytest.raises(SettingError, match="concurrency: 0"):
        list(answers(Fake(0), asked(1), cache=None))
