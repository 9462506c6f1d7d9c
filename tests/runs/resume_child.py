"""A process that trains runs and stops each at the step that a line of JSON on stdin names.

Started once, it forks for every training, so that the libraries are imported once. ``{"call": "train", "resume",
"sweep" or "controls", "run": ..., "config": {...}, "overrides": [...], "step": 7, "signal": 9, "renames": null}``: the
signal is sent after that many steps, or before that rename of a file or folder (null: never). Answers ``{"code": exit
code or minus the signal, "messages": messages of the training, "error": ..., "stopped": exit code that the training
raises after a signal, "renames": how many there were}``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def run(
    call: str,
    run: str,
    config: Any,
    overrides: list[str],
    step: int | None,
    signal: int,
    renames: int | None = None,
) -> dict[str, Any]:
    import torch

    import saelab
    from saelab.runs.controls import controls
    from saelab.runs.sweep import sweep
    from saelab.training.trainer import Trainer

    torch.set_num_threads(1)
    messages: list[str] = []
    one_step, sent = Trainer.step, False

    def stopped(self: Trainer, batch: Any) -> Any:
        nonlocal sent
        found = one_step(self, batch)
        if self.steps == step and not sent:
            sent = True
            os.kill(os.getpid(), signal)
        return found

    replace, count = os.replace, 0

    def renamed(*names: Any) -> None:
        nonlocal count
        count += 1
        if count == renames:
            os.kill(os.getpid(), signal)
        replace(*names)

    Trainer.step = stopped  # type: ignore[method-assign]
    os.replace = renamed  # type: ignore[assignment]
    try:
        if call == "train":
            saelab.train(config, overrides, say=messages.append)
        elif call == "controls":
            controls(run, overrides, say=messages.append)
        elif call == "sweep":
            sweep(config, overrides, say=messages.append)
        else:
            saelab.resume(Path(run), overrides, say=messages.append)
    except saelab.SaelabError as error:
        return {"messages": messages, "error": str(error)}
    except SystemExit as stopped:
        return {"messages": messages, "error": None, "stopped": stopped.code}
    return {"messages": messages, "error": None, "stopped": None, "renames": count}


def main() -> None:
    import transformers  # noqa: F401  (before forking, once for all)

    import saelab.lm.load
    import saelab.runs.sweep  # noqa: F401

    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            failed = 1
            try:
                os.write(writing, json.dumps(run(**json.loads(line))).encode())
                failed = 0
            finally:
                sys.stderr.flush()
                if failed:
                    sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(failed)
        os.close(writing)
        with os.fdopen(reading, "rb") as answer:
            reply = json.loads(answer.read() or "{}")
        print(json.dumps({"code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), **reply}), flush=True)


if __name__ == "__main__":
    main()
