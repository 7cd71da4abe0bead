"""nanochat.runtime: no rank outlives torchrun, nor starts when it is dead."""

import os
import subprocess
import sys

import pytest

DIRECT = 'setsid "$PYTHON" -c "$CODE"; true'  # its parent is a shell, and no torchrun
WRAPPED = 'setsid sh -c \'"$PYTHON" -c "$CODE"; true\'; true'  # a shell that leads the session
DIED = "torchrun died while this rank was starting\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a parent died")
@pytest.mark.parametrize(("command", "said"), [(DIRECT, DIED), (WRAPPED, "")])
def test_a_rank_whose_torchrun_died_does_not_start(command: str, said: str) -> None:
    code = 'from nanochat.common import set_up; set_up("cpu")'
    ours = {"PYTHON": sys.executable, "CODE": code, "TORCHELASTIC_RUN_ID": "none"}
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | ours, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.stderr == said
