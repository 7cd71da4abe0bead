"""The tokenizer stages from a folder of text to the report, and their figures against a recount."""

import json
from pathlib import Path

import pytest
import tiktoken

from nanochat import dataset
from nanochat.common import report_dir, tokenizer_dir
from nanochat.tokenizer import FILE_NAME, SPECIAL_TOKENS, Tokenizer
from scripts import tok_eval, tok_train
from tests.models import refuses

TEXTS = [
    f"Tale {i}: the hen met {i * 7} geese by the river, and it rained.\n" * 5 for i in range(60)
]


@pytest.fixture(autouse=True)
def corpus(base: Path, tmp_path: Path, monkeypatch) -> list[str]:
    """A small imported corpus; gives its training documents."""
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "tales.jsonl").write_text("\n".join(lines))
    dataset.main(dataset.Config(source=tmp_path / "tales.jsonl"))
    return [text for i, text in enumerate(TEXTS) if i % 20 != 1]


def results(stage: str) -> dict:
    return json.loads((report_dir() / f"{stage}.json").read_text())["results"]


def test_training_reads_so_many_characters_of_so_many_documents(corpus: list[str], tmp_path):
    tok_train.main(tok_train.Config(vocab_size=300, max_chars=1234, max_doc_chars=100))
    beginnings = [text[:100] for text in corpus[:13]]
    beginnings[-1] = beginnings[-1][: 1234 - 12 * 100]
    Tokenizer.train(beginnings, 300, SPECIAL_TOKENS).save(tmp_path)
    assert (tokenizer_dir() / FILE_NAME).read_text() == (tmp_path / FILE_NAME).read_text()
    section = results("tok_train")
    assert (section["characters"], section["documents"]) == (1234, 13)
    assert (section["vocabulary"], section["corpus"]) == (300, "tales")


def test_bad_settings_are_one_line():
    small = tok_train.Config(vocab_size=264)
    refuses("--vocab_size=264 is too small; use at least 265", tok_train.main, small)
    refuses("no corpus --data=typo", tok_train.main, tok_train.Config(data="typo"))
    assert not tokenizer_dir().exists(), "nothing half-written"
    refuses("no tokenizer in", tok_eval.main, tok_eval.Config())


def test_too_little_text_gives_a_smaller_vocabulary_and_says_so(capsys):
    tok_train.main(tok_train.Config(vocab_size=5000, max_chars=300))
    size = Tokenizer.load(tokenizer_dir()).vocab_size
    assert 265 < size < 5000
    assert f"no more than {size:,} ids" in capsys.readouterr().out


def test_compression_is_bytes_over_tokens(corpus: list[str]):
    tok_train.main(tok_train.Config(vocab_size=400))
    tok_eval.main(tok_eval.Config(num_documents=10))
    tokenizer = Tokenizer.load(tokenizer_dir())
    section = results("tok_eval")
    kinds = {name: [text] for name, text in tok_eval.SAMPLES.items()}
    kinds |= {"tales, train": corpus[:10], "tales, val": TEXTS[1::20]}
    for kind, texts in kinds.items():
        num_bytes = sum(len(text.encode()) for text in texts)
        num_words = sum(len(text.split()) for text in texts)
        num_tokens = sum(map(len, tokenizer.encode_batch(texts)))
        for yardstick, number in (("ours", num_tokens), ("bytes", num_bytes), ("words", num_words)):
            ratio = section[f"{kind}: bytes per token, {yardstick}"]
            assert ratio == round(num_bytes / number, 3)


def test_references_are_asked_for_where_their_folder_is_named(monkeypatch, capsys):
    ranks = {bytes([i]): i for i in range(256)}
    letters = tiktoken.Encoding("x", pat_str="(?s).", mergeable_ranks=ranks, special_tokens={})

    def only_gpt2(name: str) -> tiktoken.Encoding:
        if name != "gpt2":
            raise FileNotFoundError(name)
        return letters

    monkeypatch.setattr(tiktoken, "get_encoding", only_gpt2)
    assert list(tok_eval.find_yardsticks()) == ["bytes", "words"]
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "somewhere")
    yardsticks = tok_eval.find_yardsticks()
    assert list(yardsticks) == ["GPT-2"]
    assert len(yardsticks["GPT-2"]("né <|endoftext|>")) == 17
    assert "GPT-4's vocabulary cannot be loaded: left out (cl100k_base)" in capsys.readouterr().out
