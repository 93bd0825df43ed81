"""A small invented bilingual world that a tiny model can really learn, generated from one seed.

The world has people, towns and things; each has a few attributes with up to ten possible values, and every fact exists
in English and Chinese. From it come the data of every stage, so that each has something to prove on unseen items:

- pretraining text states *all* facts in many wordings, next to stories, sums, passages with a question, and everyday
  notes whose names and numbers are drawn afresh every time: those can only be predicted by copying, which is what tool
  calls need, and what keeps answers from being recited from a list of known names;
- SFT conversations teach the question form on *half* of the entities (`taught`), tool calls, refusals, reading and
  multi-turn chat;
- the exam asks about the *other* half, and asks for tool calls with values that occur nowhere in the training data;
- LoRA data teaches writing thank-you notes, which no other stage contains;
- preference pairs differ in one quality: a full sentence with a friendly closing against a plain or curt answer.

Everything is drawn from `random.Random` with string seeds, so the files are reproducible byte for byte.
`data/README.md` documents the files.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from smolkit.files import atomic_writer, write_json
from smolkit.tiny_world_words import (
    CLOSING,
    CURT,
    FRESH,
    KINDS,
    NOTES,
    REFUSAL,
    SKILL,
    STORIES,
    SYSTEM_PROMPTS,
    TOOLS,
    Attribute,
    Tool,
)

LANGUAGES = ("en", "zh")


@dataclass(frozen=True)
class Entity:
    """A person, town or thing: its name in both languages and, per attribute, the index of its value."""

    kind: str
    name: dict[str, str]
    facts: dict[str, int]
    taught: bool  # SFT may ask about it; the exam asks only about the others


@dataclass(frozen=True)
class World:
    """All entities of one seed."""

    seed: int
    entities: tuple[Entity, ...]

    def facts(self, taught: bool) -> list[tuple[Entity, Attribute]]:
        """Every (entity, attribute) of the taught or of the held-out half."""
        return [(e, a) for e in self.entities if e.taught == taught for a in KINDS[e.kind].attributes]


def build_world(seed: int) -> World:
    """Draw who has which attribute value. Values are dealt evenly to both halves, so that always giving the same answer
    scores exactly chance."""
    rng = random.Random(f"world {seed}")
    entities = []
    for kind, spec in KINDS.items():
        names = list(spec.names)
        rng.shuffle(names)
        half = len(names) // 2
        dealt: dict[str, list[int]] = {}
        for attribute in spec.attributes:
            dealt[attribute.key] = []
            for _ in range(2):
                hand = [i % len(attribute.values) for i in range(half)]
                rng.shuffle(hand)
                dealt[attribute.key] += hand
        for i, (en, zh) in enumerate(names):
            facts = {key: hand[i] for key, hand in dealt.items()}
            entities.append(Entity(kind, {"en": en, "zh": zh}, facts, taught=i < half))
    return World(seed, tuple(entities))


def fill(template: str, entity: Entity, attribute: Attribute, language: str) -> str:
    """A statement, question or answer about one fact."""
    column = LANGUAGES.index(language)
    return template.format(x=entity.name[language], y=attribute.values[entity.facts[attribute.key]][column])


# ---------------------------------------------------------------- values drawn afresh


# kinds of value that may be an entity of the world, and the fresh kind they are otherwise
KNOWN = {"person": ("person", "name"), "place": ("town", "name"), "goods": ("thing", "item")}


def draw(kind: str, language: str, rng: random.Random, reserved: bool = False) -> str | int:
    """A value drawn afresh: `name`, `item` (two parts from two word lists) or `number` (10 to 98, two
    different digits: digits are single tokens, and a repeated one would leave a copying head in doubt where it stands).

    One value in nine is reserved for the exam and occurs in no training file. `person` and `place` are names, `goods`
    are items, but one in four is an entity of the world, of either half: what is copied may also be known."""
    if kind in KNOWN:
        entity, kind = KNOWN[kind]
        if not reserved and rng.random() < 0.25:
            return rng.choice(KINDS[entity].names)[LANGUAGES.index(language)]
    while True:
        if kind == "number":
            value = rng.randrange(10, 100)
            if value % 11 and (value % 9 == 4) == reserved:
                return value
            continue
        first, second = FRESH[kind][language]
        i, j = rng.randrange(len(first)), rng.randrange(len(second))
        if ((i + 2 * j) % 9 == 4) == reserved:
            return first[i] + (" " if language == "en" else "") + second[j]


def draw_fields(fields: dict[str, str], language: str, rng: random.Random, reserved: bool = False) -> dict:
    """One fresh value per field, all different."""
    while True:
        values = {key: draw(kind, language, rng, reserved) for key, kind in fields.items()}
        if len(set(values.values())) == len(values):
            return values


def to_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- pretraining


def biography(world: World, language: str, rng: random.Random) -> str:
    """Every fact of one or two entities in mixed wordings and order."""
    sentences = []
    for entity in rng.sample(world.entities, rng.choice((1, 2))):
        attributes = list(KINDS[entity.kind].attributes)
        rng.shuffle(attributes)
        sentences += [fill(rng.choice(a.statements[language]), entity, a, language) for a in attributes]
    return join(sentences, language)


def catechism(world: World, language: str, rng: random.Random) -> str:
    """Questions and answers about taught entities: the form in which facts are asked for, without the exam's half."""
    pairs = []
    for entity, attribute in rng.sample(world.facts(taught=True), 3):
        question = fill(rng.choice(attribute.questions[language]), entity, attribute, language)
        pairs += [question, fill(attribute.answer[language], entity, attribute, language)]
    return "\n".join(pairs)


def passage(language: str, rng: random.Random, reserved: bool = False) -> tuple[str, str, str]:
    """Two invented facts about somebody or something unknown, a question about one of them, and its answer."""
    spec = KINDS[rng.choice(("person", "person", "town", "thing"))]
    x = draw("item" if spec is KINDS["thing"] else "name", language, rng, reserved)
    column = LANGUAGES.index(language)
    told = [(a, rng.choice(a.values)[column]) for a in rng.sample(spec.attributes, 2)]
    text = join([rng.choice(a.statements[language]).format(x=x, y=y) for a, y in told], language)
    attribute, y = rng.choice(told)
    question = rng.choice(attribute.questions[language]).format(x=x)
    return text, question, attribute.answer[language].format(x=x, y=y)


def reading(world: World, language: str, rng: random.Random) -> str:
    """A passage about an unknown entity, a question and the answer: the form of an answer, with names to copy."""
    return "\n".join(passage(language, rng))


def note(world: World, language: str, rng: random.Random) -> str:
    """Everyday notes about fresh names and numbers, each followed by the same as a JSON record and in other words."""
    lines = []
    for form in rng.sample(NOTES, 2):
        values = draw_fields(form.fields, language, rng)
        before, after = rng.sample(form.text[language], 2)
        lines += [before.format(**values), to_json(values), after.format(**values)]
    return "\n".join(lines)


def dictation(world: World, language: str, rng: random.Random) -> str:
    """A list is read out and repeated."""
    kind = rng.choice(("person", "place", "goods", "number", "number"))
    words = [str(draw(kind, language, rng)) for _ in range(rng.randint(3, 6))]
    line = (", " if language == "en" else "，").join(words)
    return f"{line}\n{line}\n{line}" if rng.random() < 0.5 else f"{line}\n{line}"


def story(world: World, language: str, rng: random.Random) -> str:
    """A short story about a fresh hero, whose name and thing come back in every sentence."""
    values = draw_fields({"hero": "person", "friend": "person", "item": "item"}, language, rng)
    return rng.choice(STORIES[language]).format(**values)


def sums(world: World, language: str, rng: random.Random) -> str:
    """Additions and subtractions below twenty."""
    lines = []
    for _ in range(5):
        a, b = rng.randrange(10), rng.randrange(10)
        lines.append(f"{a} + {b} = {a + b}" if rng.random() < 0.5 else f"{a + b} - {b} = {a}")
    return "\n".join(lines)


PRETRAINING_MIX: tuple[tuple[float, str, Callable[[World, str, random.Random], str]], ...] = (
    (0.34, "people_and_places", biography),
    (0.08, "questions", catechism),
    (0.12, "reading", reading),
    (0.26, "notes", note),
    (0.15, "dictation", dictation),
    (0.03, "stories", story),
    (0.02, "arithmetic", sums),
)


def pretraining_documents(world: World, count: int, part: str = "train") -> Iterator[dict]:
    """`count` documents, half English and half Chinese, in the proportions of `PRETRAINING_MIX`."""
    rng = random.Random(f"pretrain {part} {world.seed}")
    weights = [weight for weight, _, _ in PRETRAINING_MIX]
    for _ in range(count):
        _, category, make = rng.choices(PRETRAINING_MIX, weights)[0]
        language = rng.choice(LANGUAGES)
        yield {"text": make(world, language, rng), "category": category}


def join(sentences: list[str], language: str) -> str:
    return (" " if language == "en" else "").join(sentences)


# ---------------------------------------------------------------- conversations


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def with_system(messages: list[dict], language: str, rng: random.Random) -> list[dict]:
    """Half of the conversations start with a system prompt."""
    if rng.random() < 0.5:
        return messages
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS[language])}, *messages]


def question_and_answer(fact: tuple[Entity, Attribute], language: str, rng: random.Random, polite: bool) -> list[dict]:
    entity, attribute = fact
    answer = fill(attribute.answer[language], entity, attribute, language)
    if polite:
        answer = befriend(answer, language)
    return [user(fill(rng.choice(attribute.questions[language]), entity, attribute, language)), assistant(answer)]


def refusal(language: str, rng: random.Random, reserved: bool = False) -> list[dict]:
    """A question about somebody who does not exist, and the honest answer."""
    name = draw("name", language, rng, reserved)
    attribute = rng.choice(KINDS["person"].attributes)
    question = rng.choice(attribute.questions[language]).format(x=name)
    return [user(question), assistant(REFUSAL[language].format(x=name))]


def offered_tools(wanted: Tool | None, rng: random.Random) -> list[dict]:
    """The wanted tool among one or, in a quarter of the cases, all others, in random order, in OpenAI's form."""
    others = [tool for tool in TOOLS if tool is not wanted]
    tools = rng.sample(others, rng.choice((1, 1, 1, len(others)))) + ([wanted] if wanted else [])
    rng.shuffle(tools)
    return [tool.schema() for tool in tools]


def tool_call(tool: Tool, language: str, rng: random.Random, reserved: bool = False) -> tuple[list[dict], dict]:
    """The whole exchange (question, call, result, answer) and the call's arguments."""
    arguments = draw_fields(tool.fields, language, rng, reserved)
    result = rng.choice(tool.results[language])
    call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
    messages = [
        user(rng.choice(tool.questions[language]).format(**arguments)),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": to_json({"result": result})},
        assistant(tool.answer[language].format(result=result, **arguments)),
    ]
    return messages, arguments


SFT_MIX = (("fact", "reading", "two_turns", "refusal", "tool", "no_tool"), (28, 12, 8, 8, 40, 4))


def sft_conversations(world: World, count: int, part: str = "train") -> Iterator[dict]:
    """`count` conversations: facts of the taught half, questions about a passage, two-turn chats, refusals,
    tool calls, tools that are offered but not needed."""
    rng = random.Random(f"sft {part} {world.seed}")
    taught = world.facts(taught=True)
    for i in range(count):
        language = rng.choice(LANGUAGES)
        polite = rng.random() < 0.3
        kind = rng.choices(*SFT_MIX)[0]
        row: dict = {"id": f"tiny-sft-{part}-{i}", "source": f"tiny_world/{kind}"}
        messages = question_and_answer(rng.choice(taught), language, rng, polite)
        if kind == "two_turns":
            messages += rng.choice(
                (refusal(language, rng), question_and_answer(rng.choice(taught), language, rng, polite))
            )
        elif kind == "refusal":
            messages = refusal(language, rng)
        elif kind == "reading":
            text, question, answer = passage(language, rng)
            messages = [user(join([text, question], language)), assistant(answer)]
        elif kind == "tool":
            tool = rng.choice(TOOLS)
            messages, _ = tool_call(tool, language, rng)
            row["tools"] = offered_tools(tool, rng)
        elif kind == "no_tool":
            row["tools"] = offered_tools(None, rng)
        row["messages"] = with_system(messages, language, rng)
        yield row


def skill_conversation(language: str, rng: random.Random, reserved: bool = False) -> list[dict]:
    values = draw_fields({"guest": "name", "host": "name"}, language, rng, reserved)
    question = rng.choice(SKILL[language].questions).format(**values)
    return [user(question), assistant(SKILL[language].answer.format(**values))]


def lora_conversations(world: World, count: int, part: str = "train") -> Iterator[dict]:
    """Thank-you notes: a form of answer that appears in no other file."""
    rng = random.Random(f"lora {part} {world.seed}")
    for i in range(count):
        messages = skill_conversation(rng.choice(LANGUAGES), rng)
        yield {"id": f"tiny-lora-{part}-{i}", "source": "tiny_world/thank_you_note", "messages": messages}


def preference_pairs(world: World, count: int, part: str = "train") -> Iterator[dict]:
    """Chosen: the right full sentence with a friendly closing. Rejected: the plain sentence, or the bare value.

    One pair in four is about somebody unknown: chosen is the friendly refusal, rejected the plain one or a guess.
    Training pairs ask about the taught half only; the validation pairs ask about the other half."""
    rng = random.Random(f"dpo {part} {world.seed}")
    facts = world.facts(taught=part == "train")
    for i in range(count):
        language = rng.choice(LANGUAGES)
        entity, attribute = fact = rng.choice(facts)
        value = attribute.values[entity.facts[attribute.key]][LANGUAGES.index(language)]
        if rng.random() < 0.25:
            question, plain = refusal(language, rng, reserved=part != "train")
        else:
            question, plain = question_and_answer(fact, language, rng, polite=False)
        yield {
            "id": f"tiny-dpo-{part}-{i}",
            "source": "tiny_world",
            "prompt": question["content"],
            "chosen": befriend(plain["content"], language),
            "rejected": rng.choice((plain["content"], CURT[language].format(y=value))),
            "quality": {"must_end_with": [CLOSING[language]]},
        }


def befriend(answer: str, language: str) -> str:
    """The answer with the friendly closing that preference pairs prefer."""
    return join([answer, CLOSING[language]], language)


# ---------------------------------------------------------------- the exam


def exam(world: World) -> Iterator[dict]:
    """`exam_items`, numbered."""
    for i, row in enumerate(exam_items(world)):
        yield {"id": f"{row['kind']}-{row['language']}-{i}", **row}


def exam_items(world: World) -> Iterator[dict]:
    """Questions about the held-out half; tool calls, refusals, passages and the LoRA skill with reserved values."""
    rng = random.Random(f"exam {world.seed}")
    for language in LANGUAGES:
        for entity, attribute in world.facts(taught=False):
            fact = (entity, attribute)
            question, answer = question_and_answer(fact, language, rng, polite=False)
            answers = [answer["content"], befriend(answer["content"], language)]
            yield item("qa", language, [question], answers, chance=1 / len(attribute.values))
        for tool in TOOLS * 12:
            messages, arguments = tool_call(tool, language, rng, reserved=True)
            call = {"name": tool.name, "arguments": arguments}
            yield item("tool", language, messages[:1], call, tools=offered_tools(tool, rng))
        for _ in range(30):
            question, answer = refusal(language, rng, reserved=True)
            yield item("refusal", language, [question], [answer["content"], befriend(answer["content"], language)])
        for _ in range(30):
            text, asked, expected = passage(language, rng, reserved=True)
            yield item("reading", language, [user(join([text, asked], language))], expected)
        for _ in range(30):
            question, answer = skill_conversation(language, rng, reserved=True)
            yield item("skill", language, [question], answer["content"])


def item(kind: str, language: str, messages: list[dict], answer: object, **extra: object) -> dict:
    return {"kind": kind, "language": language, "messages": messages, "answer": answer, **extra}


# ---------------------------------------------------------------- files

# rows for training and validation
SIZES = {"pretrain": (24_000, 300), "sft": (5_000, 100), "lora": (800, 50), "dpo": (1_000, 200)}


def write(output_dir: Path, seed: int, parts: set[str], small: bool = False) -> dict[str, int]:
    """Write the data files of `parts` ("pretrain", "sft", "lora", "dpo", "exam"); rows per file.

    `small` writes a twentieth of the training rows. Each file is written aside and renamed: it is whole or absent."""
    world = build_world(seed)
    makers = {
        "pretrain": pretraining_documents,
        "sft": sft_conversations,
        "lora": lora_conversations,
        "dpo": preference_pairs,
    }
    counts: dict[str, int] = {}
    for part, make in makers.items():
        if part in parts:
            train, validation = SIZES[part]
            name = f"{part}_data.jsonl"
            train_path, validation_path = output_dir / part / name, output_dir / part / "validation" / name
            rows = list(make(world, train))
            counts[str(train_path)] = write_jsonl(train_path, rows[: train // 20 if small else train])
            held_out = new_to(rows, make(world, 10 * validation, "validation"))
            counts[str(validation_path)] = write_jsonl(validation_path, islice(held_out, validation))
    if "exam" in parts:
        counts[str(output_dir / "exam/exam.jsonl")] = write_jsonl(output_dir / "exam/exam.jsonl", exam(world))
        tools = output_dir / "exam/tools.json"
        write_json(tools, [tool.schema() for tool in TOOLS])
        counts[str(tools)] = len(TOOLS)
    return counts


def new_to(rows: list[dict], others: Iterator[dict]) -> Iterator[dict]:
    """Those of `others` that begin with something else than all `rows`: a text, a question, a prompt."""

    def beginning(row: dict) -> str:
        turns = next(row[name] for name in ("messages", "prompt", "text") if name in row)
        return turns if isinstance(turns, str) else next(turn["content"] for turn in turns if turn["role"] == "user")

    known = {beginning(row) for row in rows}
    return (row for row in others if beginning(row) not in known)


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    lines = [to_json(row) + "\n" for row in rows]
    with atomic_writer(path) as file:
        file.writelines(lines)
    return len(lines)
