"""The loader: every token a target exactly once, the same on any ranks, resumable anywhere.

Two oracles: texts whose tokens are all different numbers, so that each can be counted, and
conversations whose answers begin with a number of their own.
"""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataloader
from nanochat.common import Runtime
from nanochat.dataloader import ChatSource, Loader, RowBuffer, TextSource, merge_states
from nanochat.tokenizer import SPECIAL_TOKENS, ChatTokens, chat_tokens
from tests.models import refuses

SEQ_LEN = 31
ROWS = 4
BOS = 0  # of texts; conversations have their own


class NumberTokenizer:
    """The token ids of a text are the numbers it spells."""

    bos_id = BOS

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]


class ByteTokenizer:
    """The token ids of a text are its bytes."""

    bos_id = 256
    specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


NUMBERS: Any = NumberTokenizer()
BYTES: Any = ByteTokenizer()
MARK: ChatTokens = chat_tokens(BYTES)


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ranks read differently far."""
    monkeypatch.setattr(dataloader, "ENCODE_BYTES", 200)


def write_shards(folder: Path, lengths: list[int], num_shards: int) -> list[Path]:
    """Shards whose texts together spell 1, 2, 3, ..."""
    ends = np.cumsum(lengths)
    spans = zip(ends - np.array(lengths) + 1, ends + 1, strict=True)
    texts = np.array([" ".join(map(str, range(begin, end))) for begin, end in spans])
    folder.mkdir(exist_ok=True)
    shards = [folder / f"shard_{i:05d}.parquet" for i in range(num_shards)]
    for shard, part in zip(shards, np.array_split(texts, num_shards), strict=True):
        pq.write_table(pa.table({"text": part.tolist()}), shard)
    return shards


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """300 documents, some of them many rows long."""
    lengths = np.random.default_rng(0).geometric(1 / 20, 300)
    lengths[::50] = 400
    return write_shards(tmp_path / "shards", lengths.tolist(), 3)


def chat(question: str, answer: str | list[dict]) -> dict:
    user, assistant = {"role": "user", "content": question}, {"role": "assistant"}
    return {"messages": [user, assistant | {"content": answer}]}


def make_chats(num: int, long_every: int = 9) -> list[dict]:
    """Conversations whose answers begin with a three-digit number; some are longer than a row."""
    answers = ["a" * (200 if i % long_every == long_every - 1 else i * 5 % 17) for i in range(num)]
    return [chat("q" * (i * 7 % 11), f"{i:03d}" + answer) for i, answer in enumerate(answers)]


def on_rank(rank: int = 0, world_size: int = 1, device: str = "cpu") -> Runtime:
    return Runtime(torch.device(device), torch.float32, rank, world_size, device)


Source = TextSource | ChatSource


def take(
    make_source: Callable[[], Source],
    world_size: int = 1,
    num_steps: int | None = None,
    state: dict | None = None,
    num_rows: int = ROWS,
    seq_len: int = SEQ_LEN,
) -> tuple[list[torch.Tensor], list[dict]]:
    """Each step's global inputs and targets (2, R, T), and the state that a checkpoint keeps."""
    loaders = [
        Loader(make_source(), num_rows, seq_len, on_rank(rank, world_size), state)
        for rank in range(world_size)
    ]
    total = loaders[0].total or 0
    steps, states, num_packed = [], [], round(loaders[0].progress * total)
    while len(steps) != num_steps and not 0 < total <= num_packed:
        batches = [next(loader) for loader in loaders]
        inputs = torch.cat([batch.inputs for batch in batches])
        targets = torch.cat([batch.targets for batch in batches])
        steps.append(torch.stack([inputs, targets]))
        states.append([loader.state for loader in loaders])
        # Without a process group a rank knows its own share only.
        num_packed = sum(round(loader.progress * total) for loader in loaders)
    for loader in loaders:
        loader.close()
    # Called late, as a checkpoint may do: the states must not have moved on with the loaders.
    saved = [[json.loads(json.dumps(state())) for state in parts] for parts in states]
    return steps, [merge_states(parts) for parts in saved]


def texts_of(shards: list[Path], quiet: bool = False) -> Callable[[], TextSource]:
    return lambda: TextSource(NUMBERS, shards, quiet)


def chats_of(chats: list[dict], num_epochs: int | None = 1, seed: int = 0) -> Callable:
    return lambda: ChatSource(BYTES, chats, num_epochs, seed, quiet=True)


@pytest.fixture(params=["text", "chat"])
def streams(request: pytest.FixtureRequest, shards: list[Path]) -> Callable[[], Source]:
    """Makes sources of either kind; both give some 50 batches and more than one epoch."""
    if request.param == "text":
        return texts_of(shards[:1], quiet=True)
    return chats_of(make_chats(110), num_epochs=2)


def saved_tokens(state: dict) -> list[int]:
    return [id for lane in state["lanes"] for piece in lane["pieces"] for id in piece]


def test_every_token_of_a_text_is_a_target_exactly_once(shards: list[Path]) -> None:
    steps, states = take(texts_of(shards), num_steps=40)
    state = states[-1]
    texts = pq.read_table(shards).column("text").to_pylist()
    assert state["documents"] < 300  # still in the first epoch
    num_tokens = sum(len(text.split()) for text in texts[: state["documents"]])
    places = torch.cat([torch.cat([step[0], step[1, :, -1:]], dim=1) for step in steps])  # (R, T+1)
    learned = places[:, 1:][places[:, 1:] != BOS].tolist()
    assert Counter(learned + saved_tokens(state)) == Counter(range(1, num_tokens + 1))
    num_chunks = sum(lane["finished"] + lane["cropped"] for lane in state["lanes"])
    assert int((places == BOS).sum()) == num_chunks
    assert sum(lane["cropped"] for lane in state["lanes"]) > 0
    # Every row starts with <|bos|>, and what stands between two of them is a run of one text.
    assert (places[:, 0] == BOS).all()
    before, after = places[:, :-1], places[:, 1:]
    assert ((after == before + 1) | (after == BOS) | (before == BOS)).all()


def test_best_fit_and_split_by_hand() -> None:
    buffer = RowBuffer([np.arange(n * 100, n * 101) for n in (12, 3, 5, 4, 20)])

    def fill(window: int, split: bool = True) -> list[int]:
        row = np.zeros(10, int)
        buffer.fill(row, window, split)
        return row.tolist()

    # The 5 fits best, then the 3 into the 4 places left (its bos and 3 tokens).
    assert fill(1000) == [0, 500, 501, 502, 503, 504, 0, 300, 301, 302]
    # The 4 fits; nothing into the 5 places left: the longest gives 4 tokens, its rest is a piece.
    assert fill(1000) == [0, 400, 401, 402, 403, 0, 2000, 2001, 2002, 2003]
    assert [len(piece) for piece in buffer.pieces] == [12, 16]
    # The window ends with the oldest piece, so that is split although it is not the longest.
    assert fill(13) == [0, *range(1200, 1209)]
    assert (buffer.finished, buffer.cropped) == (3, 2)
    # 3 are left: they fit; then 6 places for the 16, whose rest is 11.
    assert fill(1000) == [0, 1209, 1210, 1211, 0, *range(2004, 2009)]
    assert fill(1000, split=False) == [0] * 10
    # One place that is left holds a <|bos|> and takes nothing.
    buffer.pieces.insert(0, np.arange(800, 808))
    assert fill(1000) == [0, *range(800, 808), 0]
    assert [len(piece) for piece in buffer.pieces] == [11]


def test_exact_mask_of_conversations_through_the_packer() -> None:
    said = [("text", "x"), ("python", "1+1"), ("python_output", "2"), ("text", "y")]
    tool = [{"type": kind, "text": text} for kind, text in said]
    loader = Loader(ChatSource(BYTES, [chat("ab", tool), chat("c", "d")]), 1, 29, on_rank())
    (batch,) = list(loader)
    row = [MARK.bos, MARK.user_start, *b"ab", MARK.user_end, MARK.assistant_start, *b"x"]
    row += [MARK.python_start, *b"1+1", MARK.python_end]
    row += [MARK.output_start, *b"2", MARK.output_end, *b"y", MARK.assistant_end]
    row += [MARK.bos, MARK.user_start, *b"c", MARK.user_end, MARK.assistant_start]
    row += [*b"d", MARK.assistant_end, *[MARK.bos] * 6]
    mask = [0] * 6 + [1] * 6 + [0] * 3 + [1] * 2 + [0] * 5 + [1] * 2 + [0] * 6
    assert batch.inputs.tolist() == [row[:-1]]
    learned = [id if learned else -1 for id, learned in zip(row[1:], mask[1:], strict=True)]
    assert batch.targets.tolist() == [learned]
    assert loader.progress == 1


def answers(steps: list[torch.Tensor]) -> list[str]:
    """The numbers of the answers that are learned, in order."""
    targets = torch.cat([step[1] for step in steps]).flatten().tolist()
    text = bytes(id if 0 <= id < 256 else 32 for id in targets).decode()
    return [word[:3] for word in text.split()]


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_each_conversation_is_learned_once_an_epoch(
    num_epochs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = make_chats(100)
    loader = Loader(ChatSource(BYTES, chats, num_epochs), ROWS, 40, on_rank())
    steps, progress = [], [0.0]
    for batch in loader:
        steps.append(torch.stack([batch.inputs, batch.targets]))
        progress.append(loader.progress)
    assert Counter(answers(steps)) == {f"{i:03d}": num_epochs for i in range(100)}
    assert progress == sorted(progress) and progress[-2] < progress[-1] == 1
    assert loader.num_cropped == num_epochs * len(range(8, 100, 9))
    said = [f"epoch {i} of the conversations begins (100)" for i in range(2, num_epochs + 1)]
    assert capsys.readouterr().out.splitlines() == said
    end = merge_states([loader.state() or {}])
    assert list(Loader(chats_of(chats, num_epochs)(), ROWS, 40, on_rank(), end)) == []


def test_rows_are_whole_conversations_then_padding() -> None:
    steps, _ = take(chats_of(make_chats(60, long_every=1000)), seq_len=40)
    for inputs, targets in (rows for step in steps for rows in step.unbind(1)):
        row = [*inputs.tolist(), int(targets[-1]) if targets[-1] >= 0 else MARK.bos]
        assert row[0] == MARK.bos
        assert row.count(MARK.user_start) == row.count(MARK.user_end)
        assert row.count(MARK.assistant_start) == row.count(MARK.assistant_end)


def test_too_long_conversations_never_clog_and_none_needs_a_reply() -> None:
    chats = [chat("q", "a" * 500)] * 50
    loader = Loader(ChatSource(BYTES, chats), 2, 16, on_rank())
    steps = [((batch.targets >= 0).any(), round(loader.progress * 25)) for batch in loader]
    assert steps == [(True, share) for share in range(1, 26)]  # a row each
    assert loader.num_cropped == 50
    loader = Loader(ChatSource(BYTES, [{"messages": chats[0]["messages"][:1]}]), 2, 16, on_rank())
    (batch,) = loader
    assert (batch.targets == -1).all() and loader.progress == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_does_not_depend_on_ranks(streams: Callable, world_size: int) -> None:
    alone, together = take(streams, 1, 60)[0], take(streams, world_size, 60)[0]
    assert len(alone) == len(together)
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 1), (2, 4)])
def test_resumed_at_any_step_equals_uninterrupted(
    streams: Callable, before: int, after: int
) -> None:
    """Conversations end where they did, too: they have fewer than 60 steps."""
    steps, states = take(streams, before, 60)
    for step in range(0, len(steps), 3):
        again, _ = take(streams, after, min(6, 59 - step), states[step])
        expected = steps[step + 1 : step + 7]
        assert len(again) == len(expected) and all(map(torch.equal, again, expected)), step


def test_ranks_resume_often_and_keep_to_the_shards_of_their_run(shards: list[Path]) -> None:
    steps, _ = take(texts_of(shards[:2]), num_steps=40)
    state, source = None, texts_of(shards[:2])
    for step in range(40):
        (again,), (state,) = take(source, (1, 2, 4)[step % 3], 1, state)
        assert torch.equal(again, steps[step]), step
        source = texts_of(shards)  # one was downloaded since


def test_the_form_of_a_saved_state() -> None:
    """Runs of earlier versions go on from these: a token that is not to be learned is ~id."""
    chats = [chat("a", "b"), chat("c", "d" * 30)]
    _, (state,) = take(chats_of(chats, None), num_steps=1, num_rows=1, seq_len=10)
    rest = {"source": {"num_conversations": 2, "seed": 0}, "seq_len": 10}
    assert {name: state[name] for name in rest} == rest
    assert set(state) == {*rest, "documents", "dealt", "lanes"}
    (lane,) = state["lanes"]
    assert set(lane) == {"lane", "documents", "finished", "cropped", "pieces"}
    short = [~MARK.user_start, ~ord("a"), ~MARK.user_end, ~MARK.assistant_start]
    assert [*short, ord("b"), MARK.assistant_end] in lane["pieces"]
    lane["pieces"].insert(0, [~5, 6, ~7, *range(8, 15)])  # fills a row
    (step,), _ = take(chats_of(chats, None), 1, 1, state, num_rows=1, seq_len=10)
    assert step[0, 0].tolist() == [MARK.bos, *range(5, 14)]
    assert step[1, 0].tolist() == [-1, 6, -1, *range(8, 15)]


def test_five_epochs_and_a_resume_in_the_middle_of_the_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = np.random.default_rng(1).geometric(1 / 30, 60).tolist()
    shards = write_shards(tmp_path, lengths, 2)
    num_steps = 5 * sum(lengths) // (ROWS * SEQ_LEN)
    steps, states = take(texts_of(shards), 1, num_steps)
    learned = torch.stack(steps)[:, 1].flatten().tolist()
    counts = Counter(learned + saved_tokens(states[-1]))
    del counts[BOS]
    assert set(counts) == set(range(1, sum(lengths) + 1))
    assert min(counts.values()) >= 5 and max(counts.values()) <= min(counts.values()) + 1
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [f"epoch {i} of the text begins (60 documents)" for i in (2, 3, 4, 5)]
    middle = next(i for i, state in enumerate(states) if 80 < state["documents"] < 100)
    again, _ = take(texts_of(shards, quiet=True), 2, num_steps - middle - 1, states[middle])
    assert all(map(torch.equal, again, steps[middle + 1 :]))
    assert capsys.readouterr().out == ""


def test_buffers_stay_together_and_bounded(shards: list[Path]) -> None:
    _, states = take(texts_of(shards), num_steps=100)
    longest = max(map(len, pq.read_table(shards).column("text").to_pylist()))
    for state in states:
        assert max(state["dealt"]) - min(state["dealt"]) <= longest
    tokens = [sum(map(len, lane["pieces"])) for state in states for lane in state["lanes"]]
    # The window, one row, a read, and what the longest document makes the rows differ by.
    assert max(tokens) < 9 * (SEQ_LEN + 1) + 200 + 2 * 400


def test_the_order_of_conversations_follows_from_seed_and_epoch() -> None:
    def order(seed: int) -> list[str]:
        steps, _ = take(chats_of(make_chats(64, 1000), num_epochs=2, seed=seed), num_rows=1)
        return answers(steps)

    assert order(1) == order(1)
    assert order(1) != order(-1) != order(2)
    assert order(1)[:64] != order(1)[64:]
    steps, _ = take(chats_of(make_chats(20), num_epochs=None), num_steps=60)  # it has no end
    assert min(Counter(answers(steps)).values()) > 2


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "nanochat-loader" in thread.name]


def test_close_ends_the_thread(shards: list[Path]) -> None:
    assert not loader_threads()
    loader = Loader(texts_of(shards)(), ROWS, SEQ_LEN, on_rank())
    next(loader)
    assert len(loader_threads()) == 1
    for _ in range(2):  # again does no harm
        loader.close()
        assert not loader_threads()
        with pytest.raises(StopIteration):
            next(loader)


def test_an_error_in_the_thread_is_raised_by_next(shards: list[Path]) -> None:
    good = shards[0].read_bytes()
    loader = Loader(texts_of(shards)(), ROWS, SEQ_LEN, on_rank())
    next(loader)
    for shard in shards[1:]:
        shard.write_bytes(good[: len(good) // 2])
    for _ in range(2):
        refuses("shard_0000[12]", list, islice(loader, 100))
    loader.close()
    assert not loader_threads()


def test_bad_input_is_told(shards: list[Path], tmp_path: Path) -> None:
    texts = texts_of(shards)
    refuses("4 rows does not divide among 3 ranks", take, texts, 3)
    _, (state,) = take(texts, 1, 1)
    refuses("other data", take, texts_of(shards[:2]), 1, 1, state)
    refuses("4 rows of 31 tokens, not 8 of 31", take, texts, 1, 1, state, num_rows=8)
    empty = texts_of(write_shards(tmp_path / "empty", [0, 0], 1))
    refuses("no text in 1 training shards", take, empty, 1, 1)
    refuses("no conversations", take, chats_of([]))
    bad = [*make_chats(5), {"messages": [{"role": "assistant", "content": "hi"}]}]
    refuses("message 0 has the role 'assistant'", take, chats_of(bad))
    _, (state,) = take(chats_of(make_chats(5), None), 1, 1)
    refuses("other data", take, chats_of(make_chats(6)), 1, 1, state)


def progress_of(rank: int, world_size: int) -> Iterator[float]:
    source = ChatSource(BYTES, make_chats(100), num_epochs=2)
    loader = Loader(source, ROWS, SEQ_LEN, on_rank(rank, world_size))
    for _ in loader:
        yield loader.progress


def test_ranks_that_sum_see_one_progress_and_end_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads stand for two ranks: each waits for the other's share."""
    alone, shares = list(progress_of(0, 1)), {}
    barrier = threading.Barrier(2, timeout=60)

    def all_reduce_sum(share: torch.Tensor) -> torch.Tensor:
        shares[threading.get_ident()] = share
        barrier.wait()
        total = torch.stack(list(shares.values())).sum()
        barrier.wait()  # before a share is overwritten
        return total

    monkeypatch.setattr(dataloader, "all_reduce_sum", all_reduce_sum)
    with ThreadPoolExecutor(2) as pool:
        ranks = list(pool.map(lambda rank: list(progress_of(rank, 2)), (0, 1)))
    assert ranks == [alone] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_batch_is_copied_to_the_gpu(shards: list[Path]) -> None:
    loader = Loader(texts_of(shards)(), ROWS, SEQ_LEN, on_rank(device="cuda"))
    for inputs, targets in take(texts_of(shards), num_steps=8)[0]:
        batch = next(loader)
        assert batch.inputs.is_cuda
        assert torch.equal(batch.inputs.cpu(), inputs) and torch.equal(batch.targets.cpu(), targets)
    loader.close()
