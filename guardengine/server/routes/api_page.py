"""The description of the HTTP API as one page without scripts, made from the OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

Json = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d5dae1, #39414d); --soft: light-dark(#566173, #a9b4c4) }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem;
  background: light-dark(#ffffff, #12161c); color: light-dark(#17202c, #e8edf4) }
h2 { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 2rem; font-size: 1.15rem }
h3 { font-size: 1rem; margin-top: 1.5rem }
p.text { white-space: pre-line }
.scroll { overflow-x: auto }
table { border-collapse: collapse }
td, th { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line) }
code { font: .92em ui-monospace, monospace; overflow-wrap: anywhere }
.soft { color: var(--soft) }
a { color: light-dark(#0b57b8, #8ab8ff) }
"""


def api_page(document: Json) -> str:
    """The page as HTML. document: OpenAPI 3.1, as FastAPI writes it."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">',
            f"<title>{title}: the API</title><style>{_STYLE}</style></head><body><main>",
            f"<h1>{title}</h1><p>{escape(info.get('description', ''))}</p>",
            '<p>The same for programs: <a href="openapi.json">openapi.json</a>. To try it: <a href="./">the '
            "playground</a>.</p>",
            *_operations(document["paths"]),
            "<h2>Schemas</h2>",
            *_schemas(document.get("components", {}).get("schemas", {})),
            "</main></body></html>",
        ]
    )


def _operations(paths: Json) -> Iterator[str]:
    for path, methods in paths.items():
        for method, operation in methods.items():
            yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
            yield f'<p class="text">{escape(operation.get("description", ""))}</p>'
            if body := _content(operation.get("requestBody", {})):
                yield f"<p>Body: {body}</p>"
            kinds: dict[str, list[str]] = {}
            for status, answer in operation["responses"].items():
                kinds.setdefault(_content(answer), []).append(f"<code>{escape(status)}</code>")
            for kind, statuses in kinds.items():
                yield f'<p class="soft">{" ".join(statuses)} {kind}</p>'


def _content(part: Json) -> str:
    schemas = [content.get("schema") for content in part.get("content", {}).values()]
    return " or ".join(_type(schema) for schema in schemas if schema)


def _schemas(schemas: Json) -> Iterator[str]:
    for name, schema in sorted(schemas.items()):
        yield f'<h3 id="{escape(name)}">{escape(name)}</h3>'
        if text := schema.get("description"):
            yield f'<p class="text">{escape(text)}</p>'
        required = schema.get("required", ())
        rows = (
            f"<tr><th><code>{escape(field)}</code></th><td>{_type(kind)}</td><td>"
            f"{'needed' if field in required else _default(kind)}</td>"
            f"<td>{escape(kind.get('description', ''))}</td></tr>"
            for field, kind in schema.get("properties", {}).items()
        )
        yield f'<div class="scroll" tabindex="0"><table>{"".join(rows)}</table></div>'


def _default(kind: Json) -> str:
    value = kind.get("default")
    return "" if value is None else f"default <code>{escape(str(value))}</code>"


def _type(kind: Json) -> str:
    """The type of a value, as HTML."""
    if "$ref" in kind:
        schema = escape(kind["$ref"].rpartition("/")[2])
        return f'<a href="#{schema}">{schema}</a>'
    for choice in ("anyOf", "oneOf"):
        if choice in kind:
            return " or ".join(_type(option) for option in kind[choice])
    if "enum" in kind or "const" in kind:
        return " or ".join(
            f"<code>{escape(repr(value))}</code>" for value in kind.get("enum", [kind.get("const")])
        )
    what = kind.get("type")
    if what == "array":
        return f"list of {_type(kind.get('items', {}))}"
    if what == "object":
        more = kind.get("additionalProperties")
        return f"object of {_type(more)}" if isinstance(more, dict) and more else "object"
    return escape(what or "anything")
