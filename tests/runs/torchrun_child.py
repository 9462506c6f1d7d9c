"""The entry point of torchrun's processes in test_torchrun.py: `saelab` commands, one after the other, with faults.

``torchrun torchrun_child.py COMMANDS``: a JSON list of {"arguments": [...], "fault": {...}}. A fault hits the process
`rank` at the first attempt: after `step` steps of its training it sends a `signal` to itself or to torchrun, or fills
the disk that the file `ballast` is on; or it is killed where it would write its `rows` of a state; or it works in
another `folder`. Each process prints how each command ended, on standard error.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from saelab.cli import main
from saelab.training import state
from saelab.training.trainer import Trainer

HERE = os.getcwd()
TRAIN_STEP, WRITE_PART = Trainer.step, state.write_part


def step_with(fault: dict[str, Any]) -> Any:
    def step(trainer: Trainer, batch: Any) -> Any:
        line = TRAIN_STEP(trainer, batch)
        if trainer.steps == fault["step"]:
            if "ballast" in fault:
                with suppress(OSError), open(fault["ballast"], "wb", buffering=0) as ballast:
                    while True:
                        ballast.write(bytes(4096))
            else:
                os.kill(os.getppid() if fault.get("torchrun") else os.getpid(), fault["signal"])
        return line

    return step


def killed(*arguments: Any, **named: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


for number, command in enumerate(json.loads(sys.argv[1])):
    fault = command.get("fault", {})
    if os.environ["RANK"] != str(fault.get("rank")) or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        fault = {}
    Trainer.step = step_with(fault) if "step" in fault else TRAIN_STEP
    state.write_part = killed if "rows" in fault else WRITE_PART
    os.chdir(fault.get("folder", HERE))
    sys.argv = ["saelab", *command["arguments"]]
    code: Any = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    # All processes write to one pipe: a line and its end in one call, or another process's line comes between them.
    os.write(2, f"ended: {number} {os.environ['RANK']} {code}\n".encode())
sys.exit(code)
