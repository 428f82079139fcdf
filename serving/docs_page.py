"""The page on /docs: a server's OpenAPI document for people, without a script or another address."""

import base64
import hashlib
import html
import json
from typing import Any

DOCS_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
:root { color-scheme: light dark; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid #8886; border-radius: .5rem; }
h2 code { font-size: 1.1rem; }
""".strip()


def docs_page(schema: dict[str, Any], port: int = 8000) -> tuple[str, str]:
    """The OpenAPI document as one page without scripts, and the content policy that it needs.

    Args:
        port: the server's usual one, for the examples.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width">',
        f"<title>{html.escape(schema['info']['title'])}</title><style>{DOCS_STYLE}</style>",
        f"<h1>{html.escape(schema['info']['title'])}</h1><p>{html.escape(schema['info']['description'])}</p>",
        '<p>For programs: <a href="/openapi.json">openapi.json</a></p>',
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(_described(path, method, operation, schema, port))
    digest = hashlib.sha256(DOCS_STYLE.encode()).digest()
    policy = (
        f"default-src 'none'; style-src 'sha256-{base64.b64encode(digest).decode()}'; frame-ancestors 'none'"
    )
    return "\n".join(parts), policy


def _described(path: str, method: str, operation: dict[str, Any], schema: dict[str, Any], port: int) -> str:
    said = [
        f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])}"
    ]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content:
        name = content["schema"]["$ref"].rpartition("/")[2]
        body = schema["components"]["schemas"][name]
        fields = ", ".join(body["properties"])
        example = json.dumps(body["examples"][0], ensure_ascii=False)
        said.append(f"; fields: {html.escape(fields)}</p>")
        said.append(
            f"<pre>curl -H 'Content-Type: application/json' \\\n  -d '{html.escape(example)}' \\\n"
            f"  http://localhost:{port}{html.escape(path)}</pre>"
        )
    else:
        parameters = [each["name"] for each in operation.get("parameters", ())]
        said.append(f"; parameters: {html.escape(', '.join(parameters))}</p>" if parameters else "</p>")
    refusals = {s: r["description"] for s, r in operation["responses"].items() if s not in ("200", "422")}
    said += [f"<p>{status}: {html.escape(meaning)}</p>" for status, meaning in refusals.items()]
    return "".join(said)
