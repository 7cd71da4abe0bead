"""The model against a slow second implementation: counts, initial state, logits, gradients."""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat import loss
from nanochat.gpt import GPT, Attention, GPTConfig
from tests.models import busy_gpt, random_ids, refuses

SMALL: dict[str, Any] = {"sequence_len": 160, "vocab_size": 90, "n_layer": 3}
SMALL |= {"n_head": 4, "n_kv_head": 2, "n_embd": 64}


# --- a second implementation, from the definitions, one token and one head at a time, in fp64


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + 1.1920929e-07)


def turn(x: torch.Tensor, position: int, base: float, sign: int) -> torch.Tensor:
    """Rotate pair (d, d + D/2) by sign * position * base^(-2d/D)."""
    half = len(x) // 2
    pair = torch.complex(x[:half], x[half:])
    speed = torch.tensor([base ** (-2 * d / len(x)) for d in range(half)], dtype=torch.float64)
    turned = pair * torch.exp(1j * sign * position * speed)
    return torch.cat((turned.real, turned.imag))


def slow_attention(
    w: dict, config: GPTConfig, layer: int, xs: list, values: list | None, sign: int
) -> list:
    prefix = f"blocks.{layer}.attn."
    size, shared = config.n_embd // config.n_head, config.n_head // config.n_kv_head
    qs, ks, vs = [], [], []
    for t, x in enumerate(xs):
        q, k, v = ((w[prefix + f"c_{c}.weight"] @ x).split(size) for c in "qkv")
        qs.append([config.qk_scale * rms(turn(head, t, config.rope_base, sign)) for head in q])
        ks.append([config.qk_scale * rms(turn(head, t, config.rope_base, sign)) for head in k])
        if values is not None:
            gates = 2 / (1 + torch.exp(-(w[prefix + "ve_gate.weight"] @ x[:12])))
            v = [a + g * b for a, g, b in zip(v, gates, values[t].split(size), strict=True)]
        vs.append(v)
    is_last = layer == config.n_layer - 1
    short = config.window_pattern[layer % len(config.window_pattern)] == "S" and not is_last
    window = 128 * math.ceil(config.sequence_len / 512) if short else len(xs)
    first_shifted = config.n_kv_head - config.shifted_keys * (config.n_kv_head // 2)

    def key(s: int, head: int) -> torch.Tensor:
        """By which a query finds token s: of later heads, its predecessor's."""
        if head < first_shifted:
            return ks[s][head]
        return ks[s - 1][head] if s else torch.zeros_like(ks[0][head])

    out = []
    for t in range(len(xs)):
        seen = range(max(0, t - window + 1), t + 1)
        heads = []
        for h in range(config.n_head):
            scores = torch.stack([qs[t][h] @ key(s, h // shared) / math.sqrt(size) for s in seen])
            weights = torch.softmax(scores, dim=0)
            heads.append(sum(a * vs[s][h // shared] for a, s in zip(weights, seen, strict=True)))
        out.append(w[prefix + "c_proj.weight"] @ torch.cat(heads))
    return out


def slow_logits(model: GPT, ids: list[int], sign: int = -1) -> torch.Tensor:
    config = model.config
    w = {name: weight.detach().double() for name, weight in model.named_parameters()}
    xs = [rms(w["wte.weight"][i]) for i in ids]
    if config.smear:
        gates = [torch.sigmoid(w["smear_gate.weight"] @ x[:24]) * w["smear_lambda"] for x in xs]
        xs = [xs[0]] + [xs[t] + gates[t] * xs[t - 1] for t in range(1, len(xs))]
    x0s = middle = xs
    for layer in range(config.n_layer):
        if config.residual_scalars:
            r, s = w["resid_lambdas"][layer], w["x0_lambdas"][layer]
            xs = [r * x + s * x0 for x, x0 in zip(xs, x0s, strict=True)]
        values = None
        if config.value_embeddings and layer % 2 == (config.n_layer - 1) % 2:
            values = [w[f"value_embeds.{layer}.weight"][i] for i in ids]
        mixed = slow_attention(w, config, layer, [rms(x) for x in xs], values, sign)
        xs = [x + y for x, y in zip(xs, mixed, strict=True)]
        up, down = (w[f"blocks.{layer}.mlp.{name}.weight"] for name in ("c_fc", "c_proj"))
        xs = [x + down @ (torch.clamp(up @ rms(x), min=0) ** 2) for x in xs]
        if layer == config.n_layer // 2:
            middle = xs
    if config.backout:
        xs = [x - w["backout_lambda"] * m for x, m in zip(xs, middle, strict=True)]
    head = w["lm_head.weight"][: config.vocab_size]
    return torch.stack([config.softcap * torch.tanh(head @ rms(x) / config.softcap) for x in xs])


@pytest.mark.parametrize(("plain", "n_kv_head"), [(True, 4), (False, 2), (False, 4)])
def test_logits_equal_the_slow_implementation(plain: bool, n_kv_head: int) -> None:
    """140 tokens, since the short window is 128; and a control that turns the other way."""
    sizes = {**SMALL, "n_kv_head": n_kv_head, "n_embd": 48}
    config = GPTConfig.plain(**sizes) if plain else GPTConfig(**sizes)
    model = busy_gpt(config)
    ids = random_ids(1, 140, 90)
    with torch.inference_mode():
        logits = model(ids)[0]
        slow = slow_logits(model, ids[0].tolist())
        wrong = slow_logits(model, ids[0, :10].tolist(), sign=1)
    assert logits.shape == (140, 90) and logits.dtype == torch.float32
    assert slow.std() > 0.1
    assert (logits - slow).abs().max() <= 1e-5
    assert (logits[:10] - wrong).abs().max() > 1e-3


def test_init_writes_everything_and_nothing_else() -> None:
    """From NaN, twice the same from one seed, without touching torch's own generator."""
    config = GPTConfig(**SMALL)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    states = []
    before = torch.get_rng_state()
    for seed in (3, 3, 4):
        with torch.no_grad():
            for weight in model.parameters():
                weight.fill_(torch.nan)
        model.init_weights(seed)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
    assert torch.equal(before, torch.get_rng_state())
    for name, value in states[0].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, states[1][name])
    assert not torch.equal(states[0]["wte.weight"], states[2]["wte.weight"])
    assert states[0]["x0_lambdas"].tolist() == pytest.approx([0.2, 0.125, 0.05])
    assert states[0]["resid_lambdas"].tolist() == pytest.approx([1.15, 1.1, 1.05])
    assert states[0]["blocks.0.attn.c_q.weight"].std() == pytest.approx(64**-0.5, rel=0.05)
    assert states[0]["blocks.0.mlp.c_fc.weight"].std() == pytest.approx(0.4 * 64**-0.5, rel=0.05)
    assert len(list(model.buffers())) == 0


def test_first_loss_is_ln_v() -> None:
    """Padded rows of the vocabulary take no probability, so V is the vocabulary asked for."""
    for vocab in (90, 128, 1000):
        model = GPT(GPTConfig(**{**SMALL, "vocab_size": vocab}))
        model.init_weights()
        ids = random_ids(2, 50, vocab)
        assert model(ids, ids).item() == pytest.approx(math.log(vocab), abs=0.01)
        assert model(ids).shape == (2, 50, vocab)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [96, 96 * 7, 2**20])
def test_loss_and_gradients_equal_plain_autograd(
    reduction: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp64, chunks of 1, 7 and all rows, ignored targets, padding, unequal weights from above."""
    monkeypatch.setattr(loss, "CPU_CHUNK", chunk)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(23, 16, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(96, 16, generator=random, dtype=torch.float64, requires_grad=True)
    targets = random_ids(1, 23, 90)[0]
    targets[::5] = -1
    above = torch.randn(23, generator=random, dtype=torch.float64)

    def total(loss: torch.Tensor) -> torch.Tensor:
        return (loss * above).sum() if reduction == "none" else loss * 0.37

    ours = loss.softcap_loss(x, weight, targets, 90, 3.0, reduction)
    logits = 3.0 * torch.tanh(x @ weight[:90].T / 3.0)
    plain = F.cross_entropy(logits, targets, reduction=reduction, ignore_index=-1)
    assert torch.allclose(ours, plain, rtol=1e-12)
    mine = torch.autograd.grad(total(ours), (x, weight))
    theirs = torch.autograd.grad(total(plain), (x, weight))
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        again = loss.softcap_loss(x, weight, targets, 90, 3.0, reduction)
    assert torch.allclose(again, plain, rtol=1e-12)


@pytest.mark.parametrize("all_the_same", [False, True])
@pytest.mark.parametrize("std", [1e-3, 0.5])  # of the head, when it starts and when it has grown
def test_gradients_of_the_loss_in_fp16(std: float, all_the_same: bool) -> None:
    """Against fp64, at the scales that the loss begins with for few and for many tokens a step."""
    random = torch.Generator().manual_seed(0)
    x = loss.norm(torch.randn(2048, 64, generator=random, dtype=torch.float64))
    weight = std * torch.randn(2048, 64, generator=random, dtype=torch.float64)
    targets = random_ids(1, 2048, 2000)[0]
    if all_the_same:  # the largest sums over a chunk
        x, targets = x[:1].expand(2048, 64), torch.zeros_like(targets)
    for factor in (2**16 / 2**12, 2**16 / 2**20):
        gradients = []
        for inputs, matrix in ((x, weight), (x.half(), weight.float())):
            leaves = inputs.detach().requires_grad_(), matrix.detach().requires_grad_()
            total = loss.softcap_loss(leaves[0], leaves[1], targets, 2000, 15.0, "sum")
            gradients.append(torch.autograd.grad(total * factor, leaves))
        for exact, found in zip(*gradients, strict=True):
            assert (found.double() - exact).norm() < 2e-3 * exact.norm()


def test_hand_written_gradients_pass_gradcheck() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 8, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss.norm, (x,))
    cos, sin = loss.rotary_angles(torch.arange(x.shape[1])[None], x.shape[-1], 100.0)
    angles = cos.double(), sin.double()
    assert torch.autograd.gradcheck(lambda x: loss.norm(x, angles), (x,))
    assert torch.allclose(loss.norm(x, angles), loss.norm(loss.rotate(x, *angles)))
    adjacent = loss.adjacent_angles(angles[0], angles[1])
    assert torch.autograd.gradcheck(lambda x: loss.norm(x, adjacent), (x,))
    side_by_side = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    turned = loss.rotate(side_by_side, *adjacent).unflatten(-1, (-1, 2)).transpose(-1, -2)
    assert torch.allclose(turned.flatten(-2), loss.rotate(x, *angles))
    assert torch.autograd.gradcheck(loss.relu_squared, (x,))
    assert torch.allclose(loss.norm(x), F.rms_norm(x, (8,), eps=loss.NORM_EPS))


def test_gradients_of_the_whole_model_reach_every_parameter() -> None:
    """Against a central difference in fp64 along a random direction of all parameters at once."""
    model = busy_gpt(GPTConfig(**SMALL)).double()
    model.compute_dtype = torch.float64
    ids, random = random_ids(2, 140, 90), torch.Generator().manual_seed(2)
    weights = list(model.parameters())
    gradients = torch.autograd.grad(model(ids, ids.roll(-1, 1)), weights)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    ways = [torch.randn(w.shape, generator=random, dtype=torch.float64) for w in weights]
    losses = []
    with torch.no_grad():
        for size in (1e-6, -2e-6):
            for weight, way in zip(weights, ways, strict=True):
                weight += size * way
            losses.append(model(ids, ids.roll(-1, 1)))
    slope = (losses[0] - losses[1]) / 2e-6
    expected = sum((g * way).sum() for g, way in zip(gradients, ways, strict=True))
    assert slope.item() == pytest.approx(float(expected), rel=1e-5)


def test_ignored_targets_and_the_last_position_alone() -> None:
    model = busy_gpt(GPTConfig(**SMALL))
    ids = random_ids(2, 20, 90)
    targets = ids.roll(-1, 1)
    targets[:, ::3] = -1
    each = model(ids, targets, reduction="none")
    assert each.shape == (2, 20) and (each[:, ::3] == 0).all()
    assert model(ids, targets).item() == pytest.approx(each[targets >= 0].mean().item(), rel=1e-5)
    nothing = model(ids, torch.full_like(ids, -1))
    nothing.backward()
    assert nothing.item() == 0
    assert all(w.grad is not None and (w.grad == 0).all() for w in model.parameters())
    assert torch.allclose(model(ids, last_only=True)[:, 0], model(ids)[:, -1], atol=1e-5)


def test_bf16_stays_close_and_masters_stay_fp32() -> None:
    model = busy_gpt(GPTConfig(**SMALL))
    ids, weights, found = random_ids(2, 140, 90), list(model.parameters()), []
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        loss = model(ids, ids)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])
        found.append((model(ids), loss.detach(), gradient))
    (wide, wide_loss, expected), (narrow, loss, gradient) = found
    assert narrow.dtype == loss.dtype == gradient.dtype == weights[0].dtype == torch.float32
    assert 0 < (narrow - wide).abs().max() < 0.3
    assert loss.item() == pytest.approx(wide_loss.item(), rel=0.01)
    assert F.cosine_similarity(gradient, expected, dim=0) > 0.99


def test_attention_begins_with_equal_tokens() -> None:
    """A token's own key gets about OWN_SCORE at first, others about 0, in heads of any size."""
    for head_dim, kv_heads in ((64, 8), (128, 2), (256, 4)):
        heads = 512 // head_dim
        sizes: dict[str, Any] = {"n_embd": 512, "n_head": heads, "n_kv_head": min(kv_heads, heads)}
        model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, **sizes))
        model.init_weights()
        (attention,) = (each for each in model.modules() if isinstance(each, Attention))
        x = torch.randn(300, 512, generator=torch.Generator().manual_seed(1))
        q, k = attention.c_q(x)[:, :head_dim], attention.c_k(x)[:, :head_dim]
        scores = loss.norm(q) @ loss.norm(k).T * attention.scale
        assert scores.diagonal().mean().item() == pytest.approx(8, abs=0.5)
        assert scores.mean().abs() < 0.1


def test_texts_longer_than_trained_for_keep_their_positions() -> None:
    """Rotation depends on distance alone, also far beyond sequence_len."""
    x = torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(0))
    scores = []
    for first in (3, 10):
        positions = torch.tensor([[first, first + 90_000]])
        near, far = loss.rotate(x, *loss.rotary_angles(positions, 32, 100000.0))[0, :, 0]
        scores.append((near @ far).item())
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    short = busy_gpt(GPTConfig(**{**SMALL, "sequence_len": 16}))
    long = busy_gpt(GPTConfig(**SMALL))
    ids = random_ids(1, 150, 90)
    assert torch.equal(short(ids), long(ids))  # 16 and 160 have the same short window, 128


def test_parameter_groups_hold_each_parameter_once() -> None:
    with torch.device("meta"):
        model, plain = GPT(GPTConfig(n_layer=4)), GPT(GPTConfig.plain(n_layer=4))
    assert len(list(plain.parameters())) == 6 * 4 + 2  # the published tensors
    groups = {group["name"]: group for group in model.parameter_groups()}
    held = [name for group in groups.values() for name in group["names"]]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    assert {name for name, group in groups.items() if group["kind"] == "muon"} == {"matrices"}
    assert len(groups["matrices"]["params"]) == 6 * 4
    assert {g["name"] for g in plain.parameter_groups()} == {"matrices", "embedding", "head"}


@pytest.mark.slow
def test_torch_compile_takes_the_step_in_one_graph() -> None:
    """No graph break: dynamo would raise. The backend only traces, so this is quick."""
    model = busy_gpt(GPTConfig(**{**SMALL, "n_layer": 2}))
    ids = random_ids(2, 140, 90)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    weights = list(model.parameters())
    traced, eager = compiled(ids, ids), model(ids, ids)
    assert traced.item() == pytest.approx(eager.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, weights) for loss in (traced, eager)]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_impossible_shapes_are_told_with_the_flag_that_mends_them() -> None:
    refuses("--window_pattern=SX", GPTConfig, window_pattern="SX")
    refuses("--head_dim", GPTConfig, n_embd=100, n_head=3, n_kv_head=3)
    refuses("kv heads", GPTConfig, n_kv_head=4)
    assert GPTConfig(**asdict(GPTConfig.plain(n_layer=7))) == GPTConfig.plain(n_layer=7)
