"""Policy: labels in, verdict out. Pure functions over small immutable states; no tensors, no engine.

A label is a *hit* when its risk is one the policy acts on. A hit on a prompt decides at once. In a response
it takes `debounce` consecutive hits, because a single token's label flickers. The state after each label is
a value of its own, so a rollback is a return to an earlier state and a fork is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack

from guardengine.errors import ConfigError
from guardengine.labels import Action, Label, Verdict

Rule = Literal["report", "eval-compat"]
Failure = Literal["error", "timeout", "overload"]
OnFailure = Literal["closed", "open"]
T = TypeVar("T")

# The categories' names in the checkpoints, and in the evaluation script and Gen's answers.
LONG_CATEGORY_NAMES: Mapping[str, str] = {
    "Violent": "Violent",
    "Sexual Content": "Sexual Content or Sexual Acts",
    "Self-Harm": "Suicide & Self-Harm",
    "Political": "Politically Sensitive Topics",
    "PII": "PII",
    "Copyright": "Copyright Violation",
    "Illegal Acts": "Non-violent Illegal Acts",
    "Unethical": "Unethical Acts",
    "Jailbreak": "Jailbreak",
}
# The evaluation script's "Violent" literally contains the double quotes.
_SHORT_CATEGORY_NAMES = {long: short for short, long in LONG_CATEGORY_NAMES.items()} | {
    '"Violent"': "Violent"
}

_MAX_COUNT = 2**20
_EVAL_RISKS = ("Unsafe", "Controversial")  # what the evaluation script looks for, in this order


class PolicyOptions(TypedDict, total=False):
    """What `Policy.strict` and `Policy.loose` leave open."""

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
    """What was decided, by which label and under which rule."""

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
    """How labels become a verdict. `Policy()` is strict; see also `strict` and `loose`.

    Hits. A token is a hit when its risk is not one of `safe_risks`. Its risk is the likeliest one, except:
      risk_thresholds[r]      it is a hit for risk r exactly when P(r) >= the threshold, likeliest or not. Of
                              several risks that are hits, the one with the more severe action counts, then
                              the one that the model names first (Unsafe before Controversial);
      category_thresholds[c]  for tokens whose likeliest category is c, this replaces all of the above: a hit
                              when the probabilities of all risks outside `safe_risks` add up to at least
                              the threshold, for the likeliest of these risks;
      ignored_categories      tokens whose likeliest category is one of these are never hits.
    A label with a probability that is not finite is a hit for the most severe risk, whatever its category.

    Rules. "report" (the technical report's): the token that is the `debounce`th hit in a row decides,
    whatever the risks before it; its risk and category become the response's. "eval-compat" (the evaluation
    script's): the hits in a row must be of the same risk; the first run of Unsafe decides, and the first run
    of Controversial only while there is none of Unsafe. After each token the verdict is the script's outcome
    for the tokens so far: it may turn from Controversial to Unsafe, at a later position, and never back.
    A user turn is judged by its one label, at once, under either rule; it also ends the run before it.

    Actions. `action`, or actions[r] for risk r. Blocking takes `debounce` hits in a row whose action is
    "block"; hits of either action in a row flag. The first decision stays unless a later one is more severe.

    Cleared. While nothing is decided, a token is cleared when at least `hold_back` newer tokens are labelled
    and it is not in a run of hits that may still decide. Flagged responses are shown on: then only runs that
    may still lead to "block" are held. A block clears nothing more: the deciding run's first token and
    everything after it stay hidden. A further user turn clears the finished response before it. When a
    response is complete and its action is not "block", there is nothing left to wait for: show all of it.

    Failures. Tokens that were not judged, because the model failed (`on_error`), not in time (`on_timeout`) or
    for lack of room (`on_overload`), block the stream when the option is "closed", the default: risk "Unknown",
    rule "error", "timeout" or "overload". "open" lets them pass: they count as cleared, later labels are judged
    as ever, and the verdict's rule says so ("timeout-open", "debounce+timeout-open").

    Category names may be the short or the long ones (LONG_CATEGORY_NAMES).
    Raises ConfigError for values out of range or contradicting each other; names: see `check_names`.
    Source: Qwen3Guard Technical Report (arXiv 2510.14276), section 4.4.
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
        store("safe_risks", frozenset(_names("safe_risks", self.safe_risks)))
        store("risk_thresholds", _mapping("risk_thresholds", self.risk_thresholds, _probability))
        by_category = _mapping("category_thresholds", self.category_thresholds, _probability)
        store("category_thresholds", _with_short_names("category_thresholds", by_category))
        ignored = _names("ignored_categories", self.ignored_categories)
        store("ignored_categories", frozenset(_short(name) for name in ignored))
        _action("action", self.action)
        store("actions", _mapping("actions", self.actions, _action))
        if self.rule not in ("report", "eval-compat"):
            raise ConfigError(f"rule={self.rule!r}: choose 'report' or 'eval-compat'")
        _count("debounce", self.debounce, 1)
        _count("hold_back", self.hold_back, 0)
        for option in ("on_error", "on_timeout", "on_overload"):
            if getattr(self, option) not in ("closed", "open"):
                raise ConfigError(f"{option}={getattr(self, option)!r}: choose 'closed' or 'open'")
        self._check_contradictions()

    @staticmethod
    def strict(**options: Unpack[PolicyOptions]) -> Policy:
        """Act on Unsafe and Controversial. The engine's default. Raises ConfigError."""
        return Policy(safe_risks=("Safe",), **_known(options))

    @staticmethod
    def loose(**options: Unpack[PolicyOptions]) -> Policy:
        """Act on Unsafe only: Controversial counts as safe. Raises ConfigError."""
        return Policy(safe_risks=("Safe", "Controversial"), **_known(options))

    @staticmethod
    def of(preset: str = "strict", **options: Unpack[PolicyOptions]) -> Policy:
        """`strict` or `loose` by its name. Raises ConfigError."""
        if preset not in ("strict", "loose"):
            raise ConfigError(f"policy: preset={preset!r:.80}: choose 'strict' or 'loose'")
        return Policy.strict(**options) if preset == "strict" else Policy.loose(**options)

    def check_names(self, risks: Iterable[str], categories: Iterable[str]) -> None:
        """Check the names in this policy against a model's. Raises ConfigError naming the model's names."""
        risks, categories = tuple(risks), tuple(categories)
        for option in ("safe_risks", "risk_thresholds", "actions"):
            for name in getattr(self, option):
                if name not in risks:
                    raise ConfigError(
                        f"{option} names risk {name!r}; the model's risks are {', '.join(risks)}"
                    )
        short = {_short(name) for name in categories}
        for option in ("category_thresholds", "ignored_categories"):
            for name in getattr(self, option):
                if name not in short:
                    known = ", ".join(categories)
                    raise ConfigError(f"{option} names category {name!r}; the model's categories are {known}")
        acted_on = [risk for risk in risks if risk not in self.safe_risks]
        if not acted_on:
            raise ConfigError(
                f"safe_risks={sorted(self.safe_risks)} covers every risk of the model: leave one out"
            )
        if self.rule == "eval-compat" and not set(acted_on) <= set(_EVAL_RISKS):
            raise ConfigError(
                f"rule='eval-compat' knows the risks {' and '.join(_EVAL_RISKS)}, the model has "
                f"{', '.join(acted_on)}: use rule='report', or add the others to safe_risks"
            )

    def start(self) -> PolicyState:
        """The state before the first label."""
        return _START

    def advance(self, state: PolicyState, label: Label) -> PolicyState:
        """The state after one more label, in constant time. Labels come in order of position."""
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
            held = run if decision is None else block_run
            cleared = max(cleared, num_labels - max(held, self.hold_back))
        return PolicyState(num_labels, run, block_run, risk, cleared, decision, state.failed_open)

    def fail(self, state: PolicyState, failure: Failure, num_tokens: int) -> PolicyState:
        """The state after tokens went unjudged, the stream's assistant tokens being `num_tokens` by now."""
        is_blocked = state.decision is not None and state.decision.action == "block"
        if getattr(self, f"on_{failure}") == "open":
            cleared = state.cleared if is_blocked else max(state.cleared, num_tokens)
            return state._replace(cleared=cleared, failed_open=failure)
        decision = self._later(state.decision, Decision("block", "Unknown", None, None, failure))
        return state._replace(decision=decision)

    def verdict(self, state: PolicyState) -> Verdict:
        """What the labels so far amount to."""
        if state.decision is None:
            rule = f"{state.failed_open}-open" if state.failed_open else "none"
            return Verdict("allow", "Safe", None, None, rule, state.cleared)
        decision = state.decision
        if state.failed_open:
            decision = decision._replace(rule=f"{decision.rule}+{state.failed_open}-open")
        return Verdict(*decision, state.cleared)

    def judge(self, labels: Iterable[Label]) -> Verdict:
        """The verdict on a whole list of labels: the same as advancing through them one by one."""
        state = self.start()
        for label in labels:
            state = self.advance(state, label)
        return self.verdict(state)

    def ignores(self, category: str) -> bool:
        """Whether a label of this category, by its short or long name, is never a hit."""
        return _short(category) in self.ignored_categories

    def hit(self, label: Label) -> str | None:
        """The risk that makes this one label a hit, or None."""
        risk_probs = label.risk_probs
        if not math.isfinite(sum(risk_probs.values()) + sum(label.category_probs.values())):
            unsafe = [risk for risk in risk_probs if risk not in self.safe_risks]
            return max(unsafe, key=self._is_block, default="Unsafe")
        category = _short(label.category)
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
        hits = [
            risk
            for risk, p in risk_probs.items()
            if risk not in self.safe_risks
            and (p >= thresholds[risk] if risk in thresholds else risk == label.risk)
        ]
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
        """The decision that stands: the old one, unless the new one is more severe."""
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
                    raise ConfigError(
                        f"{option} names {risk!r}, which counts as safe: remove it from one of the two"
                    )
        for category in self.ignored_categories:
            if category in self.category_thresholds:
                raise ConfigError(
                    f"category {category!r} is in ignored_categories and in category_thresholds: "
                    "remove it from one of the two"
                )
        unsafe, controversial = (self._is_block(risk) for risk in _EVAL_RISKS)
        if self.rule == "eval-compat" and "Controversial" not in self.safe_risks and controversial > unsafe:
            raise ConfigError(
                "actions: 'Controversial' blocks and 'Unsafe' only flags, but under rule='eval-compat' "
                "Unsafe takes precedence: give 'Unsafe' the action 'block'"
            )


def _short(category: str) -> str:
    return _SHORT_CATEGORY_NAMES.get(category, category)


def _known(options: PolicyOptions) -> PolicyOptions:
    unknown = sorted(set(options) - PolicyOptions.__annotations__.keys())
    if unknown:
        known = ", ".join(option.name for option in fields(Policy) if option.name != "safe_risks")
        raise ConfigError(f"unknown option(s) {', '.join(unknown)}; the options are {known}")
    return options


def _names(option: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"{option}={value!r}: a list of names is needed")
    names = tuple(value)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{option} contains {name!r}: names are non-empty strings")
    return names


def _mapping(option: str, value: Any, check: Callable[[str, Any], T]) -> dict[str, T]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{option}={value!r}: a mapping from names is needed")
    return {name: check(f"{option}[{name!r}]", value[name]) for name in _names(option, value)}


def _with_short_names(option: str, by_category: Mapping[str, float]) -> dict[str, float]:
    result: dict[str, float] = {}
    for name, value in by_category.items():
        if result.setdefault(_short(name), value) != value:
            raise ConfigError(f"{option} names {_short(name)!r} twice, with different values: remove one")
    return result


def _probability(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{name}={value!r}: a probability from 0 to 1 is needed")
    return float(value)


def _action(name: str, value: Any) -> Action:
    if value == "flag" or value == "block":
        return value  # type: ignore[no-any-return]
    mend = "; to allow a risk, add it to safe_risks" if value == "allow" else ""
    raise ConfigError(f"{name}={value!r}: choose 'flag' or 'block'{mend}")


def _count(name: str, value: Any, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= _MAX_COUNT:
        raise ConfigError(f"{name}={value!r}: a whole number from {smallest} to {_MAX_COUNT} is needed")
