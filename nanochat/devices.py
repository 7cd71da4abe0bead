"""Graphics cards: memory, bandwidth, peak and price of each, and the peak that MFU refers to.

`plan`, MFU and the tests of automatic batches share one table. A card is found by the words of its
CUDA device name: all of its own must be there, and no others but those that change nothing. So an
L40 is no L4, and a laptop's 4090 or a slice of an A100 is unknown. An unknown card's peak is
measured.
"""

import re
import time
from typing import NamedTuple

import torch

from nanochat.common import Runtime, synchronize


class Card(NamedTuple):
    """One GPU as its vendor describes it."""

    name: str  # words of the CUDA device name
    memory_gib: float  # usable: without what the driver, error correction and CUDA take
    bandwidth: float  # GB/s
    peak: float  # dense TFLOP/s with fp32 accumulation in bf16, before capability 8.0 in fp16
    price: float | None  # dollars for an hour, where such a card is usually rented
    capability: tuple[int, int]  # CUDA's version of the hardware

    @property
    def key(self) -> str:
        """The short name that flags take, such as h100-pcie, 4060-ti or 6000-ada."""
        return re.sub("[rg]tx (?=.)", "", self.name.lower()).replace(" ", "-")


# NVIDIA's data sheets and architecture white papers, recalled in 2026, not measured. GeForce cards
# run at half rate when they accumulate in fp32, which is the rate given. Where one name was sold
# with two memories, the other has its size in the name, which only `plan` sees. Prices are round
# figures of what rental markets asked in 2025.
# fmt: off
CARDS = [
    Card("GB200",             184,  8000, 2500,  None, (10, 0)),
    Card("B200",              178,  8000, 2250,  6.00, (10, 0)),
    Card("GH200",              94,  4000,  990,  2.00, (9, 0)),
    Card("H200",              139,  4800,  989,  3.80, (9, 0)),
    Card("H200 NVL",          139,  4800,  835,  3.40, (9, 0)),
    Card("H100",               78,  3350,  989,  3.00, (9, 0)),
    Card("H100 NVL",           92,  3900,  835,  2.80, (9, 0)),
    Card("H100 PCIe",          78,  2000,  756,  2.40, (9, 0)),
    Card("A100",               78,  2039,  312,  1.80, (8, 0)),
    Card("A100 40GB",          39,  1555,  312,  1.30, (8, 0)),
    Card("A30",                23,   933,  165,  None, (8, 0)),
    Card("A40",                44,   696,  149.7, 0.40, (8, 6)),
    Card("A10",                22,   600,  125,  0.75, (8, 6)),
    Card("A10G",               22,   600,   70,  1.00, (8, 6)),
    Card("L40S",               44,   864,  362,  1.00, (8, 9)),
    Card("L40",                44,   864,  181,  0.90, (8, 9)),
    Card("L4",                 22,   300,  121,  0.70, (8, 9)),
    Card("T4",                 14.5, 320,   65,  0.40, (7, 5)),
    Card("V100",               15.5, 900,  125,  0.50, (7, 0)),
    Card("V100 32GB",          31.5, 900,  125,  0.60, (7, 0)),
    Card("V100 PCIe",          15.5, 900,  112,  0.40, (7, 0)),
    Card("V100 PCIe 32GB",     31.5, 900,  112,  0.50, (7, 0)),
    Card("RTX PRO 6000",       94,  1792,  503.8, 1.80, (12, 0)),
    Card("RTX 6000 Ada",       47,   960,  364.2, 0.80, (8, 9)),
    Card("RTX 5000 Ada",       31,   576,  261.1, None, (8, 9)),
    Card("RTX 4500 Ada",       23,   432,  158.4, None, (8, 9)),
    Card("RTX 4000 Ada",       19,   360,  106.9, 0.30, (8, 9)),
    Card("RTX 2000 Ada",       15,   224,   48,  0.25, (8, 9)),
    Card("RTX A6000",          47,   768,  154.8, 0.50, (8, 6)),
    Card("RTX A5500",          23,   768,  136.4, None, (8, 6)),
    Card("RTX A5000",          23,   768,  111.1, 0.30, (8, 6)),
    Card("RTX A4500",          19,   640,   94.6, 0.25, (8, 6)),
    Card("RTX A4000",          15,   448,   76.7, 0.20, (8, 6)),
    Card("RTX A2000 12GB",     11.5, 288,   31.9, None, (8, 6)),
    Card("RTX A2000",           5.6, 288,   31.9, None, (8, 6)),
    Card("RTX A1000",           7.6, 192,   26.9, None, (8, 6)),
    Card("Quadro RTX 8000",    44,   672,  130.5, None, (7, 5)),
    Card("Quadro RTX 6000",    22,   672,  130.5, None, (7, 5)),
    Card("TITAN RTX",          23.4, 672,  130.5, None, (7, 5)),
    Card("RTX 5090",           31,  1792,  209.5, 0.90, (12, 0)),
    Card("RTX 5080",           15.4, 960,  112.6, None, (12, 0)),
    Card("RTX 5070 Ti",        15.4, 896,   87.9, None, (12, 0)),
    Card("RTX 5070",           11.5, 672,   61.7, None, (12, 0)),
    Card("RTX 5060 Ti 16GB",   15.4, 448,   47.4, None, (12, 0)),
    Card("RTX 5060 Ti",         7.6, 448,   47.4, None, (12, 0)),
    Card("RTX 5060",            7.6, 448,   38.4, None, (12, 0)),
    Card("RTX 4090",           23.4, 1008, 165.2, 0.50, (8, 9)),
    Card("RTX 4080 SUPER",     15.4, 736,  104.4, None, (8, 9)),
    Card("RTX 4080",           15.4, 717,   97.5, None, (8, 9)),
    Card("RTX 4070 Ti SUPER",  15.4, 672,   88.2, None, (8, 9)),
    Card("RTX 4070 Ti",        11.5, 504,   80.2, None, (8, 9)),
    Card("RTX 4070 SUPER",     11.5, 504,   71,  None, (8, 9)),
    Card("RTX 4070",           11.5, 504,   58.3, None, (8, 9)),
    Card("RTX 4060 Ti 16GB",   15.4, 288,   44.1, None, (8, 9)),
    Card("RTX 4060 Ti",         7.6, 288,   44.1, None, (8, 9)),
    Card("RTX 4060",            7.6, 272,   30.2, None, (8, 9)),
    Card("RTX 3090 Ti",        23.4, 1008,  80,  0.30, (8, 6)),
    Card("RTX 3090",           23.4, 936,   71,  0.25, (8, 6)),
    Card("RTX 3080 Ti",        11.5, 912,   68.2, None, (8, 6)),
    Card("RTX 3080 12GB",      11.5, 912,   61.3, None, (8, 6)),
    Card("RTX 3080",            9.6, 760,   59.5, None, (8, 6)),
    Card("RTX 3070 Ti",         7.6, 608,   43.5, None, (8, 6)),
    Card("RTX 3070",            7.6, 448,   40.6, None, (8, 6)),
    Card("RTX 3060 Ti",         7.6, 448,   32.4, None, (8, 6)),
    Card("RTX 3060",           11.5, 360,   25.5, None, (8, 6)),
    Card("RTX 3060 8GB",        7.6, 240,   25.5, None, (8, 6)),
    Card("RTX 3050",            7.6, 224,   18.2, None, (8, 6)),
    Card("RTX 3050 6GB",        5.6, 168,   13.5, None, (8, 6)),
    Card("RTX 2080 Ti",        10.6, 616,   53.8, None, (7, 5)),
    Card("RTX 2080 SUPER",      7.6, 496,   44.6, None, (7, 5)),
    Card("RTX 2080",            7.6, 448,   40.3, None, (7, 5)),
    Card("RTX 2070 SUPER",      7.6, 448,   36.3, None, (7, 5)),
    Card("RTX 2070",            7.6, 448,   29.9, None, (7, 5)),
    Card("RTX 2060 SUPER",      7.6, 448,   28.7, None, (7, 5)),
    Card("RTX 2060 12GB",      11.5, 336,   28.7, None, (7, 5)),
    Card("RTX 2060",            5.6, 336,   25.8, None, (7, 5)),
    Card("GTX 1660 Ti",         5.6, 288,   11,  None, (7, 5)),
    Card("GTX 1660 SUPER",      5.6, 336,   10,  None, (7, 5)),
    Card("GTX 1660",            5.6, 192,   10,  None, (7, 5)),
]
# fmt: on
# Words of a device name that tell neither speed nor a share of the card.
SAME_CARD = re.compile(
    r"nvidia|geforce|tesla|gpu|generation|blackwell|(workstation|server|edition)|pcie|sxm\d?|hbm\w+"
    r"|\d+gb"
)


def find_card(device_name: str) -> Card | None:
    """The card of a CUDA device name, by whole words; None if it is not in the table."""
    words = set(re.findall(r"[\w.]+", device_name.lower()))
    for card in sorted(CARDS, key=lambda card: -len(card.name.split())):
        own = set(card.name.lower().split())
        if own <= words and all(SAME_CARD.fullmatch(word) for word in words - own):
            return card
    return None


def peak_flops(runtime: Runtime) -> tuple[float, str]:
    """(the FLOP/s that MFU is measured against, where that number comes from)."""
    if card := find_card(runtime.device_name):
        kind = "bf16" if card.capability >= (8, 0) else "fp16"
        return card.peak * 1e12, f"{card.name} dense {kind} data sheet"
    dtype = str(runtime.dtype).removeprefix("torch.")
    return measure_flops(runtime), f"{dtype} matmul measured on this {runtime.device_name}"


def measure_flops(runtime: Runtime) -> float:
    """FLOP/s of a matmul on this device: elsewhere the best in half a second, as it may be busy.

    A GPU does so much at once that only a large one measures it, not its launch: the mean of 20.
    """
    on_gpu = runtime.device.type == "cuda"
    size, best = 8192 if on_gpu else 1024, float("inf")
    left, right = torch.randn(2, size, size, device=runtime.device, dtype=runtime.dtype)
    if on_gpu:
        product = left @ right  # loads the kernel
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            torch.mm(left, right, out=product)
        end.record()
        end.synchronize()
        return 20 * 2 * size**3 / (begin.elapsed_time(end) / 1000)
    start = time.perf_counter()
    while time.perf_counter() - start < 0.5:
        before = time.perf_counter()
        torch.mm(left, right)
        synchronize(runtime.device)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best
