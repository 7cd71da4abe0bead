"""Evaluation of a base model: the CORE metric with its data, and bits per byte.

CORE is the mean over 22 few-shot tasks of (accuracy - guessing) / (1 - guessing). An item becomes
one document per option: solved examples, a blank line after each, then the item itself.

    multiple_choice    query + delimiter + choice           lowest mean loss of the choice
    schema             option + delimiter + continuation    lowest mean loss of the common suffix
    language_modeling  context + delimiter + continuation   right if every token is the likeliest

What is scored is found among token ids, because the blank before a word belongs to its token. What
an item's options share is read once, into a KV cache. A document longer than the context loses its
beginning, but `<|bos|>` stays first, and all options of an item lose equally much.

Sources: DCLM, arXiv 2406.11794; seeds, blanks and order of rows are those of the published numbers.
B rows, T time, M scored tokens, V vocabulary.
"""

import csv
import http.client
import io
import math
import os
import random
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from itertools import islice
from os.path import commonprefix  # of any sequences
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml

from nanochat.common import (
    Runtime,
    UserError,
    all_reduce_sum,
    barrier,
    base_dir,
    fsync,
    gather,
    own_part,
    print0,
    progress_bar,
)
from nanochat.dataloader import ChatSource, Loader, TextSource
from nanochat.dataset import numbered_jsonl
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer


class Score(NamedTuple):
    """A measured value and its standard error."""

    value: float
    stderr: float


@torch.inference_mode()
def source_bpb(
    model: GPT,
    source: TextSource | ChatSource,
    runtime: Runtime,
    num_tokens: int,
    rows: int,
    *,
    num_rows: int,
    seq_len: int,
) -> float:
    """Bits per byte on the first `num_tokens` tokens of `source`, packed into `num_rows` rows.

    The nats of every target that stands for bytes, over ln 2 times those bytes, so it does not
    depend on the vocabulary. Specials, of 0 bytes, and targets of -1 do not count; without any
    bytes it is infinite. All ranks' rows fix packing and figure; `rows` are read at a time.
    """
    lengths = torch.tensor(source.tokenizer.token_bytes(), device=runtime.device)  # (V,)
    exact = torch.float32 if runtime.device.type == "mps" else torch.float64  # MPS has no fp64
    sums = torch.zeros(2, dtype=exact, device=runtime.device)  # nats, bytes
    loader = Loader(source, num_rows, seq_len, runtime)
    for batch in islice(loader, max(1, num_tokens // (num_rows * seq_len))):
        parts = zip(batch.inputs.split(rows), batch.targets.split(rows), strict=True)
        for inputs, wanted in parts:
            targets = wanted.reshape(-1)  # (R * T,)
            nats = model(inputs, wanted, reduction="none").reshape(-1)
            num_bytes = torch.where(targets >= 0, lengths[targets.clamp(min=0)], 0)
            sums[0] += torch.where(num_bytes > 0, nats, 0.0).sum(dtype=exact)
            sums[1] += num_bytes.sum()
    loader.close()
    nats_total, bytes_total = all_reduce_sum(sums).tolist()
    return nats_total / (math.log(2) * bytes_total) if bytes_total else math.inf


CORE_TASKS = (
    "hellaswag_zeroshot", "jeopardy", "bigbench_qa_wikidata", "arc_easy", "arc_challenge", "copa",
    "commonsense_qa", "piqa", "openbook_qa", "lambada_openai", "hellaswag", "winograd",
    "winogrande",
    "bigbench_dyck_languages", "agi_eval_lsat_ar", "bigbench_cs_algorithms", "bigbench_operators",
    "bigbench_repeat_copy_logic", "squad", "coqa", "boolq", "bigbench_language_identification",
)  # fmt: skip
SHOT_SEED = 1234  # plus the number of the item
CPU_CHUNK, CPU_TOKENS = 256, 1024  # tokens of a row, and of all rows, that a CPU reads at a time


class CoreTask(NamedTuple):
    """A task; each row has the fields of its kind and an "id"."""

    label: str
    kind: str  # multiple_choice, schema or language_modeling
    rows: Sequence[dict[str, Any]]
    baseline: float  # accuracy of guessing
    num_fewshot: int = 0
    delimiter: str = " "


def mean_score(records: Sequence[dict[str, Any]]) -> Score:
    """The mean of what is `correct`, or of the mean `scores` of each, with its standard error."""
    means = [fmean(record.get("scores") or [record["correct"]]) for record in records]
    mean = fmean(means)
    variance = fmean((own - mean) ** 2 for own in means)
    return Score(mean, math.sqrt(variance / max(1, len(means) - 1)))


def centered_score(
    name: str, total: int, scored: Sequence[tuple[Score, float]]
) -> tuple[str, Score]:
    """(`name`, with how many of `total` tasks there are, unless all; the mean centered accuracy).

    `scored` has each task's accuracy and that of guessing, which counts 0; all right counts 1.
    """
    num = len(scored)
    values = [1 - (1 - score.value) / (1 - guessing) for score, guessing in scored]
    variance = sum((score.stderr / (1 - guessing)) ** 2 for score, guessing in scored)
    label = name if num == total else f"{name} ({num} of {total})"
    return label, Score(sum(values) / num, math.sqrt(variance) / num)


class GPTReader:
    """Keeps the prefixes in a KV cache, so that any number of tails can be read behind each."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, num_slots: int) -> None:
        self.model, self.max_len = model, model.config.sequence_len
        self.tokenizer, self.cache = tokenizer, model.make_cache(num_slots, self.max_len)
        # A CPU is fastest while what a call computes stays in its cache.
        on_cpu = self.cache.keys.device.type == "cpu"
        self.chunk, self.budget = (CPU_CHUNK, CPU_TOKENS) if on_cpu else (self.max_len, 2**30)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` behind what begins every document."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    @torch.inference_mode()
    def start(self, prefixes: Sequence[list[int]]) -> None:
        """Read one into each slot."""
        self.cache.lengths.zero_()
        self.cache.previous.zero_()
        longest = max(map(len, prefixes))
        for begin in range(0, longest, self.chunk):
            end = min(begin + self.chunk, longest)
            slots = [slot for slot, prefix in enumerate(prefixes) if len(prefix) > begin]
            num = max(1, self.budget // (end - begin))  # rows at once
            for some in (slots[i : i + num] for i in range(0, len(slots), num)):
                self._read(some, [prefixes[slot][begin:end] for slot in some], last=True)
        self.lengths, self.previous = self.cache.lengths.clone(), self.cache.previous.clone()

    @torch.inference_mode()
    def logits(self, slots: Sequence[int], tails: Sequence[list[int]]) -> torch.Tensor:
        """(B, T, V) after each token of tails[b] behind slots[b]'s prefix; junk after its end."""
        self.cache.lengths.copy_(self.lengths)  # forget the tails before these
        self.cache.previous.copy_(self.previous)
        return self._read(slots, tails, last=False)

    def _read(self, slots: Sequence[int], rows: Sequence[list[int]], last: bool) -> torch.Tensor:
        ids, num_new = padded(rows).to(self.cache.keys.device), torch.tensor(list(map(len, rows)))
        where = torch.tensor(slots)
        return self.model(ids, cache=self.cache, slots=where, num_new=num_new, last_only=last)


class HFReader:
    """The same for a model of transformers: it reads documents whole, as caches differ there."""

    def __init__(self, name: str, runtime: Runtime) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=runtime.dtype)
        except ImportError as error:
            hint = "run `uv pip install transformers`"
            raise UserError(f"--hf_path={name} needs transformers ({error}); {hint}") from error
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--hf_path={name}: {reason}; name another") from error
        self.model = model.to(runtime.device).eval()
        self.max_len = getattr(model.config, "max_position_embeddings", None) or 2048

    def encode(self, text: str) -> list[int]:
        first = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)  # bos, or eos, or none
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return [id for id in first if id is not None][:1] + ids

    def start(self, prefixes: Sequence[list[int]]) -> None:
        self.prefixes = prefixes

    @torch.inference_mode()
    def logits(self, slots: Sequence[int], tails: Sequence[list[int]]) -> torch.Tensor:
        ids = padded([self.prefixes[s] + tail for s, tail in zip(slots, tails, strict=True)])
        begins = torch.tensor([len(self.prefixes[slot]) for slot in slots])
        num = ids.shape[1] - int(begins.min())
        logits = self.model(ids.to(self.model.device), logits_to_keep=num).logits[:, -num:]
        at = (begins - begins.min())[:, None] + torch.arange(max(map(len, tails)))  # (B, T)
        return logits[torch.arange(len(at))[:, None], at.clamp(max=num - 1)]


def padded(rows: Sequence[list[int]]) -> torch.Tensor:
    """(B, T) the rows, with zeros up to the longest."""
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


Reader = GPTReader | HFReader


class Item(NamedTuple):
    """An item as ids: what its options share, and the rest of each, scored at its end."""

    prefix: list[int]
    tails: list[list[int]]
    num_scored: list[int]  # per tail; at least one more stands before them


def evaluate(
    reader: Reader, task: CoreTask, batch_size: int, max_items: int | None
) -> list[dict[str, Any]]:
    """A record of each of the first `max_items` items (None: all), `batch_size` read at once.

    Its losses are one per option, None for infinity, which JSON does not have.
    """
    numbers = own_part(min(len(task.rows), max_items or len(task.rows)))
    items = {number: encode_item(reader, task, number) for number in numbers}
    order = sorted(items, key=lambda n: -len(items[n].prefix) - max(map(len, items[n].tails)))
    records: dict[int, dict[str, Any]] = {}
    for begin in progress_bar(range(0, len(order), batch_size), f" batch of {task.label}"):
        batch = order[begin : begin + batch_size]
        all_losses, all_likeliest = score_items(reader, [items[number] for number in batch])
        for number, losses, likeliest in zip(batch, all_losses, all_likeliest, strict=True):
            row, item = task.rows[number], items[number]
            if task.kind == "language_modeling":
                prediction, gold = reader.tokenizer.decode(likeliest), row["continuation"]
                correct = likeliest == item.tails[0][-item.num_scored[0] :]
            else:
                prediction, gold = losses.index(min(losses)), row["gold"]  # the first of equals
                correct = prediction == gold
            records[number] = {
                "task": task.label, "id": row["id"],
                "prediction": prediction, "gold": gold, "correct": correct,
                "losses": [loss if loss < math.inf else None for loss in losses],
            }  # fmt: skip
    return [record for _, record in sorted(gather(list(records.items())))]


def score_items(reader: Reader, items: Sequence[Item]) -> tuple[list[list[float]], list[list[int]]]:
    """(mean nats of each item's options, infinite without tokens; likeliest ids of its last)."""
    reader.start([item.prefix for item in items])
    losses: list[list[float]] = [[] for _ in items]
    likeliest: list[list[int]] = [[] for _ in items]
    for k in range(max(len(item.tails) for item in items)):
        slots = [slot for slot, item in enumerate(items) if k < len(item.tails)]
        tails = [items[slot].tails[k] for slot in slots]
        for slot, tail, logits in zip(slots, tails, reader.logits(slots, tails), strict=True):
            begin = len(tail) - items[slot].num_scored[k]
            scored = logits[begin - 1 : len(tail) - 1].float()  # (M, V)
            if not scored.isfinite().all():
                raise UserError("the model's logits are not numbers; choose another --step")
            targets = torch.tensor(tail[begin:], dtype=torch.int64, device=scored.device)  # (M,)
            loss = F.cross_entropy(scored, targets)
            losses[slot].append(float(loss) if len(scored) else math.inf)
            likeliest[slot] = scored.argmax(-1).tolist()
    return losses, likeliest


def encode_item(reader: Reader, task: CoreTask, number: int) -> Item:
    """One item with its examples, cropped to what the model can read."""
    documents, num_scored = item_documents(reader, task, number)
    cut = min(max(map(len, documents)) - reader.max_len, num_shared(documents, num_scored))
    cuts = [max(0, cut, len(ids) - reader.max_len) for ids in documents]
    documents = [ids[:1] + ids[1 + cut :] for ids, cut in zip(documents, cuts, strict=True)]
    num_scored = [min(num, len(ids) - 1) for num, ids in zip(num_scored, documents, strict=True)]
    begin = num_shared(documents, num_scored)
    return Item(documents[0][:begin], [ids[begin:] for ids in documents], num_scored)


def item_documents(
    reader: Reader, task: CoreTask, number: int
) -> tuple[list[list[int]], list[int]]:
    """(ids of each option's whole document, how many at its end are scored)."""
    drawn = random.Random(SHOT_SEED + number).sample(range(len(task.rows) - 1), task.num_fewshot)
    shots = [task.rows[other + (other >= number)] for other in drawn]  # any row but the item's
    solved = [task.delimiter.join(options(task, row)[row.get("gold", 0)]) for row in shots]
    before = "".join(f"{text}\n\n" for text in solved)
    pairs = options(task, task.rows[number])
    documents = [reader.encode(before + task.delimiter.join(pair)) for pair in pairs]
    if task.kind == "schema":
        ends = [ids[::-1] for ids in documents]
        return documents, [len(commonprefix(ends))] * len(documents)
    alike = documents
    if task.kind == "language_modeling":
        alike = [documents[0], reader.encode((before + pairs[0][0] + task.delimiter).rstrip())]
    return documents, [len(ids) - len(commonprefix(alike)) for ids in documents]


def options(task: CoreTask, row: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands before and behind the delimiter, for every option of a row."""
    if task.kind == "multiple_choice":
        return [(row["query"], choice) for choice in row["choices"]]
    if task.kind == "schema":
        return [(option, row["continuation"]) for option in row["context_options"]]
    return [(row["context"].strip(), row["continuation"])]


def num_shared(documents: Sequence[list[int]], num_scored: Sequence[int]) -> int:
    """How many ids to read once for all: the one before a score stays out, for its logits."""
    num_before = [len(ids) - num for ids, num in zip(documents, num_scored, strict=True)]
    return min(len(commonprefix(documents)), *num_before) - 1


URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
HINT = "give an unpacked bundle with --eval_bundle or NANOCHAT_EVAL_BUNDLE"
TIMEOUT_SECONDS = 30.0  # without a byte
SHUFFLE_SEED = 1337  # of the published numbers; the first hundred rows are a fair sample
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # what reading it may raise
# Kind of task -> the fields of its rows.
FIELDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def find_bundle(given: str = "") -> Path:
    """The folder `given`, or that of NANOCHAT_EVAL_BUNDLE, or what the main rank downloads once.

    core.yaml             label, file, kind, number of examples, delimiter of each task
    eval_meta_data.csv    what guessing scores on it, in percent
    eval_data/**.jsonl    its items, one a line
    """
    given = given or os.environ.get("NANOCHAT_EVAL_BUNDLE", "")
    folder = Path(given).expanduser() if given else base_dir() / "eval_bundle"
    if not given:
        if os.environ.get("RANK", "0") == "0" and not folder.exists():
            download(folder)
        barrier()
    if not (folder / "core.yaml").is_file():
        raise UserError(f"there is no core.yaml in {folder}; {HINT}")
    return folder


def download(folder: Path) -> None:
    """Fetch the bundle into `folder`, which appears whole or not at all."""
    print0(f"downloading {URL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL, timeout=TIMEOUT_SECONDS) as source:
            total = -(-int(source.headers.get("Content-Length") or 0) // 2**20)
            blocks = progress_bar(iter(lambda: source.read(2**20), b""), "MiB", total)
            archive = io.BytesIO(b"".join(blocks))
        with tempfile.TemporaryDirectory(prefix=".eval_bundle.", dir=folder.parent) as beside:
            zipfile.ZipFile(archive).extractall(beside)  # checks CRCs; none leaves the folder
            os.sync()
            (Path(beside) / "eval_bundle").rename(folder)
        fsync(folder.parent)
    except (OSError, http.client.HTTPException, *DAMAGED_ZIP) as error:
        raise UserError(f"{URL} cannot be downloaded whole ({_line(error)}); {HINT}") from error


def load_tasks(folder: Path, labels: Sequence[str] = CORE_TASKS) -> list[CoreTask]:
    """The tasks of CORE with these labels; prints which of them have no data in the bundle."""
    if unknown := sorted(set(labels) - set(CORE_TASKS)):
        known = ", ".join(("core", "primer-choice", *CORE_TASKS))
        raise UserError(f"--tasks: {unknown[0]!r} is unknown; choose of {known}")
    index = _read_index(folder)
    if missing := sorted(set(labels) - set(index)):
        print0(f"{folder} has no data of {', '.join(missing)}")
    tasks = [_read_rows(*index[label]) for label in dict.fromkeys(labels) if label in index]
    if not tasks:
        raise UserError(f"{folder} has no data of any task; {HINT}")
    return tasks


def _read_index(folder: Path) -> dict[str, tuple[Path, CoreTask]]:
    """Label -> (the file of its rows, the task without them), where that file is there."""
    index = {}
    try:
        table = csv.DictReader((folder / "eval_meta_data.csv").read_text("utf-8").splitlines())
        percent = {row["Eval Task"]: float(row["Random baseline"]) for row in table}
        for entry in yaml.safe_load((folder / "core.yaml").read_bytes())["icl_tasks"]:
            label, kind, shots = entry["label"], entry["icl_task_type"], entry["num_fewshot"]
            if kind not in FIELDS or not 0 <= percent[label] < 100:
                raise ValueError(f"{label}: {kind}, {percent[label]} %")
            num_fewshot = shots[0] if isinstance(shots, list) else shots
            delimiter = entry.get("continuation_delimiter", " ")
            path = folder / "eval_data" / entry["dataset_uri"]
            if path.is_file():
                task = CoreTask(label, kind, (), percent[label] / 100, num_fewshot, delimiter)
                index[label] = path, task
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        reason = f"core.yaml or eval_meta_data.csv in {folder}: {_line(error)}"
        raise UserError(f"{reason}; {HINT}") from error
    return index


def _read_rows(path: Path, task: CoreTask) -> CoreTask:
    fields, rows = FIELDS[task.kind], []
    for number, row in numbered_jsonl(path):
        try:
            kept = {field: row[field] for field in fields}
            if kept.get("gold", 0) not in range(len(options(task, kept))):
                raise LookupError("gold")
        except (LookupError, TypeError, AttributeError):
            expected = f"expected {', '.join(fields)}"
            raise UserError(f"{path}, line {number}: {expected}; mend that line") from None
        rows.append(kept | {"id": number})
    if len(rows) <= task.num_fewshot:
        few = f"{len(rows)} rows are too few for {task.num_fewshot} examples and an item"
        raise UserError(f"{path}: {few}; complete or remove it")
    random.Random(SHUFFLE_SEED).shuffle(rows)
    return task._replace(rows=rows)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
