"""Export a checkpoint to a folder that transformers, vLLM and lm-evaluation-harness load.

    python -m scripts.export_hf -i sft --out d20  # one process, on any machine; needs no GPU

reads: <source>/<model tag>/, report/report.json
writes: the folder that --out names
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import hf_export
from nanochat.checkpoint import find_checkpoint, write_tensors
from nanochat.common import Source, Step, Tag, UserError, print0, report_dir, run_script, write_file
from nanochat.report import summary_table
from nanochat.tokenizer import Tokenizer

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {title}

A language model trained with nanochat. `AutoModelForCausalLM.from_pretrained(folder{trust})` loads
it. The chat template takes strings and parts. Text outside a chat should begin with the token `bos`
(`AutoTokenizer.from_pretrained(folder, add_bos_token=True{trust})` adds it), and what strangers
wrote should be encoded with `split_special_tokens=True`.

{table}"""


@dataclass
class Config:
    out: Path  # the folder to make
    source: Source = "sft"  # stage: base, mid, sft or rl
    model_tag: Tag = ""  # empty: the one saved last
    step: Step = None  # default: the newest


def main(cfg: Config) -> None:
    if cfg.out.exists():
        raise UserError(f"--out={cfg.out} exists; name a new folder")
    run, checkpoint = find_checkpoint(cfg.source, cfg.model_tag, cfg.step)
    config, step = checkpoint.model_config, checkpoint.state["step"]
    print0(f"exporting {cfg.source}/{run.name} step {step}")
    weights = checkpoint.load_weights(torch.device("cpu"))
    weights = hf_export.check_weights(weights, config, checkpoint.folder)
    files = hf_export.text_files(config, Tokenizer.load(run / "tokenizer"), step)
    title, trust = f"{run.name}, {cfg.source}, step {step}", ""
    if not hf_export.is_plain(config):
        modeling = Path(hf_export.__file__).with_name("hf_modeling.py")
        files["modeling_nanochat_x.py"], trust = modeling.read_text(), ", trust_remote_code=True"
    report, table = report_dir() / "report.json", ""
    if report.is_file():
        table = summary_table(json.loads(report.read_text())["summary"])
    files["README.md"] = CARD.format(title=title, trust=trust, table=table)
    partial = cfg.out.with_name(f"{cfg.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        write_file(partial / name, text)
    tensors = hf_export.export_weights(weights, config)
    write_tensors(partial / "model.safetensors", tensors, {"format": "pt"})
    partial.rename(cfg.out)
    print0(f"wrote {cfg.out} ({title})")


if __name__ == "__main__":
    run_script(main, Config)
