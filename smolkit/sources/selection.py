"""Which datasets, configurations and revisions the user means, and where their files are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smolkit import sources
from smolkit.errors import UserError
from smolkit.sources.base import Source
from smolkit.sources.files import DataFile, expected, find_folder, hub_files, local_files


@dataclass(frozen=True)
class Selected:
    """A dataset with the values of its choices that the user gave, and a revision if one was given."""

    source: Source
    chosen: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    revision: str | None = None
    named: bool = True  # by the user, not taken because it is there

    @property
    def config(self) -> str:
        """Its configurations as they follow a colon; empty where the dataset has none."""
        choice = self.source.choices.get("config")
        return ",".join(self.chosen.get("config") or choice.default) if choice else ""


def parse_dataset(text: str, options: Mapping[str, Sequence[str] | None]) -> Selected:
    """`[owner/]name[:config,…][@revision]`; `options` holds the other choices (industry, language, quality).
    Raises UserError for a name, configuration or value that is not known."""
    name, _, revision = text.partition("@")
    name, _, config = name.partition(":")
    matches = [s for s in sources.ALL if name.lower() in (s.repo.lower(), s.name.lower())]
    if not matches:
        raise UserError(f"dataset {name}: unknown; known are {', '.join(known_names())}")
    if len(matches) > 1:
        raise UserError(f"dataset {name}: several have this name; say {' or '.join(s.repo for s in matches)}")
    source = matches[0]
    if config and "config" not in source.choices:
        raise UserError(f"dataset {text}: {source.repo} has no configurations")
    given = {"config": config.split(",") if config else None, **options}
    return Selected(source, choose(source, given), revision or None)


def refuse_overlap(names: Sequence[str], wanted: Sequence[Selected]) -> None:
    """Raise UserError when two of the datasets (in the user's spelling: `names`) take the same files, whose rows would
    come twice."""
    taken: dict[tuple[str, str], str] = {}
    for name, each in zip(names, wanted, strict=True):
        for pattern in each.source.patterns(each.chosen)[0]:
            if (before := taken.get((each.source.repo, pattern))) is not None:
                raise UserError(
                    f"{before} and {name} both take {pattern} of {each.source.repo}, whose rows would come twice; name "
                    "it once (a mixture's repeat takes rows more than once)"
                )
            taken[each.source.repo, pattern] = name


def known_names() -> list[str]:
    names = [source.name for source in sources.ALL]
    return [s.repo if names.count(s.name) > 1 else s.name for s in sources.ALL]


def choose(source: Source, given: Mapping[str, Sequence[str] | None]) -> dict[str, tuple[str, ...]]:
    """The values in `given` for the choices that `source` has. Raises UserError."""
    chosen = {}
    for name, choice in source.choices.items():
        values = tuple(given.get(name) or ())
        for value in values:
            if value in source.refused:
                raise UserError(f"{source.name}: {source.refused[value]}; take {' or '.join(choice.default)}")
            if choice.known and value not in choice.known:
                raise UserError(f"{source.name}: {name} {value}: unknown; known are {', '.join(choice.known)}")
        if values:
            chosen[name] = values
    return chosen


def defaults(parts: Sequence[str], options: Mapping[str, Sequence[str] | None], everything: bool) -> list[Selected]:
    """The datasets taken when the user names none: the default ones, or with `everything` (a local folder) all
    published ones that are there."""
    wanted = [s for s in sources.ALL if s.part in parts and (s.default or (everything and s.on_hub))]
    return [Selected(source, choose(source, options), named=False) for source in wanted]


def on_hub(wanted: Selected, revision: str | None) -> tuple[list[DataFile], str]:
    """Its files on the hub and their commit; `revision` is that of an interrupted run. Raises UserError."""
    if not wanted.source.on_hub:
        raise UserError(f"{wanted.source.name}: a form of your own files; use --source local --path DIR")
    return hub_files(wanted.source, wanted.chosen, wanted.revision or revision)


def on_disk(wanted: Selected, root: Path) -> list[DataFile]:
    """Its files under `root`; empty when the user did not name it and it is not there. Raises UserError."""
    if not root.is_dir():
        raise UserError(f"--path {root}: no such directory")
    folder = find_folder(wanted.source, root)
    if folder is None and wanted.named and not wanted.source.on_hub:
        folder = root  # own files need no folder of a certain name
    files = local_files(wanted.source, folder, wanted.chosen) if folder else []
    if not files and wanted.named:
        patterns = expected(wanted.source, wanted.chosen)
        raise UserError(f"{folder or root / wanted.source.name}: no files of {wanted.source.repo}; expected {patterns}")
    if folder and not files:
        print(
            f"{folder}: no files of {wanted.source.repo} (expected {expected(wanted.source, wanted.chosen)}), left out"
        )
    return files
