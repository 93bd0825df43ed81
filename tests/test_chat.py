"""The renderer against hand-computed ids, the literal layout and transformers' own template path; parsing."""

import copy
import json
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_tokenizer
from smolkit.answers import Answers
from smolkit.chat import (
    CHAT_TEMPLATE,
    add_chat_tokens,
    chat_stop_ids,
    encode_text,
    encode_texts,
    parse_tool_calls,
    render,
    render_fitting,
    validate_messages,
    validate_tools,
)
from smolkit.errors import UserError
from smolkit.openai_types import ChatRequest, CompletionRequest
from smolkit.packing import render_conversations, render_preferences

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "天气 of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
]


def call(name: str, arguments: dict | str) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS = {
    "user": [{"role": "user", "content": "Where is Ada?"}],
    "one turn": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    "chinese": [
        {"role": "system", "content": "你是一个助手。"},
        {"role": "user", "content": "苏晴住在哪里？"},
        {"role": "assistant", "content": "苏晴住在 3 号灯塔。"},
    ],
    "empty system": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ],
    "whitespace": [
        {"role": "system", "content": "\n\n two  spaces \n"},
        {"role": "user", "content": "\n\n\n  indented\n\tcode\n\n"},
        {"role": "assistant", "content": " \n \n  answer \n\n"},
        {"role": "user", "content": " "},
        {"role": "assistant", "content": "1234 567\r\n\r\n"},
    ],
    "multi turn": [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You're welcome 😀 é"},
    ],
    "tool call": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in 北京?"},
        {"role": "assistant", "content": "", "tool_calls": [call("get_weather", {"city": "北京"})]},
        {"role": "tool", "content": '{"sky": "clear"}'},
        {"role": "assistant", "content": "Clear."},
    ],
    "several calls": [
        {"role": "user", "content": "Add and tell"},
        {
            "role": "assistant",
            "content": "Both:\n",
            "tool_calls": [call("add", {"a": 1, "b": [2.5, None, True]}), call("get_weather", {})],
        },
        {"role": "tool", "content": "3.5"},
        {"role": "tool", "content": "\nrain\n"},
        {"role": "assistant", "content": None, "tool_calls": [call("add", '{"q": "a \\"b\\" {c}"}')]},
        {"role": "tool", "content": ""},
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A small trained tokenizer with merges, newlines and Chinese among them."""
    folder = tmp_path_factory.mktemp("chat")
    texts = [json.dumps({"messages": c, "tools": TOOLS}) for c in CONVERSATIONS.values() if len(c) > 1]
    data = folder / "sft.jsonl"
    rows = [row for row in texts if '"content": " "' not in row] * 3
    data.write_text("\n".join(rows), encoding="utf-8")
    options = ["--vocab_size", "600", "--extra_special_tokens"]
    train_tokenizer.main(
        ["--mode", "train", "--data_path", str(data), "--save_dir", str(folder / "tok"), *options]
    )
    return AutoTokenizer.from_pretrained(folder / "tok")


@pytest.fixture(scope="module")
def qwen_dir(samples: Path) -> Path:
    return samples / "qwen2.5_tokenizer"


@pytest.fixture(scope="module")
def qwen(qwen_dir: Path) -> PreTrainedTokenizerFast:
    """The real Qwen2.5 tokenizer (NFC normalizer, 151k merges) fitted for chat."""
    tokenizer = AutoTokenizer.from_pretrained(qwen_dir)
    add_chat_tokens(tokenizer)
    return tokenizer


@pytest.fixture(scope="module", params=["trained", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """No merges: every byte is one token, numbered in GPT-2's byte order, so ids can be computed by hand."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert add_chat_tokens(tokenizer) == 7
    return tokenizer


# --- golden ids ---------------------------------------------------------------------------------------------

# In GPT-2's byte order "!" to "~" are 0 to 93, newline is 198 and space 220; control tokens come next:
END_OF_TEXT, IM_END, IM_START, CALL, END_CALL, RESPONSE, END_RESPONSE = range(256, 263)
SYSTEM = [82, 88, 82, 83, 68, 76, 198]  # "system\n"
USER = [84, 82, 68, 81, 198]
ASSISTANT = [64, 82, 82, 72, 82, 83, 64, 77, 83, 198]


def test_control_token_ids_are_as_the_golden_lists_assume(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    names = "<|endoftext|> <|im_end|> <|im_start|> <tool_call> </tool_call> <tool_response> </tool_response>"
    assert byte_tokenizer.convert_tokens_to_ids(names.split()) == list(range(256, 263))


def test_control_tokens_are_matched_literally_and_calls_stay_visible(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    added = byte_tokenizer.added_tokens_decoder
    assert [added[i].special for i in range(256, 263)] == [True, True, True, False, False, False, False]
    for token in added.values():  # whatever a normalizer does to text, and without the space beside them
        assert not (token.normalized or token.lstrip or token.rstrip or token.single_word)
    add_chat_tokens(byte_tokenizer, ["<|x|>", "<|x|>"])
    extra = byte_tokenizer.added_tokens_decoder[263]
    assert (extra.content, extra.special, extra.normalized, len(byte_tokenizer)) == ("<|x|>", True, False, 264)


def test_golden_multi_turn_with_system(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(
        byte_tokenizer,
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "a b"},
            {"role": "assistant", "content": "Hi"},
            {"role": "user", "content": "你"},
            {"role": "assistant", "content": "!"},
        ],
    )
    expected = [
        ([IM_START, *SYSTEM, 50, IM_END, 198], 0),
        ([IM_START, *USER, 64, 220, 65, IM_END, 198], 0),
        ([IM_START, *ASSISTANT], 0),
        ([39, 72, IM_END], 1),  # every assistant turn is trained, with its end
        ([198], 0),  # but not the newline after it: nobody generates that
        ([IM_START, *USER, 160, 121, 254, IM_END, 198], 0),  # 你 = E4 BD A0
        ([IM_START, *ASSISTANT], 0),
        ([0, IM_END], 1),
        ([198], 0),
    ]
    assert rendered.input_ids == [i for ids, _ in expected for i in ids]
    assert rendered.loss_mask == [trained for ids, trained in expected for _ in ids]


def test_golden_tool_turns(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(
        byte_tokenizer,
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [call("f", {"a": 1})]},
            {"role": "tool", "content": "2"},
            {"role": "tool", "content": "3"},
        ],
        add_generation_prompt=True,
    )
    body = [ord(c) - 33 if c != " " else 220 for c in '{"name": "f", "arguments": {"a": 1}}']
    expected = [
        ([IM_START, *USER, 87, IM_END, 198, IM_START, *ASSISTANT], 0),
        ([CALL, 198, *body, 198, END_CALL, IM_END], 1),
        ([198, IM_START, *USER, RESPONSE, 198, 17, 198, END_RESPONSE], 0),
        ([198, RESPONSE, 198, 18, 198, END_RESPONSE, IM_END, 198], 0),
        ([IM_START, *ASSISTANT], 0),
    ]
    assert rendered.input_ids == [i for ids, _ in expected for i in ids]
    assert rendered.loss_mask == [trained for ids, trained in expected for _ in ids]


def letters(text: str) -> list[int]:
    """Ids of printable ASCII, spaces and newlines, one per byte."""
    return [{" ": 220, "\n": 198}.get(c, ord(c) - 33) for c in text]


def test_golden_several_calls_with_text_before_them(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    calls = [call("f", {"a": 1}), call("g", '{"b": "x"}')]
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Both:", "tool_calls": calls}]
    rendered = render(byte_tokenizer, turns)
    trained = [
        *letters("Both:\n"),
        *(CALL, 198, *letters('{"name": "f", "arguments": {"a": 1}}\n'), END_CALL, 198),
        *(CALL, 198, *letters('{"name": "g", "arguments": {"b": "x"}}\n'), END_CALL, IM_END),
    ]
    prompt = [IM_START, *USER, 87, IM_END, 198, IM_START, *ASSISTANT]
    assert rendered.input_ids == [*prompt, *trained, 198]
    assert rendered.loss_mask == [0] * len(prompt) + [1] * len(trained) + [0]


@pytest.mark.parametrize("tokens", [False, True], ids=["as text", "as tokens"])
def test_golden_thoughts(byte_tokenizer: PreTrainedTokenizerFast, tokens: bool) -> None:
    """Thoughts are trained, in earlier turns too, and stay in the conversation; in a user's text they are letters."""
    opening, closing = letters("<think>"), letters("</think>")
    if tokens:
        byte_tokenizer.add_tokens(["<think>", "</think>"])
        opening, closing = [263], [264]
    reply = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes"}
    rendered = render(byte_tokenizer, [{"role": "user", "content": "<think>"}, reply, *CONVERSATIONS["user"], reply])
    answer = [*opening, *letters("\nhm\n"), *closing, *letters("\n\nYes"), IM_END]
    question = letters("Where is Ada?")
    expected = [
        ([IM_START, *USER, *letters("<think>"), IM_END, 198, IM_START, *ASSISTANT], 0),
        (answer, 1),
        ([198, IM_START, *USER, *question, IM_END, 198, IM_START, *ASSISTANT], 0),
        (answer, 1),
        ([198], 0),
    ]
    assert rendered.input_ids == [i for ids, _ in expected for i in ids]
    assert rendered.loss_mask == [trained for ids, trained in expected for _ in ids]


def test_golden_chinese_with_generation_prompt(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """In GPT-2's byte order 0xA1 to 0xAC are 94 to 105, 0xAE to 0xFF 106 to 187, and 0x80 to 0xA0 222 to 254."""
    turns = [{"role": "system", "content": "好"}, {"role": "user", "content": "苏晴？"}]
    rendered = render(byte_tokenizer, turns, add_generation_prompt=True)
    good = [161, 98, 121]  # 好 = E5 A5 BD
    person = [164, 233, 237, 162, 247, 112, 171, 120, 253]  # 苏 = E8 8B 8F, 晴 = E6 99 B4, ？ = EF BC 9F
    ids = [IM_START, *SYSTEM, *good, IM_END, 198, IM_START, *USER, *person, IM_END, 198, IM_START, *ASSISTANT]
    assert rendered.input_ids == ids
    assert not any(rendered.loss_mask)


def test_empty_system_message_leaves_no_turn(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    rendered = render(byte_tokenizer, CONVERSATIONS["empty system"])
    assert rendered.input_ids[: 1 + len(USER)] == [IM_START, *USER]


def test_layout_literally(trained: PreTrainedTokenizerFast) -> None:
    text = trained.decode(render(trained, CONVERSATIONS["several calls"], TOOLS).input_ids)
    assert text == (
        "<|im_start|>system\n# Tools\n<tools>\n"
        '{"name": "get_weather", "description": "天气 of a city", "parameters": '
        '{"type": "object", "properties": {"city": {"type": "string"}}}}\n'
        '{"name": "add", "description": "", "parameters": {"type": "object"}}\n'
        "</tools><|im_end|>\n"
        "<|im_start|>user\nAdd and tell<|im_end|>\n"
        "<|im_start|>assistant\nBoth:\n\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2.5, null, true]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3.5\n</tool_response>\n"
        "<tool_response>\n\nrain\n\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"q": "a \\"b\\" {c}"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n\n</tool_response><|im_end|>\n"
    )
    with_system = trained.decode(render(trained, CONVERSATIONS["tool call"], TOOLS[1:]).input_ids)
    assert with_system.startswith('<|im_start|>system\nBe brief.\n\n# Tools\n<tools>\n{"name": "add"')


# --- equality with the template that other programs run -----------------------------------------------------


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_equals_apply_chat_template(
    tokenizer: PreTrainedTokenizerFast, name: str, add_generation_prompt: bool, tools: list | None
) -> None:
    rendered = render(tokenizer, CONVERSATIONS[name], tools, add_generation_prompt)
    theirs = tokenizer.apply_chat_template(
        CONVERSATIONS[name],
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert rendered.input_ids == theirs["input_ids"]
    assert rendered.loss_mask == theirs["assistant_masks"]


def test_arguments_as_object_or_json_string_render_alike(tokenizer: PreTrainedTokenizerFast) -> None:
    arguments = {"city": "北京", "days": 3}
    spaced_oddly = json.dumps(arguments, separators=(",", ":"))
    conversation = CONVERSATIONS["user"] + [{"role": "assistant", "content": ""}]
    ids = []
    for value in (arguments, json.dumps(arguments, ensure_ascii=False), spaced_oddly):
        conversation[-1] = {**conversation[-1], "tool_calls": [call("f", value)]}
        ids.append(render(tokenizer, conversation).input_ids)
    assert ids[0] == ids[1] == ids[2]
    conversation[-1]["tool_calls"] = [call("f", json.dumps(arguments, ensure_ascii=False))]
    assert tokenizer.apply_chat_template(conversation, return_dict=False) == ids[0]
    # the inner form without "function", as some clients send it
    conversation[-1]["tool_calls"] = [{"name": "f", "arguments": arguments}]
    assert tokenizer.apply_chat_template(conversation, return_dict=False) == ids[0]


def test_template_survives_a_save_and_an_extra_tool_field(
    trained: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == CHAT_TEMPLATE
    # vLLM hands over tools with every field of its schema, absent ones as None
    verbose = [
        {"type": "function", "function": {"description": None, "strict": None, **TOOLS[1]["function"]}}
    ]
    assert render(loaded, CONVERSATIONS["user"], verbose) == render(trained, CONVERSATIONS["user"], TOOLS[1:])


def test_template_itself_refuses_what_we_refuse(trained: PreTrainedTokenizerFast) -> None:
    user = {"role": "user", "content": "x"}
    with pytest.raises(Exception, match="system message must be the first"):
        trained.apply_chat_template([user, {"role": "system", "content": "late"}])
    with pytest.raises(Exception, match="unknown role"):
        trained.apply_chat_template([{"role": "critic", "content": "x"}])


@pytest.mark.parametrize(
    "reply", ["Hi", "\n\nHi", " \n Hi\n", "", "  ", "，好", "\u0301x", "\u3000中文", "\r\na"]
)
@pytest.mark.parametrize("name", ["user", "whitespace", "tool call"])
def test_prompt_ids_are_a_prefix_of_prompt_and_reply(
    tokenizer: PreTrainedTokenizerFast, name: str, reply: str
) -> None:
    prompt = render(tokenizer, CONVERSATIONS[name], TOOLS, add_generation_prompt=True)
    whole = render(tokenizer, [*CONVERSATIONS[name], {"role": "assistant", "content": reply}], TOOLS)
    length = len(prompt.input_ids)
    assert whole.input_ids[:length] == prompt.input_ids
    assert whole.loss_mask[length:] == [1] * (len(whole.input_ids) - length - 1) + [0]
    assert whole.input_ids[-2] == tokenizer.eos_token_id


# --- text stays text ----------------------------------------------------------------------------------------

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>", "<tool_response>"]


@pytest.mark.parametrize("word", CONTROL)
def test_control_words_in_text_stay_text(tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    text = f"a{word}b {word}\n{word[:-1]}{word}"
    conversation = [
        {"role": "system", "content": text},
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "tool_calls": [call("f" + word, {word: [text]})]},
        {"role": "tool", "content": text},
        {"role": "assistant", "content": text},
    ]
    tools = [{"type": "function", "function": {"name": "f" + word, "description": text, "parameters": {}}}]
    rendered = render(tokenizer, conversation, tools)
    as_written = tokenizer.apply_chat_template(conversation, tools=tools, tokenize=False)
    assert tokenizer.decode(rendered.input_ids) == as_written
    harmless = json.loads(json.dumps([conversation, tools]).replace(word, "-"))
    reference = render(tokenizer, *harmless)
    for token in CONTROL:
        identifier = tokenizer.convert_tokens_to_ids(token)
        assert rendered.input_ids.count(identifier) == reference.input_ids.count(identifier), token
    spelled_out = encode_text(tokenizer, word)
    assert len(spelled_out) > 1 and tokenizer.decode(spelled_out) == word


def test_every_special_of_qwen_stays_text(qwen: PreTrainedTokenizerFast) -> None:
    words = [token.content for token in qwen.added_tokens_decoder.values()]
    assert len(words) >= 22 and "<|fim_prefix|>" in words
    layout = render(qwen, [{"role": "user", "content": "-"}], add_generation_prompt=True).input_ids
    control = [i for i in layout if i in qwen.added_tokens_decoder]
    for word in words:
        rendered = render(qwen, [{"role": "user", "content": f"a{word} {word}"}], add_generation_prompt=True)
        assert [i for i in rendered.input_ids if i in qwen.added_tokens_decoder] == control, word
        assert f"user\na{word} {word}<|im_end|>" in qwen.decode(rendered.input_ids)


def test_random_text_is_kept_whole_and_in_its_place(trained: PreTrainedTokenizerFast) -> None:
    pick = random.Random(0)
    parts = [
        *CONTROL,
        "<",
        "|",
        "im_end",
        "\n",
        " ",
        "\t",
        "灯",
        "x1",
        "\ufdd0",
        "\ufdd1",
        "</",
        "\x00",
        "😀",
    ]
    end, start = (trained.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
    for _ in range(200):
        turns = [
            {"role": role, "content": "".join(pick.choices(parts, k=pick.randrange(12)))}
            for role in ("user", "assistant") * pick.randrange(1, 3)
        ]
        rendered = render(trained, turns)
        assert trained.decode(rendered.input_ids) == trained.apply_chat_template(turns, tokenize=False)
        assert rendered.input_ids.count(end) == rendered.input_ids.count(start) == len(turns)
        trained_ids = [i for i, mask in zip(rendered.input_ids, rendered.loss_mask, strict=True) if mask]
        answers = "".join(turn["content"].lstrip() + "<|im_end|>" for turn in turns[1::2])
        assert trained.decode(trained_ids) == answers


def test_every_noncharacter_at_once_is_refused(trained: PreTrainedTokenizerFast) -> None:
    content = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(UserError, match="all of the noncharacters"):
        render(trained, [{"role": "user", "content": content}])
    some = [{"role": "user", "content": content[:-1] + "<|im_end|>"}]
    assert trained.decode(render(trained, some).input_ids) == trained.apply_chat_template(
        some, tokenize=False
    )


def test_a_noncharacter_in_a_tool_or_a_template_variable_stays(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "\ufdd0<|im_end|>\ufdd1"
    tool = {"type": "function", "function": {"name": "f", "description": text}}
    assert text in byte_tokenizer.decode(render(byte_tokenizer, CONVERSATIONS["user"], [tool]).input_ids)
    byte_tokenizer.chat_template = "{{ note }}"
    rendered = render(byte_tokenizer, CONVERSATIONS["user"], template_kwargs={"note": text})
    assert byte_tokenizer.decode(rendered.input_ids) == text and not any(rendered.loss_mask)


def test_plain_encoding_equals_the_tokenizers_own_for_ordinary_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = [
        "",
        "Ada lives at 12 Hill Road.",
        "苏晴住在哪里？\n\n  缩进",
        "Cafe\u0301 é ñ",
        " \r\n\t x",
        "１２ Ⅷ ½",
    ]
    assert [encode_text(tokenizer, text) for text in texts] == tokenizer(texts)["input_ids"]
    assert encode_texts(tokenizer, texts) == tokenizer(texts)["input_ids"]


def test_tokens_added_later_are_seen(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    render(byte_tokenizer, CONVERSATIONS["user"])
    byte_tokenizer.add_tokens(["<late>"])
    late = byte_tokenizer.convert_tokens_to_ids("<late>")
    assert late not in render(byte_tokenizer, [{"role": "user", "content": "<late>"}]).input_ids


@pytest.mark.parametrize("word", [*CONTROL, "<repo_name>", "<jupyter_start>"])
def test_specials_stay_text_in_training_and_serving(trained: PreTrainedTokenizerFast, word: str) -> None:
    """The ids a trainer sees and the ids a server feeds hold the control tokens of the layout and no more."""
    trained = copy.deepcopy(trained)
    trained.add_special_tokens({"extra_special_tokens": [*CONTROL, "<repo_name>", "<jupyter_start>"]})
    user, reply = {"role": "user", "content": f"a {word}"}, {"role": "assistant", "content": f"{word} b"}
    harmless = [{"role": "user", "content": "a -"}, {"role": "assistant", "content": "- b"}]

    def control(ids: list[int]) -> list[int]:
        return [i for i in ids if i in trained.added_tokens_decoder]

    def served(message: dict) -> list[int]:
        answers = Answers(SimpleNamespace(max_model_len=500, adapters={}), trained, "m")
        return answers.chat_job(ChatRequest(messages=[message])).requests[0].prompt_ids

    def learned(turns: list[dict]) -> list[int]:
        pieces, _ = render_conversations([{"messages": turns}], trained, 500)
        return pieces[0].input_ids.tolist()

    def preferred(turns: list[dict]) -> list[int]:
        row = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [{"role": "assistant", "content": "no"}]}
        pairs, _ = render_preferences([row], trained, 500)
        return [int(i) for column in ("prompt_ids", "chosen_ids") for i in pairs[column][0]]

    assert served(user) == learned([user, reply])[: len(served(user))]  # one renderer for both
    assert control(served(user)) == control(served(harmless[0]))
    assert control(learned([user, reply])) == control(learned(harmless))
    assert control(preferred([user, reply])) == control(preferred(harmless))
    answers = Answers(SimpleNamespace(max_model_len=500, adapters={}), trained, "m")
    completion = answers.completion_job(CompletionRequest(prompt=f"a {word}")).requests[0].prompt_ids
    assert control(completion) == [] and trained.decode(completion) == f"a {word}"


def test_nobody_else_renders(root: Path) -> None:
    """Messages become ids in smolkit/chat.py only: no other file runs a chat template. ollama.py writes one for another
    program, and harness.py names an option of lm-evaluation-harness, which renders by itself."""
    files = [path for path in (*root.glob("*.py"), *(root / "smolkit").rglob("*.py")) if path.name != "chat.py"]
    files.append(root / "chat.py")  # the terminal client sends messages to a server
    calls = re.compile(r"apply_chat_template|render_jinja_template|<\|im_start\|>")
    found = {path.name for path in files if calls.search(path.read_text(encoding="utf-8"))}
    assert found == {"ollama.py", "harness.py"}
    harness = (root / "smolkit" / "evaluation" / "harness.py").read_text(encoding="utf-8")
    assert calls.findall(harness) == ["apply_chat_template"] and "apply_chat_template=" in harness


# --- long conversations -------------------------------------------------------------------------------------

# One token a byte: a user turn of one letter has 9 tokens, a reply of one letter 14 (with the newline after it).
LONG = [{"role": role, "content": letter} for letter in "abc" for role in ("user", "assistant")]


@pytest.mark.parametrize(
    ("limit", "messages"), [(69, 6), (68, 4), (46, 4), (45, 2), (23, 2), (22, None), (1, None)]
)
def test_long_conversations_lose_their_end(
    byte_tokenizer: PreTrainedTokenizerFast, limit: int, messages: int | None
) -> None:
    fitting = render_fitting(byte_tokenizer, LONG, None, limit)
    if messages is None:
        assert fitting is None
    else:
        assert fitting == (render(byte_tokenizer, LONG[:messages]), messages)
        assert len(fitting[0].input_ids) == 23 * messages // 2 <= limit


def test_cuts_keep_the_system_message_and_never_part_a_reply(trained: PreTrainedTokenizerFast) -> None:
    """Against the naive way: render every beginning that ends with a reply, take the longest that fits."""
    pick = random.Random(4)
    for _ in range(40):
        turns = [{"role": "system", "content": "Be brief."}] if pick.random() < 0.5 else []
        for _ in range(pick.randrange(1, 5)):
            turns += [{"role": "user", "content": "x " * pick.randrange(1, 9)}]
            if pick.random() < 0.3:
                turns += [
                    {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": 1})]},
                    {"role": "tool", "content": "2"},
                ]
            turns += [{"role": "assistant", "content": "y " * pick.randrange(1, 9)}]
        turns += [{"role": "user", "content": "bye"}] * pick.randrange(2)
        limit = pick.randrange(10, 200)
        naive = None
        for end in range(1, len(turns) + 1):
            if end == len(turns) or turns[end - 1]["role"] == "assistant":
                rendered = render(trained, turns[:end], TOOLS[1:])
                naive = (rendered, end) if len(rendered.input_ids) <= limit else naive
        assert render_fitting(trained, turns, TOOLS[1:], limit) == naive


# --- foreign tokenizers and templates -----------------------------------------------------------------------


def test_qwens_own_template_is_rendered_as_qwen_does(qwen_dir: Path) -> None:
    original = AutoTokenizer.from_pretrained(qwen_dir)
    for name in ("one turn", "chinese", "tool call"):
        rendered = render(original, CONVERSATIONS[name], TOOLS, add_generation_prompt=True)
        assert rendered.input_ids == original.apply_chat_template(
            CONVERSATIONS[name], tools=TOOLS, add_generation_prompt=True, return_dict=False
        )
        assert not any(rendered.loss_mask)  # no generation marks: nothing can be said to be the assistant's
    attack = render(original, [{"role": "user", "content": "<|im_end|>"}])
    assert attack.input_ids.count(original.convert_tokens_to_ids("<|im_end|>")) == 2  # system and user turn


def test_threads_render_side_by_side(trained: PreTrainedTokenizerFast) -> None:
    """As a server does; transformers' own renderer fails when two threads are in one template."""
    turns = [[*CONVERSATIONS["one turn"], {"role": "user", "content": str(i)}] for i in range(60)]
    expected = [render(trained, own, add_generation_prompt=True) for own in turns]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda own: render(trained, own, add_generation_prompt=True), turns))
    finally:
        sys.setswitchinterval(interval)
    assert found == expected


FOREIGN = {
    "llama": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}",
    ),
    "mistral": (
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "<s>{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}",
    ),
    "phi": (
        ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"],
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}",
    ),
    "gemma": (
        ["<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content.strip() }}<end_of_turn>\n{% endfor %}",
    ),
    "deepseek": (
        ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
        "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}",
    ),
    "a template that takes out words": (
        ["<|a|>", "<|b|>"],
        "{% for m in messages %}<|a|>{{ m.content.replace('<br>', '').replace('zz', '') }}<|b|>{% endfor %}",
    ),
    "a template that writes JSON": (["<|a|>", "<|b|>"], "<|a|>{{ messages | tojson }}<|b|>"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_any_template_is_guarded(byte_tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Control tokens of a rendered attack are those of the same conversation without it, in the same order."""
    words, byte_tokenizer.chat_template = FOREIGN[name]
    byte_tokenizer.add_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    control = set(byte_tokenizer.convert_tokens_to_ids([*words, *CONTROL]))

    def rendered(text: str) -> list[int]:
        user = {"role": "user", "content": text}
        return render(byte_tokenizer, [user, {"role": "assistant", "content": "ok"}, user]).input_ids

    layout = [i for i in rendered("x") if i in control]
    assert layout
    for word in (*words, *CONTROL):
        cut = [word[:at] + filler + word[at:] for at in range(1, len(word)) for filler in ("<br>", "zz")]
        for text in (word, f"a {word}{word} b", word * 3, f"{word[:-1]}{word}{word[1:]}", *cut):
            ids = rendered(text)
            assert [i for i in ids if i in control] == layout, text
    plain = "plain text, 光合作用 and 1 < 2 > [x]"
    turns = [{"role": "user", "content": plain}]
    assert render(byte_tokenizer, turns).input_ids == byte_tokenizer.apply_chat_template(turns, return_dict=False)


def test_thought_tokens_count_in_assistant_text_only(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.add_tokens(["<think>", "</think>"])
    think = byte_tokenizer.convert_tokens_to_ids("<think>")
    turns = [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": "<think>x</think>y"}]
    rendered = render(byte_tokenizer, turns)
    assert [mask for i, mask in zip(rendered.input_ids, rendered.loss_mask, strict=True) if i == think] == [1]


def test_a_template_may_name_the_special_tokens(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = "{{ eos_token }}{{ messages[0].content }}{{ pad_token }}"
    turns = [{"role": "user", "content": "!\""}]
    assert render(byte_tokenizer, turns).input_ids == [IM_END, 0, 1, END_OF_TEXT]


def test_space_swallowing_tokens_match_the_tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.add_tokens([AddedToken("<|sep|>", rstrip=True, lstrip=True, normalized=False)])
    byte_tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' <|sep|>\n next' }}{% endfor %}"
    turns = CONVERSATIONS["user"]
    assert render(byte_tokenizer, turns).input_ids == byte_tokenizer.apply_chat_template(
        turns, return_dict=False
    )


def test_chat_tokens_on_an_existing_tokenizer(qwen_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen_dir)
    kept = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"])
    assert add_chat_tokens(tokenizer, ["<file_sep>"]) == 3  # <tool_response>, </tool_response>, <file_sep>
    assert add_chat_tokens(tokenizer, ["<file_sep>"]) == 0
    assert (
        tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"])
        == kept
    )
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert chat_stop_ids(tokenizer) == [151645, 151643]
    ids = tokenizer("<tool_call><file_sep>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>"


def test_a_reply_ends_with_the_tokenizers_own_end_and_with_the_chats(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    assert chat_stop_ids(byte_tokenizer) == [IM_END, END_OF_TEXT]
    byte_tokenizer.eos_token = "!"
    assert chat_stop_ids(byte_tokenizer) == [0, IM_END, END_OF_TEXT]
    byte_tokenizer.eos_token = None
    assert chat_stop_ids(byte_tokenizer) == [IM_END, END_OF_TEXT]


# --- bad conversations --------------------------------------------------------------------------------------

USER_TURN = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([{"role": "critic", "content": "x"}], "message 0: role must be one of"),
        ([{"content": "x"}], "message 0: role must be one of"),
        (["x"], "message 0: role must be one of"),
        ([{"role": "user"}], r"message 0 \(user\): content must be a string, got None"),
        ([{"role": "user", "content": 3}], "content must be a string, got 3"),
        ([USER_TURN, {"role": "assistant", "content": None}], "content must be a string"),
        ([USER_TURN, {"role": "system", "content": "x"}], "message 1: a system message must be the first"),
        ([USER_TURN, {"role": "tool", "content": "x"}], "message 1: a tool message must follow"),
        ([{**USER_TURN, "tool_calls": [call("f", {})]}], "only assistant messages"),
        ([USER_TURN, {"role": "assistant", "content": "", "tool_calls": {"a": 1}}], "must be a list"),
        (
            [USER_TURN, {"role": "assistant", "content": "", "tool_calls": ["f"]}],
            "needs a function with a name",
        ),
        ([USER_TURN, {"role": "assistant", "content": "", "tool_calls": [call("f", "{a")]}], "are not JSON"),
        (
            [USER_TURN, {"role": "assistant", "content": "", "tool_calls": [call("f", "[1]")]}],
            "a JSON object",
        ),
        ([{"role": "user", "content": "\ud800"}], "unpaired surrogate at character 0"),
        (
            [USER_TURN, {"role": "assistant", "content": "", "tool_calls": [call("f", '{"a":' * 9999)]}],
            "are not JSON",
        ),
        (
            [USER_TURN, {"role": "assistant", "content": "", "tool_calls": [call("f", {"a": {1, 2}})]}],
            "as JSON",
        ),
    ],
)
def test_bad_messages_are_named(trained: PreTrainedTokenizerFast, messages: object, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        validate_messages(messages)
    with pytest.raises(UserError, match=complaint):
        render(trained, messages)


@pytest.mark.parametrize("tools", ["f", [{}], [{"function": {"name": 3}}], ["f"]])
def test_bad_tools_are_named(tools: object) -> None:
    with pytest.raises(UserError, match="tool"):
        validate_tools(tools)


def test_a_refusing_template_is_a_user_error(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="refused the conversation: roles must alternate"):
        render(byte_tokenizer, CONVERSATIONS["user"])


# --- parsing calls back -------------------------------------------------------------------------------------


def one(name: str, arguments: dict) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


@pytest.mark.parametrize("content", ["", "Let me look.", "Two\nlines\n", "ends with }"])
@pytest.mark.parametrize(
    "calls",
    [
        [],
        [("get_weather", {"city": "北京"})],
        [("add", {"a": 1, "b": -2.5}), ("add", {"nested": {"x": [{"y": {}}]}, "null": None})],
        [("f", {"text": 'braces } { and "quotes" and </tool_call> and <tool_call> inside \n'})],
    ],
)
def test_parsing_inverts_rendering(
    trained: PreTrainedTokenizerFast, content: str, calls: list[tuple[str, dict]]
) -> None:
    reply = {"role": "assistant", "content": content, "tool_calls": [call(*each) for each in calls]}
    rendered = render(trained, [USER_TURN, reply])
    ids = [i for i, mask in zip(rendered.input_ids, rendered.loss_mask, strict=True) if mask]
    text = trained.decode(ids, skip_special_tokens=True)
    expected = [{"name": name, "arguments": arguments} for name, arguments in calls]
    assert parse_tool_calls(text) == (content, expected)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{bad json}\n</tool_call>",
        '<tool_call>\n{"name": "f"}\n</tool_call>',
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {"a": NaN}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": {}} and more</tool_call>',
        '<tool_call>\n["f"]\n</tool_call>',
        "<tool_call>",
        '<tool_call>{"name": "f", "argum',
        "<tool_call>" + "[" * 100_000,
        "no call, just {braces} and </tool_call>",
    ],
)
def test_malformed_calls_stay_in_the_content(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])
    assert parse_tool_calls(f"{text} {one('f', {})}") == (f"{text} ", [{"name": "f", "arguments": {}}])


def test_text_around_calls_and_a_missing_end() -> None:
    text = f"before\n{one('f', {'a': {'b': '}'}})}\nbetween\n{one('g', {})} after"
    content, calls = parse_tool_calls(text)
    assert content == "before\nbetween after"
    assert [each["name"] for each in calls] == ["f", "g"]
    assert parse_tool_calls(one("f", {}).removesuffix("\n</tool_call>")) == (
        "",
        [{"name": "f", "arguments": {}}],
    )
    assert parse_tool_calls('<tool_call>{"name":"f","arguments":{}}</tool_call>')[1][0]["name"] == "f"
