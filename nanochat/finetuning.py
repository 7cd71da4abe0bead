"""Train a model on conversations: what midtraining and supervised finetuning share.

The learning rate follows the share of the conversations packed so far, not a number of steps: how
many rows they fill is only known once they are packed. It falls from the first step to the last: a
stage begins by undoing what the one before had cooled down to, and only what cools slowly is kept
(dev/LOG.md).

With `moments`, the optimizer too goes on from where the stage before ended: its moments come along,
and with them the count of its steps. AdamW divides by 1 - beta^steps, which for moments that are
full must be near 1; counted from 0, the tables' first update would be a third of its size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

from nanochat.checkpoint import STAGE_SCRIPTS, Checkpoint, load_model
from nanochat.common import (
    CheckpointFlags,
    Count,
    Derived,
    Share,
    Source,
    StreamFlags,
    UserError,
    all_reduce_sum,
    print0,
    set_up,
)
from nanochat.core_eval import source_bpb
from nanochat.dataloader import ChatSource, Loader
from nanochat.optim import MuonAdamW
from nanochat.report import write_section
from nanochat.scaling import lr_multiplier_at, make_optimizer
from nanochat.tokenizer import Conversation
from nanochat.trainer import Run, compile_for_training, row_choices

Files = tyro.conf.UseAppendAction[list[str]]  # a flag given once for each
MOMENTUM = 0.95  # of Muon; constant, since a stage starts from a trained model


@dataclass
class FinetuneConfig(StreamFlags, CheckpointFlags):
    """The settings of midtraining; SFT has the same, with some other defaults."""

    source: Source = "base"  # stage of the checkpoint to start from
    # data
    mixture: Literal["default", "primer", "none"] = "default"  # public data, embedded world, custom
    custom: Files = field(default_factory=list)  # .jsonl of yours, to 4,000 rows; or FILE:3
    identity: Path | None = None  # who the model is, instead of tasks/identity.json
    num_epochs: Count = 1  # passes over the mixture
    # batch and steps
    max_seq_len: Derived = -1  # tokens of a row; -1: the model's context
    total_batch_size: Count = 524288  # tokens a step over all ranks
    moments: bool = False  # start with the optimizer's moments of the checkpoint, not with zeros
    warmdown: Share = 1.0  # final share of the run over which the learning rate falls to 0
    # the run
    eval_every: int = 150  # steps between validations; <= 0: only at the end
    save_every: int = 500  # steps between checkpoints; <= 0: only at the end


def carry_moments(optimizer: MuonAdamW, checkpoint: Checkpoint) -> None:
    """Give the optimizer the state that the checkpoint was saved with, if it was with one."""
    read = checkpoint.open_optimizer()
    try:
        read("step", 0, 1)
    except UserError:  # imported from another format
        print0(f"{checkpoint.folder} has no optimizer state; --moments starts from zeros")
    else:
        optimizer.import_state(read)


def finetune(
    stage: str,
    title: str,
    cfg: FinetuneConfig,
    build_mixture: Callable[[str], Sequence[Conversation]],
    own: str = "",
) -> None:
    """Train `stage` from the checkpoint that `cfg` names, and report it under `title`.

    `build_mixture` gives the conversations of the stage and of "val"; it may download them, so all
    else is checked before. `own` tells one state of the user's files from another.
    """
    runtime = set_up(cfg.device_type, cfg.dtype, cfg.seed, cfg.deterministic)
    model, tokenizer, meta = load_model(cfg, runtime, train=True, table_dtype=cfg.table_dtype)
    print0(f"{stage} from {meta['name']}")
    settings = vars(cfg) | {"weights": meta["weights"], "own": own}
    seq_len = cfg.max_seq_len if cfg.max_seq_len > 0 else model.config.sequence_len
    num_rows, choices = row_choices(cfg, cfg.total_batch_size, seq_len, model.config, runtime)

    with Run(stage, meta["model_tag"], settings, runtime) as run:
        if run.is_finished:
            return
        train, val = build_mixture(stage), build_mixture("val")
        optimizer = make_optimizer(model, cfg.total_batch_size, 1, runtime.rank, runtime.world_size)
        if cfg.moments and run.resumed is None:
            carry_moments(optimizer, meta["checkpoint"])
        resumed_state = run.restore(model, optimizer)
        num_epochs = None if cfg.num_iterations > 0 else cfg.num_epochs
        source = ChatSource(tokenizer, train, num_epochs, cfg.seed)
        loader = Loader(source, num_rows, seq_len, runtime, resumed_state)
        run.at_exit.callback(loader.close)
        model.document_start = tokenizer.bos_id if cfg.mask_documents else None
        rows = compile_for_training(model, optimizer, cfg.compile, choices, seq_len)
        print0(f"{len(train):,} conversations, {num_rows} rows of {seq_len} tokens a step")
        meter = run.start(model, optimizer, tokenizer, rows, loader)
        while True:
            run.checkpoint(cfg.save_every)
            if run.is_due(cfg.eval_every):
                held_out = ChatSource(tokenizer, val, num_epochs=None, quiet=True)
                bpb = source_bpb(
                    model, held_out, runtime, cfg.eval_tokens, rows,
                    num_rows=num_rows, seq_len=seq_len,
                )  # fmt: skip
                meter.note(val_bpb=bpb)
            if run.progress >= 1:
                break
            loss = run.accumulate(meter.fetch(loader))
            multiplier = cfg.lr_scale * lr_multiplier_at(run.progress, cfg.warmdown)
            finite = run.update(multiplier, MOMENTUM, weight_decay=0.0)
            run.advance(loader.progress if num_epochs else (run.step + 1) / cfg.num_iterations)
            meter.log_step(loss, multiplier, cfg.total_batch_size, finite)
        results = run.finish()
        cropped = all_reduce_sum(torch.tensor(loader.num_cropped, device=runtime.device)).item()
        results |= {"from": meta["name"], "conversations": len(train), "cropped": cropped}
        script, seconds = STAGE_SCRIPTS[stage], results["seconds"]
        write_section(script, title, vars(cfg), results, seconds=seconds)
