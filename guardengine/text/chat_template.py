"""ChatTemplate: messages to token ids, where content is data and never markup.

Special ids come from the template alone. In the template's syntax tree every added token that the template itself
writes is replaced by a marker with a random nonce. Content is rendered unchanged. Afterwards markers become ids, and
all text between them is encoded as plain text (Tokenizer). So <|im_end|> that a user types stays text and cannot end a
turn, and every position reported here is that of a marker. Knows no streams and no labels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import jinja2

from guardengine.errors import CheckpointError, InvalidText
from guardengine.text.messages import Messages, checked_messages
from guardengine.text.retokenizer import Retokenizer
from guardengine.text.special_tokens import (
    SHIPPED,
    MarkedTemplate,
    compile_marked,
    compile_plain,
    read_template,
    token_pattern,
)
from guardengine.text.tokenizer import Tokenizer

_MEND = "use the chat template of the released Qwen3Guard checkpoint, or delete it to get guardengine's own"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as token ids, with positions that the template made.

    Attributes:
        token_ids: All ids.
        prompt_end: Index of the <|im_end|> that closes the last user (or tool) message.
        response_start: When the last message is the assistant's, the index of the first token with a character of its
            content (or of its reasoning, after <think> and the newline); otherwise None.
        response_end: One past the <|im_end|> of that message, or None.
    """

    token_ids: list[int]
    prompt_end: int
    response_start: int | None
    response_end: int | None


class _Turns(NamedTuple):
    """Marked text that the template writes between contents."""

    user: str  # from the <|im_end|> of an assistant turn to the content of the next user turn
    reply: str  # from after a user turn's <|im_end|> to the content of a reply without reasoning
    thinking_reply: str  # like reply, for a reply whose content begins with <think>
    openings: tuple[str, ...]  # what may stand between a reply's <|im_start|> and its content; longest first


class ChatTemplate:
    """A checkpoint's chat template, checked against its tokenizer. Made by `from_dir`.

    Attributes:
        tokenizer: The tokenizer.
        end_of_turn_id: The id of <|im_end|>.
        think_id: The id of <think>; None where the vocabulary has none.
        control_ids: The ids that content must not contain.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, name: str, variables: Mapping[str, str] | None = None
    ) -> None:
        """Compile and check a template.

        Args:
            source: The template in Jinja's language.
            tokenizer: The tokenizer of the same checkpoint.
            name: The name of the template, for errors.
            variables: Further names that the template may use (bos_token, ...).

        Raises:
            CheckpointError: The template does not compile, the sandbox refuses it, or its special tokens cannot be
                told from text.
        """
        self._source, self._name, self._variables = source, name, dict(variables or {})
        self.tokenizer = tokenizer
        self.control_ids = tokenizer.control_ids
        self.end_of_turn_id = tokenizer.added_tokens["<|im_end|>"]
        self.think_id = tokenizer.added_tokens.get("<think>")
        self._marked = self._mark()
        self._known_turns: tuple[MarkedTemplate, _Turns] | None = None
        self._check_probes()

    @staticmethod
    def from_dir(path: Path, tokenizer: Tokenizer, kind: Literal["stream", "gen"] = "stream") -> ChatTemplate:
        """Read the chat template of a checkpoint folder.

        Args:
            path: The folder. Its chat_template.jinja is used, else the chat_template in tokenizer_config.json, else
                the one that guardengine has for this kind of checkpoint.
            tokenizer: The tokenizer of the checkpoint.
            kind: "stream" or "gen".

        Raises:
            CheckpointError: A file cannot be read, or the template cannot be used.
        """
        return ChatTemplate(*read_template(Path(path), tokenizer, SHIPPED[kind]))

    @cached_property
    def retokenizer(self) -> Retokenizer:
        """Tokenizes text that comes in pieces. Made on first use, which takes 0.1 to 0.2 s."""
        return Retokenizer(self.tokenizer)

    # -- conversations -------------------------------------------------------------------------------------

    def render(self, messages: Messages, *, max_tokens: int | None = None) -> Rendered:
        """Render a conversation. Its content is plain text, whatever it spells.

        Args:
            messages: Mappings with a role of ROLES and content, both str. Further str values (reasoning_content) are
                for the template; None values are ignored. At least one message is the user's.
            max_tokens: Refuse early what cannot fit into so many tokens.

        Raises:
            InvalidText: A message is not valid; the error names it.
            StreamTooLong: The conversation cannot fit into max_tokens.
            CheckpointError: The template does not write turns in the way Qwen3's does.
        """
        checked = checked_messages(messages, self.tokenizer.check_text)
        marked = self._marked_for(checked)
        text = self._run(marked, checked)
        last_user = max(i for i, message in enumerate(checked) if message["role"] in ("user", "tool"))
        prompt = checked[: last_user + 1]
        prefix = text if len(prompt) == len(checked) else self._run(marked, prompt)
        prompt_end_at = prefix.rfind(marked.markers["<|im_end|>"])
        turn_at = prefix.rfind(marked.markers["<|im_start|>"], 0, max(prompt_end_at, 0))
        if turn_at < 0 or not text.startswith(prefix):
            raise self._fault(
                "does not write the conversation up to the last user message as a prefix of the whole"
            )
        turn = prefix[turn_at:prompt_end_at]
        self._check_kept(marked, prompt[-1]["content"], turn, last_user)
        content_at = response_end_at = None
        if checked[-1]["role"] == "assistant":
            content_at, response_end_at = self._find_response(marked, text)
            said = checked[-1].get("reasoning_content", "") + checked[-1]["content"]
            self._check_kept(marked, said, text[content_at:response_end_at], len(checked) - 1)
        ids, marker_tokens, response_start = self._encode(marked, text, content_at, max_tokens)
        return Rendered(
            token_ids=ids,
            prompt_end=marker_tokens[prompt_end_at],
            response_start=response_start,
            response_end=None if response_end_at is None else marker_tokens[response_end_at] + 1,
        )

    def render_ids(
        self, messages: Messages, *, add_generation_prompt: bool = False, max_tokens: int | None = None
    ) -> list[int]:
        """Render a conversation without positions, for a template whose turns may differ from Qwen3's (Gen).

        Args:
            messages: See `render`.
            add_generation_prompt: Let the template open the assistant's turn at the end.
            max_tokens: See `render`.

        Raises:
            InvalidText: A message is not valid, or the template leaves out content of the last message.
            StreamTooLong: The conversation cannot fit into max_tokens.
            CheckpointError: The template fails.
        """
        checked = checked_messages(messages, self.tokenizer.check_text)
        marked = self._marked_for(checked)
        text = self._run(marked, checked, add_generation_prompt=add_generation_prompt)
        self._check_kept(marked, checked[-1]["content"], text, len(checked) - 1)
        return self._encode(marked, text, None, max_tokens)[0]

    def assistant_preamble(self, thinks: bool = False) -> list[int]:
        """The ids between a user turn's <|im_end|> and the first content token of the assistant's reply.

        They are `\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n`. When the reply `thinks`, its content begins
        with <think> itself, and they are only `\\n<|im_start|>assistant\\n`. Raises CheckpointError when the template
        does not write turns in the way Qwen3's does.
        """
        marked = self._marked
        turns = self._turns(marked)
        return self._encode(marked, turns.thinking_reply if thinks else turns.reply)[0]

    def user_preamble(self) -> list[int]:
        """The ids that close an open assistant turn and open a user turn: `<|im_end|>\\n<|im_start|>user\\n`."""
        marked = self._marked
        return self._encode(marked, self._turns(marked).user)[0]

    def _check_kept(self, marked: MarkedTemplate, content: str, rendered: str, index: int) -> None:
        """Refuse messages of which the template drops a part, because that part would never be moderated.

        Qwen3's template drops what an assistant says before <think> and between two </think>, and the reasoning where
        no user message is a query (all are wrapped in <tool_response>).
        """
        if _bare(content) not in _bare(marked.unmark(rendered)):
            raise InvalidText(
                f"messages[{index}]: the chat template ({self._name}) leaves out a part of its content, which would "
                "not be moderated; give an assistant's reasoning as reasoning_content, or once, as "
                "<think>...</think>, at the beginning"
            )

    # -- rendering -----------------------------------------------------------------------------------------

    def _mark(self) -> MarkedTemplate:
        return compile_marked(self._source, self._name, self._variables, list(self.tokenizer.added_tokens))

    def _marked_for(self, messages: list[dict[str, str]]) -> MarkedTemplate:
        """The marked template. It gets a new nonce when one of the messages contains the present one."""
        marked = self._marked
        while any(marked.nonce in text for message in messages for item in message.items() for text in item):
            marked = self._marked = self._mark()
        return marked

    def _run(self, marked: MarkedTemplate, messages: list[dict[str, str]], **flags: bool) -> str:
        try:
            return marked.run(messages, **flags)
        except jinja2.exceptions.SecurityError as error:
            raise self._fault(f"was stopped by the sandbox ({marked.unmark(str(error))})") from None
        except jinja2.TemplateError as error:
            raise InvalidText(
                f"the chat template ({self._name}) refuses these messages: {marked.unmark(str(error))}"
            ) from None
        except Exception as error:  # a template is a program, and may fail as any program may
            what = f"{type(error).__name__}: {marked.unmark(str(error))}"
            raise self._fault(f"failed on these messages ({what})") from None

    def _encode(
        self, marked: MarkedTemplate, text: str, content_at: int | None = None, max_tokens: int | None = None
    ) -> tuple[list[int], dict[int, int], int | None]:
        """The ids of marked text, the token index of each marker by its place in the text, and the index of the first
        token that reaches past `content_at`."""
        ids: list[int] = []
        marker_tokens: dict[int, int] = {}
        content_token = None
        start = 0
        for match in (*marked.pattern.finditer(text), None):
            end = len(text) if match is None else match.start()
            if content_at is not None and start <= content_at < end:
                piece_ids, piece_ends = self.tokenizer.encode_with_ends(
                    text[start:end], max_tokens=max_tokens
                )
                content_token = len(ids) + bisect_right(piece_ends, content_at - start)
                ids += piece_ids
            elif start < end:
                ids += self.tokenizer.encode_text(text[start:end], max_tokens=max_tokens)
            if match is not None:
                marker_tokens[match.start()] = len(ids)
                ids.append(self.tokenizer.added_tokens[marked.tokens[int(match[1])]])
                start = match.end()
        if content_token is None and content_at is not None:
            content_token = marker_tokens.get(content_at, len(ids))
        return ids, marker_tokens, content_token

    def _find_response(self, marked: MarkedTemplate, text: str) -> tuple[int, int]:
        """Where in marked text the last turn's content begins, and where its <|im_end|> is."""
        start, end = text.rfind(marked.markers["<|im_start|>"]), text.rfind(marked.markers["<|im_end|>"])
        for opening in self._turns(marked).openings:
            if start >= 0 and text.startswith(opening, start) and start + len(opening) <= end:
                return start + len(opening), end
        raise self._fault("does not write the assistant's turn as <|im_start|>assistant ... <|im_end|>")

    def _turns(self, marked: MarkedTemplate) -> _Turns:
        if self._known_turns is None or self._known_turns[0] is not marked:
            self._known_turns = marked, self._find_turns(marked)
        return self._known_turns[1]

    def _find_turns(self, marked: MarkedTemplate) -> _Turns:
        start_of_turn, end_of_turn = marked.markers["<|im_start|>"], marked.markers["<|im_end|>"]
        prompt = [{"role": "user", "content": "probe"}]
        closed = self._run(marked, prompt)
        closed = closed[: closed.rfind(end_of_turn) + len(end_of_turn)]
        replies = []
        for thinks in (False, True):
            text = self._run(marked, prompt, add_generation_prompt=True, enable_thinking=thinks)
            if not text.startswith(closed) or start_of_turn not in text[len(closed) :]:
                raise self._fault(
                    "does not add a generation prompt, `<|im_start|>assistant`, after the last turn"
                )
            replies.append(text[len(closed) :])
        think = marked.markers.get("<think>", "<think>") + "\n"
        thinking_reply = replies[1].removesuffix(think)  # some templates begin the reasoning themselves
        openings = {
            reply[reply.rfind(start_of_turn) :]
            for reply in (replies[0], thinking_reply + think, thinking_reply)
        }
        text = self._run(marked, [*prompt, {"role": "assistant", "content": "probe"}, *prompt])
        start = text.rfind(start_of_turn)
        closing, content_at = text.rfind(end_of_turn, 0, start), text.find("probe", start)
        if min(start, closing, content_at) < 0:
            raise self._fault("does not write a user turn as <|im_start|>user ... <|im_end|>")
        return _Turns(
            user=text[closing:content_at],
            reply=replies[0],
            thinking_reply=thinking_reply,
            openings=tuple(sorted(openings, key=len, reverse=True)),
        )

    # -- the template itself -------------------------------------------------------------------------------

    def _check_probes(self) -> None:
        """Check on ordinary conversations that marking changes nothing: the ids equal those of plain text whose added
        tokens are recognized. They differ when the template builds a special token in a way that was not marked."""
        plain = compile_plain(self._source, self._name, self._variables)
        for messages in _PROBES:
            for flags in _PROBE_FLAGS:
                try:
                    expected = self._recognised(self._run(plain, messages, **flags))
                except InvalidText as error:
                    if messages is _PROBES[0]:
                        raise self._fault(f"cannot render a single user message ({error})") from None
                    continue  # not every template takes every role
                if self._encode(self._marked, self._run(self._marked, messages, **flags))[0] != expected:
                    raise self._fault(
                        "builds special tokens in a way that cannot be told from text; write each of them as one "
                        "literal in an output expression"
                    )

    def _recognised(self, text: str) -> list[int]:
        """The ids of text in which added tokens are recognized. Never used for text with content in it."""
        ids: list[int] = []
        start = 0
        for match in token_pattern(list(self.tokenizer.added_tokens)).finditer(text):
            ids += self.tokenizer.encode_text(text[start : match.start()])
            ids.append(self.tokenizer.added_tokens[match[0]])
            start = match.end()
        return ids + self.tokenizer.encode_text(text[start:])

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(f"chat template ({self._name}) {what}; {_MEND}")


def _bare(text: str) -> str:
    """The part of content that a template must keep: everything but white space and the tags around reasoning."""
    return "".join(text.replace("<think>", "").replace("</think>", "").split())


def _conversation(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


_REASONED = [
    *_conversation(("user", "How many?")),
    {"role": "assistant", "content": "Two.", "reasoning_content": "One and one."},
]
_PROBES = (
    _conversation(("user", "Hello")),
    _conversation(("system", "Be brief."), ("user", "Hello")),
    _conversation(("user", "Hello"), ("assistant", "Hi there.")),
    _conversation(
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ),
    _REASONED,
    [*_REASONED, *_conversation(("user", "Sure?"), ("assistant", "Yes."))],
    _conversation(("user", "Weather?"), ("assistant", "Let me see."), ("tool", "Sun."), ("tool", "Warm.")),
    _conversation(
        ("user", "Weather?"), ("assistant", "Let me see."), ("tool", "Sun."), ("assistant", "Fine.")
    ),
)
_PROBE_FLAGS: tuple[dict[str, bool], ...] = (
    {},
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "enable_thinking": True},
)
