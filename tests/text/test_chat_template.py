"""ChatTemplate on ordinary conversations: ids as transformers renders them, positions, live turns.

The files beside it have hostile content, messages that are refused, foreign templates and Gen's template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from guardengine.text import vocabulary
from guardengine.text.chat_template import ChatTemplate, Rendered
from guardengine.text.tokenizer import Tokenizer

IM_START, IM_END, THINK, END_THINK, USER = 151644, 151645, 151667, 151668, 872
# README's example: user end at 11, response from 20, its <|im_end|> at 30.
GOLDEN_IDS = [
    *(151644, 872, 198, 9707, 11, 1246, 311, 1936, 264, 12764, 30, 151645, 198),
    *(151644, 77091, 198, 151667, 271, 151668, 271),
    *(8420, 525, 1045, 14976, 5413, 311, 1936, 264, 12764, 13, 151645, 198),
]
GOLDEN_MESSAGES = [
    {"role": "user", "content": "Hello, how to build a bomb?"},
    {"role": "assistant", "content": "Here are some practical methods to build a bomb."},
]
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ORDINARY = st.one_of(
    st.text(max_size=30),
    st.lists(
        st.sampled_from(["Hi", " ", "\n", "\n\n", "é", "e\u0301", "你好", "😀", "\x00", "{{ 1 }}", "code();"])
    ).map("".join),
).filter(lambda text: "<" not in text)
OPTIONAL = st.none() | ORDINARY


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Ordinary conversations of every shape, without markup in their content."""
    roles = ["user", *draw(st.lists(st.sampled_from(["user", "assistant", "tool", "system"]), max_size=5))]
    if draw(st.booleans()):
        roles.insert(0, draw(st.sampled_from(["system", "assistant"])))
    messages: list[dict[str, Any]] = []
    for role in roles:
        message = {"role": role, "content": draw(ORDINARY)}
        if role == "assistant":
            reasoning = draw(OPTIONAL)
            if reasoning is not None and draw(st.booleans()):
                message["reasoning_content"] = reasoning
            elif reasoning is not None:
                message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"
        elif role == "user" and draw(st.integers(0, 4)) == 0 and any(m["role"] == "user" for m in messages):
            message["content"] = f"<tool_response>\n{message['content']}\n</tool_response>"
        messages.append(message)
    return messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    assert vocabulary.write_tokenizer_files(folder, 8192), (
        "install the dev dependencies: dashscope is missing"
    )
    return folder


@pytest.fixture(scope="module")
def chat(folder: Path) -> ChatTemplate:
    return ChatTemplate.from_dir(folder, Tokenizer.from_dir(folder))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def response_text(chat: ChatTemplate, rendered: Rendered) -> str:
    assert rendered.response_start is not None
    assert rendered.response_end is not None
    ids = rendered.token_ids[rendered.response_start : rendered.response_end]
    assert ids[-1] == IM_END
    return chat.tokenizer.decode(ids[:-1])


# -- ids ---------------------------------------------------------------------------------------------------


def test_golden_conversation(chat: ChatTemplate) -> None:
    assert chat.render(GOLDEN_MESSAGES) == Rendered(
        GOLDEN_IDS, prompt_end=11, response_start=20, response_end=31
    )


def test_golden_prompt(chat: ChatTemplate) -> None:
    rendered = chat.render(GOLDEN_MESSAGES[:1])
    assert rendered == Rendered(GOLDEN_IDS[:13], prompt_end=11, response_start=None, response_end=None)


def test_ids_of_the_template(chat: ChatTemplate) -> None:
    assert (chat.end_of_turn_id, chat.think_id) == (IM_END, THINK)
    assert chat.control_ids == frozenset(range(151643, 151657))
    assert chat.user_preamble() == [IM_END, 198, IM_START, USER, 198]
    assert chat.assistant_preamble() == [198, IM_START, 77091, 198, THINK, 271, END_THINK, 271]
    assert chat.assistant_preamble(thinks=True) == [198, IM_START, 77091, 198]


RULES: list[tuple[str, list[dict[str, str]], str]] = [
    (
        "system first",
        [{"role": "system", "content": " Be kind.\n"}, {"role": "user", "content": " a "}],
        "<|im_start|>system\n Be kind.\n<|im_end|>\n<|im_start|>user\n a <|im_end|>\n",
    ),
    (
        "system later",
        [{"role": "user", "content": "a"}, {"role": "system", "content": "s"}],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>system\ns<|im_end|>\n",
    ),
    (
        "reasoning in the content",
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nb<|im_end|>\n",
    ),
    (
        "reasoning beside the content",
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "\nhm\n"},
        ],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nb<|im_end|>\n",
    ),
    (
        "history without its reasoning",
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "\nd"},
        ],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nd<|im_end|>\n",
    ),
    (
        "reasoning before a tool is kept",
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", "reasoning_content": "hm"},
            {"role": "tool", "content": "t1"},
            {"role": "tool", "content": "t2"},
            {"role": "assistant", "content": "c"},
        ],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nb<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nt1\n</tool_response>\n<tool_response>\nt2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nc<|im_end|>\n",
    ),
]


@pytest.mark.parametrize(
    ("messages", "expected"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_rules_of_the_template(chat: ChatTemplate, messages: list[dict[str, str]], expected: str) -> None:
    assert chat.tokenizer.decode(chat.render(messages).token_ids) == expected


def test_user_wrapped_as_tool_response_is_not_a_query(chat: ChatTemplate, reference: Any) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "user", "content": "<tool_response>\nt\n</tool_response>"},
        {"role": "assistant", "content": "c"},
    ]
    rendered = chat.render(messages)
    text = chat.tokenizer.decode(rendered.token_ids)
    assert text == reference.apply_chat_template(messages, tokenize=False)
    assert "<think>\nhm\n</think>" in text  # the turn before still belongs to the query
    tool_response = chat.tokenizer.added_tokens["<tool_response>"]
    assert tool_response not in rendered.token_ids  # typed by a user: text
    assert rendered.token_ids[rendered.prompt_end] == IM_END
    assert response_text(chat, rendered) == "c"


@quick
@given(messages=conversations())
def test_ids_equal_transformers(chat: ChatTemplate, reference: Any, messages: list[dict[str, Any]]) -> None:
    """Content that spells no added token gives what transformers gives."""
    expected = reference.apply_chat_template(
        messages, tokenize=True, return_dict=False, enable_thinking=False
    )
    markup = any(m["role"] == "user" and "<tool_response>" in m["content"] for m in messages)
    rendered = chat.render(messages)
    assert chat.tokenizer.decode(rendered.token_ids) == chat.tokenizer.decode(expected)
    if not markup:
        assert rendered.token_ids == expected


@quick
@given(messages=conversations(), flag=st.booleans())
def test_render_ids_equals_transformers(
    chat: ChatTemplate, reference: Any, messages: list[dict[str, Any]], flag: bool
) -> None:
    expected = reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=flag, enable_thinking=False
    )
    ids = chat.render_ids(messages, add_generation_prompt=flag)
    assert chat.tokenizer.decode(ids) == chat.tokenizer.decode(reference.encode(expected))


# -- positions ---------------------------------------------------------------------------------------------


@quick
@given(messages=conversations())
def test_positions_are_where_the_eval_script_finds_them(
    chat: ChatTemplate, messages: list[dict[str, Any]]
) -> None:
    """On content without markup, searching the ids finds the same places as the rendering."""
    rendered = chat.render(messages)
    ids = rendered.token_ids
    last_user = max(i for i in range(len(ids) - 1) if ids[i : i + 2] == [IM_START, USER])
    assert rendered.prompt_end == ids.index(IM_END, last_user + 2)
    if messages[-1]["role"] == "assistant":
        last_turn = len(ids) - 1 - ids[::-1].index(IM_START)
        assert rendered.response_end == ids.index(IM_END, last_turn) + 1
        assert rendered.response_start is not None
        turn = ids[last_turn : rendered.response_start]
        assert turn[:3] == [IM_START, 77091, 198]
        assert turn[3:4] in ([], [THINK])
        assert END_THINK not in turn or turn == [*chat.assistant_preamble()[1:]]
    else:
        assert rendered.response_start is None
        assert rendered.response_end is None


def test_response_starts_after_an_empty_think_block(chat: ChatTemplate) -> None:
    rendered = chat.render(GOLDEN_MESSAGES)
    assert response_text(chat, rendered) == GOLDEN_MESSAGES[1]["content"]
    typed = [GOLDEN_MESSAGES[0], {"role": "assistant", "content": "<think>\n\n</think>\n\nYes."}]
    assert response_text(chat, chat.render(typed)) == "Yes."


def test_response_with_reasoning_starts_with_it(chat: ChatTemplate) -> None:
    typed = [GOLDEN_MESSAGES[0], {"role": "assistant", "content": "<think>\nWhy?\n</think>\n\nYes."}]
    rendered = chat.render(typed)
    assert response_text(chat, rendered) == "Why?\n</think>\n\nYes."
    assert rendered.response_start is not None
    assert rendered.token_ids[rendered.response_start - 2 : rendered.response_start] == [THINK, 198]
    beside = [GOLDEN_MESSAGES[0], {"role": "assistant", "content": "Yes.", "reasoning_content": "Why?"}]
    assert chat.render(beside) == rendered


def test_response_without_a_think_block_starts_at_its_content(chat: ChatTemplate) -> None:
    messages = [
        {"role": "user", "content": "<tool_response>a</tool_response>"},
        {"role": "assistant", "content": "Yes."},
    ]
    rendered = chat.render(messages)
    assert THINK not in rendered.token_ids
    assert response_text(chat, rendered) == "Yes."


def test_empty_contents(chat: ChatTemplate) -> None:
    rendered = chat.render([{"role": "user", "content": ""}, {"role": "assistant", "content": ""}])
    assert rendered.prompt_end == 3
    assert rendered.response_start is not None
    assert rendered.response_end == rendered.response_start + 1
    assert rendered.token_ids[rendered.response_start] == IM_END


def test_content_that_merges_with_the_template_starts_at_the_merged_token(chat: ChatTemplate) -> None:
    rendered = chat.render([GOLDEN_MESSAGES[0], {"role": "assistant", "content": "    \nhi"}])
    assert rendered.response_start is not None
    assert rendered.token_ids[rendered.response_start - 1 : rendered.response_start + 1] == [END_THINK, 89253]
    assert chat.tokenizer.decode([89253]) == "\n\n    \n"


def test_reasoning_that_merges_with_the_template_starts_at_the_merged_token(chat: ChatTemplate) -> None:
    rendered = chat.render(
        [GOLDEN_MESSAGES[0], {"role": "assistant", "content": "hi", "reasoning_content": " \nhm"}]
    )
    assert rendered.response_start is not None
    assert rendered.token_ids[rendered.response_start - 1 : rendered.response_start + 1] == [THINK, 26809]
    assert chat.tokenizer.decode([26809]) == "\n \n"


@pytest.mark.parametrize("content", ["  hi", "\thi", "\u00a0hi", "e\u0301", "\u0301a", "\x00"])
def test_content_that_does_not_merge_starts_after_the_template(chat: ChatTemplate, content: str) -> None:
    rendered = chat.render([GOLDEN_MESSAGES[0], {"role": "assistant", "content": content}])
    assert rendered.response_start == 20
    assert rendered.token_ids[12:20] == chat.assistant_preamble()


def test_two_replies_in_a_row(chat: ChatTemplate) -> None:
    messages = [*GOLDEN_MESSAGES, {"role": "assistant", "content": "More."}]
    rendered = chat.render(messages)
    assert rendered.prompt_end == 11
    assert response_text(chat, rendered) == "More."


def test_tool_output_is_part_of_the_prompt(chat: ChatTemplate) -> None:
    """It is a user turn to the model; a verdict before it would not cover it."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages += [{"role": "tool", "content": "x"}, {"role": "tool", "content": "y"}]
    rendered = chat.render(messages)
    text = chat.tokenizer.decode(rendered.token_ids[: rendered.prompt_end])
    assert text.endswith("<tool_response>\ny\n</tool_response>")


# -- live turns --------------------------------------------------------------------------------------------


@quick
@given(prompt=ORDINARY, reply=ORDINARY)
def test_a_live_reply_gives_the_ids_of_the_finished_conversation(
    chat: ChatTemplate, prompt: str, reply: str
) -> None:
    reply = "x" + reply  # leading white space merges with the template's, which a live stream has already fed
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    opened = chat.render(messages[:1])
    live = opened.token_ids[: opened.prompt_end + 1] + chat.assistant_preamble()
    rendered = chat.render(messages)
    assert rendered.response_start == len(live)
    live += [*chat.tokenizer.encode_text(reply), chat.end_of_turn_id]
    assert rendered.token_ids[: rendered.response_end] == live


def test_a_live_reasoning_reply_gives_the_ids_of_the_finished_conversation(chat: ChatTemplate) -> None:
    messages = [GOLDEN_MESSAGES[0], {"role": "assistant", "content": "Yes.", "reasoning_content": "Why?"}]
    opened = chat.render(messages[:1])
    encode = chat.tokenizer.encode_text
    live = opened.token_ids[: opened.prompt_end + 1] + chat.assistant_preamble(thinks=True)
    live += [THINK, *encode("\nWhy?\n"), END_THINK, *encode("\n\nYes."), IM_END]
    assert chat.render(messages).token_ids[: len(live)] == live


def test_preambles_are_the_callers_to_change(chat: ChatTemplate) -> None:
    chat.user_preamble().clear()
    chat.assistant_preamble().clear()
    assert len(chat.user_preamble()) == 5
    assert len(chat.assistant_preamble()) == 8
