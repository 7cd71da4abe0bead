"""Pretrain a base model on a corpus.

Depth is the one dial: width, heads, tokens, batch, learning rates and decay follow from it
(nanochat/scaling.py). Killed at any instant, the same command resumes from the last checkpoint.

    python -m scripts.base_train --depth 12                         # one GPU
    torchrun --nproc_per_node=8 -m scripts.base_train -- --depth 20    # eight
    python -m scripts.base_train --depth 4 --max_seq_len 512 \\
        --total_batch_size 4096 --num_iterations 300                # laptop

reads: base_data/<corpus>/, tokenizer/
writes: base/<model tag>/ (checkpoints, metrics.jsonl, tokenizer, config.json),
    report/base_train.json
"""

from dataclasses import dataclass

import torch

from nanochat import fp8, scaling
from nanochat.checkpoint import build_model, list_steps
from nanochat.common import (
    Choice,
    Count,
    Derived,
    DeviceType,
    Dtype,
    Positive,
    Rows,
    Runtime,
    TableDtype,
    Tag,
    all_reduce_sum,
    print0,
    run_dir,
    run_script,
    set_up,
    tokenizer_dir,
)
from nanochat.core_eval import source_bpb
from nanochat.dataloader import IGNORED, Loader, TextSource
from nanochat.dataset import find_corpus
from nanochat.engine import sample_texts
from nanochat.gpt import call
from nanochat.report import write_section
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Run, batch_rows, compile_for_training, row_choices, starts_over


@dataclass
class Config:
    # model
    depth: Count = 20  # layers; everything else follows from it
    aspect_ratio: Count = 64  # width is aspect_ratio x depth, rounded up to whole heads
    head_dim: Count = 128  # channels of one attention head
    max_seq_len: Count = 2048  # tokens of context
    window_pattern: str = "SSSL"  # S: a quarter of the context, L: all of it; tiled over the layers
    plain: bool = False  # the published first-generation architecture, without our additions
    # horizon and batch
    num_iterations: Derived = -1  # steps; -1: from target_param_data_ratio
    target_param_data_ratio: Positive = 12.0  # tokens per parameter of blocks and head
    total_batch_size: Derived = -1  # tokens a step over all ranks; -1: from the horizon
    device_batch_size: Rows = "auto"  # rows per micro-batch; auto: what fits
    recompute: Choice = "auto"  # activations, for a third more time; auto: if nothing fits else
    # data and machine
    data: str = ""  # corpus; empty: the one prepared last
    mask_documents: bool = False  # a token sees its own document only
    device_type: DeviceType = ""  # cpu, cuda or mps; empty: the best available
    dtype: Dtype = "auto"  # of the matmuls: auto, bfloat16, float16 or float32
    table_dtype: TableDtype = "auto"  # of the embeddings
    fp8: bool = False  # matmuls of the blocks in 8-bit floats, on GPUs that have them
    compile: Choice = "auto"  # torch.compile; auto: on a GPU
    seed: int = 0  # of the initial weights
    deterministic: bool = False  # the same bits on a GPU each time; slower
    # the run
    run: str = "dummy"  # wandb name; dummy: no wandb
    model_tag: Tag = ""  # folder of the run; empty: d<depth>
    fresh: bool = False  # start over instead of resuming
    log_every: int = 10  # steps between console lines; <= 0: only at the end
    eval_every: int = 250  # steps between validations; <= 0: only at the end
    eval_tokens: Count = 10_485_760  # tokens of one validation
    sample_every: int = 2000  # steps between samples; <= 0: only at the end
    save_every: int = 1000  # steps between checkpoints; <= 0: only at the end
    keep_last: int = 3  # newest checkpoints to keep; <= 0: all


def plan_steps(cfg: Config, num_tokens: int) -> tuple[int, int, float]:
    """(tokens a step, number of steps, steps that rates and decay are for) at `num_tokens`."""
    ratio = cfg.target_param_data_ratio
    total = cfg.total_batch_size
    if total <= 0:
        horizon = scaling.reference_horizon(num_tokens, ratio)
        total = max(scaling.batch_tokens(horizon), cfg.max_seq_len)
    if cfg.num_iterations > 0:
        return total, cfg.num_iterations, cfg.num_iterations
    num_steps = max(1, round(num_tokens / total))
    if total < scaling.SQRT_RULE_FROM:  # there the rules are ours, swept at ratio 0.1 by real steps
        return total, num_steps, num_steps
    return total, num_steps, scaling.reference_horizon(num_steps, ratio)


def load_tokenizer(cfg: Config, tag: str) -> Tokenizer:
    """The run's tokenizer if it has begun, else the one trained last."""
    run = run_dir("base", tag)
    begun = list_steps(run) and not starts_over(cfg.fresh)
    return Tokenizer.load(run / "tokenizer" if begun else tokenizer_dir())


def uses_fp8(cfg: Config, runtime: Runtime, choices: list[tuple[int, bool]]) -> bool:
    """True if asked for and there; UserError if one of the `choices` of rows does not suit it."""
    if not cfg.fp8 or not fp8.is_there(runtime):
        return False
    for rows, _ in choices:
        fp8.check_batch(rows * cfg.max_seq_len)
    return True


def main(cfg: Config) -> None:
    runtime = set_up(cfg.device_type, cfg.dtype, cfg.seed, cfg.deterministic, trains=True)
    tag = cfg.model_tag or f"d{cfg.depth}"
    corpus, tokenizer = find_corpus(cfg.data), load_tokenizer(cfg, tag)
    config = scaling.depth_to_config(
        cfg.depth, tokenizer.vocab_size, cfg.max_seq_len,
        cfg.aspect_ratio, cfg.head_dim, cfg.window_pattern, cfg.plain,
    )  # fmt: skip
    total_batch_size, num_steps, tuned_steps = plan_steps(
        cfg, scaling.training_tokens(config, cfg.target_param_data_ratio)
    )
    num_rows = batch_rows(total_batch_size, cfg.max_seq_len)
    choices = row_choices(
        num_rows, cfg.device_batch_size, cfg.max_seq_len, config, runtime, cfg.recompute,
        cfg.table_dtype,
    )  # fmt: skip
    in_fp8 = uses_fp8(cfg, runtime, choices)
    settings = vars(cfg) | {"corpus": corpus.name}
    with Run("base", tag, settings, runtime) as run:
        if run.is_finished:
            return
        model = build_model(config, None, runtime, cfg.seed, cfg.table_dtype)
        optimizer = scaling.make_optimizer(
            model, total_batch_size, tuned_steps, runtime.rank, runtime.world_size
        )
        resumed_state = run.restore(model, optimizer)
        linears = fp8.enable(model.blocks) if in_fp8 else []
        source = TextSource(tokenizer, corpus.train)
        loader = Loader(source, num_rows, cfg.max_seq_len, runtime, resumed_state)
        run.at_exit.callback(loader.close)
        model.document_start = tokenizer.bos_id if cfg.mask_documents else None
        rows = compile_for_training(
            model, cfg.compile, choices, cfg.max_seq_len, runtime.device, optimizer
        )
        print0(f"corpus {corpus.name}; {num_steps:,} steps of {total_batch_size:,} tokens")
        meter = run.start(model, tokenizer, rows)
        samples: list[str] = []
        while True:
            if run.should_stop():  # SIGTERM or SIGINT has reached a rank
                run.save(model, optimizer, meter, loader)
                run.stop()
            if run.is_due(cfg.save_every):
                run.save(model, optimizer, meter, loader)
            if run.is_due(cfg.eval_every):
                held_out = TextSource(tokenizer, [corpus.val], quiet=True)
                bpb = source_bpb(
                    model, held_out, runtime, cfg.eval_tokens, rows,
                    num_rows=num_rows, seq_len=cfg.max_seq_len,
                )  # fmt: skip
                meter.note(val_bpb=bpb)
            if run.step > 0 and run.is_due(cfg.sample_every):
                samples = sample_texts(model, tokenizer)
                print0("\n".join(samples))
            if run.step == num_steps:
                break

            # Gradients add up over micro-batches. Losses are divided by the number of all ranks'
            # targets, so the mean depends neither on the micro-batches nor on the number of ranks.
            batch = meter.fetch(loader)
            micro_batches = list(zip(*(part.split(rows) for part in batch), strict=True))
            num_targets = all_reduce_sum((batch.targets != IGNORED).sum())
            loss = torch.zeros((), device=runtime.device)
            for i, (inputs, targets) in enumerate(micro_batches, start=1):
                part = model(inputs, targets, reduction="sum") / num_targets
                if i == len(micro_batches):
                    optimizer.reduce_on_next_backward()  # average the gradients over the ranks
                # As the optimizer averages over ranks; the other scale is 1, but in fp16.
                (part * runtime.world_size * optimizer.loss_scale).backward()
                loss += part.detach()

            multiplier = scaling.lr_multiplier(run.step, num_steps)
            momentum = scaling.muon_momentum(run.step, num_steps)
            decay = scaling.weight_decay_multiplier(run.step / num_steps)
            optimizer.set_multipliers(multiplier, momentum, decay)
            finite = optimizer.step()  # a no-op if a gradient has a NaN or infinity
            optimizer.zero_grad()
            fp8.refresh(linears, compiled=model.call_part is not call)

            run.advance((run.step + 1) / num_steps)
            loss = all_reduce_sum(loss)
            meter.log_step(loss, multiplier, total_batch_size, finite, loader)
        results = meter.finish()
        run.finish(results)
        write_section("base_train", "Base training", vars(cfg), results, samples, meter.seconds)


if __name__ == "__main__":
    run_script(main, Config)
