"""Exports against transformers itself: its own NanoChatForCausalLM is the oracle of the plain
architecture, its tokenizers and chat templates are that of ids; the modelling file of the additions
is held against nanochat.gpt. With equal ids and logits, lm-evaluation-harness scores alike.
"""

import copy
import itertools
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jinja2 import TemplateError
from tokenizers import Tokenizer as Reference
from transformers.models.nanochat import modeling_nanochat

from nanochat import report
from nanochat.checkpoint import save_checkpoint
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_export import GUARD, tokenizer_json
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    Conversation,
    Tokenizer,
    render_conversation,
    render_prompt,
)
from scripts.export_hf import Config, main
from tests.models import CPU, busy_gpt, random_ids, refuses, save_model
from tests.test_rustbpe import MULTILINGUAL
from tests.test_tokenizer import fixture_strings

# 500 is no multiple of 64, so there are rows of padding.
TOKENIZER = Tokenizer.train(MULTILINGUAL * 2, 500, SPECIAL_TOKENS)
SAID = [("text", "It is "), ("python", "2+3"), ("python_output", "5"), ("text", "5<|bos|>\n")]
TALK: Conversation = {
    "messages": [
        {"role": "system", "content": "Be brief. <|user_end|>"},
        {"role": "user", "content": "  2 < 3 <|assistant_start|>? <"},
        {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in SAID]},
        {"role": "user", "content": "Sure?\n"},
        {"role": "assistant", "content": "<\nYes"},
    ]
}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in the test's folder: runs, and where transformers copies modelling files to."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [modules, *sys.path])


def new_model(kind: str, depth: int = 2, num_kv_heads: int = 2, **settings: Any) -> GPT:
    """Random weights; no special token is ever likely."""
    sizes: Any = {"n_layer": depth, "n_head": 4, "n_kv_head": num_kv_heads, "n_embd": 64}
    sizes |= {"sequence_len": 256, "vocab_size": TOKENIZER.vocab_size}
    make = GPTConfig.plain if kind == "plain" else GPTConfig
    model = busy_gpt(make(**sizes, **settings))
    with torch.no_grad():
        model.lm_head.weight[TOKENIZER.bos_id : TOKENIZER.vocab_size] *= 1e-3
    return model


def export(model: GPT, out: Path) -> Any:
    """What transformers makes of the export of `model`."""
    save_model(model, "sft", "d2", 7, TOKENIZER)
    main(Config(out))
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert loaded.dtype == torch.float32
    return loaded


def some_ids(rows: int, time: int) -> torch.Tensor:
    return random_ids(rows, time, TOKENIZER.bos_id)


@torch.inference_mode()
def largest_difference(model: GPT, loaded: Any, ids: torch.Tensor) -> float:
    logits = model(ids)
    assert logits.abs().max() > 1  # else small differences would mean nothing
    return (logits - loaded(ids).logits).abs().max().item()


@pytest.mark.parametrize(("depth", "num_kv_heads"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("kind", ["plain", "additions"])
def test_logits_and_greedy_tokens_are_equal(
    kind: str, depth: int, num_kv_heads: int, tmp_path: Path
) -> None:
    model = new_model(kind, depth, num_kv_heads)
    loaded = export(model, tmp_path / "out")
    own_class = modeling_nanochat.NanoChatForCausalLM
    assert isinstance(loaded, own_class) == (kind == "plain")
    assert loaded.get_output_embeddings().weight.shape[0] == TOKENIZER.vocab_size  # no padding
    assert largest_difference(model, loaded, some_ids(2, 200)) <= 1e-5  # beyond the window of 128
    prompt = some_ids(1, 120)
    engine = Engine(model, TOKENIZER, num_slots=1)
    request = Request(prompt[0].tolist(), 64, temperature=0.0)
    ours = [event.token for event in engine.stream([request])]
    theirs = loaded.generate(prompt, max_new_tokens=64, do_sample=False)
    assert theirs[0, 120:].tolist() == ours and len(ours) == 64


@pytest.mark.parametrize(
    "addition",
    ["value_embeddings", "residual_scalars", "smear", "backout", "shifted_keys", "qk_scale", "SL"],
)
def test_each_addition_alone(addition: str, tmp_path: Path) -> None:
    changes = {"qk_scale": {"qk_scale": 1.2}, "SL": {"window_pattern": "SL"}}
    model = new_model("plain", **changes.get(addition, {addition: True}))
    loaded = export(model, tmp_path / "out")
    assert type(loaded).__name__ == "NanoChatXForCausalLM"
    assert largest_difference(model, loaded, some_ids(2, 200)) <= 1e-5


def test_padding_on_the_left_beams_and_a_cache_of_ones_own(tmp_path: Path) -> None:
    """The modelling file by itself: a batch is its rows, and a cache changes nothing."""
    loaded = export(new_model("additions"), tmp_path / "out")
    ids = some_ids(2, 30)
    greedy = {"max_new_tokens": 20, "do_sample": False}
    short = loaded.generate(ids[:1, 9:], **greedy)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    both = loaded.generate(ids, attention_mask=mask, **greedy)
    assert both[0, 9:].tolist() == short[0].tolist()
    assert both[1].tolist() == loaded.generate(ids[1:], **greedy)[0].tolist()
    greedy["num_beams"] = 3
    anew = loaded.generate(ids, use_cache=False, **greedy)
    assert torch.equal(loaded.generate(ids, **greedy), anew)
    with torch.inference_mode():
        whole = loaded(ids).logits
        padded = loaded(ids, attention_mask=mask).logits[0, 9:]
        torch.testing.assert_close(padded, loaded(ids[:1, 9:]).logits[0], rtol=0, atol=1e-4)
        past = loaded(ids[:, :20], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="previous_ids"):
            loaded(ids[:, 20:], past_key_values=past)
        rest = loaded(ids[:, 20:], past_key_values=past, previous_ids=ids[:, 19:20])
    torch.testing.assert_close(rest.logits, whole[:, 20:], rtol=0, atol=1e-5)


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """The tokenizer of an export, as transformers loads it."""
    export(new_model("plain"), tmp_path / "out")
    return transformers.AutoTokenizer.from_pretrained(tmp_path / "out")


def test_ids_are_equal(theirs: Any, tmp_path: Path) -> None:
    strings = fixture_strings()
    assert sum("<|" in text for text in strings) > 300
    for text in strings:
        ids = theirs.encode(text, split_special_tokens=True)
        assert ids == TOKENIZER.encode(text), repr(text)
        assert theirs.decode(ids) == text
        if not any(name in text for name in SPECIAL_TOKENS):
            assert theirs.encode(text) == ids, repr(text)
    names = {name: theirs.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    assert names == TOKENIZER.specials
    assert theirs.bos_token_id == TOKENIZER.bos_id and len(theirs) == TOKENIZER.vocab_size
    with_bos: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", add_bos_token=True)
    assert with_bos.encode("The hen") == [TOKENIZER.bos_id, *TOKENIZER.encode("The hen")]


@pytest.mark.parametrize("letters", ["ab", "abc"])
def test_ids_are_equal_where_merges_overlap(letters: str) -> None:
    """With few letters neighbours often make a token in another way than training did."""
    random_ = random.Random(1)
    texts = ["".join(random_.choices(letters, k=40)) for _ in range(60)]
    tokenizer = Tokenizer.train(texts, 256 + 60 + len(SPECIAL_TOKENS), SPECIAL_TOKENS)
    theirs = Reference.from_str(json.dumps(tokenizer_json(tokenizer)))
    for _ in range(300):
        text = "".join(random_.choices(letters, k=random_.randint(1, 60)))
        assert theirs.encode(text).ids == tokenizer.encode(text), text


def test_the_chat_template_gives_our_ids(theirs: Any) -> None:
    def ids(messages: list[dict[str, Any]], **settings: Any) -> list[int]:
        return theirs.apply_chat_template(messages, return_dict=True, **settings)["input_ids"]

    for begin, end in itertools.product((0, 1), range(2, 6)):
        messages = TALK["messages"][begin:end]
        talk = {"messages": messages}
        as_parts = copy.deepcopy(messages)
        for message in as_parts:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
        assert ids(messages) == ids(as_parts) == render_conversation(TOKENIZER, talk)[0]
        if messages[-1]["role"] == "user":
            prompt = render_prompt(TOKENIZER, talk)
            assert ids(messages, add_generation_prompt=True) == prompt
    assert GUARD not in theirs.decode(ids(TALK["messages"]))
    for role, content in (("tool", "x"), ("user", [{"type": "image", "text": "x"}])):
        with pytest.raises(TemplateError, match=r"turns|image"):
            ids([{"role": role, "content": content}])


def test_the_card_holds_the_table_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(new_model("additions"), "sft", "d2", 7, TOKENIZER)
    main(Config(tmp_path / "before"))
    assert "|" not in (tmp_path / "before/README.md").read_text()
    report.write_section("chat_eval_sft", "Quizzes", {}, {"ARC-Easy": 0.8512}, seconds=1.0)
    report.generate()
    main(Config(tmp_path / "after"))
    card = (tmp_path / "after/README.md").read_text()
    row = next(line for line in card.splitlines() if "ARC-Easy" in line)
    assert "85.1 %" in row and "d2, sft, step 7" in card and "trust_remote_code=True" in card


def test_a_tensor_that_is_amiss_is_named(tmp_path: Path) -> None:
    model = new_model("plain")
    run = save_model(model, "sft", "d2", 7, TOKENIZER)
    refuses("--out", main, Config(tmp_path))  # a folder that exists is left alone
    for name, tensor in (
        ("extra.weight", torch.zeros(2, 2)),
        ("blocks.1.mlp.c_fc.weight", None),
        ("wte.weight", torch.zeros(10, 64)),
    ):
        weights = {n: t for n, t in (model.state_dict() | {name: tensor}).items() if t is not None}
        state = {"step": 8, "model_config": asdict(model.config)}
        save_checkpoint(run, state, weights, {}, None, CPU)
        refuses(name, main, Config(tmp_path / "out"))
        assert not list(tmp_path.glob("out*"))
