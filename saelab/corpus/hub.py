"""A dataset on the Hugging Face Hub, streamed through the datasets library."""

import random
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from saelab.corpus.documents import (
    Cursor,
    Document,
    Lane,
    Row,
    Source,
    choose_column,
    documents_of_rows,
    one_after_another,
)
from saelab.errors import SaelabError, brief
from saelab.hub import TIMEOUT, HubUnreachable, ask_hub


def open_hub_dataset(
    name: str, subset: str | None, split: str, text_column: str | None, nearest: str, revision: str | None = None
) -> Source:
    """The source that streams `name` at `revision` (a commit, tag or branch; default: the current commit).

    `nearest` is added to the message if there is no such dataset. Raises SaelabError if the Hub does not answer within
    about `TIMEOUT` seconds, or has no such dataset, subset, split or column.
    """
    commit = _commit(name, nearest, revision)
    import datasets

    datasets.disable_progress_bars()
    about = f"the Hub dataset {name}"
    try:
        stream: Any = datasets.load_dataset(name, subset, split=split, streaming=True, revision=commit)
        column, tokenised = choose_column(_rows(stream, about), about, text_column)
    except SaelabError:
        raise
    except Exception as error:  # the library raises many kinds; its messages list the available subsets and splits
        raise SaelabError(f"corpus: {about} cannot be opened: {brief(error)} (see `subset` and `split`)") from error
    if stream.column_names is not None:
        stream = stream.select_columns([column])

    files = [partial(_read_file, stream, name, number, column, tokenised) for number in range(stream.num_shards)]

    def documents(rng: random.Random, lane: Lane, start: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
        drawn = rng.sample(files, len(files))  # the library's shuffle() may lose its buffer on resuming
        if len(drawn) % lane.of == 0:  # each lane has files of its own
            return one_after_another(drawn[lane.index :: lane.of], Lane(), start)
        return one_after_another(drawn, lane, start)

    identity = {"source": "hub", "text": f"{name} {subset} {split} {commit}", "column": column}
    return Source(about, identity, tokenised, documents)


def _read_file(
    stream: Any, name: str, number: int, column: str, tokenised: bool, lane: Lane, start: list[Any] | None
) -> Iterator[tuple[Document, list[Any]]]:
    """One file of a Hub dataset as a part; a position in it: how many rows of the lane, and the library's state."""
    from datasets.distributed import split_dataset_by_node

    file = stream.shard(num_shards=stream.num_shards, index=number)
    if lane.of > 1:  # every lane reads the whole file and keeps only its own rows
        file = split_dataset_by_node(file, rank=lane.index, world_size=lane.of)
    done, state = start or (0, None)
    if state is not None:
        file.load_state_dict(state)
    rows = _rows(file, f"file {number} of the Hub dataset {name}", range(lane.index, sys.maxsize, lane.of)[done:])
    for count, (where, row) in enumerate(rows, done + 1):
        row = {column: None} | row if isinstance(row, dict) else row  # a file may lack the column
        for document in documents_of_rows([(where, row)], column, tokenised):
            yield document, [count, file.state_dict()]


def _rows(stream: Any, what: str, numbers: Sequence[int] = range(sys.maxsize)) -> Iterator[Row]:
    """The rows of a stream; messages locate them by `what` and their `numbers`."""
    rows = iter(stream)
    for number in numbers:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network failed, or a file does not parse
            raise SaelabError(f"corpus: reading {what} failed at row {number}: {brief(error)}") from error
        yield partial("{}, row {}".format, what, number), row


def _commit(name: str, nearest: str, revision: str | None) -> str:
    """The commit of `name` that `revision` refers to; None: the current one."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    local = f"There is no file or folder of that name either.{nearest}"
    try:
        return ask_hub(lambda api: api.dataset_info(name, revision=revision, timeout=TIMEOUT)).sha
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
