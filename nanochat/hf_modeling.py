"""nanochat with its additions as a transformers model. `scripts.export_hf` copies this file into a
folder; `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it.

Names are those of nanochat.gpt, which explains the additions. Only torch and transformers (5 or
newer) are imported: nanochat need not be installed. Batches may be padded on either side, with an
attention mask. Smear needs the previous token, which a KV cache does not hold: `generate` passes
it, and a caller of `forward` with a cache must, as `previous_ids`. The cache is a DynamicCache.

Shapes: B batch, T new tokens, S tokens seen with them, C channels, H query heads, K kv heads, D
head dimension, V vocabulary.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

VE_GATE_CHANNELS, SMEAR_GATE_CHANNELS, VE_GATE_RANGE = 12, 24, 2.0
matrix = partial(nn.Linear, bias=False)


class NanoChatXConfig(PreTrainedConfig):
    """GPTConfig, and per layer `windows` (null: all keys) and `value_layers` (has it a table?)."""

    model_type = "nanochat_x"


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(torch.float32).eps)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """(B, H, T, D) `x` rotated by minus the (T, D / 2) angles; channel d pairs with d + D / 2."""
    cos, sin = angles.cos().type_as(x), angles.sin().type_as(x)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)


def visible(age: Tensor, window: int | None, attention_mask: Tensor | None) -> Tensor:
    """(1 or B, 1, T, S) True where a query sees a key, `age` (T, S) tokens before it."""
    seen = ((age >= 0) & (age < (window or age.shape[1])))[None, None]
    if attention_mask is None:
        return seen
    # Padding sees itself, as a softmax over nothing would be NaN.
    return (seen & attention_mask[:, None, None].bool()) | (age == 0)


class Attention(nn.Module):
    """Causal sliding-window attention, with an optional value embedding."""

    def __init__(self, config: NanoChatXConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.n_embd // config.n_head
        self.scale = config.qk_scale**2 / math.sqrt(self.head_dim)
        kv_channels = config.n_kv_head * self.head_dim
        self.num_shifted = config.n_kv_head // 2 if config.shifted_keys else 0
        self.c_q = matrix(config.n_embd, config.n_embd)
        self.c_k = matrix(config.n_embd, kv_channels)
        self.c_v = matrix(config.n_embd, kv_channels)
        self.c_proj = matrix(config.n_embd, config.n_embd)
        if config.value_layers[layer]:
            self.ve_gate = matrix(VE_GATE_CHANNELS, config.n_kv_head)

    def forward(
        self,
        x: Tensor,
        value: Tensor | None,
        angles: Tensor,
        mask: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
    ) -> Tensor:
        q, k, v = self._heads(self.c_q(x)), self._heads(self.c_k(x)), self._heads(self.c_v(x))
        if value is not None:
            gate = VE_GATE_RANGE * self.ve_gate(x[..., :VE_GATE_CHANNELS]).sigmoid()  # (B, T, K)
            v = v + gate.transpose(1, 2)[..., None] * self._heads(value)
        q, k = norm(rotate(q, angles)), norm(rotate(k, angles))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)  # (B, K, S, D)
        if self.num_shifted:  # these heads find a token by its predecessor's key
            own, late = k.tensor_split([-self.num_shifted], dim=1)
            if attention_mask is not None:  # padding on the left is nobody's predecessor
                late = late * attention_mask[:, None, :, None].type_as(late)
            k = torch.cat((own, F.pad(late, (0, 0, 1, -1))), dim=1)
        gqa = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.scale, enable_gqa=gqa)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)


class Block(nn.Module):
    def __init__(self, config: NanoChatXConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = nn.ModuleDict()
        self.mlp["c_fc"] = matrix(config.n_embd, 4 * config.n_embd)
        self.mlp["c_proj"] = matrix(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        x = x + self.attn(norm(x), *rest)
        return x + self.mlp["c_proj"](self.mlp["c_fc"](norm(x)).relu().square())


class NanoChatXForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoChatXConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _input_embed_layer = "wte"

    def __init__(self, config: NanoChatXConfig) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.lm_head = matrix(config.n_embd, config.vocab_size)
        shape = config.vocab_size, config.n_kv_head * (config.n_embd // config.n_head)
        layers = [i for i, has_value in enumerate(config.value_layers) if has_value]
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(*shape) for i in layers})
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.smear:
            self.smear_gate = matrix(SMEAR_GATE_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        previous_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """fp32 logits (B, T, V), or only of the last `logits_to_keep` tokens; the loss if `labels`.

        `input_ids` (B, T) follow `previous_ids` (B, 1) and the cache; `attention_mask` is (B, S).
        """
        config, head_dim = self.config, self.config.n_embd // self.config.n_head
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        num_past = 0 if cache is None else cache.get_seq_length()
        place = torch.arange(num_past + input_ids.shape[1], device=input_ids.device)  # (S)
        age = place[num_past:, None] - place  # (T, S)
        masks = {window: visible(age, window, attention_mask) for window in set(config.windows)}
        pairs = torch.arange(0, head_dim, 2, device=input_ids.device).float()
        angles = place[num_past:, None].float() * (1 / config.rope_base ** (pairs / head_dim))
        x = norm(self.wte(input_ids))  # (B, T, C)
        if config.smear:
            x = self._smear(x, num_past, previous_ids, attention_mask)
        x0 = middle = x
        for i, block in enumerate(self.blocks):
            if config.residual_scalars:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            value = self.value_embeds[str(i)](input_ids) if config.value_layers[i] else None
            x = block(x, value, angles, masks[config.windows[i]], attention_mask, cache)
            if i == config.n_layer // 2:
                middle = x
        x = norm(x - self.backout_lambda * middle if config.backout else x)
        logits = self.lm_head(x[:, -logits_to_keep:]).float()
        logits = config.softcap * torch.tanh(logits / config.softcap)
        size = config.vocab_size
        loss = None if labels is None else self.loss_function(logits, labels, size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _smear(
        self, x: Tensor, num_past: int, previous_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """`x` plus a gated share of the previous token's; the first token has none."""
        if num_past and previous_ids is None:
            raise ValueError("the cache holds tokens: give previous_ids, the one before input_ids")
        first = torch.zeros_like(x[:, :1]) if previous_ids is None else norm(self.wte(previous_ids))
        before = torch.cat((first, x[:, :-1]), dim=1)
        if attention_mask is not None:  # padding on the left is nobody's past
            real = F.pad(attention_mask, (1, 0))[:, -x.shape[1] - 1 : -1]
            before = before * real[..., None].type_as(x)
        gate = self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]).sigmoid()
        return x + self.smear_lambda * gate * before

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict:
        """As for any model, plus the token before the new ones."""
        prepare = super().prepare_inputs_for_generation  # pyright: ignore
        inputs = prepare(input_ids, *args, **kwargs)
        num_new = inputs["input_ids"].shape[1]
        previous = input_ids[:, -num_new - 1 : -num_new] if num_new < input_ids.shape[1] else None
        return inputs | {"previous_ids": previous}
