"""Chat templates as programs: read from a checkpoint folder, compiled in a sandbox, with markers in their output.

Templates come with checkpoints and are not trusted: they run in jinja2's immutable sandbox, with the names and
extensions that transformers gives them. Knows no messages and no token ids.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import ext, nodes, parser, sandbox

from guardengine.errors import CheckpointError
from guardengine.text.tokenizer import Tokenizer

SHIPPED = {"stream": "qwen3_chat.jinja", "gen": "qwen3guard_gen.jinja"}  # by kind of checkpoint
_MEND = "use the files of the released Qwen3Guard checkpoint, or delete the template to get guardengine's own"


def read_template(
    folder: Path, tokenizer: Tokenizer, shipped_name: str
) -> tuple[str, Tokenizer, str, dict[str, str]]:
    """The arguments of ChatTemplate for a checkpoint folder: source, tokenizer, name for errors, variables. Raises
    CheckpointError for files that cannot be read."""
    file = folder / "tokenizer_config.json"
    try:
        config = json.loads(file.read_bytes()) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); {_MEND}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: a JSON {type(config).__name__}, not an object; {_MEND}")
    variables = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            variables[name] = token
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        try:
            return own_file.read_bytes().decode(), tokenizer, str(own_file), variables
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{own_file}: cannot be read as UTF-8 text ({error}); {_MEND}") from None
    template = config.get("chat_template")
    if template is None:
        shipped = resources.files("guardengine.text").joinpath(shipped_name).read_text(encoding="utf-8")
        return shipped, tokenizer, f"guardengine's {shipped_name}", variables
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        if "default" not in named:
            raise CheckpointError(
                f"{file}: `chat_template` names {list(named)!r}, none is 'default'; {_MEND}"
            )
        template = named["default"]
    if not isinstance(template, str):
        raise CheckpointError(f"{file}: `chat_template` is {type(template).__name__}, not text; {_MEND}")
    return template, tokenizer, f"{file}: `chat_template`", variables


@dataclass(frozen=True, slots=True)
class MarkedTemplate:
    """A compiled template that writes a marker in place of each added token that the template itself has.

    A marker has a nonce of 128 random bits, which content cannot guess because it is never shown. Its brackets make it
    unambiguous: no marker can begin inside another or reach beyond its end.

    Attributes:
        program: The compiled template.
        variables: The variables, marked as well.
        tokens: The added tokens.
        markers: Token -> marker.
        pattern: Matches a marker; group 1 is the index of its token.
        nonce: The nonce.
    """

    program: jinja2.Template
    variables: Mapping[str, str]
    tokens: tuple[str, ...]
    markers: Mapping[str, str]
    pattern: re.Pattern[str]
    nonce: str

    def run(self, messages: list[dict[str, str]], **flags: bool) -> str:
        """Render to marked text. Raises whatever the template raises. Finished conversations are rendered with
        enable_thinking=False, as in the released evaluation scripts."""
        variables = {"add_generation_prompt": False, "enable_thinking": False, **self.variables, **flags}
        return self.program.render(messages=messages, tools=None, documents=None, **variables)

    def unmark(self, text: str) -> str:
        """Marked text in the form that the template itself would have written."""
        return self.pattern.sub(lambda match: self.tokens[int(match[1])], text)


def compile_plain(source: str, name: str, variables: Mapping[str, str]) -> MarkedTemplate:
    """Compile a template without markers. Raises CheckpointError with the line of a syntax error."""
    return MarkedTemplate(_compile(source, name, str), variables, (), {}, re.compile(r"(?!)"), "")


def compile_marked(
    source: str, name: str, variables: Mapping[str, str], tokens: Sequence[str]
) -> MarkedTemplate:
    """Compile a template with fresh markers in place of `tokens` in each literal that it outputs or assigns.

    Literals that are only compared (arguments of calls, filters and tests, comparisons, subscripts) stay unchanged, so
    that `'</think>' in content` looks at content. Raises CheckpointError with the line of a syntax error.
    """
    nonce = secrets.token_hex(16)
    markers = {token: f"[{nonce}:{index}]" for index, token in enumerate(tokens)}
    pattern = token_pattern(tokens)

    def mark(text: str) -> str:
        return pattern.sub(lambda match: markers[match[0]], text)

    return MarkedTemplate(
        program=_compile(source, name, mark),
        variables={key: mark(value) for key, value in variables.items()},
        tokens=tuple(tokens),
        markers=markers,
        pattern=re.compile(rf"\[{nonce}:([0-9]+)\]"),
        nonce=nonce,
    )


def token_pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches added tokens in text; of two at the same place, the longer."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


def _compile(source: str, name: str, mark: Callable[[str], str]) -> jinja2.Template:
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        tree = environment.parse(source)
        for output in tree.find_all(nodes.Output):
            for value in output.nodes:
                _mark_literals(value, mark)
        for assignment in tree.find_all(nodes.Assign):
            _mark_literals(assignment.node, mark)
        return environment.from_string(tree)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"chat template ({name}): line {error.lineno}: {error.message}; {_MEND}"
        ) from None
    except Exception as error:  # literals are folded at compile time, so `{{ 1 / 0 }}` fails here
        raise CheckpointError(f"chat template ({name}): cannot be compiled ({error}); {_MEND}") from None


def _mark_literals(node: nodes.Node | None, mark: Callable[[str], str]) -> None:
    """Apply `mark` to the literals whose text becomes part of the value of an expression."""
    parts: list[nodes.Node | None] = []
    match node:
        case nodes.TemplateData():
            node.data = mark(node.data)
        case nodes.Const(value=str() as value):
            node.value = mark(value)
        case nodes.Add() | nodes.Mod() | nodes.And() | nodes.Or():
            parts = [node.left, node.right]
        case nodes.Concat():
            parts = [*node.nodes]
        case nodes.CondExpr():
            parts = [node.expr1, node.expr2]
        case nodes.List() | nodes.Tuple():
            parts = [*node.items]
        case nodes.Dict():
            parts = [pair.value for pair in node.items]
        case nodes.Getitem(node=nodes.List() | nodes.Tuple() | nodes.Dict() as table):
            parts = [table]
        case nodes.Filter():
            parts = [node.node]
        case nodes.Call(node=nodes.Getattr() as method):
            parts = [method.node]
        case _:
            pass
    for part in parts:
        _mark_literals(part, mark)


class _GenerationBlock(ext.Extension):
    """`{% generation %}`, with which trainers mark an assistant's tokens. Here its body is rendered, in a scope of its
    own."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter, with the options that transformers offers."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
