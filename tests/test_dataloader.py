"""The text loader. Its oracle: documents whose tokens are all different numbers, so each can be counted."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import Batch, Lane, TextLoader, merge_states

BOS = 0
SEQ_LEN = 31
ROWS = 4


class NumberTokenizer:
    """The token ids of a text are the numbers it spells."""

    bos_id = BOS

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]


def make_texts(lengths: list[int]) -> list[str]:
    """Texts that together spell 1, 2, 3, ..."""
    ends = np.cumsum(lengths)
    return [
        " ".join(map(str, range(end - num + 1, end + 1)))
        for end, num in zip(ends, lengths, strict=True)
    ]


def write_shards(folder: Path, texts: list[str], num_shards: int) -> list[Path]:
    shards = [folder / f"shard_{i:05d}.parquet" for i in range(num_shards)]
    for shard, part in zip(shards, np.array_split(np.array(texts), num_shards), strict=True):
        pq.write_table(pa.table({"text": part.tolist()}), shard)
    return shards


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    generator = np.random.default_rng(0)
    lengths = generator.geometric(1 / 20, 300)
    lengths[::50] = 400  # many rows long
    return write_shards(tmp_path, make_texts(lengths.tolist()), 3)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ranks deal differently far."""
    monkeypatch.setattr(dataloader, "CHUNK_BYTES", 200)


class Ranks:
    """The loaders of all ranks of one run, in this process."""

    def __init__(self, shards: list[Path], world_size: int, state: dict | None = None) -> None:
        tokenizer: Any = NumberTokenizer()
        self.loaders = [
            TextLoader(tokenizer, shards, ROWS, SEQ_LEN, rank, world_size, "cpu", state)
            for rank in range(world_size)
        ]

    def next(self) -> tuple[torch.Tensor, list[Batch]]:
        """The global batch as rows of T+1 tokens, and each rank's part of it."""
        batches = [next(loader) for loader in self.loaders]
        inputs = torch.cat([batch.inputs for batch in batches])
        targets = torch.cat([batch.targets for batch in batches])
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        return torch.cat([inputs, targets[:, -1:]], dim=1), batches

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


def take(
    shards: list[Path], world_size: int, num_steps: int, state: dict | None = None
) -> tuple[list[torch.Tensor], list[dict]]:
    """The rows of each step, and the merged state after it, as a checkpoint would give it back."""
    ranks = Ranks(shards, world_size, state)
    rows, states = [], []
    for _ in range(num_steps):
        step_rows, batches = ranks.next()
        rows.append(step_rows)
        states.append([batch.state for batch in batches])
    ranks.close()
    # Called late, as a checkpoint may do: the states must not have moved on with the loaders.
    saved = [[json.loads(json.dumps(state())) for state in parts] for parts in states]
    return rows, [merge_states(parts) for parts in saved]


def left_in_lanes(state: dict) -> list[int]:
    return [id for lane in state["lanes"] for piece in lane["pieces"] for id in piece]


def test_every_token_is_a_target_exactly_once(shards: list[Path]) -> None:
    rows, states = take(shards, 1, 40)
    state = states[-1]
    assert state["documents"] < 300  # still in the first epoch
    dealt = len(
        " ".join(pq.read_table(shards).column("text").to_pylist()[: state["documents"]]).split()
    )
    places = torch.cat(rows)
    learned = places[:, 1:][places[:, 1:] != BOS].tolist()
    assert Counter(learned + left_in_lanes(state)) == Counter(range(1, dealt + 1))
    num_pieces = sum(lane["finished"] + lane["cropped"] for lane in state["lanes"])
    assert int((places == BOS).sum()) == num_pieces
    assert sum(lane["cropped"] for lane in state["lanes"]) > 0


def test_rows_start_with_bos_and_pieces_are_runs_of_text(shards: list[Path]) -> None:
    places = torch.cat(take(shards, 1, 40)[0])
    assert (places[:, 0] == BOS).all()
    before, after = places[:, :-1], places[:, 1:]
    assert ((after == before + 1) | (after == BOS) | (before == BOS)).all()


def test_best_fit_and_crop_by_hand() -> None:
    lane = Lane([np.arange(n * 100, n * 100 + n) for n in (12, 3, 5, 4, 20)])

    def fill(window: int) -> list[int]:
        row = np.zeros(10, int)
        lane.fill(row, window, crop=True)
        return row.tolist()

    # The 5 fits best, then the 3 into the 4 places left (its bos and 3 tokens).
    assert fill(1000) == [0, 500, 501, 502, 503, 504, 0, 300, 301, 302]
    # The 4 fits; nothing into the 5 places left, so the longest gives 4 tokens; its rest is a piece.
    assert fill(1000) == [0, 400, 401, 402, 403, 0, 2000, 2001, 2002, 2003]
    assert [len(piece) for piece in lane.pieces] == [12, 16]
    # The window ends with the oldest piece, so that is cropped although it is not the longest.
    assert fill(13) == [0, *range(1200, 1209)]
    assert (lane.finished, lane.cropped) == (3, 2)
    # 3 are left: they fit; then 6 places for the 16, whose rest is 11.
    assert fill(1000) == [0, 1209, 1210, 1211, 0, *range(2004, 2009)]


def test_one_place_left_holds_a_bos_and_takes_nothing() -> None:
    lane = Lane([np.arange(100, 108), np.arange(200, 230)])
    row = np.zeros(10, int)
    lane.fill(row, 1000, crop=True)
    assert row.tolist() == [0, *range(100, 108), 0]
    assert [piece.tolist() for piece in lane.pieces] == [list(range(200, 230))]


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_does_not_depend_on_ranks(shards: list[Path], world_size: int) -> None:
    for alone, together in zip(
        take(shards, 1, 60)[0], take(shards, world_size, 60)[0], strict=True
    ):
        assert torch.equal(alone, together)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (4, 4), (1, 2), (4, 1), (2, 4)])
def test_resumed_at_any_step_equals_uninterrupted(
    shards: list[Path], before: int, after: int
) -> None:
    num_steps = 24
    rows, states = take(shards, before, num_steps)
    for step in range(num_steps - 4):
        again, _ = take(shards, after, 4, states[step])
        assert all(map(torch.equal, again, rows[step + 1 : step + 5])), step


def test_ranks_that_dealt_differently_far_resume_often(shards: list[Path]) -> None:
    rows, _ = take(shards, 1, 40)
    state = None
    for step in range(40):
        (again,), (state,) = take(shards, (1, 2, 4)[step % 3], 1, state)
        assert torch.equal(again, rows[step]), step


def test_five_epochs_and_a_resume_in_the_middle_of_the_second(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = np.random.default_rng(1).geometric(1 / 30, 60).tolist()
    shards = write_shards(tmp_path, make_texts(lengths), 2)
    num_steps = 5 * sum(lengths) // (ROWS * SEQ_LEN)
    rows, states = take(shards, 1, num_steps)
    counts = Counter(torch.cat(rows)[:, 1:].flatten().tolist() + left_in_lanes(states[-1]))
    del counts[BOS]
    assert set(counts) == set(range(1, sum(lengths) + 1))
    assert min(counts.values()) >= 5 and max(counts.values()) <= min(counts.values()) + 1
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [f"epoch {i} of the text begins (60 documents)" for i in (2, 3, 4, 5)]
    middle = next(i for i, state in enumerate(states) if 80 < state["documents"] < 100)
    again, _ = take(shards, 2, num_steps - middle - 1, states[middle])
    assert all(map(torch.equal, again, rows[middle + 1 :]))


def test_a_quiet_loader_says_no_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer: Any = NumberTokenizer()
    shards = write_shards(tmp_path, make_texts([40, 40]), 1)
    for quiet in (False, True):
        loader = TextLoader(tokenizer, shards, ROWS, SEQ_LEN, 0, 1, "cpu", quiet=quiet)
        assert next(loader).progress > 2
        loader.close()
        assert ("epoch 3" in capsys.readouterr().out) is not quiet


def test_lanes_stay_together_and_bounded(shards: list[Path]) -> None:
    _, states = take(shards, 1, 100)
    longest = max(map(len, pq.read_table(shards).column("text").to_pylist()))
    for state in states:
        assert max(state["dealt"]) - min(state["dealt"]) <= longest
    tokens = [sum(map(len, lane["pieces"])) for state in states for lane in state["lanes"]]
    # The window, one row, a chunk, and what the longest document makes the lanes differ by.
    assert max(tokens) < 9 * (SEQ_LEN + 1) + 200 + 2 * 400


def test_a_resumed_run_keeps_to_its_shards(shards: list[Path]) -> None:
    rows, states = take(shards[:2], 1, 60)
    again, _ = take(shards, 1, 40, states[19])
    assert all(map(torch.equal, again, rows[20:]))


def test_batches_are_contiguous_int64_and_know_their_targets(shards: list[Path]) -> None:
    ranks = Ranks(shards, 2)
    _, batches = ranks.next()
    ranks.close()
    for batch in batches:
        for tensor in (batch.inputs, batch.targets):
            assert tensor.shape == (ROWS // 2, SEQ_LEN) and tensor.dtype == torch.int64
            assert tensor.is_contiguous()
        assert batch.num_targets == ROWS // 2 * SEQ_LEN
        assert 0 < batch.progress < 1


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "nanochat-loader"]


def test_close_ends_the_thread(shards: list[Path]) -> None:
    assert not loader_threads()
    ranks = Ranks(shards, 2)
    ranks.next()
    assert len(loader_threads()) == 2
    ranks.close()
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(ranks.loaders[0])
    ranks.close()  # again does no harm


def test_an_error_in_the_thread_is_raised_by_next(shards: list[Path]) -> None:
    good = shards[0].read_bytes()
    ranks = Ranks(shards, 1)
    for shard in shards[1:]:
        shard.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="shard_0000[12]"):
        for _ in range(100):
            ranks.next()
    assert not loader_threads()
    with pytest.raises(UserError, match="shard_0000[12]"):
        ranks.next()


def test_bad_input_is_told(shards: list[Path], tmp_path: Path) -> None:
    tokenizer: Any = NumberTokenizer()
    with pytest.raises(UserError, match="4 rows does not divide among 3 ranks"):
        TextLoader(tokenizer, shards, ROWS, SEQ_LEN, 0, 3, "cpu")
    _, (state,) = take(shards, 1, 1)
    with pytest.raises(UserError, match="other data"):
        TextLoader(tokenizer, shards[:2], ROWS, SEQ_LEN, 0, 1, "cpu", state)
    with pytest.raises(UserError, match="4 rows of 31 tokens, not 8 of 31"):
        TextLoader(tokenizer, shards, 8, SEQ_LEN, 0, 1, "cpu", state)
    (tmp_path / "empty").mkdir()
    empty = TextLoader(
        tokenizer, write_shards(tmp_path / "empty", ["", ""], 1), ROWS, SEQ_LEN, 0, 1, "cpu"
    )
    with pytest.raises(UserError, match="no text in 1 training shards"):
        next(empty)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_batch_is_copied_to_the_gpu(shards: list[Path]) -> None:
    tokenizer: Any = NumberTokenizer()
    loader = TextLoader(tokenizer, shards, ROWS, SEQ_LEN, 0, 1, "cuda")
    for expected in take(shards, 1, 8)[0]:
        batch = next(loader)
        assert batch.inputs.is_cuda
        assert torch.equal(batch.inputs.cpu(), expected[:, :-1])
        assert torch.equal(batch.targets.cpu(), expected[:, 1:])
    loader.close()
