"""Measure a base model: bits per byte of training and validation text, and sample continuations.

    python -m scripts.base_loss                                        # one GPU
    torchrun --nproc_per_node=8 -m scripts.base_loss                   # eight
    python -m scripts.base_loss --eval_tokens 65536 --device_batch_size 16  # laptop

reads: base/<model tag>/, base_data/<corpus>/
writes: report/base_loss.json
"""

from dataclasses import dataclass

from nanochat.checkpoint import load_model
from nanochat.common import CheckpointFlags, Choice, Count, Source, print0, run_script, set_up
from nanochat.core_eval import source_bpb
from nanochat.dataloader import TextSource
from nanochat.dataset import find_corpus
from nanochat.engine import sample_texts
from nanochat.report import write_section
from nanochat.trainer import compile_parts


@dataclass
class Config(CheckpointFlags):
    source: Source = "base"  # stage of the checkpoint
    data: str = ""  # corpus; empty: the one it was trained on, if known, or prepared last
    eval_tokens: Count = 10_485_760  # tokens of each of the two measurements
    device_batch_size: Count = 32  # rows read at a time on one device
    compile: Choice = "auto"  # torch.compile; auto: on a GPU


def main(cfg: Config) -> None:
    runtime = set_up(cfg.device_type, cfg.dtype, exact=True)
    model, tokenizer, meta = load_model(cfg, runtime)
    compile_parts(model, cfg.compile)
    trained = meta.get("config", {})  # an imported model has none
    corpus = find_corpus(cfg.data or trained.get("corpus") or trained.get("data", ""))
    print0(f"measuring {meta['name']} on the corpus {corpus.name}")
    place = {"model_tag": meta["model_tag"], "step": meta["step"], "data": corpus.name}
    seq_len = model.config.sequence_len
    num_rows = max(1, min(256, cfg.eval_tokens // seq_len))
    num_rows += -num_rows % runtime.world_size  # the same on 1, 2, 4 or 8 GPUs
    results = {"step": meta["step"]}
    for split, shards in (("train", corpus.train), ("val", [corpus.val])):
        bpb = source_bpb(
            model, TextSource(tokenizer, shards, quiet=True), runtime,
            cfg.eval_tokens, cfg.device_batch_size, num_rows=num_rows, seq_len=seq_len,
        )  # fmt: skip
        results[f"{split}_bpb"] = bpb
        print0(f"{split}: {bpb:.4f} bits per byte")
    samples = sample_texts(model, tokenizer)
    print0("\n".join(samples))
    write_section("base_loss", "Base loss", vars(cfg) | place, results, samples)


if __name__ == "__main__":
    run_script(main, Config)
