"""Optional filters of records while data is prepared: length, quality, language, contamination, duplicates.

Each filter is an object with `judge(record)`: the reason why the record is unwanted, or None; and
`remember(record)`: called with every record that all filters let pass. What a filter knows follows from the
records that were kept, so an interrupted run restores it from its own output. Cheap filters come first.

Words are runs of letters and digits; a Chinese, Japanese or Korean character is a word of its own."""

import hashlib
import re
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from smolkit.errors import UserError

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
SHINGLE_WORDS = 5
LANGUAGE_CHARACTERS = 2000  # of a text that the language is read from
SHORTEST_GRAM = 8  # words; evaluation texts shorter than this would match by chance
# The same where most words are single characters. A Chinese word has nearly two of them: 13 characters are one official
# name, and 8 are a stock phrase such as "which of the following is correct", that any text may have.
CJK_GRAM, SHORTEST_CJK_GRAM = 24, 15


def text_of(record: dict) -> str:
    """All text of a record of any kind, parts separated by a newline."""
    if "text" in record:
        return record["text"]
    if "messages" in record:
        calls = [str(message["tool_calls"]) for message in record["messages"] if message.get("tool_calls")]
        return "\n".join([message["content"] for message in record["messages"]] + calls)
    prompt = record["prompt"]
    prompts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return "\n".join([*prompts, record["chosen"], record["rejected"]])


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def digest(text: str) -> int:
    """A stable 64-bit hash."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class HashSet:
    """A set of 64-bit hashes in 8 bytes each: a sorted array, and a small Python set of the newest."""

    NEWEST = 1 << 17

    def __init__(self) -> None:
        self.sorted = np.empty(0, dtype=np.uint64)
        self.view = self.sorted.data
        self.newest: set[int] = set()

    def __len__(self) -> int:
        return len(self.sorted) + len(self.newest)

    def __contains__(self, value: int) -> bool:
        if value in self.newest:
            return True
        at = bisect_left(self.view, value)  # for one value much faster than np.searchsorted
        return at < len(self.view) and self.view[at] == value

    def add(self, value: int) -> bool:
        """Whether `value` is new."""
        if value in self:
            return False
        self.newest.add(value)
        if len(self.newest) >= self.NEWEST:
            newest = np.fromiter(self.newest, dtype=np.uint64, count=len(self.newest))
            self.sorted = np.concatenate([self.sorted, newest])
            self.sorted.sort()
            self.view = self.sorted.data
            self.newest = set()
        return True


class Filter(ABC):
    """What every filter does; most remember nothing."""

    @abstractmethod
    def judge(self, record: dict) -> str | None:
        """The reason why `record` is unwanted, or None."""

    def remember(self, record: dict) -> None:  # noqa: B027 (not abstract on purpose)
        """Take note of a record that every filter let pass."""


class Length(Filter):
    """Records whose text has fewer than `least` or more than `most` characters."""

    def __init__(self, least: int | None, most: int | None) -> None:
        self.least, self.most = least, most

    def judge(self, record: dict) -> str | None:
        size = len(text_of(record))
        if self.least is not None and size < self.least:
            return f"length: below {self.least} characters"
        return f"length: above {self.most} characters" if self.most is not None and size > self.most else None


class Words:
    """How a text falls into words, for datatrove's steps, in place of its `WordTokenizer` (one library for each
    language). Signs are no words, as in the paper, where a word is what stands between spaces."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)


class Quality(Filter):
    """The rules for web text of Gopher (Rae et al. 2021, appendix A.1) as datatrove has them, with its thresholds,
    except the number of words (see `Length`). They are about English (stop words) and about words (lengths, repeated
    n-grams); a text in which 30 % of the words are single Chinese, Japanese or Korean characters is only judged
    by the other rules."""

    def __init__(self) -> None:
        try:
            from datatrove.data import Document
            from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
            from datatrove.utils.word_tokenizers import WordTokenizer
        except ImportError:
            raise UserError("--quality_rules needs datatrove: pip install -r requirements-datatrove.txt") from None
        WordTokenizer.register(Words)
        self.document = Document
        rules = {"language": Words(), "min_doc_words": None, "max_doc_words": None}
        characters = {"min_avg_word_length": None, "max_avg_word_length": None, "min_stop_words": None}
        self.of_words = [GopherQualityFilter(**rules), GopherRepetitionFilter(language=Words())]
        self.of_characters = [
            GopherQualityFilter(**rules, **characters),
            GopherRepetitionFilter(language=Words(), top_n_grams=(), dup_n_grams=()),
        ]

    def judge(self, record: dict) -> str | None:
        text = text_of(record)
        words = len(words_of(text))
        if not words:
            return "quality: no words"
        document = self.document(text=text, id="")
        for rule in self.of_characters if len(CJK.findall(text)) > 0.3 * words else self.of_words:
            kept = rule.filter(document)
            if kept is not True:
                return f"quality: {kept[1]}"
        return None


class Language(Filter):
    """Records that are, with a probability above 1 - `threshold`, in none of `languages` (ISO 639-1 codes), by
    py3langid (Lui and Baldwin 2012); its model comes with the package. Texts of fewer than 20 characters stay: it
    is sure of their language, and wrong."""

    SHORTEST = 20

    def __init__(self, languages: Iterable[str], threshold: float = 0.2) -> None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self.languages, self.threshold = set(languages), threshold
        self.identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        unknown = self.languages - set(self.identifier.labels)
        if unknown:
            known = " ".join(sorted(self.identifier.labels))
            raise UserError(f"--keep_languages {' '.join(sorted(unknown))}: unknown; known are {known}")

    def judge(self, record: dict) -> str | None:
        text = text_of(record)[:LANGUAGE_CHARACTERS]
        if len(text) < self.SHORTEST:
            return None
        ranked = self.identifier.rank(text)
        wanted = sum(probability for language, probability in ranked if language in self.languages)
        return f"language: {ranked[0][0]}" if wanted < self.threshold else None


class Decontamination(Filter):
    """Records that share `size` consecutive words with an evaluation text (13, as for GPT-3: Brown et al. 2020,
    appendix C; where most of these are single Chinese, Japanese or Korean characters, 24). A shorter evaluation text
    of 8 words (15 such characters) or more is looked for as a whole; still shorter ones are left out, and counted in
    `ignored`."""

    def __init__(self, files: Iterable[Path], size: int = 13) -> None:
        self.grams: dict[str, str] = {}
        self.ignored = 0
        for path in files:
            before = len(self.grams)
            for text in evaluation_texts(path):
                grams = evaluation_grams(words_of(text), size)
                self.ignored += not grams
                for gram in grams:
                    self.grams.setdefault(gram, path.name)
            if len(self.grams) == before:
                raise UserError(
                    f"{path}: no text of {SHORTEST_GRAM} words or more to look for ({SHORTEST_CJK_GRAM} if they are "
                    "single Chinese, Japanese or Korean characters)"
                )
        if self.ignored:
            print(
                f"{self.ignored} evaluation texts of fewer than {SHORTEST_GRAM} words are not looked for (or of fewer "
                f"than {SHORTEST_CJK_GRAM} Chinese, Japanese or Korean characters)"
            )
        self.sizes = sorted({gram.count(" ") + 1 for gram in self.grams}, reverse=True)

    def judge(self, record: dict) -> str | None:
        words = words_of(text_of(record))
        for size in self.sizes:
            for gram in grams_of(words, size):
                if gram in self.grams:
                    return f"contaminated: shares {size} words with {self.grams[gram]}"
        return None


def grams_of(words: list[str], size: int) -> Iterator[str]:
    return (" ".join(words[i : i + size]) for i in range(len(words) - size + 1))


def mostly_cjk(words: list[str]) -> bool:
    return 2 * sum(bool(CJK.match(word)) for word in words) > len(words)


def evaluation_grams(words: list[str], size: int) -> list[str]:
    """The stretches of an evaluation text that a record must not have: from every word on `size` words, or `CJK_GRAM`
    where most of these are single characters; the whole text if it has no such stretch; none if it is too short."""
    starts = range(len(words) - size + 1)
    ends = [i + (CJK_GRAM if mostly_cjk(words[i : i + size]) else size) for i in starts]
    grams = [" ".join(words[i:end]) for i, end in zip(starts, ends, strict=True) if end <= len(words)]
    shortest = SHORTEST_CJK_GRAM if mostly_cjk(words) else SHORTEST_GRAM
    return grams or ([" ".join(words)] if len(words) >= shortest else [])


def evaluation_texts(path: Path) -> Iterator[str]:
    """Every string in the rows of a .jsonl, .json or .parquet file, or the paragraphs of a text file."""
    from smolkit.sources.files import DataFile, Unreadable, read_rows

    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (dict, list)):
            for each in value.values() if isinstance(value, dict) else value:
                yield from strings(each)

    try:
        if path.suffix == ".txt":
            yield from re.split(r"\n\s*\n", path.read_text("utf-8"))
            return
        for index, row in read_rows(DataFile(str(path), path.name, False)):
            if isinstance(row, Unreadable):
                raise UserError(f"{path}:{index + 1}: {row}; an evaluation set must be whole to be kept out")
            yield from strings(row)
    except (Unreadable, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); an evaluation set must be whole to be kept out") from None


class ExactDuplicates(Filter):
    """Records whose whole text, whitespace apart, was there before. 8 bytes of memory for each kept record."""

    def __init__(self) -> None:
        self.seen = HashSet()

    def judge(self, record: dict) -> str | None:
        return "duplicate: exact" if self.key(record) in self.seen else None

    def remember(self, record: dict) -> None:
        self.seen.add(self.key(record))

    @staticmethod
    def key(record: dict) -> int:
        return digest(" ".join(text_of(record).split()))


class NearDuplicates(Filter):
    """Records whose word 5-grams resemble those of a kept record (MinHash, Broder 1997, with rensa): their Jaccard
    similarity, estimated from 128 hashes, must reach `threshold`. Candidates are those that share a band of hashes;
    see `bands_for`. About 1.5 kB of memory for each kept record."""

    PERMUTATIONS = 128

    def __init__(self, threshold: float = 0.8) -> None:
        from rensa import RMinHashLSH

        self.threshold = threshold
        self.index = RMinHashLSH(threshold, self.PERMUTATIONS, bands_for(threshold))
        self.kept: list = []
        self.last: tuple = (None, None)  # the record judged last and its signature, which `remember` needs again

    def signature(self, record: dict) -> Any:
        from rensa import RMinHash

        if self.last[0] is not record:
            words = words_of(text_of(record))
            signature = RMinHash(self.PERMUTATIONS, 42)
            signature.update(list(set(grams_of(words, min(SHINGLE_WORDS, max(1, len(words)))))))
            self.last = (record, signature)
        return self.last[1]

    def judge(self, record: dict) -> str | None:
        signature = self.signature(record)
        alike = any(signature.jaccard(self.kept[i]) >= self.threshold for i in self.index.query(signature))
        return "duplicate: near" if alike else None

    def remember(self, record: dict) -> None:
        self.index.insert(len(self.kept), self.signature(record))
        self.kept.append(self.signature(record))


def bands_for(threshold: float) -> int:
    """In how many bands the 128 hashes are compared: the fewest, from 16 of 8 hashes on, in which of pairs that have
    just this similarity 94 % share one. More bands cost time, not precision, as candidates are compared in full."""
    bands = (16, 32, 64, 128)
    found = (b for b in bands if 1 - (1 - threshold ** (NearDuplicates.PERMUTATIONS // b)) ** b >= 0.94)
    return next(found, bands[-1])


class Filters:
    """The filters that the user asked for, in the order they run."""

    def __init__(
        self,
        *,
        min_characters: int | None = None,
        max_characters: int | None = None,
        quality: bool = False,
        languages: Iterable[str] = (),
        decontaminate: Iterable[Path] = (),
        deduplicate: str = "none",
        near_threshold: float = 0.8,
    ) -> None:
        """`deduplicate`: "none", "exact", or "near" (which removes exact duplicates too)."""
        self.asked = {
            "min_characters": min_characters,
            "max_characters": max_characters,
            "quality": quality,
            "languages": sorted(languages),
            "decontaminate": [
                f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in existing(decontaminate)
            ],
            "deduplicate": deduplicate,
            "near_threshold": near_threshold,
        }
        chain: list[tuple[object, type[Filter], tuple]] = [
            (min_characters or max_characters, Length, (min_characters, max_characters)),
            (languages, Language, (languages,)),
            (quality, Quality, ()),
            (decontaminate, Decontamination, (decontaminate,)),
            (deduplicate != "none", ExactDuplicates, ()),
            (deduplicate == "near", NearDuplicates, (near_threshold,)),
        ]
        self.filters = [make(*arguments) for wanted, make, arguments in chain if wanted]

    def judge(self, record: dict) -> str | None:
        """The first reason against the record, or None; a record without one is remembered."""
        for each in self.filters:
            reason = each.judge(record)
            if reason:
                return reason
        self.remember(record)
        return None

    def remember(self, record: dict) -> None:
        for each in self.filters:
            each.remember(record)

    def settings(self) -> dict:
        """What was asked for, in JSON's types; evaluation files by name and content."""
        return self.asked


def existing(paths: Iterable[Path]) -> list[Path]:
    missing = [str(path) for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"--decontaminate {' '.join(missing)}: no such file")
    return [Path(path) for path in paths]
