"""The memory and disk that writing a cache needs."""

import math
from collections.abc import Mapping
from pathlib import Path

from saelab.activations.cache.layout import BLOCK_TOKENS, UNFINISHED, File, files_of, token_bytes
from saelab.activations.settings import CacheSettings
from saelab.memory import Need, size


def writer_needs(
    settings: CacheSettings, sites: Mapping[str, int], gradients: bool, context: int, tokens: int, folder: Path
) -> list[Need]:
    """Two shards in memory, one being filled and one on its way to the disk; and the cache's files in `folder`.

    `sites` maps names to d_in; `tokens` are wanted in all lanes together. Shards that an interrupted writer finished
    are not counted again.
    """
    files = files_of({"sites": sites, "dtype": settings.dtype, "gradients": gradients})
    each, pass_tokens = token_bytes(files), settings.rows_per_forward * context
    passes = min(max(1, settings.shard_tokens // pass_tokens), math.ceil(tokens / settings.lanes / pass_tokens) + 1)
    shard = passes * pass_tokens
    return [
        Need("shards", 2 * shard * each, "memory", f"2 x {shard:,} tokens x {each:,} bytes"),
        _files_need(files, tokens + settings.lanes * pass_tokens, settings.lanes, shard).less(_written(folder)),
    ]


def _files_need(files: list[File], tokens: int, lanes: int, shard: int) -> Need:
    """`tokens` tokens in files of at most `shard`, and the manifest's entries: 24 bytes a block, 400 a file."""
    shards = lanes + tokens // shard
    entries = shards * sum(400 + 24 * len(file.columns) * -(-shard // BLOCK_TOKENS) for file in files)
    each, headers = token_bytes(files), shards * sum(len(file.header(shard)) for file in files)
    how = f"{tokens:,} tokens x {each:,} bytes, {size(headers + entries)} for headers and checksums"
    return Need("cache", tokens * each + headers + entries, "disk", how)


def _written(folder: Path) -> int:
    """Bytes of finished files of an interrupted cache in `folder`."""
    if not (folder / UNFINISHED).is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.glob("*/*.safetensors"))
