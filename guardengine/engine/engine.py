"""Engine: the public runtime. Joins checkpoint, template, policy and EngineCore; single-threaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.checkpoint.model_config import GuardHeadsConfig
from guardengine.config import EngineConfig
from guardengine.core.admission import Ticket, check_timeout
from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import Feed, feed_ids, feed_messages
from guardengine.core.health import Canary, check_health
from guardengine.core.state import StreamState
from guardengine.engine.checked_policies import CheckedPolicies
from guardengine.engine.conversations import Options
from guardengine.engine.info import EngineInfo, info_of
from guardengine.engine.loading import choose_backend, load_engine
from guardengine.engine.moderation import WholeConversations
from guardengine.engine.moderator import OnUnfit
from guardengine.engine.opening import Messages, Opening, require_chat
from guardengine.engine.stats import stats_of
from guardengine.engine.stream import Stream
from guardengine.errors import ConfigError
from guardengine.gen.answering import Answering
from guardengine.gen.answers import Mode
from guardengine.labels import GenModeration, Label, Moderation, Role
from guardengine.policy import Policy
from guardengine.records.snapshot import read_snapshot
from guardengine.text.chat_template import ChatTemplate

logger = logging.getLogger("guardengine")


class Engine:
    """Moderates many conversations at once. Make one with `from_pretrained`. Also a context manager that closes it.

    An engine belongs to one thread: the first that opens a stream or steps. Calls from another one, or from inside
    another call, raise WrongThread. AsyncEngine is for many tasks.
    """

    def __init__(
        self,
        core: EngineCore,
        chat: ChatTemplate | None,
        heads: GuardHeadsConfig | None,
        answering: Answering | None = None,
    ) -> None:
        self.core, self.answering = core, answering
        self.canary = Canary(core)
        self.chat, self._heads = chat, heads
        self._policies = CheckedPolicies(heads)
        is_stream = heads is not None
        self.conversations = WholeConversations(core, chat, answering, self._policies, is_stream=is_stream)

    @staticmethod
    def from_pretrained(
        path_or_id: str | Path,
        *,
        device: str = "auto",
        backend: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        progress: bool = False,
        **limits: Any,
    ) -> Engine:
        """Load a Stream or Gen checkpoint.

        Args:
            path_or_id: A folder with config.json and safetensors files, or a hub id.
            device: "auto" (a GPU that can run the model, else the CPU), "cpu", "cuda" or "cuda:N".
            backend: The operators: "auto", "reference" (plain PyTorch), "cpu" or "triton".
            dtype: Of weights and activations: "auto" (the checkpoint's own; float32 for float16), "float32" or
                "bfloat16".
            quantization: Of the layers' matrices: None, "int8" (weights) or "w8a8" (weights and activations).
            revision: The full commit of a hub id; may be left out where guardengine has a pinned one.
            progress: Whether to show a progress bar on stderr.
            **limits: The fields of EngineConfig, such as kv_cache_bytes and max_num_streams.

        Raises:
            CheckpointError: The files cannot be found, read or trusted.
            ConfigError: An option is unknown, out of range, or not supported by this machine or checkpoint.
        """
        options = EngineConfig.from_options(limits)
        loaded = load_engine(
            resolve_checkpoint(path_or_id, revision),
            options,
            choose_backend(backend, device, quantization),
            dtype,
            quantization,
            progress=progress,
        )
        engine = Engine(*loaded)
        logger.info("loaded %s: %s", path_or_id, stats_of(engine.core))  # not a first use: no owner yet
        return engine

    # -- streams -------------------------------------------------------------------------------------------

    def open(
        self,
        messages: Messages | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        role: Role = "user",
        policy: Policy | None = None,
        stream_id: str | None = None,
        tenant: str = "",
        cache_salt: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Stream:
        """Open a stream, from messages or from raw token ids. Nothing is computed before `step`.

        Args:
            messages: Rendered with the checkpoint's chat template, content as plain text whatever it spells. The
                prompt label is read at the <|im_end|> of the last user turn. A final assistant message is the beginning
                of the reply: its tokens are labelled, and more may be appended. Where the reply comes as text, an empty
                one lets the template's tokens before the reply be computed with the prompt.
            token_ids: Qwen3 ids instead of messages, fed as they are.
            role: Of token_ids. "user": one prompt label, at the last of them. "assistant": one label for each.
            policy: What labels mean; Policy.strict() by default.
            stream_id: The name in labels and logs; by default one that is not in use.
            tenant: Whom `max_streams_per_tenant` and `max_pending_tokens_per_tenant` count.
            cache_salt: Streams of one salt (by default the tenant) share cached KV blocks where they begin alike.
                Streams of different salts share nothing, so that timing tells nothing either.
            priority: From -3 to 3; a stream of higher priority runs sooner.
            timeout_s: Seconds until tokens that are not computed count as unjudged, as in `Stream.append`.

        Returns:
            The stream's handle.

        Raises:
            InvalidText, InvalidTokens: The messages or ids cannot be fed. Nothing is opened after any error.
            StreamTooLong: There are more tokens than `max_model_len`, or than the KV cache has room for.
            Overloaded: There is no free place, block or pending token now.
            ConfigError: An option is wrong, the stream_id is in use, or this is a Gen checkpoint.
            StreamClosed: The engine is closed.
        """
        opening = Opening(
            messages, token_ids, role, policy, stream_id, tenant, cache_salt, priority, timeout_s
        )
        return Stream(self.core, self.chat, self.open_state(opening))

    def open_state(self, opening: Opening, feed: Feed | None = None) -> StreamState:
        """Open a stream's books, without a handle.

        Args:
            opening: The arguments of `open`.
            feed: What `prepare_opening` returned, where it was called before.
        """
        core = self.core
        with core.gate:
            core.check_engine_open()
            if feed is None:
                feed = self.prepare_opening(opening)
            ticket = Ticket(
                self._policies.check(opening.policy),
                opening.stream_id,
                opening.tenant,
                opening.cache_salt,
                opening.priority,
            )
            return core.open(feed, ticket, opening.timeout_s)

    def prepare_opening(self, opening: Opening) -> Feed:
        """Render what a stream is opened with. For any thread; raises as `open` does, before anything is computed.

        Args:
            opening: The arguments of `open`.
        """
        self._check_kind("stream", "open() and streams are of Stream checkpoints; use moderate()")
        if (opening.messages is None) == (opening.token_ids is None):
            raise ConfigError("open() needs either messages or token_ids")
        if opening.token_ids is not None:
            return feed_ids(self.core.check_token_ids(opening.token_ids), opening.role)
        chat, max_tokens = require_chat(self.chat), self.core.max_model_len
        return feed_messages(chat, opening.messages, is_complete=False, max_tokens=max_tokens)

    def restore(self, snapshot: Mapping[str, Any], stream_id: str | None = None) -> Stream:
        """Go on with a stream of which `Stream.snapshot` was taken, by this engine or another.

        Labels, verdict, turns, tenant, cache_salt and priority are what they were; deadlines are not part of a
        snapshot. Nothing is computed before the next `append`, which computes the whole stream again. Labels that were
        pending, or that no `step` had returned, come with the next `step`, and none comes twice.

        Args:
            snapshot: What `Stream.snapshot` returned, also after a way through JSON.
            stream_id: Another name than the snapshot's; labels that were returned before keep the old one.

        Returns:
            The stream's handle.

        Raises:
            CheckpointError: The snapshot is of other weights. Nothing is opened after any error.
            ConfigError: It is of another dtype or quantization, of a version that this one does not read, or damaged;
                or the stream_id is in use.
            StreamTooLong, Overloaded, StreamClosed: As in `open`.
        """
        core = self.core
        with core.gate:
            core.check_engine_open()
            self._check_kind("stream", "restore() is of Stream checkpoints")
            state, undelivered = read_snapshot(
                snapshot,
                readout=core.readout,
                fingerprint=core.fingerprint,
                vocab_size=core.vocab_size,
                chat=self.chat,
                stream_id=stream_id,
            )
            self._policies.check(state.policy)
            ticket = Ticket(state.policy, state.stream_id, state.tenant, None, state.priority)
            core.restore(state, ticket, undelivered)
            return Stream(core, self.chat, state)

    def step(self) -> list[Label]:
        """Run one batched forward over all streams with pending tokens and return the labels that it completed.

        [] when nothing is pending, or when the step computed only parts of prompts. An exception from the model
        leaves every stream as it was, the same tokens pending.
        """
        with self.core.gate:
            return self.core.step()

    def run(self) -> list[Label]:
        """Step until nothing is pending; returns all labels. Raises as `step` does; labels that had come before are
        then returned by the next call."""
        with self.core.gate:
            return self.core.run()

    # -- whole conversations -------------------------------------------------------------------------------

    @property
    def kind(self) -> Literal["stream", "gen"]:
        """Of the checkpoint."""
        return "gen" if self._heads is None else "stream"

    @property
    def info(self) -> EngineInfo:
        """Limits and names that do not change while the engine is open."""
        return info_of(self.core, self._heads, reads_text=self.chat is not None)

    def moderate(
        self, messages: Messages, policy: Policy | None = None, *, mode: Mode | None = None
    ) -> Moderation | GenModeration:
        """Moderate one finished conversation. See `moderate_many`, also for what is raised.

        Args:
            messages: As in `open`.
            policy: Policy.strict() by default.
            mode: Gen checkpoints only: "choice" (the default) or "greedy".

        Returns:
            A Moderation of a Stream checkpoint, a GenModeration of a Gen checkpoint.
        """
        answer: Moderation | GenModeration
        [answer] = self.moderate_many([messages], policy, mode=mode)
        return answer

    def moderate_many(
        self,
        conversations: Sequence[Messages],
        policy: Policy | None = None,
        *,
        mode: Mode | None = None,
        tenant: str = "",
        timeout_s: float | None = None,
        spans: bool = False,
        on_unfit: OnUnfit = "raise",
    ) -> list[Any]:
        """Moderate finished conversations, as many at a time as fit. Other streams advance in the same steps and their
        labels come with the next `step`.

        Args:
            conversations: Messages of each, as in `open`.
            policy: Policy.strict() by default.
            mode: Gen checkpoints only. "choice" (the default) takes the likeliest answer of the grammar that the
                checkpoint was trained to keep, with its probabilities, in a step or a few; "greedy" takes the likeliest
                token after every token, up to 128, as transformers' greedy generate does.
            tenant: As in `open`. Stream checkpoints only, as the two that follow.
            timeout_s: Seconds for each conversation, from when there is room for it: as in `open`.
            spans: Whether to say where the token of each label stands in the last message's content. A reply is then
                tokenized as `Stream.append_text` does, which differs only in 256 characters without a place to cut.
            on_unfit: What becomes of a conversation that is no valid input, or too long: "raise" its error, or
                "return" the error in its place. The others are then judged all the same. Found before anything runs.

        Returns:
            Stream checkpoints: a Moderation each (list[Moderation]). The labels are those of the last assistant
            message's tokens up to and including its <|im_end|>; response is None where the conversation ends with the
            user, and judges the response alone: the prompt is in `prompt`.
            Gen checkpoints: a GenModeration each (list[GenModeration]), of the last message.
            With on_unfit="return" also InvalidTokens, InvalidText and StreamTooLong, in their places.

        Raises:
            InvalidText, InvalidTokens, StreamTooLong: A conversation is unfit. Nothing has been computed then.
            ConfigError: An option is wrong, or of the other kind of checkpoint.
            Overloaded: Other streams leave no room for even one; may come after some were computed.
            StreamClosed: The engine is closed.
        """
        options = Options(mode, tenant, timeout_s, spans, on_unfit)
        with self.core.gate:
            self.core.check_engine_open()
            return self.conversations.run(self.conversations.prepare(conversations, policy, options), options)

    # -- the engine itself ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters since the start and gauges of now, as a plain dict."""
        with self.core.gate:
            self.core.check_engine_open()
            self.core.sweep()
            return stats_of(self.core)

    def health(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Run one token through the model, beside all streams, and report.

        Args:
            timeout_s: Seconds after which the answer is "stalled"; None: never.

        Returns:
            A plain dict. status: "ok"; "failing", when the model raised, gave numbers that are not finite or, but for
            the reference backend, other bits than the first time; "stalled". note: why, in words. canary_ms: how long
            the token took. last_error: of the newest step, None when it went well. last_step_age_s: seconds since a
            step went well. Where no KV block is free nothing is run, and the newest step decides.

        Raises:
            ConfigError: `timeout_s` is no time.
            StreamClosed: The engine is closed.
        """
        with self.core.gate:
            self.core.check_engine_open()
            if timeout_s is not None:
                check_timeout(timeout_s)
            return check_health(self.core, self.canary, timeout_s)

    def weights_digest(self) -> str:
        """sha256 over the checkpoint's config.json and safetensors files, as `sha256sum config.json
        model*.safetensors | sha256sum` prints it in its folder. Reads all of them at the first call.

        Raises CheckpointError when they have changed since they were loaded.
        """
        with self.core.gate:
            return self.core.fingerprint.weights()

    def check_integrity(self) -> None:
        """Raise IntegrityError if the engine's books contradict each other. For tests and debugging."""
        with self.core.gate:
            self.core.check_integrity()

    def close(self) -> None:
        """Close every stream and free weights and KV cache. Every later call raises StreamClosed."""
        with self.core.gate:
            self.core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # -- internals -----------------------------------------------------------------------------------------

    def _check_kind(self, kind: str, mend: str) -> None:
        if self.kind != kind:
            raise ConfigError(f"this is a {self.kind.capitalize()} checkpoint: {mend}")
