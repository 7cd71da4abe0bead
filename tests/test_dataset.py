"""Corpora appear whole, are reused when complete, and are downloaded from a hub (here a local one)."""

import os
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError, corpora_dir
from nanochat.dataset import Config, PublicCorpus, find_corpus, main, read_texts
from tests.hub import Hub


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base" / "base_data"


def parquet(*texts: str) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.table({"text": list(texts)}), buffer)
    return buffer.getvalue()


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def test_parquet_folder_is_taken_as_it_is(tmp_path: Path, base: Path, capsys):
    files = {f"part-{i}.parquet": parquet(f"a{i}", f"b{i}") for i in (10, 9, 2)}
    source = folder_of(tmp_path / "mine", {**files, "notes.txt": b"left alone"})
    main(Config(source=source))
    corpus = find_corpus()
    assert corpus.name == "mine"
    assert [shard.name for shard in corpus.train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert list(read_texts([*corpus.train, corpus.val])) == ["a2", "b2", "a9", "b9", "a10", "b10"]
    assert corpus.train[0].read_bytes() == files["part-2.parquet"]
    assert (base / "current").read_text() == "mine\n"

    before = corpus.train[0].parent.stat().st_ino
    main(Config(source=source))
    assert "already complete" in capsys.readouterr().out
    assert corpus.train[0].parent.stat().st_ino == before

    (source / "part-11.parquet").write_bytes(parquet("a11"))
    main(Config(source=source))
    assert list(read_texts([find_corpus().val])) == ["a11"]
    assert sorted(path.name for path in base.iterdir()) == ["current", "mine"]


def test_a_damaged_import_is_made_again(tmp_path: Path):
    source = folder_of(tmp_path / "mine", {"a.txt": b"first\n", "b.txt": b"second\n"})
    main(Config(source=source))
    shard = find_corpus().train[0]
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(UserError, match="shard_00000.parquet is no whole parquet file"):
        find_corpus()
    main(Config(source=source))
    assert list(read_texts([shard])) == ["first\n"]


def test_texts_become_two_shards_at_least(tmp_path: Path):
    texts = folder_of(tmp_path / "texts", {f"{i}.txt": f"text {i}".encode() for i in range(40)})
    main(Config(source=texts, name="forty"))
    corpus = find_corpus("forty")
    assert list(read_texts([corpus.val])) == ["text 1", "text 21"]
    train = list(read_texts(corpus.train))
    assert train == [f"text {i}" for i in range(40) if i not in (1, 21)]

    single = folder_of(tmp_path / "single", {"only.parquet": parquet("x", "y", "z")})
    main(Config(source=single))
    corpus = find_corpus()
    assert list(read_texts(corpus.train)) == ["x", "z"]
    assert list(read_texts([corpus.val])) == ["y"]


def test_a_bad_import_leaves_nothing_behind(tmp_path: Path, base: Path):
    main(Config(source=folder_of(tmp_path / "good", {"a.txt": b"one two"})))
    bad = {
        "cut": {"a.parquet": parquet("x"), "b.parquet": parquet("y")[:-9]},
        "empty": {"a.parquet": parquet("x"), "b.parquet": parquet()},
        "latin": {"a.txt": b"fine", "b.txt": b"\xe9"},
        "line": {"b.jsonl": b'{"text": "x"}\n{"text": "y"}\n{"text": "z"}\noops\n'},
    }
    for name, files in bad.items():
        with pytest.raises(UserError, match=r"/b\.") as caught:
            main(Config(source=folder_of(tmp_path / name, files)))
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in base.iterdir()) == ["current", "good"]
    assert find_corpus().name == "good"


@pytest.mark.parametrize("name", ["climbmix", "primer", "current", "../up", ".hidden", "a b"])
def test_reserved_and_odd_names_are_refused(tmp_path: Path, name: str):
    source = folder_of(tmp_path / "texts", {"a.txt": b"one two"})
    with pytest.raises(UserError, match="choose another with --name"):
        main(Config(source=source, name=name))


def test_no_corpus_says_what_to_run(tmp_path: Path, base: Path):
    for name in ("", "books"):
        with pytest.raises(UserError, match="run `python -m nanochat.dataset"):
            find_corpus(name)
    main(Config(source=folder_of(tmp_path / "mine", {"a.txt": b"one two"})))
    with pytest.raises(UserError, match="no corpus --data=books .*there are mine"):
        find_corpus("books")
    with pytest.raises(UserError, match="--name goes with --from"):
        main(Config(name="x"))


def test_primer_corpus_holds_the_primers_documents(capsys):
    import primer

    main(Config(corpus="primer", num_documents=50))
    corpus = find_corpus()
    assert corpus.name == "primer"
    assert list(read_texts(corpus.train)) == [primer.document("train", i) for i in range(50)]
    assert list(read_texts([corpus.val])) == [primer.document("val", i) for i in range(2)]
    main(Config(corpus="primer", num_documents=50))
    assert "already complete" in capsys.readouterr().out
    main(Config(corpus="primer", num_documents=20))
    assert len(list(read_texts(find_corpus().train))) == 20


REPO = "someone/tiny-shuffle"
SHARDS = {f"shard_{i:05d}.parquet": parquet(*(f"{i}:{k}" for k in range(5000))) for i in range(5)}


@pytest.fixture
def hub(monkeypatch):
    """A tiny public corpus on a local hub, found through HF_ENDPOINT."""
    monkeypatch.setattr(dataset, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(dataset, "PUBLIC", {"climbmix": PublicCorpus(REPO, 5, "CC-TEST 1.0")})
    with Hub(REPO, dict(SHARDS)).serving() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


def test_download_takes_the_validation_shard_and_only_what_is_missing(hub: Hub, base: Path, capsys):
    main(Config(num_shards=2))
    assert "CC-TEST 1.0" in capsys.readouterr().out
    corpus = find_corpus()
    assert [path.name for path in corpus.train] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert corpus.val.name == "shard_00004.parquet"
    for path in [*corpus.train, corpus.val]:
        assert path.read_bytes() == SHARDS[path.name]
    assert hub.gets[0][0] == "shard_00004.parquet", "first, so that it is the last of any part"
    assert sorted(os.listdir(base / "climbmix")) == sorted(
        p.name for p in [*corpus.train, corpus.val]
    )

    hub.gets.clear()
    main(Config(num_shards=2))
    assert "nothing to do" in capsys.readouterr().out
    assert hub.gets == []
    corpus.train[1].write_bytes(b"damaged")
    main(Config(num_shards=-1))
    assert sorted(name for name, _ in hub.gets) == [f"shard_0000{i}.parquet" for i in (1, 2, 3)]
    assert corpus.train[1].read_bytes() == SHARDS["shard_00001.parquet"]


def test_a_broken_transfer_is_continued(hub: Hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.fault = lambda number: "cut" if number == 0 else ""
    main(Config(num_shards=1))
    corpus = find_corpus()
    for path in [*corpus.train, corpus.val]:
        assert path.read_bytes() == SHARDS[path.name]
    half = len(SHARDS["shard_00004.parquet"]) // 2
    assert hub.gets[:2] == [
        ("shard_00004.parquet", ""),
        ("shard_00004.parquet", f"bytes={half // 1000 * 1000}-"),
    ]


def test_a_failed_download_is_one_line_and_keeps_what_arrived(hub: Hub, base: Path):
    del hub.files["shard_00001.parquet"]
    with pytest.raises(UserError, match="shard_00001.parquet of someone/tiny-shuffle") as caught:
        main(Config(num_shards=2, num_workers=1))
    assert "\n" not in str(caught.value)
    assert "HF_ENDPOINT" in str(caught.value)
    assert not (base / "current").exists()
    hub.files = dict(SHARDS)
    hub.gets.clear()
    main(Config(num_shards=2))
    assert [name for name, _ in hub.gets] == ["shard_00001.parquet"]


def test_a_shard_that_is_no_parquet_never_lands(hub: Hub, base: Path):
    hub.files["shard_00000.parquet"] = b"<html>blocked</html>"
    with pytest.raises(UserError, match="shard_00000.parquet .*no whole parquet file"):
        main(Config(num_shards=1))
    assert [path.name for path in (base / "climbmix").glob("*.parquet")] == ["shard_00004.parquet"]
    assert corpora_dir() == base


def test_the_number_of_shards_is_checked():
    for num_shards in (0, -2, 6543):
        with pytest.raises(UserError, match="climbmix has 1 to 6542 training shards"):
            main(Config(num_shards=num_shards))
