"""dev.bench.learning trains and scores every depth with the idea and without it."""

from pathlib import Path

import pytest

import primer
from dev.bench import learning
from tests.test_dataset import parquet


@pytest.mark.slow
def test_each_depth_is_trained_with_the_idea_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")  # restores it afterwards
    for number in (0, 1):
        texts = (primer.document("train", 300 * number + index) for index in range(300))
        (tmp_path / f"shard_{number:05d}.parquet").write_bytes(parquet(*texts))
    learning.main(
        learning.Config(tmp_path, (1, 2), ratio=0.01, variant=("plain",), device_type="cpu")
    )
    page = capsys.readouterr().out
    for depth in (1, 2):
        for side in ("baseline", "idea    "):
            assert f"\ndepth {depth}, {side}  bpb" in page
