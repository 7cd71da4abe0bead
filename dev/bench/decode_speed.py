"""Decoding speed, and what the device does at best: products and a copy.

    python -m dev.bench.decode_speed
    python -m dev.bench.decode_speed --depth 4 --slots 1 8 --past 64        # laptop

The model is random. MBU is the least that a step must read (weights, visible keys and values) over
its time, as a share of what a plain copy moves.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from dev.bench.serve_load import letter_tokenizer
from nanochat import attention, common, fp8
from nanochat.checkpoint import build_model
from nanochat.engine import Engine, SlotPool, slots_that_fit
from nanochat.gpt import GPT
from nanochat.scaling import depth_to_config, find_card


@dataclass
class Config:
    depth: int = 20  # layers
    slots: tuple[int, ...] = (1, 8, 32, 128)  # sequences at once
    past: tuple[int, ...] = (64, 1500)  # tokens before the one that is decoded
    device_type: common.DeviceType = ""  # cpu, cuda or mps; empty: the best available


def seconds_of(work: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Mean time of `work`, again and again without a wait, after three that do not count."""
    begin = 0.0
    for number in range(repeats + 3):
        if number == 3:
            common.synchronize(device)
            begin = time.perf_counter()
        work()
    common.synchronize(device)
    return (time.perf_counter() - begin) / repeats


def show_peaks(runtime: common.Runtime) -> float:
    """Print the rates of products and of a copy; returns the copy's bytes per second."""
    device, card = runtime.device, find_card(runtime.device_name)
    size = 8192 if device.type == "cuda" else 512
    left, right = torch.randn(2, size, size, device=device, dtype=runtime.dtype).unbind(0)
    rates = {"matmul": 2 * size**3 / seconds_of(lambda: left @ right, device)}
    if fp8.is_there(runtime):
        one = torch.ones((), device=device)
        eight = partial(fp8.multiply, left.to(fp8.E4M3), right.to(fp8.E4M3), one, one, fast=True)
        rates["fp8 matmul"] = 2 * size**3 / seconds_of(eight, device)
    source, target = torch.ones(2, 2**15 * size, device=device).unbind(0)
    rates["copy"] = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)
    for name, rate in rates.items():
        print(f"{name}, 10^12 per second  {rate / 1e12:.4g}")
        if card:
            peak = card.bandwidth / 1e3 if name == "copy" else card.peak
            print(f"{name} over data sheet  {rate / 1e12 / peak:.4g}")
    return rates["copy"]


def step_bytes(model: GPT, num_slots: int, length: int) -> int:
    """The least that a decode step reads when every slot holds `length` tokens."""
    tables = ("wte", "value_embeds")  # a few rows of them
    weights = sum(p.nbytes for n, p in model.named_parameters() if n.split(".")[0] not in tables)
    config = model.config
    seen = sum(min(length, config.window(i) or length) for i in range(config.n_layer))
    cell = 2 * config.n_kv_head * config.head_dim * model.compute_dtype.itemsize
    return weights + num_slots * seen * cell


@torch.inference_mode()
def feed(pool: SlotPool, past: int) -> None:
    """A step of decoding, behind `past` tokens in every slot."""
    pool.cache.lengths.fill_(past)
    for slot in pool.all:
        slot.last = 7
    pool.decode(pool.all)


def main(cfg: Config) -> None:
    runtime, tokenizer = common.set_up(cfg.device_type), letter_tokenizer()
    capability, dtype = runtime.capability, runtime.dtype
    kernel = attention.choose_kernel(runtime.device.type, capability, dtype, head_dim=128)
    print(f"{runtime.device_name} {capability}, torch {torch.__version__}, {kernel}, {dtype}")
    copied = show_peaks(runtime)
    model = build_model(depth_to_config(cfg.depth, tokenizer.vocab_size), None, runtime)
    for name, weight in model.named_parameters():
        if name.endswith(("c_proj.weight", "lm_head.weight")):  # products of zeros take less power
            torch.nn.init.normal_(weight, 0, weight.shape[1] ** -0.5)
    model = model.to(dtype).eval()
    for num_slots in cfg.slots:
        if num_slots > slots_that_fit(model):
            break
        pool = Engine(model, tokenizer, num_slots).slots
        graphs = pool.graphs
        for past, pool.graphs in product(cfg.past, {graphs, None}):
            taken = seconds_of(partial(feed, pool, past), runtime.device)
            label = f"{num_slots} slots after {past} tokens".replace("1 slots", "1 slot")
            label += "" if pool.graphs is graphs else ", eager"
            print(f"tok/s of {label}  {num_slots / taken:.4g}")
            share = step_bytes(model, num_slots, past) / taken / copied
            print(f"MBU of {label}, %  {100 * share:.4g}", flush=True)


if __name__ == "__main__":
    common.run_script(main, Config)
