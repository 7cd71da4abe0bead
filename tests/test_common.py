"""nanochat.common: --help, and what a user can mend: one line, before work begins."""

import errno
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nanochat import common, dataset
from nanochat.common import UserError, fastest_dtype, run_script, set_up
from tests import launch
from tests.models import refuses

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "scripts").glob("[a-z]*.py"))


def run(monkeypatch: pytest.MonkeyPatch, command: str, fault: Exception | None = None) -> object:
    """What the script's main was given, or what it exited with; `fault` is what main raises."""
    name, *arguments = command.split()
    script = importlib.import_module(f"scripts.{name}")
    given: list[object] = []

    def main(cfg: object) -> None:
        given.append(cfg)
        if fault:
            raise fault

    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        run_script(main, script.Config)
    except SystemExit as ended:
        assert fault or not given, "refused before it began"
        return ended.code
    return given[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_says_what_the_script_does(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = importlib.import_module(f"scripts.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        run_script(script.main, script.Config)
    said = capsys.readouterr().out
    assert script.__doc__ and ended.value.code == 0
    assert script.__doc__.split("\n")[0] in said


def test_a_value_that_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    least_one, above_0 = "be greater than or equal to 1", "be greater than 0"
    assert run(monkeypatch, "plan --mfu 0") == f"error: --mfu=0.0: Input should {above_0}"
    for command, what in {
        "base_train --depth=0": least_one,
        "base_train --num_iterations=0": least_one,
        "base_train --target_param_data_ratio=inf": "be a finite number",
        "base_train --device_batch_size=-2": least_one,
        "base_train --device_type=tpu": "match pattern '^(cpu|cuda|mps)?$'",
        "base_train --dtype=fp16": "match pattern '^(auto|bfloat16|float16|float32)$'",
        "base_train --model_tag=../x": r"match pattern '^(\w[\w.-]*)?$'",
        "base_eval --batch_size=0": least_one,
        "mid_train --warmdown=1.5": "be less than or equal to 1",
        "chat_sft --lr_scale=0.0": above_0,
        "chat_cli --temperature=nan": "be less than or equal to 100",
        "chat_cli --top_k=-1": "be greater than or equal to 0",
        "chat_web --port=99999": "be less than or equal to 65535",
        "chat_eval --max_problems=-1": least_one,
    }.items():
        kind = "String" if "pattern" in what else "Input"
        told = f"error: {command.split()[1]}: {kind} should {what}"
        assert run(monkeypatch, command) == told


def test_values_that_can_be_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "base_train --depth=1 --num_iterations -1 --device_batch_size=auto --eval_every=0"
    cfg = vars(run(monkeypatch, command))
    assert (cfg["num_iterations"], cfg["device_batch_size"], cfg["eval_every"]) == (-1, "auto", 0)
    cfg = vars(run(monkeypatch, "chat_sft --num_iterations 7 --warmdown=0 -g a.b-c_1"))
    assert (cfg["num_iterations"], cfg["warmdown"], cfg["model_tag"]) == (7, 0, "a.b-c_1")
    assert vars(run(monkeypatch, "chat_eval -i rl"))["max_problems"] is None


def test_what_a_user_or_the_machine_caused_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/a/b")
    memory = torch.OutOfMemoryError("CUDA out of memory")
    room, other = "make room or choose another path", "choose another path"
    out = "out of GPU memory"
    for command, fault, said in (
        ("base_loss --step=7", UserError("no step 7"), "no step 7"),
        ("tok_train", full, f"/a/b: No space left on device; {room}"),
        ("tok_train", OSError(errno.EIO, "I/O error"), f"a file: I/O error; {other}"),
        ("tok_train", IsADirectoryError(errno.EISDIR, "A folder", "/a"), f"/a: A folder; {other}"),
        ("base_eval --batch_size=9", memory, f"{out} with --batch_size=9; try --batch_size=3"),
        ("chat_rl --num_slots=7", memory, f"{out} with --device_batch_size=32 --num_slots=7; "
         "try --device_batch_size=16 --num_slots=1"),
        ("chat_cli", memory, f"{out}; use a smaller model or shorter rows"),
    ):  # fmt: skip
        assert run(monkeypatch, command, fault) == f"error: {said}"
    with pytest.raises(OSError, match="Bad file descriptor"):
        run(monkeypatch, "tok_train", OSError(errno.EBADF, "Bad file descriptor"))


def test_a_base_folder_that_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone/nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for place in ("/proc/x", "/dev/null", "/sys/y", "file", "file/below", "dangling", "circle"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / place))
        monkeypatch.setattr(sys, "argv", ["dataset", "--corpus", "primer", "--num_documents", "3"])
        with pytest.raises(SystemExit) as ended:
            run_script(dataset.main, dataset.Config)
        said = str(ended.value.code)
        assert said.startswith(f"error: {tmp_path / place}") and "\n" not in said, said


def test_a_reader_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    ends = os.pipe()
    with open(ends[1], "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        os.close(ends[0])
        for number in range(3):
            common.print0(f"line {number}")


# Time


@pytest.mark.parametrize(
    ("duration", "seconds"), [("3h50m", 13_800), ("90s", 90), ("2m", 120), ("1h1m1s", 3661)]
)
def test_a_time_limit_counts_from_the_start(
    duration: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert common.stop_time() == float("inf")
    assert common.stop_time(duration) == common.STARTED + seconds
    monkeypatch.setenv("NANOCHAT_BEGAN", "1000")
    monkeypatch.setenv("NANOCHAT_STOP_AFTER", duration)
    assert common.stop_time() == common.stop_time("99h") == 1000 + seconds
    for wrong in ("soon", "3", "h", "50m3h", "-3h", "1.5h"):
        monkeypatch.setenv("NANOCHAT_STOP_AFTER", wrong)
        refuses(f"NANOCHAT_STOP_AFTER={wrong} is no time", common.stop_time)
        flag = f"error: --stop_after={wrong}: String should match pattern"
        assert str(run(monkeypatch, f"mid_train --stop_after={wrong}")).startswith(flag)


@pytest.mark.parametrize("under_torchrun", [False, True])
@pytest.mark.parametrize("asks", ["the time", "SIGUSR1"])
def test_a_script_whose_time_is_up_says_so_by_its_status(
    asks: str, under_torchrun: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    """To torchrun, which starts a rank that failed again, by a file alone."""
    monkeypatch.setenv("NANOCHAT_STOPPED", str(tmp_path / "stopped"))
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if asks == "the time":
        monkeypatch.setenv("NANOCHAT_STOP_AFTER", "1s")
        monkeypatch.setenv("NANOCHAT_BEGAN", "1000")  # long ago

    def main(_: object) -> None:
        if asks == "SIGUSR1":
            signal.raise_signal(signal.SIGUSR1)
        time.sleep(60)

    monkeypatch.setattr(sys, "argv", ["tok_train"])
    with pytest.raises(SystemExit) as ended:
        run_script(main, importlib.import_module("scripts.tok_train").Config)
    assert ended.value.code == (0 if under_torchrun else 75)
    assert (tmp_path / "stopped").exists()
    assert capfd.readouterr().out == "the time is up; the same command goes on\n"


def be_a_rank(log: Path, leads_session: bool) -> None:
    """What torchrun starts, in a session of its own unless a script is between them."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    if leads_session:
        os.setsid()
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    set_up("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a parent died")
@pytest.mark.parametrize("leads_session", [True, False])
def test_a_rank_whose_torchrun_died_does_not_start(tmp_path: Path, leads_session: bool) -> None:
    rank = launch.FORK.Process(target=be_a_rank, args=(tmp_path / "log", leads_session))
    rank.start()  # its parent is the server that forks it, and no torchrun
    rank.join(60)
    died = (tmp_path / "log").read_text() == "torchrun died while this rank was starting\n"
    assert (rank.exitcode, died) == (leads_session, leads_session)


def test_a_gpu_s_dtype_follows_its_capability() -> None:
    dtypes = {(0, 0): "float32", (6, 1): "float32", (7, 0): "float16", (7, 5): "float16"}
    dtypes |= dict.fromkeys([(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], "bfloat16")
    assert {capability: fastest_dtype(capability) for capability in dtypes} == dtypes


def be_a_cuda_machine(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    for name, answer in {
        "is_available": True, "get_device_name": "a card", "get_device_capability": capability,
        "set_device": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)

    def ones(*_: object, **__: object) -> None:  # what CUDA 13 says of cards before 7.5
        if capability < (7, 5):
            raise torch.AcceleratorError("CUDA error: no kernel image\nCompile with a flag")

    monkeypatch.setattr(torch, "ones", ones)


def test_set_up_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    be_a_cuda_machine(monkeypatch, (7, 5))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: pytest.fail("not asked"))
    runtime = set_up()
    assert (runtime.dtype, runtime.capability, str(runtime.device)) == (
        torch.float16, (7, 5), "cuda:0",
    )  # fmt: skip
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert set_up(dtype="float32").dtype == torch.float32
    be_a_cuda_machine(monkeypatch, (7, 0))
    told = refuses("--torch-backend=cu126 --reinstall-package torch --upgrade torch", set_up)
    assert "capability 7.0 (CUDA error: no kernel image); run" in told

    be_a_cuda_machine(monkeypatch, (9, 0))
    monkeypatch.setattr(os, "environ", {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"})
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    assert set_up(deterministic=True).dtype == torch.bfloat16 and asked == [True]
    assert os.environ.keys() == {"PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"}


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_a_process_group_knows_its_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "rendezvous", lambda *_, **__: iter([("a store", 1, 2)]))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    given: dict[str, object] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **k: given.update(k, b=backend))
    common.join_ranks(torch.device(device))
    assert (given["store"], given["rank"], given["world_size"]) == ("a store", 1, 2)
    on_gpu = torch.device(device).type == "cuda"
    expected = ("nccl", torch.device(device)) if on_gpu else ("gloo", None)
    assert (given["b"], given["device_id"]) == expected


@pytest.mark.parametrize(
    ("has", "is_faster"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC"}, False),
        ({}, False),
    ],
)
def test_bf16_only_where_it_is_faster(
    has: dict[str, Any], is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert common.multiplies_bf16() == is_faster
