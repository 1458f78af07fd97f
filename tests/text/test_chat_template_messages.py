"""Messages that ChatTemplate refuses, and what it lets pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile import BAD_MESSAGES
from markupsafe import Markup

from guardengine.errors import InvalidText, StreamTooLong
from guardengine.text import vocabulary
from guardengine.text.chat_template import ChatTemplate, Rendered
from guardengine.text.tokenizer import Tokenizer

IM_END = 151645
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


def response_text(chat: ChatTemplate, rendered: Rendered) -> str:
    assert rendered.response_start is not None
    assert rendered.response_end is not None
    ids = rendered.token_ids[rendered.response_start : rendered.response_end]
    assert ids[-1] == IM_END
    return chat.tokenizer.decode(ids[:-1])


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES)
def test_bad_messages_are_refused(chat: ChatTemplate, messages: Any, message: str) -> None:
    for render in (chat.render, chat.render_ids):
        with pytest.raises(InvalidText, match=message):
            render(messages)


def test_long_values_are_not_quoted_whole(chat: ChatTemplate) -> None:
    with pytest.raises(InvalidText) as caught:
        chat.render([{"role": "x" * 10_000, "content": "a"}])
    assert len(str(caught.value)) < 200


def test_further_keys(chat: ChatTemplate) -> None:
    plain = chat.render(GOLDEN_MESSAGES)
    extended = [{**message, "name": "someone", "tool_calls": None} for message in GOLDEN_MESSAGES]
    assert chat.render(extended) == plain
    assert chat.render(tuple(extended)) == plain


def test_text_too_long_for_the_stream_is_refused_early(chat: ChatTemplate) -> None:
    prompt = [{"role": "user", "content": "a" * 100_000}]
    reply = [GOLDEN_MESSAGES[0], {"role": "assistant", "content": "a" * 100_000}]
    for messages in (prompt, reply):
        for render in (chat.render, chat.render_ids):
            with pytest.raises(StreamTooLong, match="cannot fit into 100 tokens"):
                render(messages, max_tokens=100)
    assert chat.render(GOLDEN_MESSAGES, max_tokens=100).token_ids == GOLDEN_IDS


class SlyText(str):
    """Answers as a tool response would."""

    def startswith(self, *_: Any) -> bool:
        return True

    def endswith(self, *_: Any) -> bool:
        return True


@pytest.mark.parametrize("text_class", [SlyText, Markup])
def test_subclasses_of_str_are_taken_as_their_text(chat: ChatTemplate, text_class: type[str]) -> None:
    messages = [{"role": m["role"], "content": text_class(m["content"])} for m in GOLDEN_MESSAGES]
    assert chat.render(messages).token_ids == GOLDEN_IDS


@pytest.mark.parametrize(
    "content",
    ["evil <think>why</think> good", "why</think>evil</think>good", "<think>a</think><think>b</think>c"],
)
def test_a_reply_of_which_the_template_drops_a_part_is_refused(chat: ChatTemplate, content: str) -> None:
    messages = [GOLDEN_MESSAGES[0], {"role": "assistant", "content": content}]
    for render in (chat.render, chat.render_ids):
        with pytest.raises(InvalidText, match=r"messages\[1\]: the chat template .* leaves out a part"):
            render(messages)
    # Nothing is lost where the reasoning is given apart.
    kept = chat.render(
        [GOLDEN_MESSAGES[0], {"role": "assistant", "content": content, "reasoning_content": "r"}]
    )
    assert response_text(chat, kept) == f"r\n</think>\n\n{content}"
