"""Serve a model: the chat page and an OpenAI-compatible API.

    python -m scripts.chat_web               # the newest finetuned model, at http://127.0.0.1:8000
    python -m scripts.chat_web -i rl -g d20 --num_gpus=8 --host=0.0.0.0   # on 8 GPUs, for everybody
    python -m scripts.chat_web --device_type=cpu --slots=4   # laptop

$NANOCHAT_API_KEY, if set, is required by the API. Ctrl-C waits for the answers in progress; a
second one exits at once.

reads: <source>/<model tag>/, report/report.html
writes: nothing
"""

# pyright: reportIncompatibleVariableOverride=false

import os
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import uvicorn

from nanochat.chat_api import ServerConfig
from nanochat.checkpoint import load_model
from nanochat.common import (
    ChatStage,
    CheckpointFlags,
    Count,
    Natural,
    Port,
    UserError,
    print0,
    run_script,
    set_up,
)
from nanochat.engine import Engine, slots_that_fit
from nanochat.server import Server, create_app, listen

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass
class Config(ServerConfig, CheckpointFlags):
    source: ChatStage = "sft"  # stage
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: open to other machines
    port: Port = 8000  # 0: any free one
    slots: Natural = 0  # concurrent answers per GPU; 0: what fits, up to 64 (CPU: 8)
    num_gpus: Count = 1  # GPUs, each with a copy of the model


def load_engines(cfg: Config) -> tuple[list[Engine], str]:
    runtime = set_up(cfg.device_type, cfg.dtype)
    present = torch.cuda.device_count() if runtime.device.type == "cuda" else 1
    if cfg.num_gpus > present:
        raise UserError(f"--num_gpus={cfg.num_gpus}: there are {present}; choose 1 to {present}")
    engines, name = [], ""
    for index in range(cfg.num_gpus):
        device = torch.device("cuda", index) if present > 1 else runtime.device
        own = replace(runtime, device=device)
        model, tokenizer, meta = load_model(cfg, own)
        usual = max(1, min(64 if device.type == "cuda" else 8, slots_that_fit(model)))
        engines.append(Engine(model, tokenizer, num_slots=cfg.slots or usual))
        name = f"nanochat-{meta['model_tag']}-{cfg.source}"
        if index == 0:
            print0(f"serving {meta['name']}")
    return engines, name


def main(cfg: Config) -> None:
    listener = listen(cfg.host, cfg.port)
    engines, name = load_engines(cfg)
    is_local = cfg.host in LOOPBACK | {"::1"}
    api_key = os.environ.get("NANOCHAT_API_KEY", "")
    host_names = LOOPBACK if is_local else frozenset[str]()
    app = create_app(engines, cfg, model=name, api_key=api_key, host_names=host_names)
    if not (is_local or api_key):
        print0("open to whoever reaches this machine; set NANOCHAT_API_KEY to ask for a key")
    num_slots, max_len = engines[0].num_slots, engines[0].max_len
    size = engines[0].slots.cache.num_bytes / num_slots / 2**20
    print0(f"{name}: {cfg.num_gpus} x {num_slots} slots of {max_len} tokens, {size:.1f} MiB each")
    host, port = listener.getsockname()[:2]
    print0(f"chat at http://{host}:{port}, API at http://{host}:{port}/v1; Ctrl-C ends")
    options = {"access_log": False, "limit_concurrency": 1000, "timeout_graceful_shutdown": 5}
    with suppress(KeyboardInterrupt):  # which uvicorn raises again at its end
        Server(uvicorn.Config(app, **options)).run([listener])


if __name__ == "__main__":
    run_script(main, Config)
