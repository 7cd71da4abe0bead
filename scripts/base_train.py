"""Pretrain a base model on a corpus.

Depth is the one dial: width, heads, tokens, batch, learning rates and decay follow from it
(nanochat/scaling.py). Killed at any instant, the same command resumes from the last checkpoint.

    python -m scripts.base_train --depth 12                         # one GPU
    torchrun --nproc_per_node=8 -m scripts.base_train -- --depth 20    # eight
    python -m scripts.base_train --depth 4 --max_seq_len 512 \\
        --total_batch_size 4096 --num_iterations 300                # laptop
    python -m scripts.base_train -i base -g d12 --data mytexts      # goes on from d12

With `--extend` and a greater `--num_iterations` or ratio a run goes on to a later end, with the
batch that it began with. If its learning rate has not begun to fall, it falls later; else it rises
and falls once more from there (arXiv 2403.08763). `-i` trains any model further on a corpus, as a
run of its own, here d12-mytexts, with the whole schedule; by default for four passes at most, after
which repeated text teaches little (arXiv 2305.16264).

reads: base_data/<corpus>/, tokenizer/, or the model that -i names
writes: base/<model tag>/ (checkpoints, metrics.jsonl, tokenizer, config.json),
    report/base_train.json
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet as parquet
import tyro

from nanochat import fp8, scaling
from nanochat.checkpoint import build_model, list_steps, load_model
from nanochat.common import (
    CheckpointFlags,
    Count,
    Derived,
    Positive,
    RunName,
    Runtime,
    StreamFlags,
    Tag,
    UserError,
    print0,
    run_dir,
    run_script,
    set_up,
    tokenizer_dir,
)
from nanochat.core_eval import source_bpb
from nanochat.dataloader import Loader, TextSource
from nanochat.dataset import Corpus, find_corpus, read_texts
from nanochat.engine import sample_texts
from nanochat.gpt import GPT, call
from nanochat.report import write_section
from nanochat.scaling import Schedule
from nanochat.tokenizer import Tokenizer
from nanochat.trainer import Run, compile_for_training, row_choices, starts_over

PASSES = 4  # over a corpus, at most, of a model that is trained further
Start = Annotated[Literal["", "base", "mid", "sft", "rl"], tyro.conf.arg(aliases=["-i"])]


@dataclass
class ModelFlags:
    """What a new model is to be."""

    depth: Count = 20  # layers; everything else follows from it
    aspect_ratio: Count = 64  # width is aspect_ratio x depth, rounded up to whole heads
    head_dim: Count = 128  # channels of one attention head
    max_seq_len: Count = 2048  # tokens of context
    window_pattern: str = "SSSL"  # S: a quarter of the context, L: all of it; tiled over the layers
    plain: bool = False  # the published first-generation architecture, without our additions


# pyright: reportIncompatibleVariableOverride=false
@dataclass
class Config(StreamFlags, CheckpointFlags, ModelFlags):
    # what to train
    source: Start = ""  # stage of a model to train further; empty: a new model
    # horizon and batch
    target_param_data_ratio: Positive = 12.0  # tokens per parameter of blocks and head
    total_batch_size: Derived = -1  # tokens a step over all ranks; -1: from the horizon
    # data and precision
    data: str = ""  # corpus; empty: the one prepared last
    fp8: bool = False  # matmuls of the blocks in 8-bit floats, on GPUs that have them
    # the run
    model_tag: Tag = ""  # folder of the run; empty: d<depth>; with -i of the model
    new_tag: RunName = ""  # with -i folder of the run; empty: <model tag>-<corpus>
    extend: bool = False  # train a run on to a greater --num_iterations or ratio
    sample_every: int = 2000  # steps between samples; <= 0: only at the end


def plan_steps(cfg: Config, num_tokens: int) -> Schedule:
    """The schedule of a new run on `num_tokens`."""
    ratio = cfg.target_param_data_ratio
    total = cfg.total_batch_size
    if total <= 0:
        horizon = scaling.reference_horizon(num_tokens, ratio)
        total = max(scaling.batch_tokens(horizon), cfg.max_seq_len)
    end = tuned_steps = cfg.num_iterations
    if end <= 0:
        end = tuned_steps = max(1, round(num_tokens / total))
        if total >= scaling.SQRT_RULE_FROM:  # below, the rules are our sweep's, by real steps
            tuned_steps = scaling.reference_horizon(end, ratio)
    return Schedule(total, end, tuned_steps)


def plan_run(cfg: Config, num_tokens: int, run: Run) -> Schedule:
    """The schedule that the run has followed, a new one, or with --extend a longer one.

    Where the rate has begun to fall, it rises again. Raises UserError for an earlier end.
    """
    state = run.resumed.state if run.resumed else {}
    if "schedule" not in state:
        if state and cfg.extend:
            raise UserError("an earlier version began this run, so --extend cannot; use -i base")
        return plan_steps(cfg, num_tokens)
    saved = Schedule(*state["schedule"])
    wanted = plan_steps(replace(cfg, total_batch_size=saved.batch), num_tokens)
    if not cfg.extend or wanted.end == saved.end:
        return saved
    if wanted.end < saved.end:
        raise UserError(
            f"the run is to end at step {saved.end:,}, which is later than {wanted.end:,}; give "
            "--extend a greater --num_iterations or --target_param_data_ratio"
        )
    falls = saved.start + (1 - scaling.WARMDOWN) * (saved.end - saved.start)
    start = saved.start if run.step <= falls else run.step
    tuned_steps = wanted.tuned_steps * (wanted.end - start) / wanted.end
    return Schedule(saved.batch, wanted.end, tuned_steps, start)


def count_tokens(tokenizer: Tokenizer, shards: Sequence[Path]) -> int:
    """Tokens in `shards`, about: their bytes, with as many to a token as in the first documents."""
    some = list(islice(read_texts(shards), 100))
    num_ids = sum(len(tokenizer.encode(text)) for text in some)
    num_bytes = sum(len(text.encode()) for text in some)
    metas = [parquet.read_metadata(shard) for shard in shards]
    groups = [meta.row_group(i) for meta in metas for i in range(meta.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text")
    return round(size * num_ids / num_bytes)


def load_tokenizer(cfg: Config, tag: str) -> Tokenizer:
    """The run's tokenizer if it has begun, else the one trained last."""
    run = run_dir("base", tag)
    begun = list_steps(run) and not starts_over(cfg.fresh)
    return Tokenizer.load(run / "tokenizer" if begun else tokenizer_dir())


def load_start(
    cfg: Config, corpus: Corpus, runtime: Runtime
) -> tuple[Config, GPT, Tokenizer, dict[str, Any]]:
    """(cfg with the model's sizes and the run's length; the rest as load_model) for -i.

    UserError if a flag would change the model.
    """
    for flag in fields(ModelFlags):
        if getattr(cfg, flag.name) != flag.default:
            raise UserError(f"--{flag.name} goes with a new model; one that -i names keeps its own")
    model, tokenizer, meta = load_model(cfg, runtime, train=True, table_dtype=cfg.table_dtype)
    config = model.config
    ratio = cfg.target_param_data_ratio
    if ratio == Config.target_param_data_ratio:
        num_tokens = PASSES * count_tokens(tokenizer, corpus.train)
        ratio = min(ratio, float(f"{num_tokens / scaling.scaling_parameters(config):.3g}"))
    cfg = replace(cfg, depth=config.n_layer, max_seq_len=config.sequence_len)
    return replace(cfg, target_param_data_ratio=ratio), model, tokenizer, meta


def main(cfg: Config) -> None:
    runtime = set_up(cfg.device_type, cfg.dtype, cfg.seed, cfg.deterministic)
    corpus = find_corpus(cfg.data)
    model, settings = None, {"corpus": corpus.name}
    if cfg.source:
        cfg, model, tokenizer, meta = load_start(cfg, corpus, runtime)
        print0(f"base from {meta['name']}")
        tag, config = cfg.new_tag or f"{meta['model_tag']}-{corpus.name}", model.config
        if (cfg.source, tag) == ("base", meta["model_tag"]):
            raise UserError(f"--new_tag={tag} is the model that -i names; give another")
        settings["weights"] = meta["weights"]
    elif cfg.new_tag or cfg.step is not None:
        raise UserError("--new_tag and --step go with -i, which names a model to train further")
    else:
        tag = cfg.model_tag or f"d{cfg.depth}"
        tokenizer = load_tokenizer(cfg, tag)
        config = scaling.depth_to_config(
            cfg.depth, tokenizer.vocab_size, cfg.max_seq_len,
            cfg.aspect_ratio, cfg.head_dim, cfg.window_pattern, cfg.plain,
        )  # fmt: skip
    num_tokens = scaling.training_tokens(config, cfg.target_param_data_ratio)
    with Run("base", tag, vars(cfg) | settings, runtime) as run:
        if run.is_finished:
            return
        schedule = plan_run(cfg, num_tokens, run)
        run.more_state["schedule"] = schedule
        num_rows, choices = row_choices(cfg, schedule.batch, cfg.max_seq_len, config, runtime)
        batches = [rows * cfg.max_seq_len for rows, _ in choices]
        in_fp8 = cfg.fp8 and fp8.is_there(runtime, batches)
        model = model or build_model(config, None, runtime, cfg.seed, cfg.table_dtype)
        optimizer = scaling.make_optimizer(
            model, schedule.batch, schedule.tuned_steps, runtime.rank, runtime.world_size
        )
        resumed_state = run.restore(model, optimizer)
        run.progress = run.step / schedule.end
        linears = fp8.enable(model.blocks) if in_fp8 else []
        source = TextSource(tokenizer, corpus.train)
        loader = Loader(source, num_rows, cfg.max_seq_len, runtime, resumed_state)
        run.at_exit.callback(loader.close)
        model.document_start = tokenizer.bos_id if cfg.mask_documents else None
        rows = compile_for_training(model, optimizer, cfg.compile, choices, cfg.max_seq_len)
        again = f", the rate rises again from step {schedule.start:,}" if schedule.start else ""
        print0(f"corpus {corpus.name}; {schedule.end:,} steps of {schedule.batch:,} tokens{again}")
        meter = run.start(model, optimizer, tokenizer, rows, loader)
        samples: list[str] = []
        while True:
            run.checkpoint(cfg.save_every)  # or end here, if a signal or the time asks for it
            if run.is_due(cfg.eval_every):
                held_out = TextSource(tokenizer, [corpus.val], quiet=True)
                bpb = source_bpb(
                    model, held_out, runtime, cfg.eval_tokens, rows,
                    num_rows=num_rows, seq_len=cfg.max_seq_len,
                )  # fmt: skip
                meter.note(val_bpb=bpb)
            if run.step > 0 and run.is_due(cfg.sample_every):
                samples = meter.record["samples"] = sample_texts(model, tokenizer)
                print0("\n".join(samples))
            if run.progress >= 1:
                break

            loss = run.accumulate(meter.fetch(loader))
            multiplier, momentum, decay = schedule.multipliers(run.step)
            multiplier *= cfg.lr_scale
            finite = run.update(multiplier, momentum, decay)
            fp8.refresh(linears, compiled=model.call_part is not call)

            run.advance((run.step + 1) / schedule.end)
            meter.log_step(loss, multiplier, schedule.batch, finite)
        results = run.finish()
        results.pop("samples", None)
        write_section("base_train", "Base training", vars(cfg), results, samples, meter.seconds)


if __name__ == "__main__":
    run_script(main, Config)
