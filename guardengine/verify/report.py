"""The report of `verify_quantization` as Markdown. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

from guardengine.labels import Role
from guardengine.verify.quantization import Report, SchemeErrors

_ROLE_NAMES: dict[Role, str] = {"user": "prompt", "assistant": "response"}

WHAT_TO_CHECK = """\
What to check before you serve real weights under a scheme:
- Run this on the real checkpoint, with --input: a thousand or more conversations of your own traffic, borderline ones
  and all your languages among them. Random weights and the built-in conversations say that the arithmetic is right,
  no more.
- Flips at margins of 0.1 and above should be none or next to none: there the model was sure and the scheme
  overruled it. Flips below 0.02 are ties that bfloat16 flips as well; compare with its row.
- Verdicts that differ are what your users see; read those conversations.
- A scheme whose mean error is a few times bfloat16's is at the level of the noise that is there anyway."""


def markdown(report: Report) -> str:
    """The report as Markdown: what was run, the tables, and how to read them."""
    runs = [*([report.own_dtype] if report.own_dtype else []), *report.schemes]
    rows = [(run, role) for run in runs for role in run.roles if run.roles[role].num_labels]
    return "\n\n".join(
        (
            _heading(report),
            _errors(report, rows),
            _labels(rows),
            _verdicts(runs),
            WHAT_TO_CHECK,
        )
    )


def _heading(report: Report) -> str:
    first = report.schemes[0].roles
    left_out = f", {report.num_left_out} left out (--max-tokens)" if report.num_left_out else ""
    counts = ", ".join(f"{first[role].num_labels} {name} labels" for role, name in _ROLE_NAMES.items())
    engine = report.engine
    return (
        f"**{report.checkpoint}** against itself in float32\n"
        f"- conversations: {report.num_conversations} of {report.corpus}{left_out}; {report.num_tokens} tokens, "
        f"{counts}\n"
        f"- engine: {engine['version']}, backend {engine['backend']} ({engine['isa'] or 'torch'}), "
        f"{engine['num_threads']} threads"
    )


def _errors(report: Report, rows: Sequence[tuple[SchemeErrors, Role]]) -> str:
    own = report.own_dtype.scheme if report.own_dtype else "own dtype"
    lines = []
    for run, role in rows:
        errors, relative = run.roles[role], report.relative(run, role)
        is_own = run is report.own_dtype
        lines.append(
            (
                run.scheme,
                _ROLE_NAMES[role],
                _number(errors.max_logit_error, ".3f"),
                _number(errors.mean_logit_error, ".4f"),
                *("" if is_own else _times(relative[f"{name}_logit_error"]) for name in ("max", "mean")),
                _number(errors.max_probability_error, ".4f"),
                _number(errors.mean_kl, ".1e"),
                "" if is_own else _times(relative["mean_kl"]),
            )
        )
    header = ("scheme", "label", "logit error max", "mean", f"max / {own}", f"mean / {own}")
    return "Errors against float32\n\n" + _table(
        (*header, "probability error max", "KL mean", f"KL / {own}"), lines
    )


def _labels(rows: Sequence[tuple[SchemeErrors, Role]]) -> str:
    lines = []
    for run, role in rows:
        errors = run.roles[role]
        lines.append(
            (
                run.scheme,
                _ROLE_NAMES[role],
                _number(errors.risk_agreement, ".2%"),
                f"{_number(errors.category_agreement, '.2%')} of {errors.num_not_safe}",
                *(f"{part.num_flipped} of {part.num_labels}" for part in errors.flips),
                str(errors.num_not_finite),
            )
        )
    bins = [
        f"< {part.margin_to:g}" if part.margin_to <= 1 else f">= {part.margin_from:g}"
        for part in rows[0][0].roles[rows[0][1]].flips
    ]
    return (
        "Labels that agree with float32's, and risks that flip, by float32's margin between the two likeliest risks; "
        "each margin's column begins where the one before ends\n\n"
        + _table(("scheme", "label", "risk agrees", "category agrees", *bins, "not finite"), lines)
    )


def _verdicts(runs: Sequence[SchemeErrors]) -> str:
    lines = [
        (
            run.scheme,
            f"{run.verdicts.num_actions} of {run.verdicts.num_conversations}",
            f"{run.verdicts.num_any} of {run.verdicts.num_conversations}",
        )
        for run in runs
    ]
    return "Verdicts of Policy.strict() that are not float32's\n\n" + _table(
        ("scheme", "another action", "or another token, risk or category"), lines
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    cells = [header, ["-" * (width - 1) + ":" for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    )
