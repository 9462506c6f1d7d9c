"""A dataset on the Hugging Face Hub, streamed through the datasets library."""

import random
from collections.abc import Iterator
from functools import partial
from typing import Any

from saelab.corpus.documents import Document, Row, Source, choose_column, documents_of_rows
from saelab.errors import SaelabError, brief
from saelab.hub import TIMEOUT, HubUnreachable, ask_hub


def open_hub_dataset(name: str, subset: str | None, split: str, text_column: str | None, nearest: str) -> Source:
    """The source that streams `name` at its present revision.

    `nearest` is added to the message where there is no such dataset. Raises SaelabError within some `TIMEOUT`
    seconds if the Hub cannot be reached, or if it has no such dataset, subset, split or column.
    """
    revision = _revision(name, nearest)
    import datasets

    datasets.disable_progress_bars()
    about = f"the Hub dataset {name}"
    try:
        stream: Any = datasets.load_dataset(name, subset, split=split, streaming=True, revision=revision)
        first = next(_rows(iter(stream), name), None)
    except SaelabError:
        raise
    except Exception as error:  # the library raises many kinds; its messages list the subsets and splits there are
        raise SaelabError(f"corpus: {about} cannot be opened: {brief(error)} (see `subset` and `split`)") from error
    column, tokenised = choose_column(first, about, text_column)
    if stream.column_names is not None:
        stream = stream.select_columns([column])

    def documents(rng: random.Random) -> Iterator[Document]:
        # A buffer of 1 permutes the files of the dataset only: documents are shuffled later, in windows of their own.
        shuffled = stream.shuffle(seed=rng.getrandbits(31), buffer_size=1)
        return documents_of_rows(_rows(iter(shuffled), name), column, tokenised)

    identity = {"source": "hub", "text": f"{name} {subset} {split} {revision}", "column": column}
    return Source(about, identity, tokenised, documents)


def _rows(stream: Iterator[Any], name: str) -> Iterator[Row]:
    index = 0
    while True:
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:  # of the network, or of a file that does not parse
            raise SaelabError(
                f"corpus: reading {name} from the Hub failed after {index} rows: {brief(error)}"
            ) from error
        yield partial("row {} of the Hub dataset {}, as streamed".format, index, name), row
        index += 1


def _revision(name: str, nearest: str) -> str:
    """The commit that the Hub has of `name` now."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    local = f"There is no file or folder of that name either.{nearest}"
    try:
        return ask_hub(lambda api: api.dataset_info(name, timeout=TIMEOUT)).sha
    except HFValidationError as error:
        raise SaelabError(f"corpus: {name!r} cannot be the id of a Hub dataset. {local}") from error
    except RepositoryNotFoundError as error:
        raise SaelabError(
            f"corpus: the Hub has no dataset {name}, or it is private (log in, or set HF_TOKEN). {local}"
        ) from error
    except HubUnreachable as error:
        raise SaelabError(
            f"corpus: the Hub dataset {name} cannot be reached ({error}). {local} Without a network, use "
            "`corpus: demo`, a local file or folder, or a copy made elsewhere: "
            f"`hf download {name} --repo-type dataset --local-dir DIR`."
        ) from error
