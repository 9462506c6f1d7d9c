"""A process that trains runs and stops each at the step that a line of JSON on stdin names.

Started once, it forks for every training, so that the libraries are imported once. ``{"call": "train" or "resume",
"run": ..., "config": {...}, "overrides": [...], "step": 7, "signal": 9}``: the signal is sent after that many steps
(null: never). Answers ``{"code": exit code or minus the signal, "messages": messages of the training, "error": ...,
"stopped": exit code that the training raises after a signal}``.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def run(call: str, run: str, config: Any, overrides: list[str], step: int | None, signal: int) -> dict[str, Any]:
    import torch

    import saelab
    from saelab.training.trainer import Trainer

    torch.set_num_threads(1)
    messages: list[str] = []
    one_step = Trainer.step

    def stopped(self: Trainer, batch: Any) -> Any:
        found = one_step(self, batch)
        if self.steps == step:
            os.kill(os.getpid(), signal)
        return found

    Trainer.step = stopped  # type: ignore[method-assign]
    try:
        if call == "train":
            saelab.train(config, overrides, say=messages.append)
        else:
            saelab.resume(Path(run), overrides, say=messages.append)
    except saelab.SaelabError as error:
        return {"messages": messages, "error": str(error)}
    except SystemExit as stopped:
        return {"messages": messages, "error": None, "stopped": stopped.code}
    return {"messages": messages, "error": None, "stopped": None}


def main() -> None:
    import transformers  # noqa: F401  (before forking, once for all)

    import saelab.lm.load
    import saelab.runs.train  # noqa: F401

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
