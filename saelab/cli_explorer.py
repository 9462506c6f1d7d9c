"""The command `saelab app`: the explorer on 127.0.0.1."""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from saelab import cli_autointerp
from saelab.errors import SaelabError

Port = Annotated[int, typer.Option(min=1, max=65535, help="port of the explorer, on 127.0.0.1")]


def explorer(
    runs: Annotated[list[Path] | None, typer.Argument(help="run folders, or folders of runs (default: runs)")] = None,
    port: Port = 8501,
    llm: cli_autointerp.Llm = None,
    model: cli_autointerp.Model = None,
    price: cli_autointerp.Price = None,
    max_tokens: cli_autointerp.Tokens = None,
    max_money: cli_autointerp.Money = None,
) -> None:
    """Serve the explorer on 127.0.0.1 until Ctrl-C.

    With --llm its buttons can ask a language model for explanations and scores; --max-tokens and --max-money are caps
    for all of them together. A key comes from SAELAB_LLM_KEY or OPENAI_API_KEY.

    Example: saelab app runs

    Example: saelab app runs --llm http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
    """
    options = cli_autointerp.explorer_options(llm, model, price, max_tokens, max_money)
    serve(runs or [Path("runs")], port, options)


def serve(runs: list[Path], port: int, options: Sequence[str] = ()) -> None:
    """Start Streamlit on the explorer, in place of this process."""
    from saelab.files import expanded

    runs = [Path(expanded(run)) for run in runs]
    missing = [run for run in runs if not run.is_dir()]
    if missing:
        raise SaelabError(f"{missing[0]}: no such folder (`saelab train CONFIG` makes a run)")
    package = Path(__file__).parent
    main = next((p for p in (package / "_app" / "main.py", package.parent / "app" / "main.py") if p.is_file()), None)
    if main is None:
        raise SaelabError("the explorer's files are missing from this installation; install saelab again")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a server that has just ended counts as one
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SaelabError(f"cannot listen on 127.0.0.1:{port} ({error.strerror}); try --port {port + 1}") from error
    typer.echo(f"explorer: http://127.0.0.1:{port}  (Ctrl-C ends it)")
    sys.stdout.flush()
    command = [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        str(main),
        "--server.address=127.0.0.1",
        f"--server.port={port}",
        "--server.headless=true",
        "--browser.gatherUsageStats=false",
        "--",
        *options,
        *(str(run.resolve()) for run in runs),
    ]
    os.execv(sys.executable, command)
