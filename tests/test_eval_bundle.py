"""The bundle of CORE: where it is found, how it is downloaded, what is read of it, and what is
refused.
"""

import json
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest

from nanochat import core_eval
from nanochat.common import UserError, eval_bundle_dir
from nanochat.core_eval import CORE_TASKS, find_bundle, load_tasks

ROWS: dict[str, list[dict[str, Any]]] = {
    "deep/copa.jsonl": [
        {"query": f"It is {i}, so", "choices": ["it rains.", "we go."], "gold": i % 2}
        for i in range(9)
    ],
    "winograd.jsonl": [
        {"context_options": ["the cat", "the mat"], "continuation": f"is {i}.", "gold": 0}
        for i in range(5)
    ],
    "lambada.jsonl": [
        {"context": f"I have {i} and", "continuation": f"{i}", "gold": "more", "category": "x"}
        for i in range(4)
    ],
}
INDEX = """
icl_tasks:
- {label: copa, dataset_uri: deep/copa.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}
- {label: winograd, dataset_uri: winograd.jsonl, num_fewshot: 0, icl_task_type: schema}
- label: lambada_openai
  dataset_uri: lambada.jsonl
  num_fewshot: [3]
  icl_task_type: language_modeling
  continuation_delimiter: "\\nAnswer: "
- {label: squad, dataset_uri: nowhere.jsonl, num_fewshot: [0], icl_task_type: language_modeling}
- {label: mine, dataset_uri: winograd.jsonl, num_fewshot: [0], icl_task_type: schema}
"""
BASELINES = """Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline
copa,reasoning,multiple_choice,2,9,50.0
winograd,understanding,schema,0,5,50.0
lambada_openai,understanding,language_modeling,3,4,0
squad,comprehension,language_modeling,0,1,0
mine,own,schema,0,5,50
"""


def write_bundle(folder: Path) -> Path:
    """A bundle with three tasks of CORE, one without its file, and one that is none of CORE."""
    for name, rows in ROWS.items():
        path = folder / "eval_data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core.yaml").write_text(INDEX)
    (folder / "eval_meta_data.csv").write_text(BASELINES)
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE", raising=False)
    monkeypatch.setattr(core_eval, "URL", "http://127.0.0.1:9/eval_bundle.zip")  # nobody is there
    return tmp_path / "base"


def test_tasks_are_read_and_missing_ones_named(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {task.label: task for task in load_tasks(bundle)}
    assert list(tasks) == ["copa", "lambada_openai", "winograd"]  # in the order of CORE
    copa, lambada, winograd = tasks.values()
    assert (copa.kind, copa.baseline, copa.num_fewshot) == ("multiple_choice", 0.5, 2)
    assert (winograd.kind, winograd.num_fewshot, winograd.delimiter) == ("schema", 0, " ")
    assert (lambada.delimiter, lambada.baseline) == ("\nAnswer: ", 0.0)
    order = list(range(9))
    random.Random(1337).shuffle(order)
    assert copa.rows == [{**ROWS["deep/copa.jsonl"][i], "id": i + 1} for i in order]
    assert lambada.rows[0].keys() == {"context", "continuation", "id"}
    [line] = capsys.readouterr().out.splitlines()
    assert set(CORE_TASKS) - set(tasks) == set(line.split(" has no data of ")[1].split(", "))
    assert [task.label for task in load_tasks(bundle, ["winograd"])] == ["winograd"]
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="'mine' is unknown"):
        load_tasks(bundle, ["mine"])
    with pytest.raises(UserError, match="no data of any task"):
        load_tasks(bundle, ["squad", "coqa"])


COPA = {"query": "a", "choices": ["b", "c"], "gold": 1}


@pytest.mark.parametrize(
    "row",
    [
        "{not json", "[]", "7", COPA | {"gold": 2}, COPA | {"gold": -1}, COPA | {"gold": "0"},
        COPA | {"gold": True}, COPA | {"choices": ["b"], "gold": 0}, COPA | {"choices": "bc"},
        COPA | {"choices": ["b", 3]}, COPA | {"query": None}, {"query": "a", "gold": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_row_is_named_with_its_line(bundle: Path, row: Any) -> None:
    path = bundle / "eval_data/deep/copa.jsonl"
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text("\n".join([json.dumps(COPA)] * 4 + ["", text, json.dumps(COPA)]))
    with pytest.raises(UserError, match=r"copa\.jsonl, line 6: ") as refusal:
        load_tasks(bundle)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("core.yaml", "icl_tasks:", "tasks:"),
        ("core.yaml", "icl_tasks:", "icl_tasks: ["),
        ("core.yaml", INDEX, "icl_tasks: 3"),
        ("core.yaml", "icl_task_type: schema", "icl_task_type: essay"),
        ("core.yaml", "num_fewshot: [2]", "num_fewshot: []"),
        ("core.yaml", "num_fewshot: [2]", "num_fewshot: many"),
        ("eval_meta_data.csv", "Random baseline", "Baseline"),
        ("eval_meta_data.csv", "9,50.0", "9,half"),
        ("eval_meta_data.csv", "9,50.0", "9,100"),
        ("eval_meta_data.csv", "copa", "coma"),
        ("eval_data/winograd.jsonl", "", None),
        ("eval_data/lambada.jsonl", json.dumps(ROWS["lambada.jsonl"][3]), ""),  # 3 rows, 3 examples
    ],
)
def test_a_malformed_bundle_is_refused(bundle: Path, name: str, old: str, new: str | None) -> None:
    text = (bundle / name).read_text()
    (bundle / name).write_text("" if new is None else text.replace(old, new))
    with pytest.raises(UserError) as refusal:
        load_tasks(bundle)
    assert "\n" not in str(refusal.value) and Path(name).name in str(refusal.value)


def test_where_the_bundle_is_found(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_bundle(str(bundle)) == bundle
    with pytest.raises(UserError, match="--eval_bundle"):
        find_bundle(str(tmp_path / "nowhere"))
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE", str(bundle))
    assert find_bundle() == bundle
    assert find_bundle(str(write_bundle(tmp_path / "other"))) == tmp_path / "other"
    monkeypatch.delenv("NANOCHAT_EVAL_BUNDLE")
    own = write_bundle(eval_bundle_dir())
    assert find_bundle() == own
    (eval_bundle_dir() / "core.yaml").unlink()
    with pytest.raises(UserError, match="no core.yaml"):
        find_bundle()


def zip_bundle(bundle: Path, archive: Path, inside: str = "eval_bundle/") -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(bundle.rglob("*.*")):
            file.write(path, inside + str(path.relative_to(bundle)))


@pytest.mark.parametrize("inside", ["", "eval_bundle/"])
def test_download_once(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    zip_bundle(bundle, tmp_path / "it.zip", inside)
    monkeypatch.setattr(core_eval, "URL", (tmp_path / "it.zip").as_uri())
    folder = find_bundle()
    assert folder == base / "eval_bundle" and len(load_tasks(folder)) == 3
    assert [path.name for path in base.iterdir()] == ["eval_bundle"]
    (tmp_path / "it.zip").unlink()
    assert find_bundle() == folder


def damage(kind: str, archive: Path) -> None:
    data = archive.read_bytes()
    match kind:
        case "cut":
            archive.write_bytes(data[: len(data) // 2])
        case "flipped":
            archive.write_bytes(data[:80] + bytes(byte ^ 255 for byte in data[80:120]) + data[120:])
        case "page":
            archive.write_text("<html>Sign in to this network</html>")
        case "empty":
            zipfile.ZipFile(archive, "w").close()
        case "escaping":
            with zipfile.ZipFile(archive, "a") as file:
                file.writestr("../outside.txt", "here")
        case "absolute":
            with zipfile.ZipFile(archive, "a") as file:
                file.writestr("/tmp/outside.txt", "here")


@pytest.mark.parametrize(
    "kind", ["cut", "flipped", "page", "empty", "escaping", "absolute", "no network", "no file"]
)
def test_a_failed_download_leaves_nothing(
    base: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    archive = tmp_path / "it.zip"
    zip_bundle(bundle, archive)
    damage(kind, archive)
    if kind == "no file":
        archive.unlink()
    if kind != "no network":
        monkeypatch.setattr(core_eval, "URL", archive.as_uri())
    with pytest.raises(UserError, match="--eval_bundle") as refusal:
        find_bundle()
    assert "\n" not in str(refusal.value)
    assert not list(base.iterdir()) and not list(tmp_path.rglob("outside.txt"))
