"""Serve models: the chat page and an OpenAI-compatible API.

    python -m scripts.chat_web               # the newest finetuned model, at http://127.0.0.1:8000
    python -m scripts.chat_web -i rl -g d20 --replicas=8 --host=0.0.0.0   # on 8 GPUs, for everybody
    python -m scripts.chat_web -i base --models=all   # a base model; all others if asked for
    python -m scripts.chat_web --device_type=cpu --slots=4   # laptop

Whoever asks for another stage of the same run, by its name in /v1/models, gets it after a moment:
it is loaded, and models that nobody uses make room for it.

$NANOCHAT_API_KEY, if set, is required by the API. Ctrl-C waits for the answers in progress; a
second one exits at once.

reads: <stage>/<model tag>/, report/report.html
writes: nothing
"""

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import uvicorn
from pydantic import Field

from nanochat.chat_api import ServerConfig
from nanochat.checkpoint import STAGE_SCRIPTS, find_checkpoint, list_runs, load_model
from nanochat.common import (
    CheckpointFlags,
    Count,
    Natural,
    Port,
    Runtime,
    UserError,
    free_memory,
    leave,
    print0,
    run_script,
    set_up,
)
from nanochat.engine import Engine
from nanochat.jobs import ServedModel
from nanochat.kv_cache import KVCache, kept_dtype
from nanochat.replicas import supervise
from nanochat.server import DRAIN_SECONDS, Server, create_app, listen

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass
class Config(ServerConfig, CheckpointFlags):
    host: str = "127.0.0.1"  # the address to listen on; 0.0.0.0: open to other machines
    port: Port = 8000  # 0: any free one
    models: Literal["run", "all"] = "run"  # which may be asked for: the run's stages, or all runs
    memory: Annotated[float, Field(ge=0, lt=1e6)] = 0  # GiB per process; 0: most of the free
    slots: Natural = 0  # concurrent answers per model; 0: what fits, up to 64 (CPU: 8)
    replicas: Count = 1  # processes with models of their own: a GPU each, or a share of the CPU
    deterministic: bool = False  # other requests do not change an answer's last bits; slower


def offer(cfg: Config, runtime: Runtime) -> tuple[list[ServedModel], float]:
    """(models, of which the first is loaded; bytes that those loaded may take in all)."""
    memory = cfg.memory * 2**30 or 0.8 * free_memory(runtime.device)
    run, first = describe(cfg, runtime, memory)
    if first.num_bytes > memory:
        raise UserError(
            f"{first.name} takes {first.num_bytes / 2**30:.2g} GiB, more than the memory of "
            f"{memory / 2**30:.2g} GiB; lower --slots or raise --memory"
        )
    first.preloaded = first.load()
    models, runs = [first], [run for stage in STAGE_SCRIPTS for run in list_runs(stage)]
    for other in sorted(runs, key=lambda other: other.name != run.name):
        if other != run and (other.name == run.name or cfg.models == "all"):
            chosen = replace(cfg, source=other.parent.name, model_tag=other.name, step=None)
            try:
                models.append(describe(chosen, runtime, memory)[1])
            except (UserError, OSError) as error:
                print0(f"warning: {error}; {other} is not offered")
    return models, memory


def describe(chosen: Config, runtime: Runtime, memory: float) -> tuple[Path, ServedModel]:
    """(run folder, its model, not loaded, with as many slots as `memory` bytes hold beside it)."""
    run, checkpoint = find_checkpoint(chosen.source, chosen.model_tag, chosen.step, verify=False)
    chosen = replace(chosen, model_tag=run.name)
    config, most = checkpoint.model_config, 64 if runtime.device.type == "cuda" else 8
    max_len, weights = config.sequence_len, checkpoint.folder / "model.safetensors"
    kept_as = kept_dtype(runtime.device, runtime.dtype)
    slot = KVCache(
        num_layers=config.n_layer, num_slots=1, num_kv_heads=config.n_kv_head, max_len=max_len,
        head_dim=config.head_dim, num_channels=config.n_embd, device="meta", dtype=runtime.dtype,
        kept_as=kept_as,
    )  # fmt: skip
    room = int((memory - weights.stat().st_size) / slot.num_bytes)
    slots = chosen.slots or max(1, min(most, room))
    return run, ServedModel(
        name=f"nanochat-{run.name}-{chosen.source}",
        kind="base" if chosen.source == "base" else "chat",
        max_len=max_len,
        num_bytes=weights.stat().st_size + slots * slot.num_bytes,
        load=partial(load_engine, chosen, runtime, slots),
    )


def load_engine(chosen: Config, runtime: Runtime, slots: int) -> Engine:
    if runtime.device.type == "cuda":
        torch.cuda.set_device(runtime.device)  # of this thread, an engine's or the main one
    model, tokenizer, meta = load_model(chosen, runtime)
    engine = Engine(model, tokenizer, slots, deterministic=chosen.deterministic)
    size = engine.slots.cache.num_bytes / slots / 2**20
    print0(f"serving {meta['name']}, {slots} slots of {engine.max_len} tokens, {size:.1f} MiB each")
    return engine


def serve(cfg: Config, listener: socket.socket, ready: Callable[[], None] | None = None) -> None:
    """Serve in this process; `ready` is server.Server's."""
    runtime = set_up(cfg.device_type, cfg.dtype)
    torch.set_num_threads(max(1, torch.get_num_threads() // cfg.replicas))
    models, memory = offer(cfg, runtime)
    is_local = cfg.host in LOOPBACK | {"::1"}
    api_key = os.environ.get("NANOCHAT_API_KEY", "").strip()
    host_names = LOOPBACK if is_local else frozenset[str]()
    app = create_app(models, cfg, memory, api_key=api_key, host_names=host_names)
    if not (is_local or api_key):
        print0("open to everybody, training samples too; set NANOCHAT_API_KEY to ask for a key")
    if others := [model.name for model in models[1:]]:
        print0(f"when asked for: {', '.join(others)}")
    host, port = listener.getsockname()[:2]
    print0(f"chat at http://{host}:{port}, API at http://{host}:{port}/v1; Ctrl-C ends")
    config = uvicorn.Config(
        app, access_log=False, limit_concurrency=1000, timeout_graceful_shutdown=5
    )
    # By which a Ctrl-C ends it: of an exception each open connection would print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    server = Server(config, ready)
    for number in (signal.SIGUSR1, signal.SIGALRM):  # which would break answers off, were they not
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run([listener])
    if server.should_exit:  # by these; other signals have ended the process
        leave("the time is up")


def main(cfg: Config) -> None:
    num_gpus = torch.cuda.device_count() if cfg.device_type in ("", "cuda") else 0
    if num_gpus and cfg.replicas > num_gpus:
        raise UserError(f"--replicas={cfg.replicas}: more than the {num_gpus} GPUs; lower it")
    key = os.environ.get("NANOCHAT_API_KEY", "")
    if key and not (key.strip().isprintable() and key.isascii() and key.strip()):
        raise UserError("NANOCHAT_API_KEY is to be of visible ASCII characters; choose another")
    listener = listen(cfg.host, cfg.port)
    if cfg.replicas == 1:
        return serve(cfg, listener)
    if not (num_gpus or cfg.memory):  # now: who replaces one finds that of the others taken
        free = free_memory(torch.device("cpu")) / 2**30
        cfg = replace(cfg, memory=0.8 * free / cfg.replicas)
    supervise(partial(serve, cfg, listener), cfg.replicas, DRAIN_SECONDS + 15)


if __name__ == "__main__":
    run_script(main, Config)
