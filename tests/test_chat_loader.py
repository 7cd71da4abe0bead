"""The chat loader: masks by hand, every conversation once an epoch, any number of ranks, no clogging."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import Batch, ChatLoader, merge_states
from nanochat.tokenizer import SPECIAL_TOKENS, ChatTokens, chat_tokens

SEQ_LEN = 40
ROWS = 4


class ByteTokenizer:
    """The token ids of a text are its bytes."""

    bos_id = 256
    specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


TOKENIZER: Any = ByteTokenizer()
MARK: ChatTokens = chat_tokens(TOKENIZER)


def chat(question: str, answer: str | list[dict]) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def make_chats(num: int, long_every: int = 9) -> list[dict]:
    """Conversations whose answers begin with a three-digit number of their own; some far too long."""
    return [
        chat(
            "q" * (i * 7 % 11),
            f"{i:03d}" + "a" * (200 if i % long_every == long_every - 1 else i * 5 % 17),
        )
        for i in range(num)
    ]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ranks deal differently far."""
    monkeypatch.setattr(dataloader, "CHUNK_BYTES", 200)


def make_loader(
    chats: list[dict],
    rank: int = 0,
    world_size: int = 1,
    state: dict | None = None,
    **settings: Any,
) -> ChatLoader:
    settings = {"num_rows": ROWS, "seq_len": SEQ_LEN} | settings
    return ChatLoader(
        chats, TOKENIZER, rank=rank, world_size=world_size, device="cpu", state=state, **settings
    )


def take_all(chats: list[dict], state: dict | None = None, **settings: Any) -> list[Batch]:
    return list(make_loader(chats, state=state, **settings))


def global_rows(batches: list[Batch]) -> torch.Tensor:
    inputs = torch.cat([batch.inputs for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    return torch.stack([inputs, targets])


def take_together(
    chats: list[dict], world_size: int, state: dict | None = None, **settings: Any
) -> tuple[list[torch.Tensor], list[dict]]:
    """Each step's global batch and merged state, until the shares of all ranks make up the whole."""
    loaders = [
        make_loader(chats, rank, world_size, state, **settings) for rank in range(world_size)
    ]
    total = len(chats) * settings.get("num_epochs", 1)
    rows, states, num_packed = [], [], 0
    while num_packed < total:
        batches = [next(loader) for loader in loaders]
        rows.append(global_rows(batches))
        states.append(merge_states([json.loads(json.dumps(batch.state())) for batch in batches]))
        num_packed = sum(round(batch.progress * total) for batch in batches)
    for loader in loaders:
        loader.close()
    return rows, states


def answers(targets: torch.Tensor) -> list[str]:
    """The numbers of the answers that are learned, in order."""
    text = bytes(id if 0 <= id < 256 else 32 for id in targets.flatten().tolist()).decode()
    return [word[:3] for word in text.split()]


def test_exact_mask_through_the_packer() -> None:
    tool = [
        {"type": "text", "text": "x"},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "y"},
    ]
    (batch,) = take_all([chat("ab", tool), chat("c", "d")], num_rows=1, seq_len=29)
    first = [MARK.bos, MARK.user_start, *b"ab", MARK.user_end, MARK.assistant_start, *b"x"]
    first += [MARK.python_start, *b"1+1", MARK.python_end]
    first += [MARK.output_start, *b"2", MARK.output_end, *b"y", MARK.assistant_end]
    second = [MARK.bos, MARK.user_start, *b"c", MARK.user_end, MARK.assistant_start]
    second += [*b"d", MARK.assistant_end]
    row = first + second + [MARK.bos] * (30 - len(first) - len(second))
    mask = [0] * 6 + [1] * 6 + [0] * 3 + [1] * 2 + [0] * 5 + [1] * 2 + [0] * 6
    assert len(row) == len(mask) == 30
    assert batch.inputs.tolist() == [row[:-1]]
    assert batch.targets.tolist() == [
        [id if learned else -1 for id, learned in zip(row[1:], mask[1:], strict=True)]
    ]
    assert batch.num_targets == 10 and batch.progress == 1


def test_each_conversation_is_learned_once_an_epoch() -> None:
    chats = make_chats(100)
    for num_epochs in (1, 3):
        batches = take_all(chats, num_epochs=num_epochs)
        learned = answers(torch.cat([batch.targets for batch in batches]))
        assert Counter(learned) == {f"{i:03d}": num_epochs for i in range(100)}
        assert batches[-1].progress == 1 and all(batch.progress < 1 for batch in batches[:-1])
        assert batches[-1].num_cropped == num_epochs * len(range(8, 100, 9))


def test_rows_are_whole_conversations_then_padding() -> None:
    chats = make_chats(60, long_every=1000)
    for batch in take_all(chats):
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            row = [*inputs, targets[-1] if targets[-1] >= 0 else MARK.bos]
            for start, end in (
                (MARK.user_start, MARK.user_end),
                (MARK.assistant_start, MARK.assistant_end),
            ):
                assert row.count(start) == row.count(end)
            assert row[0] == MARK.bos
        assert batch.num_targets == int((batch.targets >= 0).sum())
        assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()


def test_too_long_conversations_never_clog() -> None:
    chats = [chat("question", "a" * 500) for _ in range(50)]
    batches = take_all(chats, num_rows=2, seq_len=16)
    assert len(batches) == 25  # a row each
    assert [round(batch.progress * 25) for batch in batches] == list(range(1, 26))
    assert batches[-1].num_cropped == 50
    assert all(batch.num_targets > 0 for batch in batches)


def test_a_row_without_targets_is_legal() -> None:
    (batch,) = take_all([{"messages": [{"role": "user", "content": "hello"}]}])
    assert batch.num_targets == 0 and (batch.targets == -1).all() and batch.progress == 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_ranks(world_size: int) -> None:
    chats = make_chats(150)
    alone = [global_rows([batch]) for batch in take_all(chats, num_epochs=2)]
    together, _ = take_together(chats, world_size, num_epochs=2)
    assert len(alone) == len(together)
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (4, 2)])
def test_resumed_at_any_step_equals_uninterrupted(before: int, after: int) -> None:
    chats = make_chats(90)
    rows, states = take_together(chats, before, num_epochs=2)
    for step in range(0, len(rows) - 1):
        again, _ = take_together(chats, after, states[step], num_epochs=2)
        assert len(again) == len(rows) - step - 1
        assert all(map(torch.equal, again, rows[step + 1 :])), step
    assert take_all(chats, states[-1], num_epochs=2) == []


def test_the_order_follows_from_seed_and_epoch() -> None:
    chats = make_chats(64, long_every=1000)

    def order(seed: int) -> list[str]:
        batches = take_all(chats, num_rows=1, num_epochs=2, seed=seed)
        return answers(torch.cat([batch.targets for batch in batches]))

    assert order(1) == order(1)
    assert order(1) != order(-1) != order(2)
    assert order(1)[:64] != order(1)[64:]


def test_without_end_the_epochs_are_counted() -> None:
    loader = make_loader(make_chats(20), num_epochs=None)
    progress = [next(loader).progress for _ in range(30)]
    loader.close()
    assert progress == sorted(progress) and progress[-1] > 2


def test_bad_input_is_told() -> None:
    with pytest.raises(UserError, match="no conversations"):
        make_loader([])
    loader = make_loader([*make_chats(5), {"messages": [{"role": "assistant", "content": "hi"}]}])
    with pytest.raises(UserError, match="message 0 has the role 'assistant'"):
        list(loader)
    state = take_together(make_chats(5), 1)[1][0]
    with pytest.raises(UserError, match="other data"):
        make_loader(make_chats(6), state=state)


RANK_PROGRAM = """
import sys, torch
import torch.distributed as dist
from tests.test_chat_loader import make_chats, make_loader
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
batches = list(make_loader(make_chats(100), rank, 2, num_epochs=2))
print([batch.progress for batch in batches])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_real_ranks_see_one_progress_and_end_together(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, str(rank), str(tmp_path / "store")],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [json.loads(rank.communicate(timeout=120)[0].splitlines()[-1]) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    alone = [batch.progress for batch in take_all(make_chats(100), num_epochs=2)]
    assert printed == [alone, alone]
