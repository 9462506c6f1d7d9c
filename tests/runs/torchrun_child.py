"""The entry point of torchrun's processes in test_torchrun.py: `saelab` commands, one after the other, with faults.

``torchrun torchrun_child.py COMMANDS``: a JSON list of {"arguments": [...], "fault": {...}}, the fault optional: after
`step` steps of its training the process `rank`, at the first attempt, sends a `signal` to itself or to torchrun, or
fills the disk that the file `ballast` is on. Each process prints how each command ended, on standard error.
"""

import json
import os
import sys
from contextlib import suppress
from typing import Any

from saelab.cli import main
from saelab.training.trainer import Trainer

TRAIN_STEP = Trainer.step


def step_with(fault: dict[str, Any]) -> Any:
    def step(trainer: Trainer, batch: Any) -> Any:
        line = TRAIN_STEP(trainer, batch)
        mine = int(os.environ["RANK"]) == fault["rank"] and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if mine and trainer.steps == fault["step"]:
            if "ballast" in fault:
                with suppress(OSError), open(fault["ballast"], "wb", buffering=0) as ballast:
                    while True:
                        ballast.write(bytes(4096))
            else:
                os.kill(os.getppid() if fault.get("torchrun") else os.getpid(), fault["signal"])
        return line

    return step


for number, command in enumerate(json.loads(sys.argv[1])):
    Trainer.step = step_with(command["fault"]) if "fault" in command else TRAIN_STEP
    sys.argv = ["saelab", *command["arguments"]]
    code: Any = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code or 0
    print(f"ended: {number} {os.environ['RANK']} {code}", file=sys.stderr, flush=True)
sys.exit(code)
