"""Graphics cards: memory, bandwidth, peak and price of each, and the peak that MFU refers to.

`plan`, MFU and the tests of automatic batches share one table. A card is found by the words of its
CUDA device name: all of its own must be there, and no others but those that change nothing. So an
L40 is no L4, and a laptop's 4090 or a slice of an A100 is unknown. An unknown card's peak is
measured.
"""

import re
import time
from pathlib import Path
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


def read_cards() -> list[Card]:
    """The table of cards.txt, which says what its columns are and where they come from."""
    cards = []
    for line in (Path(__file__).parent / "cards.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, memory, bandwidth, peak, price, capability = line.rsplit(maxsplit=5)
            major, minor = map(int, capability.split("."))
            card = Card(
                name,
                memory_gib=float(memory),
                bandwidth=float(bandwidth),
                peak=float(peak),
                price=None if price == "-" else float(price),
                capability=(major, minor),
            )
            cards.append(card)
    return cards


CARDS = read_cards()
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
