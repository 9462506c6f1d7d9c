"""One question to the Hugging Face Hub, answered soon or not at all."""

import os
import threading
from collections.abc import Callable
from typing import Any

from saelab.errors import brief

TIMEOUT = 4.0
"""Seconds to wait for the Hub before saying that it cannot be reached."""


class HubUnreachable(Exception):
    """The Hub gave no answer; the message says why."""


def ask_hub(question: Callable[[Any], Any]) -> Any:
    """``question(HfApi())``, within `TIMEOUT` seconds.

    Asked in a thread of its own and once only: the Hugging Face libraries retry for 23 seconds, with a line of log for
    each attempt, and looking up an address can take longer than any timeout of a request. Raises HubUnreachable,
    or what the Hub's client raises where the Hub did answer: HFValidationError, RepositoryNotFoundError.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(question(HfApi()))
        except Exception as error:  # the client's transport raises its own kinds, which differ between versions
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    answer = answers[0] if answers else TimeoutError(f"no answer within {TIMEOUT:g} s")
    if isinstance(answer, HFValidationError | RepositoryNotFoundError):
        raise answer
    if isinstance(answer, Exception):
        raise HubUnreachable(brief(answer)) from answer
    return answer
