"""A base folder of the test's own: empty, or with a small corpus; flash for a CPU."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat import attention, dataset
from scripts import tok_train
from tests.models import slow_varlen_attn


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not there yet."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path / "base"


@pytest.fixture
def slow_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In place of torch's flash kernel, one that a CPU can run."""
    cached = attention.flash_options, attention._varlen_options
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen_attn)
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a corpus of 200 documents and a tokenizer of 300 tokens; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        dataset.main(dataset.Config(corpus="primer", num_documents=200))
        tok_train.main(tok_train.Config(vocab_size=300))
    return folder


@pytest.fixture
def base_dir(prepared: Path, base: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(prepared, base))
