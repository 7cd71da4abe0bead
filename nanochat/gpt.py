"""The GPT: token ids -> logits or loss, with all initialisation in one function.

    x0 = smear(norm(embedding))
    L blocks: x = r_i x + s_i x0;  x += attention(norm(x));  x += mlp(norm(x))
    logits = 15 tanh(head(norm(x - backout)) / 15)

Weightless RMS norms, rotary positions (by -theta, as in the published weights) before QK norm,
relu squared, an untied head. Five additions, each a switch of `GPTConfig`, lower the loss per step:
gated value embeddings (every other layer adds a per-token table to its values), per-layer scalars
on the residual stream and on x0, smear (a token sees a little of its predecessor before any
attention), backout (part of the middle layer's output is subtracted before the head) and shifted
keys (half of the heads find a token by the key of its predecessor: finding what once followed a
token like this one takes one layer instead of two).

Shapes: B batch, T time, C channels, H query heads, K kv heads, D head dimension, L layers, V
vocabulary. Sources: RoPE arXiv 2104.09864; QK norm 2010.04245; relu squared 2109.08668; GQA
2305.13245; softcap 2408.00118; value embeddings, x0 scalars, keys one token late:
KellerJordan/modded-nanogpt; smear, backout, constants: karpathy/nanochat; heads that look for what
followed: 2209.11895.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat.attention import Kernel, View, attend, see
from nanochat.common import UserError
from nanochat.fp8 import Quantised, fp8_linear
from nanochat.kv_cache import Append, KVCache, kept_dtype
from nanochat.loss import (
    GPU_CHUNK,
    Angles,
    adjacent_angles,
    norm,
    relu_squared,
    rotary_angles,
    softcap_loss,
)

VOCAB_MULTIPLE = 64  # matmuls are faster on round sizes; the extra rows never win
VE_GATE_CHANNELS = 12  # a gate reads only the first channels: enough, and nearly free
SMEAR_GATE_CHANNELS = 24
VE_GATE_RANGE = 2.0  # gate = range * sigmoid: 1 at zero. The other known choice is 3
# What a query gives its own token's key at first, where others get about 0. So attention finds
# equal tokens from the first step on, and in shifted heads what followed them; with random keys a
# laptop's model learned to match in some runs only. After arXiv 2305.09828; tried in dev/LOG.md.
OWN_SCORE = 8.0


class Role(NamedTuple):
    """How parameters of one name are initialised and trained."""

    group: str
    # normal: std a; uniform: std a / sqrt(n_embd); constant: a; linear: a to b over the layers
    init: str
    a: float = 0.0
    b: float = 0.0


# Last part of a parameter's name -> its role. Values: karpathy/nanochat, tuned at depths 12 to 24.
ROLES = {
    "wte": Role("embedding", "normal", 0.8),
    "lm_head": Role("head", "normal", 0.001),  # logits near 0: the first loss is ln V
    "c_q": Role("matrices", "uniform", 1.0),
    "c_k": Role("matrices", "uniform", 1.0),
    "c_v": Role("matrices", "uniform", 1.0),
    "c_fc": Role("matrices", "uniform", 0.4),
    "c_proj": Role("matrices", "constant", 0.0),  # a block adds nothing at first
    "value_embeds": Role("value_embeddings", "uniform", 1.0),  # as large as what c_v gives
    "ve_gate": Role("gates", "constant", 0.0),  # half open
    "smear_gate": Role("gates", "constant", 0.0),
    "resid_lambdas": Role("resid_scalars", "linear", 1.15, 1.05),
    "x0_lambdas": Role("x0_scalars", "linear", 0.20, 0.05),
    "smear_lambda": Role("smear_backout", "constant", 0.0),
    "backout_lambda": Role("smear_backout", "constant", 0.2),
}


# What a checkpoint or an export from before an addition does not say.
BEFORE = {"shifted_keys": False}


@dataclass(frozen=True)
class GPTConfig:
    """The whole architecture; saved with every checkpoint."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"  # tiled over the layers; S short, L all; the last is always L
    rope_base: float = 100000.0
    qk_scale: float = 1.2
    softcap: float = 15.0
    value_embeddings: bool = True
    residual_scalars: bool = True
    smear: bool = True
    backout: bool = True
    shifted_keys: bool = True  # in n_kv_head // 2 heads

    @classmethod
    def plain(cls, **sizes: Any) -> "GPTConfig":
        """The published first-generation architecture, in the given sizes."""
        off = ("value_embeddings", "residual_scalars", "smear", "backout", "shifted_keys")
        first = {"window_pattern": "L", "rope_base": 10000.0, "qk_scale": 1.0}
        return cls(**{**dict.fromkeys(off, False), **first, **sizes})

    def __post_init__(self) -> None:
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(
                f"--window_pattern={self.window_pattern} is unknown; use S and L only, such as SSSL"
            )
        if self.n_embd % (2 * self.n_head) or self.n_head % self.n_kv_head:
            raise UserError(
                f"{self.n_embd} channels do not divide into {self.n_head} even heads over "
                f"{self.n_kv_head} kv heads; choose another --head_dim or --aspect_ratio"
            )
        if self.smear and self.n_embd < SMEAR_GATE_CHANNELS:
            raise UserError(
                f"a gate reads {SMEAR_GATE_CHANNELS} channels, but there are only {self.n_embd}; "
                "choose a larger --aspect_ratio"
            )
        assert 0 < self.softcap <= 60, "softcap_loss takes exp of a logit as it is"
        assert self.qk_scale**2 * math.sqrt(self.head_dim) <= 60, "so does KVCache, of a score"

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def window(self, layer: int) -> int | None:
        """Keys visible to a query of `layer`, its own included; None: all earlier ones."""
        is_short = self.window_pattern[layer % len(self.window_pattern)] == "S"
        quarter = 128 * -(-self.sequence_len // 512)  # of the context, rounded up to 128
        return quarter if is_short and layer < self.n_layer - 1 else None

    def has_value_embedding(self, layer: int) -> bool:
        """True for every other layer, counted back from the last."""
        return self.value_embeddings and (self.n_layer - 1 - layer) % 2 == 0


class Linear(nn.Linear):
    """A matrix without bias: fp32 master weights, cast to the input's dtype."""

    quantised: Quantised | None = None  # see nanochat.fp8.enable

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, bias=False)

    def reset_parameters(self) -> None:
        """No-op: see init_weights."""

    def forward(self, input: Tensor) -> Tensor:
        if self.quantised is not None and torch.is_grad_enabled():
            return fp8_linear(input, self.weight, self.quantised)
        return F.linear(input, self.weight.to(input.dtype))


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """No-op: see init_weights."""


class Context(NamedTuple):
    """What all layers of one forward call share."""

    angles: Angles  # (1 or B, T, 1, D / 2): cos and sin, or a complex tensor and None
    append: Append | None  # where the tokens go in the cache, if there is one
    view: View | None  # who sees whom, if there is none


def one_later(x: Tensor, view: View) -> Tensor:
    """(B, T, C) `x` one token later; where a row or a document begins, zeros."""
    x = F.pad(x, (0, 0, 1, -1))
    return x if view.starts is None else x.masked_fill(view.starts[..., None], 0)


class Attention(nn.Module):
    """Causal sliding-window attention, with an optional value embedding."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.window = layer, config.window(layer)
        self.head_dim = config.head_dim
        self.num_shifted = config.n_kv_head // 2 if config.shifted_keys else 0  # the last kv heads
        # Queries and keys are both scaled by qk_scale after their norm; here at once.
        self.scale = config.qk_scale**2 / math.sqrt(config.head_dim)
        kv_channels = config.n_kv_head * config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, kv_channels)
        self.c_v = Linear(config.n_embd, kv_channels)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(VE_GATE_CHANNELS, config.n_kv_head)

    @torch.no_grad()
    def align_keys(self) -> None:
        """Mix the first query head of each group into its random keys, so far as OWN_SCORE asks."""
        share = min(1.0, OWN_SCORE / (self.scale * self.head_dim))
        keys = self.c_k.weight.unflatten(0, (-1, self.head_dim))  # (K, D, C)
        queries = self.c_q.weight.unflatten(0, (len(keys), -1, self.head_dim))[:, 0]
        keys.mul_(math.sqrt(1 - share**2)).add_(queries, alpha=share)

    def forward(self, x: Tensor, value_embedding: Tensor | None, context: Context) -> Tensor:
        batch, time, _ = x.shape
        adjacent = context.angles[1] is None
        q = self._turnable(x, self.c_q, adjacent)  # (B, T, H, D)
        k = self._turnable(x, self.c_k, adjacent)  # (B, T, K, D)
        v = self.c_v(x).view(batch, time, -1, self.head_dim)
        if value_embedding is not None:
            gate = VE_GATE_RANGE * self.ve_gate(x[..., :VE_GATE_CHANNELS]).sigmoid()  # (B, T, K)
            v = v + gate[..., None] * value_embedding.view_as(v)
        q, k = norm(q, context.angles), norm(k, context.angles)
        if context.append is not None:
            window, num_shifted = self.window, self.num_shifted
            y = context.append.attend(self.layer, (q, k, v), window, self.scale, num_shifted)
        else:
            assert context.view is not None
            if self.num_shifted:
                own, late = k.tensor_split([-self.num_shifted], dim=2)
                late = one_later(late.flatten(2), context.view).view_as(late)
                k = torch.cat((own, late), dim=2)
            y = attend((q, k, v), context.view, self.window, self.scale)
        return self.c_proj(y.reshape(batch, time, -1))

    def _turnable(self, x: Tensor, matrix: "Linear", adjacent: bool) -> Tensor:
        """(B, T, -1, D) queries or keys; with `adjacent`, pairs of channels lie side by side.

        That changes no score, as long as it is done to both.
        """
        if adjacent:
            weight = matrix.weight.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2)
            y = F.linear(x, weight.flatten(0, 2).to(x.dtype))
        else:
            y = matrix(x)
        return y.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(relu_squared(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        mix: tuple[Tensor, Tensor] | None,
        value_embedding: Tensor | None,
        context: Context,
    ) -> Tensor:
        if mix is not None:
            x = mix[0].to(x.dtype) * x + mix[1].to(x.dtype) * x0
        x = x + self.attn(norm(x), value_embedding, context)
        return x + self.mlp(norm(x))


def call(part: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """What trainers compile: the model is called part by part, and all layers alike share code.

    Compiled whole, gradients would only be there when the backward pass is over, too late to
    average them over the ranks meanwhile.
    """
    return part(*inputs)


class GPT(nn.Module):
    """The model, uninitialised until `init_weights` or a checkpoint is loaded."""

    def __init__(self, config: GPTConfig, table_dtype: torch.dtype | None = None) -> None:
        """Tables of embeddings are in `table_dtype`, by default in fp32 like everything else."""
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32  # of activations and matmuls; weights keep theirs
        self.kernel: Kernel = "dense"  # of attention
        self.document_start: int | None = None  # id of a token that sees nothing before it
        self.loss_chunk = GPU_CHUNK  # logits in a GPU's memory at once
        self.recompute = False  # in backward, what a block keeps otherwise: a third more time
        self.call_part = call  # or a compiled one; only for calls without a cache
        rows, kv_channels = config.padded_vocab_size, config.n_kv_head * config.head_dim
        self.wte = Embedding(rows, config.n_embd, dtype=table_dtype)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, rows)
        with_value = [str(i) for i in range(config.n_layer) if config.has_value_embedding(i)]
        tables = {i: Embedding(rows, kv_channels, dtype=table_dtype) for i in with_value}
        self.value_embeds = nn.ModuleDict(tables)
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        if config.smear:
            self.smear_gate = Linear(SMEAR_GATE_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))

    def make_cache(
        self, num_slots: int, max_len: int, device: torch.device | str | None = None
    ) -> KVCache:
        """An empty cache for `num_slots` sequences of up to `max_len` tokens.

        On the device "meta" it has a size, but takes no memory.
        """
        own, dtype, config = self.wte.weight.device, self.compute_dtype, self.config
        return KVCache(
            config.n_layer, num_slots, config.n_kv_head, max_len, config.head_dim, config.n_embd,
            device or own, dtype, self.kernel, kept_dtype(own, dtype, self.kernel),
        )  # fmt: skip

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialise every parameter; depends only on `seed` (and the kind of device)."""
        random = torch.Generator(self.wte.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            role = _role(name)
            values = torch.empty_like(weight, dtype=torch.promote_types(weight.dtype, torch.float))
            match role.init:
                case "normal":
                    values.normal_(0, role.a, generator=random)
                case "uniform":
                    bound = role.a * math.sqrt(3 / self.config.n_embd)
                    values.uniform_(-bound, bound, generator=random)
                case "constant":
                    values.fill_(role.a)
                case "linear":
                    values.copy_(torch.linspace(role.a, role.b, len(weight)))
            weight.copy_(values)
        for module in self.modules():
            if isinstance(module, Attention):
                module.align_keys()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters by how they train: {"name", "kind": "muon" | "adamw", "names", "params"}."""
        groups: dict[str, dict[str, Any]] = {}
        for name, weight in self.named_parameters():
            role = _role(name)
            kind = "muon" if role.group == "matrices" else "adamw"
            fresh = {"name": role.group, "kind": kind, "names": [], "params": []}
            group = groups.setdefault(role.group, fresh)
            group["names"].append(name)
            group["params"].append(weight)
        return list(groups.values())

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        cache: KVCache | None = None,
        slots: Tensor | None = None,
        num_new: Tensor | None = None,
        packed: bool = False,
        last_only: bool = False,
    ) -> Tensor:
        """The loss if there are `targets`, else fp32 logits (B, T, vocab_size).

        `ids` and `targets` are (B, T); targets of -1 are ignored. `reduction` "mean" and "sum" give
        a scalar, "none" (B, T). With a `cache`, row b appends its first num_new[b] tokens (default
        T) to slot slots[b] (default: all in order), both (B,), and sees that slot's past; the rest
        is padding with meaningless logits. If `packed`, the only row has the num_new[b] tokens of
        each slot one after the other, then padding. `last_only` gives (B, 1, vocab_size), after
        each sequence's last token.
        """
        if cache is None:
            x, middle = self._trunk(ids, None)  # (B, T, C)
            if targets is not None:
                return self.call_part(self._loss, x, middle, targets, reduction)
            x = self._normed(x, middle)
            return self._logits(x[:, -1:] if last_only else x)
        assert targets is None, "no loss behind a cache"
        rows, time = ids.shape
        append = cache.begin(rows, time, slots, num_new, self.compute_dtype, packed)
        x = self._normed(*self._trunk(ids, append))
        cache.finish(append)
        return self._logits(x.flatten(0, 1)[append.last][:, None] if last_only else x)

    def embed(self, ids: Tensor) -> Tensor:
        """(..., C) input of the trunk, before smear; a KVCache keeps the newest token's."""
        return norm(self.wte(ids).to(self.compute_dtype))

    def _trunk(self, ids: Tensor, append: Append | None) -> tuple[Tensor, Tensor]:
        """(B, T, C) outputs of the last and of the middle layer."""
        config = self.config
        if append is None:
            run, positions = self.call_part, torch.arange(ids.shape[1], device=ids.device)[None]
            windows = {config.window(layer) for layer in range(config.n_layer)}
            view = see(self.kernel, windows, ids, self.document_start, self.compute_dtype)
        else:
            run, positions, view = call, append.positions, None  # (B, T)
        # Recomputed in each call: no table that a long prompt could outgrow.
        cos, sin = rotary_angles(positions, config.head_dim, config.rope_base)
        angles: Angles = (cos, sin)
        if ids.is_cpu and torch.is_grad_enabled() and run is call:
            angles = adjacent_angles(cos, sin)
        context = Context(angles, append, view)
        x = self.embed(ids)
        if config.smear:
            x = run(self._smear, x, append, view)

        def block(layer: int, x: Tensor, x0: Tensor) -> Tensor:
            mix = value_embedding = None
            if config.residual_scalars:
                mix = self.resid_lambdas[layer], self.x0_lambdas[layer]
            if config.has_value_embedding(layer):
                value_embedding = self.value_embeds[str(layer)](ids).to(x.dtype)
            return run(self.blocks[layer], x, x0, mix, value_embedding, context)

        recompute = self.recompute and torch.is_grad_enabled()
        x0 = middle = x
        for layer in range(config.n_layer):
            if recompute:
                x = checkpoint(block, layer, x, x0, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(layer, x, x0)
            if layer == config.n_layer // 2:
                middle = x
        return x, middle

    def _smear(self, x: Tensor, append: Append | None, view: View | None) -> Tensor:
        """`x` plus a gated share of the previous token's; the first token has none."""
        if append is not None:
            before = append.swap_previous(x)
        else:
            assert view is not None
            before = one_later(x, view)
        gate = self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]).sigmoid()  # (B, T, 1)
        return x + self.smear_lambda.to(x.dtype) * gate * before

    def _normed(self, x: Tensor, middle: Tensor) -> Tensor:
        """(B, T, C) input of the head."""
        return norm(x - self.backout_lambda.to(x.dtype) * middle if self.config.backout else x)

    def _loss(self, x: Tensor, middle: Tensor, targets: Tensor, reduction: str) -> Tensor:
        size, softcap = self.config.vocab_size, self.config.softcap
        x = self._normed(x, middle)
        weight, chunk = self.lm_head.weight, self.loss_chunk
        return softcap_loss(x, weight, targets, size, softcap, reduction, chunk)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.lm_head(x)[..., : self.config.vocab_size].float()
        return self.config.softcap * logits.div_(self.config.softcap).tanh_()


def _role(name: str) -> Role:
    """The role of a parameter such as "blocks.3.attn.c_q.weight" or "value_embeds.1.weight"."""
    parts = name.removesuffix(".weight").split(".")
    return ROLES[parts[0] if parts[0] == "value_embeds" else parts[-1]]
