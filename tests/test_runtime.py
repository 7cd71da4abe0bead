"""nanochat.common: no rank outlives torchrun, nor starts when it is dead; what a GPU can do."""

import os
import subprocess
import sys

import pytest
import torch

from nanochat import common

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


@pytest.mark.parametrize(
    ("device", "sheet"),
    [
        ("NVIDIA L4", "L4"), ("NVIDIA L40", "L40"), ("NVIDIA L40S", "L40S"), ("NVIDIA A10G", "A10G"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100 80GB PCIe", "A100"), ("NVIDIA A10", ""),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA GB200", "GB200"), ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090 D", ""),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", ""), ("NVIDIA GeForce RTX 5090 Laptop GPU", ""),
    ],
)  # fmt: skip
def test_a_peak_is_that_of_the_very_gpu(
    device: str, sheet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "measure_flops", lambda *_: 1.0)
    peak, source = common.peak_flops(
        common.Runtime(torch.device("cpu"), torch.bfloat16, 0, 1, device)
    )
    assert source == (
        f"{sheet} dense bf16 data sheet" if sheet else f"bfloat16 matmul measured on this {device}"
    )
    assert peak == (common.PEAK_BF16_FLOPS[sheet] if sheet else 1.0)
