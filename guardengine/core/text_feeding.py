"""Text into a stream's reply: append_text, append_foreign_ids and finish_text, and where its tokens stand in the text.

Functions over a stream's books, as conversation.py has them for ids. Called with the engine's gate held, but for those
that only read.
"""

from __future__ import annotations

from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import check_reply_open, feed_more
from guardengine.core.state import StreamState
from guardengine.errors import ConfigError, InvalidTokens, StreamTooLong
from guardengine.labels import Label
from guardengine.text.chat_template import ChatTemplate
from guardengine.text.foreign_ids import ForeignIds
from guardengine.text.spans import HeldText, Offsets, Piece, Span, TextState, TokenizedPiece

LONG_CHARS = 16_384  # which take 10 to 30 ms to encode


def accept_text(
    core: EngineCore,
    chat: ChatTemplate | None,
    state: StreamState,
    piece: Piece,
    timeout_s: float | None = None,
) -> None:
    """Feed what a piece settles of the reply, and keep the rest. Raises as `Stream.append_text`; nothing has changed
    then."""
    feed_settled(core, chat, state, settle(core, chat, state, piece), timeout_s)


def settle(core: EngineCore, chat: ChatTemplate | None, state: StreamState, piece: Piece) -> TokenizedPiece:
    """What a piece comes to on a stream as it is; nothing is changed. Raises as `Stream.append_text`."""
    chat, books, foreign, text = _read(core, chat, state, piece)
    held = HeldText() if _begins_reply(state, books) else books.held
    token_ids: list[int] = []
    spans: list[Offsets] = []
    for part, is_final in ((text[0], False), (text[1], piece.is_final)):
        if part or is_final:
            more_ids, more_spans, held = chat.retokenizer.feed(held, part, is_final=is_final)
            token_ids += more_ids
            spans += more_spans
    if piece.ends_turn and state.turns is not None:
        token_ids.append(chat.end_of_turn_id)
        spans.append((held.num_chars, held.num_chars, held.num_bytes, held.num_bytes))
    return TokenizedPiece(token_ids, spans, held, foreign)


def feed_settled(
    core: EngineCore,
    chat: ChatTemplate | None,
    state: StreamState,
    settled: TokenizedPiece,
    timeout_s: float | None = None,
) -> None:
    """Feed what a piece came to; the stream must be as it was then. Raises StreamTooLong or Overloaded; nothing has
    changed then."""
    num_tokens = len(settled.token_ids)
    if num_tokens:
        core.accept(state, feed_more(chat, state, settled.token_ids, "assistant"), timeout_s)
    books = state.text or TextState()
    books.extend(state.num_tokens - num_tokens, state.num_assistant_tokens - num_tokens, settled)
    state.text = books


def hold_text(core: EngineCore, chat: ChatTemplate | None, state: StreamState, piece: Piece) -> None:
    """Keep all of a piece's text, to be fed with what comes next. Raises as `Stream.append_text`; nothing has changed
    then."""
    chat, books, foreign, text = _read(core, chat, state, piece)
    held = HeldText() if _begins_reply(state, books) else books.held
    for part in text:
        held = chat.retokenizer.hold(held, part)
    books.held, books.foreign = held, foreign
    state.text = books


def is_long(piece: Piece) -> bool:
    """Whether a piece's text should be measured beside the engine's thread before it is tokenized there."""
    return isinstance(piece.text, str | bytes) and len(piece.text) > LONG_CHARS


def check_length(chat: ChatTemplate, piece: Piece, max_tokens: int) -> None:
    """Raise StreamTooLong where a piece's text has more tokens than a stream may have. For any thread.

    Says nothing of how the text joins what is held back before it, so that its ids are found again in the stream's
    turn; but text that cannot fit is not tokenized there, which takes seconds for a few megabytes.
    """
    text = piece.text if isinstance(piece.text, str) else bytes(piece.text).decode("utf-8", "replace")
    num_tokens = len(chat.tokenizer.encode_text(text, max_tokens=max_tokens))
    if num_tokens > max_tokens:
        raise StreamTooLong(
            f"a text of {num_tokens} tokens, max_model_len={max_tokens}; shorten it, or split the conversation"
        )


def check_nothing_held(state: StreamState) -> None:
    """Raise InvalidTokens where ids would overtake text."""
    if state.text is not None and state.text.has_unfed_text:
        raise InvalidTokens(
            f"{state.stream_id} holds back {len(state.text.held.text)} characters of the reply, whose ids depend on "
            "what follows; call finish_text() before ids are appended (or rollback(0), which drops them)"
        )


def span_of(state: StreamState, at: Label | int) -> Span | None:
    """Where the token of a label, or at a position, stands in its reply."""
    position = at if isinstance(at, int) else at.position
    return None if state.text is None else state.text.span(position)


def cleared_chars(state: StreamState, cleared: int) -> int:
    """How many characters of the latest reply are wholly in the first `cleared` assistant tokens of the stream."""
    books, turns = state.text, state.turns
    return 0 if books is None else books.cleared_chars(turns[-1].start if turns else 0, cleared)


def cut_before(state: StreamState, cleared: int) -> tuple[int, int]:
    """Where to cut the latest reply's text: see `TextState.cut_before`."""
    books, turns = state.text, state.turns
    return (cleared, 0) if books is None else books.cut_before(turns[-1].start if turns else 0, cleared)


def accepted_chars(state: StreamState) -> int:
    """How many characters the reply has so far, those held back included; what is incomplete counts as it would end."""
    books = state.text
    if books is None or _begins_reply(state, books):
        return 0
    rest = "" if books.foreign is None else books.foreign.rest()
    return books.held.num_chars + len(books.held.text) + bool(books.held.partial) + len(rest)


def held_text(state: StreamState) -> str:
    """The text that was accepted and not fed."""
    return "" if state.text is None else state.text.held.text


def _begins_reply(state: StreamState, books: TextState) -> bool:
    """Whether text that comes now is the first of a reply. (Held text is of a reply that may not have begun yet.)"""
    if books.has_unfed_text or state.turns is None:
        return False
    last = state.turns[-1]
    return last.role != "assistant" or last.is_closed


def _read(
    core: EngineCore, chat: ChatTemplate | None, state: StreamState, piece: Piece
) -> tuple[ChatTemplate, TextState, ForeignIds | None, tuple[str, str | bytes]]:
    """A stream's books, where ids of another tokenizer are left after a piece, and its text, checked."""
    core.check_open(state)
    if chat is None:
        raise ConfigError(
            "the checkpoint folder has no tokenizer.json, so text cannot be made into ids; add Qwen3's tokenizer.json "
            "to it, or append Qwen3 token ids"
        )
    if not isinstance(piece.text, bytes | bytearray | memoryview):
        chat.tokenizer.check_text(piece.text)
    check_reply_open(state)
    books = state.text or TextState()
    foreign, text = _read_foreign(books.foreign, piece)
    for part in text:
        num_chars = len(part) if isinstance(part, str) else len(part) // 4  # at least
        chat.tokenizer.check_fits(num_chars, core.max_model_len)
    return chat, books, foreign, text


def _read_foreign(
    foreign: ForeignIds | None, piece: Piece
) -> tuple[ForeignIds | None, tuple[str, str | bytes]]:
    """Where ids of another tokenizer are left after a piece, and its text: what they left incomplete before, and
    its own."""
    before, text = "", piece.text
    if foreign is not None and (text or piece.is_final or piece.tokenizer not in (None, foreign.tokenizer)):
        before, foreign = foreign.rest(), None
    if piece.tokenizer is not None:
        text, foreign = (foreign or ForeignIds.begin(piece.tokenizer)).read(piece.foreign_ids)
    return foreign, (before, text)
