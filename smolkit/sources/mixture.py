"""Mixtures: several prepared sources in given proportions, small ones repeated (upsampled).

    sft:
      total: 100000              # optional; records, for pretraining estimated tokens
      sources:
        - {dataset: smol-smoltalk, weight: 0.6}
        - {dataset: "smoltalk:apigen-80k", weight: 0.3, max_records: 20000}
        - {dataset: gsm8k, weight: 0.1, repeat: 4}

`weight` is the share of the source in the mixture: of its records, in pretraining of its bytes. `repeat` is how
often a record may be used (default once). Without `total` the mixture is as large as no source has to be
repeated more often. Each source is first prepared on its own (in the hidden folder `<part>/.sources/`,
resumable), so its size is known; mixing then only copies lines. Validation rows are never repeated, and what one
source's publisher held out is not trained on from another (near duplicates with another question apart: of those
`--deduplicate near` keeps the one of the source that is named first)."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from smolkit.errors import UserError
from smolkit.files import atomic_writer, write_json
from smolkit.filters import Filters
from smolkit.sources.output import REPORT, output_names, remove_earlier
from smolkit.sources.pipeline import BYTES_PER_TOKEN, HeldOut, Input, Settings, write_part

NUMBER = (int, float)
KEYS: dict[str, Any] = {"dataset": str, "weight": NUMBER, "repeat": int, "max_records": int, "max_tokens": NUMBER}


@dataclass(frozen=True)
class Share:
    """One source of a mixture as the user wrote it."""

    dataset: str
    weight: float
    repeat: int = 1
    max_records: int | None = None
    max_tokens: float | None = None


@dataclass(frozen=True)
class Mixture:
    """The sources of one part, and the size of the mixture (None: as large as the sources allow)."""

    shares: tuple[Share, ...]
    total: float | None = None


def read_mixtures(path: Path) -> dict[str, Mixture]:
    """The mixture of each part in a YAML file. Raises UserError that names the file and the entry."""
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict) or not value or not set(value) <= {"pretrain", "sft", "dpo"}:
        raise UserError(f"{path}: must hold a mixture under pretrain, sft or dpo, or several of them")
    return {part: _mixture(entry, f"{path}: {part}") for part, entry in value.items()}


def _mixture(entry: object, where: str) -> Mixture:
    if not isinstance(entry, dict) or not isinstance(entry.get("sources"), list) or not entry["sources"]:
        raise UserError(f"{where}: needs a list called sources")
    if unknown := set(entry) - {"sources", "total"}:
        raise UserError(f"{where}: unknown keys {', '.join(sorted(unknown))}; known are sources, total")
    total = entry.get("total")
    if total is not None and (not isinstance(total, (int, float)) or total <= 0):
        raise UserError(f"{where}: total: {total}: must be a number above 0")
    shares = tuple(_share(each, f"{where}: source {i}") for i, each in enumerate(entry["sources"], 1))
    if len({share.dataset for share in shares}) < len(shares):
        raise UserError(f"{where}: a dataset is named twice; use repeat to take its records more than once")
    return Mixture(shares, total)


def _share(each: object, where: str) -> Share:
    if not isinstance(each, dict) or not {"dataset", "weight"} <= set(each):
        raise UserError(f"{where}: needs dataset and weight, got {each}")
    for key, value in each.items():
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key}; known are {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]) or (key != "dataset" and value <= 0):
            raise UserError(f"{where}: {key}: {value}: must be {'text' if key == 'dataset' else 'a number above 0'}")
    return Share(**each)


def quotas(sizes: Mapping[str, int], mixture: Mixture, total: float | None) -> dict[str, int]:
    """How much of each source (by its name; in the unit of `sizes`) makes the mixture. Raises UserError when
    `total` needs more of a source than its `repeat` allows."""
    weight = sum(share.weight for share in mixture.shares)
    wanted = {share.dataset: share.weight / weight for share in mixture.shares}
    room = {share.dataset: sizes[share.dataset] * share.repeat for share in mixture.shares}
    largest = min(room[name] / wanted[name] for name in wanted)
    if total is not None and total > largest * (1 + 1e-9):
        name = min(wanted, key=lambda n: room[n] / wanted[n])
        passes = total * wanted[name] / sizes[name]
        raise UserError(
            f"mixture: {name} would have to be used {passes:.1f} times for a total of {total:.0f}; raise its repeat, "
            f"lower its weight, or make the total at most {largest:.0f}"
        )
    return {name: round((total or largest) * wanted[name]) for name in wanted}


def interleave(paths: Mapping[str, Path], wanted: Mapping[str, int], by_bytes: bool) -> Iterator[tuple[str, bytes]]:
    """(name, line): always from the source that has given the smallest part of its quota, so every stretch of
    the mixture has its proportions. A source that ends begins again; its ids then end in "#2", "#3", …"""
    lines = {name: _passes(path) for name, path in paths.items()}
    given = dict.fromkeys(paths, 0)
    open_names = [name for name in paths if wanted[name] > 0]
    while open_names:
        name = min(open_names, key=lambda n: given[n] / wanted[n])
        line = next(lines[name])
        given[name] += len(line) if by_bytes else 1
        yield name, line
        if given[name] >= wanted[name]:
            open_names.remove(name)


def _passes(path: Path) -> Iterator[bytes]:
    number = 1
    while True:
        with open(path, "rb") as file:
            for line in file:
                yield line if number == 1 else _renamed(line, number)
        number += 1


def _renamed(line: bytes, number: int) -> bytes:
    record = json.loads(line)
    if "id" not in record:
        return line
    return json.dumps(record | {"id": f"{record['id']}#{number}"}, ensure_ascii=False).encode() + b"\n"


def prepare_mixture(
    part: str,
    mixture: Mixture,
    inputs: Sequence[Input],
    folder: Path,
    settings: Settings,
    filters: Filters,
    restart: bool = False,
) -> dict:
    """Prepare each input (one for each share, in order) on its own, mix them into `<folder>/<part>_data.jsonl`,
    concatenate their validation rows, and write the report, which is returned. Raises UserError."""
    parts, reports, after, held_out = {}, {}, "", HeldOut(inputs, settings)
    for share, data in zip(mixture.shares, inputs, strict=True):
        own = parts[share.dataset] = folder / ".sources" / slug(share.dataset)
        report = write_part(part, [data], own, settings, filters, restart, after, held_out)
        after = f"{after} {share.dataset}".strip()
        reports[share.dataset] = report["sources"][data.source.repo]
    by_bytes, (name, validation) = part == "pretrain", output_names(part)
    paths = {dataset: own / name for dataset, own in parts.items()}
    sizes = {dataset: path.stat().st_size if by_bytes else _rows(path) for dataset, path in paths.items()}
    wanted = quotas(sizes, mixture, mixture.total and mixture.total * (BYTES_PER_TOKEN if by_bytes else 1))
    rows, size = dict.fromkeys(paths, 0), dict.fromkeys(paths, 0)
    with atomic_writer(folder / name, "wb") as file:
        for dataset, line in interleave(paths, wanted, by_bytes):
            file.write(line)
            rows[dataset] += 1
            size[dataset] += len(line)
    concatenate((own / validation for own in parts.values()), folder / validation)
    remove_earlier(folder, part, output_names(part))
    given = size if by_bytes else rows
    for dataset, report in reports.items():
        passes = round(given[dataset] / sizes[dataset], 3)
        fraction = round(given[dataset] / sum(given.values()), 4)
        report["mixture"] = {"share": fraction, "passes": passes, "rows": rows[dataset], "bytes": size[dataset]}
    write_json(folder / REPORT, {"sources": reports, "mixture": asdict(mixture)})
    return {"sources": reports}


def slug(dataset: str) -> str:
    """A dataset's specification as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", dataset)


def concatenate(paths: Iterable[Path], target: Path) -> None:
    """The files that exist, one after the other; no target when none does."""
    found = [path for path in paths if path.exists()]
    target.unlink(missing_ok=True)
    if found:
        with atomic_writer(target, "wb") as file:
            for path in found:
                with open(path, "rb") as lines:
                    shutil.copyfileobj(lines, file)


def _rows(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
