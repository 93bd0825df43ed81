"""Which rows a training step sees: by seed and position, on any number of processes, and after a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler

import train_tokenizer
from smolkit.packing import LengthGroupedOrder, SeededOrder

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the a cat dog sat on mat with red blue house of tree and ran fast slow very big small".split()
# Trains as train_pretrain.py does and notes the documents of each step; SIGKILL in the middle of step KILL_AT.
DRIVER = """
import json, os, signal, sys
import train_pretrain
from smolkit.packing import IGNORE

log, kill_at = sys.argv[1], int(sys.argv[2])
original = train_pretrain.PretrainTrainer.training_step

def training_step(self, model, inputs, *rest):
    step = self.state.global_step + 1
    rows = [ids[labels != IGNORE].tolist() for ids, labels in zip(inputs["input_ids"], inputs["labels"])]
    with open(f"{log}.{self.args.process_index}", "a") as file:
        file.write(json.dumps([step, [row for row in rows if row]]) + "\\n")
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, model, inputs, *rest)

train_pretrain.PretrainTrainer.training_step = training_step
train_pretrain.main(sys.argv[3:])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(5, 30))) for _ in range(63)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer.main(
        f"--mode train --data_path {folder}/text.jsonl --vocab_size 320 --save_dir {folder}/tokenizer".split()
    )
    (folder / "driver.py").write_text(DRIVER)
    return folder


def train(world: Path, name: str, batch_size: int, kill_at: int = 0, processes: int = 1, more: str = "") -> list:
    """Per line of the log, all processes: (step, rows as sets of trained tokens). Three epochs."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += f"-m torch.distributed.run --standalone --nproc_per_node {processes}".split()
    arguments = f"""{world}/driver.py {world}/{name} {kill_at} --data_path {world}/text.jsonl
        --tokenizer_path {world}/tokenizer --model_size tiny --block_size 48 --num_epochs 3 --save_steps 4
        --per_device_train_batch_size {batch_size} --output_dir {world}/{name}-out --disable_tqdm true
        --model_overrides hidden_size=16 intermediate_size=16 num_hidden_layers=1 num_attention_heads=1
        num_key_value_heads=1 {more}"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher + arguments.split(), cwd=ROOT, env=environment, capture_output=True, text=True)
    killed = -signal.SIGKILL if processes == 1 else 1
    assert done.returncode == (killed if kill_at else 0), done.stdout + done.stderr
    logs = [(world / f"{name}.{rank}").read_text().splitlines() for rank in range(processes)]
    return [json.loads(line) for log in logs for line in log]


def by_step(lines: list) -> dict[int, list]:
    """Rows of each step, whichever process and micro-batch had them."""
    steps: dict[int, list] = {}
    for step, rows in lines:
        steps.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


@pytest.fixture(scope="module")
def whole(world) -> dict[int, list]:
    """One process, never interrupted."""
    steps = by_step(train(world, "whole", batch_size=4))
    rows = sum(map(len, steps.values())) // 3
    assert rows % 4, "the epochs end with a smaller batch"
    assert len(steps) == 3 * -(-rows // 4)
    epochs = [[row for step in range(e * len(steps) // 3, (e + 1) * len(steps) // 3) for row in steps[step + 1]]
              for e in range(3)]  # fmt: skip
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]), "each row once in each epoch"
    assert epochs[0] != epochs[1]
    return steps


def test_a_killed_run_sees_the_rows_it_would_have_seen(world, whole) -> None:
    per_epoch = len(whole) // 3
    kill_at = per_epoch + per_epoch // 2 + 1  # in the second epoch, between two checkpoints
    killed = train(world, "killed", batch_size=4, kill_at=kill_at)
    saved = (kill_at - 1) // 4 * 4
    assert saved % per_epoch and per_epoch < saved < kill_at - 1
    resumed = train(world, "killed", batch_size=4)[len(killed) :]
    assert by_step(killed) == {step: rows for step, rows in whole.items() if step <= kill_at}
    assert by_step(resumed) == {step: rows for step, rows in whole.items() if step > saved}


def test_two_processes_see_the_rows_of_one(world, whole) -> None:
    assert by_step(train(world, "two", batch_size=2, processes=2, more="--dataloader_num_workers 1")) == whole


@pytest.mark.slow
def test_two_killed_processes_and_accumulation_see_the_rows_of_one(world, whole) -> None:
    kill_at = len(whole) // 3 + len(whole) // 6 + 1
    more = "--gradient_accumulation_steps 2"
    train(world, "both", batch_size=1, processes=2, kill_at=kill_at, more=more)
    for rank in range(2):
        (world / f"both.{rank}").unlink()
    saved = (kill_at - 1) // 4 * 4
    resumed = by_step(train(world, "both", batch_size=1, processes=2, more=more))
    assert resumed == {step: rows for step, rows in whole.items() if step > saved}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_order_is_the_librarys_and_the_tail_is_blank(world_size) -> None:
    """Against accelerate's own seeded sampler on one process; 3 × 2 does not divide 11."""
    PartialState(cpu=True)
    rows = list(range(11))
    library = prepare_data_loader(
        DataLoader(rows, batch_size=1, sampler=RandomSampler(rows)), num_processes=1, process_index=0,
        use_seedable_sampler=True, data_seed=7, put_on_device=False,
    )  # fmt: skip
    library.set_epoch(1)
    expected = [int(batch) for batch in library]
    order = SeededOrder(11, 7, multiple=world_size * 2)
    shards = []
    for rank in range(world_size):
        loader = DataLoader(ConcatDataset([rows, [-1]]), batch_size=2, sampler=order)
        loader = prepare_data_loader(loader, num_processes=world_size, process_index=rank, put_on_device=False)
        loader.set_sampler(order)
        loader = skip_first_batches(loader, 1)  # as a resumed run does
        loader.set_epoch(1)
        shards.append([batch.tolist() for batch in loader])
    seen = [row for step in zip(*shards, strict=True) for batch in step for row in batch]
    assert seen == expected[2 * world_size :] + [-1] * (len(order) - 11)
    assert torch.equal(torch.tensor(sorted(expected)), torch.arange(11))


def test_length_grouped_steps_are_sorted_stretches_of_the_seeded_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 1003).tolist()
    order = LengthGroupedOrder(lengths, seed=5, batch_size=4)
    order.set_epoch(2)
    rows = list(order)
    assert rows == list(order) and sorted(rows) == list(range(1003))
    shuffled = SeededOrder(1003, 5)
    shuffled.set_epoch(2)
    shuffled = list(shuffled)
    assert shuffled != rows
    for start in range(0, 1003, 200):  # 50 steps of 4
        stretch = sorted(shuffled[start : start + 200], key=lambda row: lengths[row])
        steps = {tuple(stretch[i : i + 4]) for i in range(0, len(stretch), 4)}
        assert {tuple(rows[i : i + 4]) for i in range(start, min(start + 200, 1003), 4)} == steps
    order.set_epoch(3)
    assert list(order) != rows

    def padded(numbers: list[int]) -> int:
        batches = [[lengths[row] for row in numbers[i : i + 4]] for i in range(0, len(numbers), 4)]
        return sum(len(batch) * max(batch) for batch in batches)

    assert padded(rows) < 1.1 * sum(lengths) < padded(shuffled)
