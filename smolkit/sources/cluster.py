"""The same preparation on datatrove's executors, for a corpus that outgrows one machine. An executor file says how:

    executor: slurm                     # local (processes of this machine), slurm or ray
    tasks: 64                           # shares of the files; each writes one shard
    workers: 32                         # tasks that run at the same time
    tokenizer: out/tokenizer            # optional, pretraining only: token ids too, in <part>/tokens
    options: {partition: cpu, time: "24:00:00"}     # any other argument of datatrove's executor

Stages: convert (the converters, filters and split of the pipeline; signatures of the texts), buckets and clusters
(datatrove's MinHash, or its exact deduplication), write (without the duplicates), publish, tokenise, join. A stage
that is done is not repeated, so the same command goes on after an interruption. What lies between the stages is in
`<part>/.datatrove`, which must be a folder that all machines see. Limits are shared by the tasks in equal parts.

As in a plain run no training row begins as a row does that a publisher held out: every task reads all held-out files
before its own. But of near duplicates with different questions datatrove keeps the first that it meets, which need not
be the held-out one."""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from smolkit.errors import UserError
from smolkit.files import atomic_writer, write_json
from smolkit.filters import Filters, Words, text_of
from smolkit.sources.output import REPORT, already_written, locked, remove_earlier
from smolkit.sources.pipeline import (
    HeldOut,
    Input,
    Limits,
    Settings,
    Stream,
    fingerprint_of,
    identity_hash,
    in_share,
    names_of,
    origin,
)

EXECUTORS = {"local": LocalPipelineExecutor, "slurm": SlurmPipelineExecutor, "ray": RayPipelineExecutor}
SIDES = ("train", "held_out")
# What a Slurm job needs to find datatrove's command and our modules, which are not installed.
ENVIRONMENT = f"export PATH={sys.prefix}/bin:$PATH PYTHONPATH={Path(__file__).resolve().parents[2]}:$PYTHONPATH"
HASH = HashConfig(hash_fc="sha1")  # its xxhash functions need xxhash<4
# Pairs with a similarity from about 0.72 up are found. Numbers stay: two problems may differ in nothing else.
MINHASH = MinhashConfig(
    num_buckets=14, hashes_per_bucket=8, norm_config=TextNormConfig(norm_numbers=False), hash_config=HASH
)
WordTokenizer.register(Words)


@dataclass(frozen=True)
class Plan:
    """An executor file."""

    executor: str
    tasks: int = 1
    workers: int | None = None
    tokenizer: str | None = None
    options: dict = field(default_factory=dict)


def read_plan(path: Path) -> Plan:
    """Raises UserError that names the file and the entry."""
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    kinds: dict[str, Any] = {"executor": str, "tasks": int, "workers": int, "tokenizer": str, "options": dict}
    if not isinstance(value, dict) or value.get("executor") not in EXECUTORS:
        raise UserError(f"{path}: executor: must be one of {', '.join(EXECUTORS)}")
    for key, given in value.items():
        if key not in kinds:
            raise UserError(f"{path}: unknown key {key}; known are {', '.join(kinds)}")
        if not isinstance(given, kinds[key]) or (kinds[key] is int and given < 1):
            raise UserError(f"{path}: {key}: {given}: must be a {kinds[key].__name__}, and at least 1 if a number")
    if value.get("tokenizer") and not Path(value["tokenizer"]).is_dir():
        raise UserError(f"{path}: tokenizer: {value['tokenizer']}: no such directory; see train_tokenizer.py")
    return Plan(**value)


def share_of(data: Input, rank: int, tasks: int) -> Input:
    """What task `rank` of `tasks` does of one source: every `tasks`-th file, and its part of the limits."""
    train = [f for f in data.files if not f.held_out]
    held_out = [f for f in data.files if f.held_out]
    busy, limits = max(1, min(tasks, len(train))), data.limits
    limits = Limits(
        records=limits.records and math.ceil(limits.records / busy), tokens=limits.tokens and limits.tokens / busy
    )
    return dataclasses.replace(data, files=train[rank::tasks] + held_out[rank::tasks], limits=limits)


class Convert(PipelineStep):
    """Files → `converted/<rank>.jsonl`, whose lines are a source's number, a side and a record, and
    `reports/<rank>.json`; passes the texts on to the signatures."""

    type, name = "READER", "Convert"

    def __init__(self, inputs: Sequence[Input], settings: Settings, filters: dict, work: Path) -> None:
        super().__init__()
        self.inputs, self.settings, self.filters, self.work = list(inputs), settings, filters, work

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        filters, reports = Filters(**self.filters), []
        openings = HeldOut(self.inputs, self.settings).openings
        with atomic_writer(self.work / "converted" / f"{rank:05d}.jsonl", "wb") as file:
            for number, data in enumerate(self.inputs):
                stream = Stream(share_of(data, rank, world_size), self.settings, filters.judge, openings)
                for record, line, held_out in stream:
                    aside = held_out or in_share(identity_hash(record), self.settings.validation_fraction)
                    file.write(b"%d %d " % (number, aside) + line)
                    yield Document(text=text_of(record), id="")
                reports.append(stream.tally.as_dict())
        write_json(self.work / "reports" / f"{rank:05d}.json", reports)


class Converted(PipelineStep):
    """What `Convert` wrote, again as documents."""

    type, name = "READER", "Converted"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with open(self.work / "converted" / f"{rank:05d}.jsonl", "rb") as file:
            for row in file:
                number, aside, line = row.split(b" ", 2)
                metadata = {"source": int(number), "side": SIDES[int(aside)], "line": line}
                yield Document(text=text_of(json.loads(line)), id="", metadata=metadata)


class Write(PipelineStep):
    """Documents → `shards/<side>/<rank>.jsonl`, and `written/<rank>.json` with the rows of each source."""

    type, name = "WRITER", "Write"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        train, held_out = (self.work / "shards" / side / f"{rank:05d}.jsonl" for side in SIDES)
        counts: Counter = Counter()
        with atomic_writer(train, "wb") as first, atomic_writer(held_out, "wb") as second:
            for document in data:
                (first if document.metadata["side"] == "train" else second).write(document.metadata["line"])
                counts[document.metadata["source"]] += 1
        write_json(self.work / "written" / f"{rank:05d}.json", counts)


class Publish(PipelineStep):
    """One task: the shards get their final names, in place of what an earlier run left, and the report is written."""

    type, name = "WRITER", "Publish"

    def __init__(self, part: str, inputs: Sequence[Input], folder: Path, fingerprint: dict, duplicates: str) -> None:
        super().__init__()
        self.part, self.folder, self.fingerprint, self.duplicates = part, folder, fingerprint, duplicates
        self.sources = {name: origin(data) for name, data in zip(names_of(inputs), inputs, strict=True)}

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        work, files = work_of(self.folder), {}
        shutil.rmtree(self.folder / "tokens", ignore_errors=True)  # of an earlier run
        for side, folder in zip(SIDES, (self.folder, self.folder / "validation"), strict=True):
            for shard in sorted((work / "shards" / side).glob("*.jsonl")):
                if size := shard.stat().st_size:
                    final = folder / f"{self.part}_data-{shard.name}"
                    link_over(shard, final)  # not moved: interrupted, this stage begins again
                    files[final.relative_to(self.folder).as_posix()] = {"bytes": size}
        remove_earlier(self.folder, self.part, files)
        write_json(self.folder / REPORT, {"sources": self.report(work), "files": files, "settings": self.fingerprint})
        for name in ("converted", "shards", "signatures", "duplicates", "removed"):
            shutil.rmtree(work / name, ignore_errors=True)

    def report(self, work: Path) -> dict:
        """What became of the rows of each source, all tasks together."""
        tasks = [json.loads(path.read_text("utf-8")) for path in sorted((work / "reports").glob("*.json"))]
        written = [json.loads(path.read_text("utf-8")) for path in sorted((work / "written").glob("*.json"))]
        report = {}
        for number, (name, where) in enumerate(self.sources.items()):
            converted = sum(task[number]["written"] for task in tasks)
            kept = sum(counts.get(str(number), 0) for counts in written)
            dropped: dict[str, dict] = {}
            for reason, entry in (item for task in tasks for item in task[number]["dropped"].items()):
                total = dropped.setdefault(reason, {"rows": 0, "for_example": entry["for_example"]})
                total["rows"] += entry["rows"]
            if converted > kept:
                dropped[f"duplicate: {self.duplicates}"] = {"rows": converted - kept, "for_example": ["(see the logs)"]}
            read = sum(task[number]["read"] for task in tasks)
            counts = {"read": read, "written": kept, "duplicate_prompts": None}  # they would have to meet in one place
            report[name] = counts | {"dropped": dropped, **where}
        return report


class Tokenise(PipelineStep):
    """The shard of this task → a store of token ids (see smolkit/shards.py) under `tokens/<rank>`."""

    type, name = "TOKENIZER", "Tokenise"

    def __init__(self, part: str, folder: Path, tokenizer: str) -> None:
        super().__init__()
        self.part, self.folder, self.tokenizer = part, folder, tokenizer

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        # Imported here, so that processes of other stages start without a model library.
        from smolkit.checkpoints import document_end_id, load_tokenizer
        from smolkit.packing import documents
        from smolkit.shards import tokenized

        shard = self.folder / f"{self.part}_data-{rank:05d}.jsonl"
        if shard.exists():
            tokenizer = load_tokenizer(self.tokenizer)
            conversion = documents(document_end_id(tokenizer))
            tokenized(conversion, [shard], tokenizer, work_of(self.folder) / "tokens" / f"{rank:05d}")


class Join(PipelineStep):
    """One task: the stores of all tasks become one, `<part>/tokens`, which `--data_path` of training takes."""

    type, name = "TOKENIZER", "Join"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:
        from smolkit.shards import join_stores

        stores = sorted(path.parent for path in (work_of(self.folder) / "tokens").glob("*/*/manifest.json"))
        shutil.rmtree(self.folder / "tokens", ignore_errors=True)
        join_stores(stores, self.folder / "tokens")
        shutil.rmtree(work_of(self.folder) / "tokens")


def work_of(folder: Path) -> Path:
    return folder / ".datatrove"


def link_over(source: Path, target: Path) -> None:
    """Give a file a second name, in place of whatever has it."""
    aside = target.with_name(f".{target.name}.part")
    aside.parent.mkdir(exist_ok=True)
    aside.unlink(missing_ok=True)
    os.link(source, aside)
    os.replace(aside, target)


def text_content(document: Document) -> str:
    """What exact duplicates share: the text, white space apart."""
    return " ".join(document.text.split())


Stage = tuple[str, list[PipelineStep], int]  # its name, its steps, its tasks


def deduplication(kind: str, work: Path) -> tuple[list[PipelineStep], list[Stage], list[PipelineStep]]:
    """The steps that make signatures, the stages that compare them, and the steps that leave duplicates out."""
    signatures, duplicates, removed = (str(work / name) for name in ("signatures", "duplicates", "removed"))
    if kind == "exact":
        config = ExactDedupConfig(content_getter=text_content, hash_config=HASH)
        find: list[Stage] = [("find", [ExactFindDedups(signatures, removed, config)], 1)]
        return [ExactDedupSignature(signatures, config)], find, [ExactDedupFilter(removed, config)]
    if kind == "near":
        buckets = MinhashDedupBuckets(signatures, duplicates, config=MINHASH)
        clusters = MinhashDedupCluster(duplicates, removed, config=MINHASH)
        find = [("buckets", [buckets], MINHASH.num_buckets), ("clusters", [clusters], 1)]
        return [MinhashDedupSignature(signatures, MINHASH, language=Words())], find, [MinhashDedupFilter(removed)]
    return [], [], []


def stages_of(
    part: str, inputs: Sequence[Input], folder: Path, settings: Settings, filters: dict, plan: Plan, fingerprint: dict
) -> list[Stage]:
    """Every stage in order. `filters`: arguments of `Filters`."""
    kind, work = filters["deduplicate"], work_of(folder)
    sign, find, leave_out = deduplication(kind, work)
    convert = Convert(inputs, settings, filters | {"deduplicate": "none"}, work)
    stages: list[Stage] = [("convert", [convert, *sign], plan.tasks), *find]
    stages.append(("write", [Converted(work), *leave_out, Write(work)], plan.tasks))
    stages.append(("publish", [Publish(part, inputs, folder, fingerprint, kind)], 1))
    if plan.tokenizer:
        stages.append(("tokenise", [Tokenise(part, folder, plan.tokenizer)], plan.tasks))
        stages.append(("join", [Join(folder)], 1))
    return stages


def executor_of(part: str, stages: Sequence[Stage], folder: Path, plan: Plan) -> PipelineExecutor:
    """The last stage's executor, which depends on the one before, and so on. Raises UserError."""
    executor = None
    for name, steps, tasks in stages:
        at_most = plan.workers or ((os.cpu_count() or 1) if plan.executor == "local" else tasks)
        named = {"job_name": f"{part}-{name}", "env_command": ENVIRONMENT} if plan.executor == "slurm" else {}
        try:
            executor = EXECUTORS[plan.executor](
                pipeline=steps,
                tasks=tasks,
                workers=min(tasks, at_most),
                logging_dir=str(work_of(folder) / "logs" / name),
                depends=executor,
                **(named | plan.options),
            )
        except TypeError as error:
            raise UserError(f"executor {plan.executor}: options: {error}") from None
    return executor


def prepare_on_cluster(
    part: str, inputs: Sequence[Input], folder: Path, settings: Settings, filters: dict, plan: Plan, restart: bool
) -> dict | None:
    """Run (Slurm: submit) all stages for one part; the report, or None when it is still to come. Raises UserError."""
    if plan.tokenizer and part != "pretrain":
        raise UserError(f"executor file: tokenizer: {part} data is tokenised by its training, which knows the lengths")
    folder = folder.resolve()
    fingerprint = fingerprint_of(part, inputs, settings, Filters(**filters)) | {"executor_tasks": plan.tasks}
    started = work_of(folder) / "settings.json"
    with locked(folder):
        if restart:
            shutil.rmtree(work_of(folder), ignore_errors=True)
        elif already_written(folder, fingerprint) and (folder / "tokens").exists() >= bool(plan.tokenizer):
            shutil.rmtree(work_of(folder), ignore_errors=True)
            return json.loads((folder / REPORT).read_text("utf-8")) | {"already": True}
        elif started.exists() and json.loads(started.read_text("utf-8")) != fingerprint:
            raise UserError(f"{started}: a run with other settings was begun; repeat its command or add --restart")
        write_json(started, fingerprint)
        stages = stages_of(part, inputs, folder, settings, filters, plan, fingerprint)
        executor_of(part, stages, folder, plan).run()
        if plan.executor == "slurm":
            return None
        shutil.rmtree(work_of(folder))
        return json.loads((folder / REPORT).read_text("utf-8"))
