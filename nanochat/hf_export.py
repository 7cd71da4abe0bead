"""What transformers reads: settings, tensor names, tokenizer and chat template of a checkpoint.

A plain model becomes transformers' NanoChatForCausalLM; one with additions keeps its names and
needs nanochat/hf_modeling.py beside it. Padding rows of the vocabulary are dropped.

- tiktoken keeps ranks, not merges, and joins any two neighbours whose bytes form a token, so every
  way to split a token in two becomes a merge.
- transformers parses special tokens spelled in a text. The chat template therefore puts a
  noncharacter after each `<` of a message, and the tokenizer removes it after looking for special
  tokens: what users type stays text.

Sources: NanoChatConfig of transformers; letters for bytes: `bytes_to_unicode` of openai/gpt-2.
"""

from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss import NORM_EPS
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, chat_tokens

Weights = dict[str, torch.Tensor]

PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
# How tokenizer.json spells each byte.
LETTERS = [chr(byte if byte in PRINTABLE else 256 + OTHERS.index(byte)) for byte in range(256)]
GUARD = "\ufdd0"  # U+FDD0 never was a character, and never will be
SETTINGS = {
    "sequence_len": "max_position_embeddings", "vocab_size": "vocab_size", "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "softcap": "final_logit_softcapping",
}  # fmt: skip
LAYER_NAMES = {
    **{f"attn.c_{letter}": f"self_attn.{letter}_proj" for letter in "qkv"},
    **{"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
}
# `text_files` puts lines before it that name the special tokens.
CHAT_TEMPLATE = """
{%- set marks = {
  'text': ['', ''],
  'python': [python_start, python_end],
  'python_output': [output_start, output_end]
} -%}
{%- macro plain(content) -%}
  {%- for part in ([{'type': 'text', 'text': content}] if content is string else content) -%}
    {{- marks[part.type][0] ~ part.text | replace('<', '<' ~ guard) ~ marks[part.type][1] -}}
  {%- endfor -%}
{%- endmacro -%}
{{- bos -}}
{%- set system = messages[0].role == 'system' -%}
{%- for message in messages[1 if system else 0:] -%}
  {%- set text = plain(message.content) -%}
  {%- if message.role == 'user' and loop.index0 % 2 == 0 -%}
    {%- set before = plain(messages[0].content) ~ '\n\n' if system and loop.first else '' -%}
    {{- user_start ~ before ~ text ~ user_end -}}
  {%- elif message.role == 'assistant' and loop.index0 % 2 == 1 -%}
    {{- assistant_start ~ text ~ assistant_end -}}
  {%- else -%}
    {{- raise_exception('after a system message, user and assistant take turns') -}}
  {%- endif -%}
{%- endfor -%}
{{- assistant_start if add_generation_prompt else '' -}}
"""


def is_plain(config: GPTConfig) -> bool:
    """True if transformers' class is exactly this architecture."""
    windows = map(config.window, range(config.n_layer))
    additions = config.value_embeddings, config.residual_scalars, config.smear, config.backout
    return not any((*additions, config.shifted_keys, *windows, config.qk_scale != 1))


def plain_names(num_layers: int) -> dict[str, str]:
    """Our name of each parameter of a plain model -> transformers' name."""
    return {"wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"} | {
        f"blocks.{i}.{ours}.weight": f"model.layers.{i}.{theirs}.weight"
        for i in range(num_layers)
        for ours, theirs in LAYER_NAMES.items()
    }


def is_vocabulary_table(name: str) -> bool:
    return name.startswith(("wte.", "lm_head.", "value_embeds."))


def check_weights(weights: Weights, config: GPTConfig, origin: object) -> Weights:
    """`weights` by our names, with the vocabulary's padding rows added.

    Raises UserError naming what is missing, unknown or of another shape.
    """
    num_extra = config.padded_vocab_size - config.vocab_size
    with torch.device("meta"):
        model = GPT(config)
    try:
        for name in filter(is_vocabulary_table, weights):
            rows = weights[name][: config.vocab_size]
            weights = weights | {name: F.pad(rows, (0, 0, 0, num_extra))}
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{origin} is refused: {reason}") from error
    return weights


def export_weights(weights: Weights, config: GPTConfig) -> Weights:
    names = plain_names(config.n_layer) if is_plain(config) else {}
    rows = dict.fromkeys(filter(is_vocabulary_table, weights), config.vocab_size)
    return {names.get(name, name): weights[name][: rows.get(name)] for name in weights}


def model_settings(config: GPTConfig) -> dict[str, Any]:
    settings = {theirs: getattr(config, ours) for ours, theirs in SETTINGS.items()}
    settings |= {"dtype": "float32", "tie_word_embeddings": False}
    if is_plain(config):
        return settings | {
            "model_type": "nanochat",
            "architectures": ["NanoChatForCausalLM"],
            "intermediate_size": 4 * config.n_embd,
            "rms_norm_eps": NORM_EPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        }
    layers, module = range(config.n_layer), "modeling_nanochat_x"
    additions = {
        "model_type": "nanochat_x",
        "architectures": ["NanoChatXForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.NanoChatXConfig",
            "AutoModelForCausalLM": f"{module}.NanoChatXForCausalLM",
        },
        "windows": [config.window(i) for i in layers],
        "value_layers": [config.has_value_embedding(i) for i in layers],
    }
    return settings | asdict(config) | additions


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json: the same ids as `tokenizer` for all UTF-8 text."""
    tokens = [tokenizer.decode_bytes([id]) for id in range(tokenizer.bos_id)]
    spelled = {token: "".join(LETTERS[byte] for byte in token) for token in tokens}
    cuts = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    merges = [[spelled[a], spelled[b]] for a, b in cuts if a in spelled and b in spelled]
    exact = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ids = tokenizer.specials.items()
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    pieces = [split | {"pattern": {"Regex": tokenizer.pattern}}, bytewise | {"trim_offsets": False}]
    return {
        "added_tokens": [{"id": i, "content": name, "special": True, **exact} for name, i in ids],
        "normalizer": {"type": "Replace", "pattern": {"String": f"<{GUARD}"}, "content": "<"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
        "decoder": pieces[1],
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a piece that is a token is that token, as for tiktoken
            "vocab": {word: id for id, word in enumerate(spelled.values())},
            "merges": merges,
        },
    }


def text_files(config: GPTConfig, tokenizer: Tokenizer, step: int) -> dict[str, Any]:
    """Name -> content of the files beside the weights; a text, or values for JSON."""
    chat = chat_tokens(tokenizer)
    words = {"guard": GUARD} | {token[2:-2]: token for token in SPECIAL_TOKENS}
    naming = "".join(f"{{%- set {name} = '{word}' -%}}\n" for name, word in words.items())
    end = words["assistant_end"]
    ids = {"bos_token_id": chat.bos, "pad_token_id": chat.assistant_end}
    ids |= {"eos_token_id": [chat.assistant_end, chat.bos]}  # a reply ends where the Engine ends it
    return {
        "config.json": model_settings(config) | ids | {"nanochat_step": step},
        "generation_config.json": ids,
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.sequence_len,
            **{"bos_token": words["bos"], "eos_token": end, "pad_token": end},
        },
        "chat_template.jinja": naming + CHAT_TEMPLATE.strip(),
    }
