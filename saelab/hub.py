"""A request to the Hugging Face Hub with a short timeout."""

import os
import threading
from collections.abc import Callable
from typing import Any

from saelab.errors import brief

TIMEOUT = 4.0
"""Seconds to wait before the Hub counts as unreachable."""


class HubUnreachable(Exception):
    """The Hub did not answer; the message says why."""


def ask_hub(question: Callable[[Any], Any]) -> Any:
    """``question(HfApi())``, within `TIMEOUT` seconds.

    Asks once, in a thread of its own: the Hugging Face libraries retry for 23 seconds, logging each attempt, and an
    address lookup can take longer than any request's timeout. Raises HubUnreachable, or the Hub client's
    HFValidationError or RepositoryNotFoundError if the Hub did answer.
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
        except Exception as error:  # the client's transport raises its own kinds, and they differ between versions
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
