"""The client that a user names."""

from saelab.autointerp.lexical import LexicalJudge
from saelab.autointerp.llm.openai_client import OpenAIClient
from saelab.autointerp.llm.protocol import Client
from saelab.errors import SettingError
from saelab.lm.settings import ModelSettings

LOCAL = "local"


def client(llm: str | Client | None, model: str | None, concurrency: int) -> Client:
    """The client of `llm`: an address with the OpenAI chat protocol, ``local``, a client, or None for the offline one.

    `model` is the model's name on the server; for ``local`` a model folder or Hub id. Raises SettingError if one of
    the two is missing, and SaelabError if the model cannot be loaded.
    """
    if llm is None:
        if model is not None:
            raise SettingError(f"llm: is missing; name the server that has {model}, or {LOCAL} for a model folder")
        return LexicalJudge()
    if not isinstance(llm, str):
        return llm
    if model is None:
        which = "a model folder" if llm == LOCAL else f"the model to be asked at {llm}"
        raise SettingError(f"model: is missing; name {which}")
    if llm != LOCAL:
        return OpenAIClient(llm, model, concurrency=concurrency)
    from saelab.autointerp.llm.local import load_local_model  # with torch

    return load_local_model(ModelSettings(model))
