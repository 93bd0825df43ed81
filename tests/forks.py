"""Runs training scripts in forked processes: one import of torch for many runs that are killed for real.

    python tests/forks.py PLAN.json      PLAN: a list of runs; prints a line of JSON for each

A run is {"script", "argv", "ranks"?, "fault"?, "seconds"?}; its result {"codes", "seconds", "output"}. Codes are those
of `subprocess`: -9 for SIGKILL. Faults act at the outermost boundary, in the process of rank `fault["rank"]` (0):

    {"kill_at": step, "micro"?: n}     SIGKILL in that step, before the forward pass of micro-batch n
    {"signal": name, "at": step}       send that signal to itself in the middle of that step
    {"kill_call": n}                   SIGKILL in the n-th call of one of CALLS since the first save
    {"kill_at_the_end": true}          SIGKILL after the last evaluation, before the final directory is written
    {"nan_at": [step, ...]}            the loss of these steps' first micro-batch is NaN
    {"nan_gradient_at": [step, ...]}   their gradients are NaN, and nothing else
    {"fp16": scale}                    a CPU that trains in fp16, with that loss scale at first
    {"on_a_gpu": true}                 losses and norms are looked at a step later, as where an update guards itself
    {"slow_disk": steps}               fsync in the background lasts until training is that many steps further
    {"full_after": bytes}              the disk is full: RLIMIT_FSIZE, which every file of more bytes runs into
"""

import importlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")


def sabotage(fault: dict[str, Any]) -> None:
    """Arrange for `fault` in this process."""
    from transformers import Trainer

    step, micro = Trainer.training_step, {"step": -1, "count": 0}

    def training_step(self: Trainer, model: Any, inputs: Any, *rest: Any) -> Any:
        now = self.state.global_step + 1
        micro["count"] = micro["count"] + 1 if micro["step"] == now else 0
        micro["step"] = now
        if fault.get("kill_at") == now and fault.get("micro", 0) == micro["count"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.get("at") == now and not micro["count"]:
            os.kill(os.getpid(), getattr(signal, fault["signal"]))
        if "reached" in fault and now >= fault["until"]:
            fault["reached"].set()
        loss = step(self, model, inputs, *rest)
        broken = now in fault.get("nan_at", ())
        if (broken or now in fault.get("nan_gradient_at", ())) and not micro["count"]:
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.grad.fill_(float("nan"))
            return loss * float("nan") if broken else loss
        return loss

    Trainer.training_step = training_step
    if "kill_at_the_end" in fault:
        import smolkit.training

        smolkit.training.final_weights = lambda trainer: os.kill(os.getpid(), signal.SIGKILL)
    if "fp16" in fault:
        from fp16_worker import on_a_cpu

        on_a_cpu(fault["fp16"])
    if "on_a_gpu" in fault:
        from smolkit.guards import GuardMixin

        GuardMixin.self_guarding = GuardMixin.master_optimizer
    if "full_after" in fault:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail with EFBIG instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["full_after"],) * 2)
    if "slow_disk" in fault:
        fault |= {"reached": threading.Event(), "until": 10**9}
        fsync, write = os.fsync, Trainer._save_checkpoint

        def slow(handle: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                assert fault["reached"].wait(20), "training waits for the disk"
            fsync(handle)

        def noted(self: Trainer, *args: Any) -> None:
            fault["reached"].clear()
            fault["until"] = min(self.state.global_step + fault["slow_disk"], self.state.max_steps)
            if fault["until"] <= self.state.global_step:
                fault["reached"].set()
            write(self, *args)

        os.fsync, Trainer._save_checkpoint = slow, noted
    if "kill_call" in fault:
        save, calls = Trainer._save_checkpoint, {"left": fault["kill_call"], "saving": False}

        def counted(original: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                if calls["saving"]:
                    calls["left"] -= 1
                    if calls["left"] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))

        def saving(self: Trainer, *args: Any) -> None:
            calls["saving"] = True  # from the library's first file until the process ends
            save(self, *args)

        Trainer._save_checkpoint = saving


def child(run: dict[str, Any], rank: int, port: int, output: int) -> None:
    """The forked process: never returns."""
    os.setpgid(0, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    ranks = run.get("ranks", 1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from smolkit import errors

    code = 0
    try:
        fault = run.get("fault")
        if fault and fault.get("rank", 0) == rank:
            sabotage(fault)
        errors.run(lambda: importlib.import_module(run["script"]).main(run["argv"]))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def execute(run: dict[str, Any]) -> dict[str, Any]:
    """Fork the ranks of a run and wait for all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = Path(f"/tmp/forks-{os.getpid()}.log")
    output = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    started, pids = time.monotonic(), []
    for rank in range(run.get("ranks", 1)):
        pid = os.fork()
        if pid == 0:
            child(run, rank, port, output)
        pids.append(pid)
    codes: list[int | None] = [None] * len(pids)
    while None in codes:
        for number, pid in enumerate(pids):
            if codes[number] is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[number] = os.waitstatus_to_exitcode(status)
        if time.monotonic() - started > run.get("seconds", 90):
            for number, pid in enumerate(pids):
                if codes[number] is None:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    codes[number] = -999
        time.sleep(0.01)
    os.close(output)
    text = log.read_text(errors="replace")
    log.unlink()
    return {"codes": codes, "seconds": round(time.monotonic() - started, 2), "output": text}


def main() -> None:
    # Imported once, nothing of it run: forks of a process whose torch has threads would hang.
    for name in ("train_pretrain", "train_full_sft", "train_lora", "train_dpo"):
        importlib.import_module(name)
    for run in json.loads(Path(sys.argv[1]).read_text()):
        print(json.dumps(execute(run)), flush=True)


if __name__ == "__main__":
    main()
