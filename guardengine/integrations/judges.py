"""Who judges: `guardengine serve`, or an AsyncEngine in this process. Both open streams that are asked alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from guardengine.errors import ConfigError

if TYPE_CHECKING:  # which bring torch or numpy: who asks a server begins without
    from guardengine.client.async_client import AsyncGuardStream
    from guardengine.engine.async_engine import AsyncEngine
    from guardengine.engine.async_stream import AsyncStream
    from guardengine.labels import Verdict
    from guardengine.policy import Policy

Json = dict[str, Any]
Messages = Sequence[Mapping[str, Any]]


class JudgedStream(Protocol):
    """A stream whose prompt is judged. Labels are as docs/serving/protocol.md has them."""

    @property
    def prompt(self) -> Json | None:
        """The label of the prompt."""

    @property
    def verdict(self) -> Verdict: ...

    @property
    def cleared_chars(self) -> int:
        """How many characters of the reply may be shown."""

    async def append(self, text: str) -> list[Json]:
        """Judge more of the reply; returns the labels that are new."""

    async def finish(self) -> list[Json]:
        """Judge what is held back, and the reply's end; returns the labels that are new."""

    async def close(self) -> None: ...


class Judge(Protocol):
    """Opens streams. Calls raise what AsyncGuardClient's and AsyncEngine's do."""

    async def ready(self) -> None:
        """Wait until it can judge. Raises CheckpointError or ConfigError where it never can."""

    async def open(self, messages: Messages) -> JudgedStream:
        """A stream of a conversation; returns when the prompt is judged."""

    async def close(self) -> None: ...


class ServerJudge:
    """A `guardengine serve`. Needs the extra `client`, and no torch.

    Args:
        url: of the server.
        api_key: one of the server's keys, where it has some.
        policy: options of a policy, as docs/serving/protocol.md has them; None: what the server was started with.
        has_scores: whether labels come with probabilities.
        options: `timeout_s` and `reconnect_s` of an AsyncGuardClient.

    Raises:
        ConfigError: for a bad url, or a policy that is no mapping.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        policy: Any = None,
        has_scores: bool = False,
        **options: float,
    ) -> None:
        from guardengine.client import AsyncGuardClient

        if policy is not None and not isinstance(policy, Mapping):
            raise ConfigError(f"policy is {type(policy).__name__}; a server takes a dict of its options")
        self._policy, self._has_scores = policy, has_scores
        self._client = AsyncGuardClient(url, api_key=api_key, **options)

    async def ready(self) -> None:
        """The first stream finds out."""

    async def open(self, messages: Messages) -> JudgedStream:
        return _Served(await self._client.stream(messages, policy=self._policy, scores=self._has_scores))

    async def close(self) -> None:
        await self._client.close()


class EngineJudge:
    """An AsyncEngine.

    Args:
        engine: for one event loop; it may be loading still.
        policy: a Policy, or its options as a mapping with "preset" beside them; None: strict.
        has_scores: whether labels come with probabilities.
        timeout_s: seconds for an answer, see Policy.on_timeout; None: no limit.
        owns_engine: whether `close` closes it.

    Raises:
        ConfigError: for options of a policy, and for what is no AsyncEngine.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        policy: Policy | Mapping[str, Any] | None = None,
        has_scores: bool = False,
        timeout_s: float | None = None,
        owns_engine: bool = False,
    ) -> None:
        from guardengine.engine.async_engine import AsyncEngine

        if not isinstance(engine, AsyncEngine):
            raise ConfigError(f"engine is {type(engine).__name__}, not an AsyncEngine")
        self._policy = _policy_of(policy)
        self._engine, self._has_scores, self._timeout_s = engine, has_scores, timeout_s
        self._owns_engine = owns_engine

    @staticmethod
    def load(
        checkpoint: str,
        engine_options: Mapping[str, Any] | None = None,
        *,
        policy: Policy | Mapping[str, Any] | None = None,
        **options: Any,
    ) -> EngineJudge:
        """Load an engine of one's own, in a thread.

        Args:
            checkpoint: a folder or hub id.
            engine_options: of `AsyncEngine.from_pretrained`.
            policy: as in EngineJudge; it is read before anything is loaded.
            options: of EngineJudge.

        Raises:
            ConfigError: for options.
        """
        from guardengine.engine.async_engine import AsyncEngine

        known = _policy_of(policy)
        engine = AsyncEngine.from_pretrained(checkpoint, **(engine_options or {}))
        return EngineJudge(engine, policy=known, owns_engine=True, **options)

    async def ready(self) -> None:
        await self._engine

    async def open(self, messages: Messages) -> JudgedStream:
        await self.ready()
        stream = await self._engine.open(messages, policy=self._policy, timeout_s=self._timeout_s)
        try:
            await stream.prompt()
        except BaseException:
            await stream.close()
            raise
        return _Own(stream, self._timeout_s, self._has_scores)

    async def close(self) -> None:
        if self._owns_engine:
            await self._engine.close()


class _Served:
    def __init__(self, stream: AsyncGuardStream) -> None:
        self._stream = stream
        self.close = stream.close

    @property
    def prompt(self) -> Json | None:
        return self._stream.prompt

    @property
    def verdict(self) -> Verdict:
        from guardengine.labels import Verdict

        return Verdict(**self._stream.verdict)

    @property
    def cleared_chars(self) -> int:
        return self._stream.cleared_chars

    async def append(self, text: str) -> list[Json]:
        return (await self._stream.append(text)).labels

    async def finish(self) -> list[Json]:
        return (await self._stream.finish()).labels


class _Own:
    def __init__(self, stream: AsyncStream, timeout_s: float | None, has_scores: bool) -> None:
        self._stream, self._timeout_s, self._has_scores = stream, timeout_s, has_scores
        self.close = stream.close

    @property
    def prompt(self) -> Json | None:
        from guardengine.server.json_values import prompt_json

        return prompt_json(self._stream.prompt_label)

    @property
    def verdict(self) -> Verdict:
        return self._stream.verdict

    @property
    def cleared_chars(self) -> int:
        return self._stream.cleared_chars

    async def append(self, text: str) -> list[Json]:
        return self._json(await self._stream.append_text(text, timeout_s=self._timeout_s))

    async def finish(self) -> list[Json]:
        return self._json(await self._stream.finish_text(timeout_s=self._timeout_s))

    def _json(self, labels: Sequence[Any]) -> list[Json]:
        from guardengine.server.json_values import label_json

        span = self._stream.span
        return [label_json(label, span(label), with_scores=self._has_scores) for label in labels]


def _policy_of(policy: Policy | Mapping[str, Any] | None) -> Policy:
    from guardengine.policy import Policy

    return policy if isinstance(policy, Policy) else Policy.of(**(policy or {}))
