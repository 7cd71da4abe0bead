"""nanochat.runtime: no rank outlives torchrun, nor starts when it is dead."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process that its parent died"
)
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            'setsid "$PYTHON" -c "$CODE"; true',
            "torchrun died while this rank was starting\n",
        ),  # sh is not torchrun
        (
            'setsid sh -c \'"$PYTHON" -c "$CODE"; true\'; true',
            "",
        ),  # torchrun started a script, the script us
    ],
)
def test_a_rank_whose_torchrun_died_does_not_start(command: str, said: str) -> None:
    code = 'from nanochat.runtime import set_up; set_up("cpu")'
    environment = os.environ | {
        "PYTHON": sys.executable,
        "CODE": code,
        "TORCHELASTIC_RUN_ID": "none",
    }
    done = subprocess.run(
        ["sh", "-c", command], env=environment, stderr=subprocess.PIPE, text=True, timeout=120
    )
    assert done.stderr == said
