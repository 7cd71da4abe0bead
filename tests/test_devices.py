"""nanochat.devices: a card is found by its own device names and by no other's."""

import pytest
import torch

from nanochat import devices
from nanochat.common import Runtime
from nanochat.devices import CARDS, find_card, peak_flops
from nanochat.loss import gpu_chunk

# Device names as drivers report them -> the card's name; "" is unknown.
REPORTED = {
    "NVIDIA L4": "L4", "NVIDIA L40": "L40", "NVIDIA L40S": "L40S", "NVIDIA A10G": "A10G",
    "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA A100 80GB PCIe": "A100", "NVIDIA A10": "A10",
    "NVIDIA A100-PCIE-40GB": "A100 40GB", "NVIDIA A100-SXM4-40GB MIG 1g.5gb": "",
    "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA H200": "H200",
    "NVIDIA H100 NVL": "H100 NVL", "NVIDIA H200 NVL": "H200 NVL", "NVIDIA H20": "",
    "NVIDIA GH200 480GB": "GH200", "NVIDIA GB200": "GB200", "NVIDIA B200": "B200",
    "Tesla T4": "T4", "GRID T4-16Q": "", "Tesla V100-SXM2-16GB": "V100",
    "NVIDIA A800-SXM4-80GB": "",
    "Tesla V100-SXM3-32GB": "V100 32GB", "Tesla V100-PCIE-32GB": "V100 PCIe 32GB",
    "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA GeForce RTX 4090 D": "",
    "NVIDIA GeForce RTX 4090 Laptop GPU": "", "NVIDIA GeForce RTX 5090 Laptop GPU": "",
    "NVIDIA GeForce RTX 4060 Ti": "RTX 4060 Ti", "NVIDIA GeForce RTX 4060": "RTX 4060",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "RTX 4070 Ti SUPER", "NVIDIA RTX A6000": "RTX A6000",
    "GeForce RTX 2080 with Max-Q Design": "", "NVIDIA GeForce GTX 1660 Ti": "GTX 1660 Ti",
    "NVIDIA RTX A1000": "RTX A1000", "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "Quadro RTX 6000": "Quadro RTX 6000", "NVIDIA RTX A2000 12GB": "RTX A2000 12GB",
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": "RTX PRO 6000",
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition": "", "cpu": "", "mps": "",
    "AMD Instinct MI300X": "", "NVIDIA GeForce RTX 3080": "RTX 3080",
}  # fmt: skip


def test_a_peak_is_that_of_the_very_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "measure_flops", lambda _: 1.0)
    peaks = {card.name: 1e12 * card.peak for card in CARDS}
    for device, name in REPORTED.items():
        peak, source = peak_flops(Runtime(torch.device("cpu"), torch.bfloat16, 0, 1, device))
        if name:
            kind = "fp16" if name.startswith(("T4", "V100", "Quadro", "GTX")) else "bf16"
            assert (peak, source) == (peaks[name], f"{name} dense {kind} data sheet")
        else:
            assert (peak, source) == (1.0, f"bfloat16 matmul measured on this {device}")


def test_the_table_is_whole() -> None:
    """Each card is found by its name, has a key of its own, and figures that a card can have."""
    assert len({card.key for card in CARDS}) == len(CARDS)
    keys = {"h100", "h100-pcie", "a100-40gb", "l4", "4090", "4060-ti-16gb", "1660-ti", "a6000"}
    assert keys < {card.key for card in CARDS}
    for card in CARDS:
        assert find_card(card.name) == card
        assert 5 < card.memory_gib < 185 and (7, 0) <= card.capability <= (12, 0)
        assert 100 < card.bandwidth <= 8000 and 10 <= card.peak <= 2500
        # FLOPs for each byte that comes from memory: far off only where a figure is mistyped.
        assert 25 < 1e3 * card.peak / card.bandwidth < 600, card


def test_the_loss_takes_little_of_any_card_s_memory() -> None:
    chunks = {card.key: gpu_chunk(card.memory_gib * 2**30) for card in CARDS}
    assert (chunks["h100"], chunks["t4"], chunks["3060-ti"]) == (2**27, 2**26, 2**25)
    assert all(3 * 4 * chunks[card.key] < 0.1 * card.memory_gib * 2**30 for card in CARDS)


def test_a_matmul_s_speed_is_measured() -> None:
    flops = devices.measure_flops(Runtime(torch.device("cpu"), torch.float32, 0, 1, "cpu"))
    assert 1e8 < flops < 1e14
