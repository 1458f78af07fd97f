"""Moderation of whole conversations: rendered and checked for any thread, run on the engine's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from guardengine.core.engine_core import EngineCore
from guardengine.core.whole_streams import moderation, run_feeds
from guardengine.engine.checked_policies import CheckedPolicies
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
from guardengine.engine.opening import Messages, require_chat
from guardengine.gen.answering import Answering, Job, run_prompts
from guardengine.gen.moderation import gen_moderation
from guardengine.gen.prompts import Prompt, render_prompt
from guardengine.labels import GenModeration
from guardengine.policy import Policy
from guardengine.text.chat_template import ChatTemplate


class WholeConversations:
    """What `moderate_many` of Engine and AsyncEngine share."""

    def __init__(
        self,
        core: EngineCore,
        chat: ChatTemplate | None,
        answering: Answering | None,
        policies: CheckedPolicies,
        *,
        is_stream: bool,
    ) -> None:
        self._core, self._chat, self._answering, self._policies = core, chat, answering, policies
        self._is_stream = is_stream

    def prepare(self, conversations: Sequence[Messages], policy: Policy | None, options: Options) -> Prepared:
        """Render what `moderate_many` runs. For any thread; raises as it does, before anything is computed.

        Args:
            conversations: Messages of each.
            policy: Policy.strict() by default.
            options: The other arguments of `moderate_many`.
        """
        check_options("stream" if self._is_stream else "gen", conversations, options)
        chat, max_tokens = require_chat(self._chat), self._core.max_model_len

        def prepare(messages: Messages) -> Whole | Prompt:
            if self._is_stream:
                return feed_whole(chat, messages, max_tokens, spans=options.spans)
            return render_prompt(chat, messages, max_tokens=max_tokens)

        items = each_fit(conversations, prepare, options.on_unfit)
        return Prepared(self._policies.check(policy), items, options.mode or "choice")

    def run(self, prepared: Prepared, options: Options) -> list[Any]:
        """Run what was prepared to its end. On the engine's thread, inside its gate."""
        items = check_lengths(self._core, self._answering, prepared, options.on_unfit)
        answers: list[Any]
        if self._answering is not None:
            jobs = run_prompts(self._core, self._answering, fit(items), prepared.mode)
            answers = [self.outcome(job, prepared.policy) for job in jobs]
        else:
            states = run_feeds(
                self._core,
                [each.feed for each in fit(items)],
                prepared.policy,
                tenant=options.tenant,
                timeout_s=options.timeout_s,
            )
            answers = [
                moderation(state, prepared.policy, state.verdict, each.spans)
                for state, each in zip(states, fit(items), strict=True)
            ]
        return in_place(items, answers)

    def outcome(self, job: Job, policy: Policy) -> GenModeration:
        """What a Gen checkpoint's complete answer says. For any thread.

        Args:
            job: The answer.
            policy: A checked policy.
        """
        return gen_moderation(job, require_chat(self._chat).tokenizer, policy)
