"""Policy: labels in, verdict out. Pure functions over small immutable states; no tensors, no engine.

A label is a *hit* when its risk is one that the policy acts on. A hit on a prompt decides at once. A response is
decided by `debounce` hits in a row, because the label of a single token is noisy. The state after each label is an
immutable value, so a rollback returns to an earlier state and a fork copies one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

from guardengine import checks
from guardengine.errors import ConfigError
from guardengine.labels import Action, Label, Verdict, short_category

Rule = Literal["report", "eval-compat"]
Failure = Literal["error", "timeout", "overload"]
OnFailure = Literal["closed", "open"]

_MAX_COUNT = 2**20
_EVAL_RISKS = ("Unsafe", "Controversial")  # the risks that the evaluation script looks for, in this order


class PolicyOptions(TypedDict, total=False):
    """The fields of `Policy` that `Policy.strict` and `Policy.loose` accept: all but `safe_risks`."""

    risk_thresholds: Mapping[str, float]
    category_thresholds: Mapping[str, float]
    ignored_categories: Iterable[str]
    action: Action
    actions: Mapping[str, Action]
    rule: Rule
    debounce: int
    hold_back: int
    on_error: OnFailure
    on_timeout: OnFailure
    on_overload: OnFailure


class Decision(NamedTuple):
    """A decision, the label that it rests on, and the rule that made it. The fields mean what they do in `Verdict`."""

    action: Action
    risk: str
    category: str | None
    position: int | None
    rule: str


class PolicyState(NamedTuple):
    """A policy's memory after some labels: a value, never changed in place."""

    num_labels: int  # assistant tokens seen
    run: int  # consecutive hits up to the newest token; eval-compat: hits of the same risk
    block_run: int  # those at the end of the run whose action is "block"
    run_risk: str | None  # risk of the newest hit, None when the newest label is no hit
    cleared: int
    decision: Decision | None
    failed_open: Failure | None = None  # the newest failure that was let pass


_START = PolicyState(0, 0, 0, None, 0, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The rule that turns labels into a verdict. `Policy()` is strict; see also `strict` and `loose`.

    **Hits.** A token is a hit for a risk when the policy acts on that risk. Normally its risk is the likeliest one,
    and it is a hit when that is not one of `safe_risks`. Thresholds and ignored categories change this, see below.
    A label with a probability that is not finite is a hit for the most severe risk, whatever its category.

    **Decision.** Under the rule "report", a response is decided at token i when the labels of the last `debounce`
    tokens, i - debounce + 1 to i, are all hits, whatever their risks. Token i gives the response its risk and
    category. With the default of 2 this is the rule of the Qwen3Guard Technical Report (arXiv 2510.14276), section
    4.4: tokens i - 1 and i are both Unsafe or Controversial. Under "eval-compat", the rule of the released evaluation
    script, the hits in a row must be of the same risk; the first run of Unsafe decides, and the first run of
    Controversial only while there is no run of Unsafe. So a verdict may turn from Controversial to Unsafe, at a later
    position, and never back. Under either rule a user turn is decided by its one label, and it ends the run before it.

    **Action.** A response is blocked by `debounce` hits in a row whose action is "block"; if any of them has the
    action "flag", it is only flagged. The first decision stays unless a later one is more severe.

    **Cleared tokens.** While nothing is decided, a token is cleared when at least `hold_back` newer tokens have
    labels and it is not in a run of hits that may still decide. After a flag, only runs that may still block are held
    back. After a block nothing more is cleared: the first token of the deciding run and all later ones stay hidden. A
    further user turn clears the finished response before it. When a response is complete and is not blocked, show
    all of it: no later label can change the verdict.

    **Failures.** Tokens may go without a label. With "closed" this blocks the stream, with the risk "Unknown" and the
    rule "error", "timeout" or "overload". With "open" the tokens count as cleared, later labels are judged normally,
    and the rule of the verdict records it ("timeout-open", "debounce+timeout-open").

    Attributes:
        safe_risks: Risks that are never hits. "Safe" must be one of them.
        risk_thresholds: Risk -> probability, 0 to 1. A token is a hit for risk r exactly when P(r) >= the threshold,
            even when r is not the likeliest risk. Of several such risks, one with the action "block" counts
            first, then the one that the model names first (Unsafe before Controversial).
        category_thresholds: Category -> probability, 0 to 1. For tokens whose likeliest category is c, this replaces
            the rules above: a hit when the probabilities of all risks outside `safe_risks` sum to at least the
            threshold, for the likeliest of these risks.
        ignored_categories: Tokens whose likeliest category is one of these are never hits.
        action: What a decision does: "block", or "flag" to report it and let the response go on.
        actions: Risk -> action, for risks whose action is not `action`.
        rule: "report" or "eval-compat", see above.
        debounce: Number of hits in a row that decide a response, 1 to 2**20.
        hold_back: Number of newest tokens that are not cleared yet, 0 to 2**20.
        on_error: "closed" or "open": what follows when the model fails on a token.
        on_timeout: "closed" or "open": what follows when a token is not judged in time.
        on_overload: "closed" or "open": what follows when there is no room to judge a token.

    Names of categories may be the short or the long ones (`guardengine.labels.LONG_CATEGORY_NAMES`).

    Raises:
        ConfigError: A value is out of range, or two options contradict each other. Whether a model has the risks and
            categories that are named here is checked when a stream opens: see `check_names`.
    """

    safe_risks: Iterable[str] = ("Safe",)
    risk_thresholds: Mapping[str, float] = field(default_factory=dict, hash=False)
    category_thresholds: Mapping[str, float] = field(default_factory=dict, hash=False)
    ignored_categories: Iterable[str] = ()
    action: Action = "block"
    actions: Mapping[str, Action] = field(default_factory=dict, hash=False)
    rule: Rule = "report"
    debounce: int = 2
    hold_back: int = 0
    on_error: OnFailure = "closed"
    on_timeout: OnFailure = "closed"
    on_overload: OnFailure = "closed"

    def __post_init__(self) -> None:
        store: Callable[[str, Any], None] = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        store("safe_risks", frozenset(checks.names("safe_risks", self.safe_risks)))
        store("risk_thresholds", checks.by_name("risk_thresholds", self.risk_thresholds, checks.probability))
        by_category = checks.by_name("category_thresholds", self.category_thresholds, checks.probability)
        store("category_thresholds", _with_short_names("category_thresholds", by_category))
        ignored = checks.names("ignored_categories", self.ignored_categories)
        store("ignored_categories", frozenset(short_category(name) for name in ignored))
        _action("action", self.action)
        store("actions", checks.by_name("actions", self.actions, _action))
        checks.choice("rule", self.rule, ("report", "eval-compat"))
        checks.whole_number("debounce", self.debounce, 1, _MAX_COUNT)
        checks.whole_number("hold_back", self.hold_back, 0, _MAX_COUNT)
        for option in ("on_error", "on_timeout", "on_overload"):
            checks.choice(option, getattr(self, option), ("closed", "open"))
        self._check_contradictions()

    @staticmethod
    def strict(**options: Unpack[PolicyOptions]) -> Policy:
        """Act on Unsafe and on Controversial. The engine's default.

        Args:
            **options: Fields of `Policy`, except `safe_risks`.

        Raises:
            ConfigError: An option is unknown or its value is not valid.
        """
        return Policy(safe_risks=("Safe",), **_known(options))

    @staticmethod
    def loose(**options: Unpack[PolicyOptions]) -> Policy:
        """Act on Unsafe only; Controversial counts as safe.

        Args:
            **options: Fields of `Policy`, except `safe_risks`.

        Raises:
            ConfigError: An option is unknown or its value is not valid.
        """
        return Policy(safe_risks=("Safe", "Controversial"), **_known(options))

    @staticmethod
    def of(preset: str = "strict", **options: Unpack[PolicyOptions]) -> Policy:
        """The preset of this name, with some of its options replaced.

        Args:
            preset: "strict" or "loose".
            **options: Fields of `Policy`, except `safe_risks`.

        Raises:
            ConfigError: The preset or an option is unknown, or a value is not valid.
        """
        checks.choice("policy: preset", preset, ("strict", "loose"))
        return Policy.strict(**options) if preset == "strict" else Policy.loose(**options)

    def check_names(self, risks: Iterable[str], categories: Iterable[str]) -> None:
        """Check that a model has the risks and categories that this policy names.

        Args:
            risks: The model's names of risks, in its order.
            categories: The model's names of categories, short or long.

        Raises:
            ConfigError: The model has no such name (the message lists its names), or no risk is left to act on.
        """
        risks, categories = tuple(risks), tuple(categories)
        all_risks, all_categories = ", ".join(risks), ", ".join(categories)
        for option in ("safe_risks", "risk_thresholds", "actions"):
            for name in getattr(self, option):
                if name not in risks:
                    raise ConfigError(f"{option} names risk {name!r}; the model's risks are {all_risks}")
        short = set(map(short_category, categories))
        for option in ("category_thresholds", "ignored_categories"):
            for name in getattr(self, option):
                if name not in short:
                    known = all_categories
                    raise ConfigError(f"{option} names category {name!r}; the model's categories are {known}")
        acted_on = set(risks) - set(self.safe_risks)
        if not acted_on:
            raise ConfigError(
                f"safe_risks={sorted(self.safe_risks)} covers every risk of the model: leave one out"
            )
        if self.rule == "eval-compat" and not acted_on <= set(_EVAL_RISKS):
            raise ConfigError(
                f"rule='eval-compat' knows the risks {' and '.join(_EVAL_RISKS)}, the model has {all_risks}: "
                "use rule='report', or add the others to safe_risks"
            )

    def start(self) -> PolicyState:
        """The state before the first label: pass it to `advance` with the label of the first token."""
        return _START

    def advance(self, state: PolicyState, label: Label) -> PolicyState:
        """A new state, the one after one more label. Takes constant time.

        Args:
            state: The state after the labels before this one.
            label: The next label; labels come in order of position.
        """
        old = state.decision
        if old is not None and old.action == "block" and not self._may_turn_unsafe(old):
            return state
        risk = self.hit(label)
        if label.role == "user":
            return self._after_prompt(state, label, risk)
        num_labels = state.num_labels + 1
        run = block_run = 0
        decision = old
        if risk is not None:
            action = self.actions.get(risk, self.action)
            goes_on = self.rule == "report" or risk == state.run_risk
            run = state.run + 1 if goes_on else 1
            if action == "block":
                block_run = state.block_run + 1 if goes_on else 1
            if run >= self.debounce:
                rule = "debounce" if self.rule == "report" else "eval-compat"
                reached: Action = "block" if block_run >= self.debounce else "flag"
                decision = self._later(old, Decision(reached, risk, label.category, label.position, rule))
        cleared = state.cleared
        if decision is None or decision.action != "block":
            undecided = run if decision is None else block_run
            cleared = max(cleared, num_labels - max(undecided, self.hold_back))
        return PolicyState(num_labels, run, block_run, risk, cleared, decision, state.failed_open)

    def fail(self, state: PolicyState, failure: Failure, num_tokens: int) -> PolicyState:
        """A new state, the one after tokens that got no label.

        Args:
            state: The state after the labels so far.
            failure: Why they got none: "error", "timeout" or "overload".
            num_tokens: How many assistant tokens the stream has, those without a label included.
        """
        is_blocked = state.decision is not None and state.decision.action == "block"
        if getattr(self, f"on_{failure}") == "open":
            cleared = state.cleared if is_blocked else max(state.cleared, num_tokens)
            return state._replace(cleared=cleared, failed_open=failure)
        decision = self._later(state.decision, Decision("block", "Unknown", None, None, failure))
        return state._replace(decision=decision)

    def verdict(self, state: PolicyState) -> Verdict:
        """The verdict in a state, in constant time.

        Args:
            state: From `start`, `advance` or `fail`.
        """
        if state.decision is None:
            rule = f"{state.failed_open}-open" if state.failed_open else "none"
            return Verdict("allow", "Safe", None, None, rule, state.cleared)
        decision = state.decision
        if state.failed_open:
            decision = decision._replace(rule=f"{decision.rule}+{state.failed_open}-open")
        return Verdict(*decision, state.cleared)

    def judge(self, labels: Iterable[Label]) -> Verdict:
        """The verdict on a whole list of labels, equal to that of `advance` called on them one by one.

        Args:
            labels: Labels of one stream, in order of position.
        """
        state = self.start()
        for label in labels:
            state = self.advance(state, label)
        return self.verdict(state)

    def ignores(self, category: str) -> bool:
        """Whether labels of a category are never hits.

        Args:
            category: The category's short or long name.
        """
        return short_category(category) in self.ignored_categories

    def hit(self, label: Label) -> str | None:
        """The risk for which one label is a hit, or None when it is no hit.

        Args:
            label: Any label; the labels before it do not matter here.
        """
        risk_probs = label.risk_probs
        if not math.isfinite(sum(risk_probs.values()) + sum(label.category_probs.values())):
            unsafe = [risk for risk in risk_probs if risk not in self.safe_risks]
            return max(unsafe, key=self._is_block, default="Unsafe")
        category = short_category(label.category)
        if self.ignores(category):
            return None
        if category in self.category_thresholds:
            unsafe_probs = {risk: p for risk, p in risk_probs.items() if risk not in self.safe_risks}
            if not unsafe_probs or math.fsum(unsafe_probs.values()) < self.category_thresholds[category]:
                return None
            return max(unsafe_probs, key=unsafe_probs.__getitem__)
        if not self.risk_thresholds:
            return None if label.risk in self.safe_risks else label.risk
        thresholds = self.risk_thresholds
        unsafe = [risk for risk in risk_probs if risk not in self.safe_risks]
        hits = [r for r in unsafe if (risk_probs[r] >= thresholds[r] if r in thresholds else r == label.risk)]
        return max(hits, key=self._is_block, default=None)

    # -- internals -----------------------------------------------------------------------------------------

    def _after_prompt(self, state: PolicyState, label: Label, risk: str | None) -> PolicyState:
        blocked = state.decision is not None and state.decision.action == "block"
        decision = state.decision
        if risk is not None:
            action = self.actions.get(risk, self.action)
            decision = self._later(decision, Decision(action, risk, label.category, label.position, "prompt"))
        cleared = state.cleared if blocked else max(state.cleared, state.num_labels)
        return PolicyState(state.num_labels, 0, 0, None, cleared, decision, state.failed_open)

    def _later(self, old: Decision | None, new: Decision) -> Decision:
        """The decision that counts from now on: the old one, unless the new one is more severe."""
        if old is None or (old.action == "flag" and new.action == "block"):
            return new
        if new.risk == "Unsafe" and new.rule == "eval-compat" and self._may_turn_unsafe(old):
            return new
        return old

    def _may_turn_unsafe(self, decision: Decision) -> bool:
        return decision.rule == "eval-compat" and decision.risk == "Controversial"

    def _is_block(self, risk: str) -> bool:
        return self.actions.get(risk, self.action) == "block"

    def _check_contradictions(self) -> None:
        if "Safe" not in self.safe_risks:
            raise ConfigError(f"safe_risks={sorted(self.safe_risks)}: 'Safe' must be one of them")
        for option in ("risk_thresholds", "actions"):
            for risk in getattr(self, option):
                if risk in self.safe_risks:
                    mend = "remove it from safe_risks or from here"
                    raise ConfigError(f"{option} names {risk!r}, which counts as safe: {mend}")
        for category in self.ignored_categories:
            if category in self.category_thresholds:
                where = "in ignored_categories and in category_thresholds"
                raise ConfigError(f"category {category!r} is {where}: remove it from one of the two")
        unsafe, controversial = (self._is_block(risk) for risk in _EVAL_RISKS)
        if self.rule == "eval-compat" and "Controversial" not in self.safe_risks and controversial > unsafe:
            raise ConfigError(
                "actions: 'Controversial' blocks and 'Unsafe' only flags, but under rule='eval-compat' "
                "Unsafe takes precedence: give 'Unsafe' the action 'block'"
            )


def _known(options: PolicyOptions) -> PolicyOptions:
    unknown = sorted(set(options) - PolicyOptions.__annotations__.keys())
    if unknown:
        known = ", ".join(option.name for option in fields(Policy) if option.name != "safe_risks")
        raise ConfigError(f"unknown option(s) {', '.join(unknown)}; the options are {known}")
    return options


def _with_short_names(option: str, by_category: Mapping[str, float]) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, value in by_category.items():
        if result.setdefault(short_category(name), value) != value:
            raise ConfigError(
                f"{option} names {short_category(name)!r} twice, with different values: remove one"
            )
    return result


def _action(name: str, value: Any) -> Action:
    if value == "allow":
        raise ConfigError(f"{name}='allow': choose 'flag' or 'block'; to allow a risk, add it to safe_risks")
    return checks.choice(name, value, ("flag", "block"))  # type: ignore[return-value]
