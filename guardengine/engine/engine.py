"""Engine: the public runtime. Joins checkpoint, template, policy and EngineCore; single-threaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from guardengine.checkpoint.hub import resolve_checkpoint
from guardengine.checkpoint.model_config import RISKS, GuardHeadsConfig
from guardengine.config import EngineConfig
from guardengine.core.admission import Ticket, check_timeout
from guardengine.core.engine_core import EngineCore
from guardengine.core.feeds import Feed, feed_ids, feed_messages
from guardengine.core.health import Canary, check_health
from guardengine.core.state import StreamState
from guardengine.core.whole_streams import moderation, run_feeds
from guardengine.engine.conversations import (
    Options,
    Prepared,
    Whole,
    check_lengths,
    check_options,
    each_fit,
    feed_whole,
    fit,
    in_place,
)
from guardengine.engine.info import EngineInfo, info_of
from guardengine.engine.loading import choose_backend, load_engine
from guardengine.engine.moderator import OnUnfit
from guardengine.engine.opening import Messages, Opening
from guardengine.engine.stats import stats_of
from guardengine.engine.stream import Stream
from guardengine.errors import ConfigError
from guardengine.gen.answering import Answering, Job, run_prompts
from guardengine.gen.answers import Mode
from guardengine.gen.moderation import gen_moderation
from guardengine.gen.parse import CATEGORIES
from guardengine.gen.prompts import Prompt, render_prompt
from guardengine.labels import GenModeration, Label, Moderation, Role
from guardengine.policy import Policy
from guardengine.records.snapshot import read_snapshot
from guardengine.text.chat_template import ChatTemplate

logger = logging.getLogger("guardengine")

_MAX_CHECKED = 64  # policies that are remembered

_NO_TOKENIZER = (
    "the checkpoint folder has no tokenizer.json, so text cannot be rendered; "
    "add Qwen3's tokenizer.json to it, or pass token ids"
)


class Engine:
    """Moderates many conversations at once. Make one with `from_pretrained`; also a context manager.

    One thread's: the first that opens a stream or steps. Calls from another one, or from inside another call, raise
    WrongThread. AsyncEngine is for many tasks.
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
        self._default_policy = Policy.strict()
        # By id: policies do not change, so checks need not be repeated.
        self._checked_policies: dict[int, Policy] = {}

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
        """Load a checkpoint folder or hub id. `limits` are the fields of EngineConfig.

        dtype "auto" is the checkpoint's own (float32 for float16 ones); a hub id needs a pinned `revision`
        unless it is one whose revision ships with guardengine.

        Raises CheckpointError for what is wrong with the files and ConfigError for what is wrong with the options.
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
        """Open a stream, from messages or from raw token ids; nothing is computed before `step`.

        messages: rendered with the checkpoint's chat template, content as plain text whatever it spells. The
        prompt label is read at the <|im_end|> of the last user turn. A final assistant message is the beginning
        of the reply: its tokens are labelled, and more may be appended. Where that is text, an empty one lets the
        template's tokens before the reply be computed with the prompt instead of with the first of it.
        token_ids: fed as they are. Role "user": one prompt label, at the last of them. Role "assistant": one
        label for each.

        tenant: whom `max_streams_per_tenant` and `max_pending_tokens_per_tenant` count. cache_salt: streams of the
        same salt (by default the tenant) share cached KV blocks where they begin alike; between others not even
        timing tells. priority: -3 to 3, higher runs sooner. timeout_s: as in `Stream.append`.

        `policy` is Policy.strict() by default. Raises InvalidText or InvalidTokens, StreamTooLong, Overloaded,
        ConfigError or StreamClosed; nothing is opened then.
        """
        opening = Opening(
            messages, token_ids, role, policy, stream_id, tenant, cache_salt, priority, timeout_s
        )
        return Stream(self.core, self.chat, self.open_state(opening))

    def open_state(self, opening: Opening, feed: Feed | None = None) -> StreamState:
        """The books of a new stream. feed: what `prepare_opening` came to, where it was called before."""
        core = self.core
        with core.gate:
            core.check_engine_open()
            if feed is None:
                feed = self.prepare_opening(opening)
            ticket = Ticket(
                self._checked(opening.policy),
                opening.stream_id,
                opening.tenant,
                opening.cache_salt,
                opening.priority,
            )
            return core.open(feed, ticket, opening.timeout_s)

    def prepare_opening(self, opening: Opening) -> Feed:
        """What is fed first. For any thread; raises as `open` does, before anything is computed."""
        self._check_kind("stream", "open() and streams are of Stream checkpoints; use moderate()")
        if (opening.messages is None) == (opening.token_ids is None):
            raise ConfigError("open() needs either messages or token_ids")
        if opening.token_ids is not None:
            return feed_ids(self.core.check_token_ids(opening.token_ids), opening.role)
        return self._feed_messages(opening.messages, is_complete=False)

    def restore(self, snapshot: Mapping[str, Any], stream_id: str | None = None) -> Stream:
        """Go on with a stream of which `Stream.snapshot` was taken, by another engine or this one.

        Labels, verdict and turns are what they were. Nothing is computed before the next `append`, which computes
        the whole stream again; labels that were owed, or that no `step` had returned, come with the next `step`, and
        none comes twice. stream_id: another one than the snapshot's; labels that were returned keep the old one.
        `cache_salt`, `tenant` and `priority` are the snapshot's. Deadlines (`timeout_s`) are not part of it.

        Raises CheckpointError for a snapshot of other weights, ConfigError for one of another dtype or quantization,
        from a version that this one does not read, or that is damaged; and, as `open` does, ConfigError (a stream_id
        in use), StreamTooLong, Overloaded or StreamClosed. Nothing is opened then.
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
            self._checked(state.policy)
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
        """Moderate one finished conversation. See `moderate_many`."""
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
            prepared = self.prepare_conversations(conversations, policy, options)
            items = check_lengths(self.core, self.answering, prepared, on_unfit)
            answers: list[Any]
            if self.answering is not None:
                jobs = run_prompts(self.core, self.answering, fit(items), prepared.mode)
                answers = [self.gen_moderation(job, prepared.policy) for job in jobs]
            else:
                states = run_feeds(
                    self.core,
                    [each.feed for each in fit(items)],
                    prepared.policy,
                    tenant=tenant,
                    timeout_s=timeout_s,
                )
                answers = [
                    moderation(state, prepared.policy, state.verdict, each.spans)
                    for state, each in zip(states, fit(items), strict=True)
                ]
        return in_place(items, answers)

    def prepare_conversations(
        self, conversations: Sequence[Messages], policy: Policy | None, options: Options
    ) -> Prepared:
        """Render what `moderate_many` runs. For any thread; raises as it does, before anything is computed."""
        check_options(self.kind, conversations, options)
        chat, max_tokens = self._require_chat(), self.core.max_model_len
        is_stream = self.kind == "stream"

        def prepare(messages: Messages) -> Whole | Prompt:
            if is_stream:
                return feed_whole(chat, messages, max_tokens, spans=options.spans)
            return render_prompt(chat, messages, max_tokens=max_tokens)

        items = each_fit(conversations, prepare, options.on_unfit)
        return Prepared(self._checked(policy), items, options.mode or "choice")

    def gen_moderation(self, job: Job, policy: Policy) -> GenModeration:
        """The outcome of an answer that is complete. For any thread."""
        return gen_moderation(job, self._require_chat().tokenizer, policy)

    # -- the engine itself ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters since the start and gauges of now, as a plain dict."""
        with self.core.gate:
            self.core.check_engine_open()
            self.core.sweep()
            return stats_of(self.core)

    def health(self, timeout_s: float | None = None) -> dict[str, Any]:
        """Run one token through the model, beside all streams, and report as a plain dict.

        status: "ok"; "failing", when that raised, was not finite or, but for the reference backend, differs in a bit
        from the first time; "stalled", when it took longer than `timeout_s`. note: why, in words. canary_ms: how long
        it took. last_error: the newest step's, None when that went well. last_step_age_s: since the newest step that
        went well.

        Where no KV block is free nothing is run, the note says so, and the newest step decides. Raises StreamClosed.
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

    def _checked(self, policy: Policy | None) -> Policy:
        policy = self._default_policy if policy is None else policy
        if self._checked_policies.get(id(policy)) is policy:
            return policy
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy={policy!r}: a Policy is needed, such as Policy.strict()")
        heads = self._heads
        if heads is None:
            policy.check_names(RISKS, CATEGORIES)
        else:
            policy.check_names(
                tuple(dict.fromkeys(heads.response_risks + heads.query_risks)),
                tuple(dict.fromkeys(heads.response_categories + heads.query_categories)),
            )
        if len(self._checked_policies) >= _MAX_CHECKED:
            self._checked_policies.clear()
        self._checked_policies[id(policy)] = policy
        return policy

    def _feed_messages(self, messages: Messages | None, *, is_complete: bool) -> Feed:
        max_tokens = self.core.max_model_len
        return feed_messages(self._require_chat(), messages, is_complete=is_complete, max_tokens=max_tokens)

    def _require_chat(self) -> ChatTemplate:
        if self.chat is None:
            raise ConfigError(_NO_TOKENIZER)
        return self.chat

    def _check_kind(self, kind: str, mend: str) -> None:
        if self.kind != kind:
            raise ConfigError(f"this is a {self.kind.capitalize()} checkpoint: {mend}")
