"""Reads the calls that a model wrote, in any of the known notations.

The text itself shows its notation: JSON, elements with parameters, keys and values in tags, names and arguments
between special tokens, Python calls. Independent of templates and tokens.
"""

import ast
import json
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from engine.request import ToolCall
from engine.text.answers.nested_values import NULLABLE, TAG, kind_of, read_braced, read_elements

Types = Mapping[str, Mapping[str, Any]]
"""Type of each parameter by function, from the JSON schemas of the tools; the schema itself where values are nested.
Empty where they are not known."""

_LETTERS = string.ascii_letters + string.digits
_FENCE = re.compile(r"^```(?:json)?\s*\n?(.*?)\n?\s*```$", re.DOTALL)
_DECORATION = re.compile(r"\]<\]minimax\[>\[|｜DSML｜|(?<=[</])atem:|(?<=\w):opensource(?=>)")
_OPEN, _CLOSE = re.compile(r"<\|open\|>(.*?)<\|sep\|>", re.DOTALL), re.compile(r"<\|close\|>(\w+)<\|sep\|>")

_UNKNOWN_ESCAPE = re.compile(r"""\\(?![\\'"abfnrtvxuUN0-7\n])(?<!\\\\)""")
_NAME = r"[\w.:/-]+"
_ELEMENT = re.compile(
    rf"""<(function|invoke|call)(?:=|\s+(?:name|tool)=)["']?({_NAME})["']?[^>]*>(.*?)(?:</\1>|\Z)""", re.DOTALL
)
_PARAMETER = re.compile(
    r"""<(parameter|param|argument)(?:=|\s+(?:name|key)=)["']?([^"'>]+)["']?([^>]*)>(.*?)</\1>""", re.DOTALL
)
_CHILD = re.compile(r"<(\w[\w.-]*)>(.*?)</\1>", re.DOTALL)
_KEY_VALUE = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|(?=<arg_key>)|\Z)", re.DOTALL)
_KEYED = re.compile(rf"\s*({_NAME})\s*(?:<tool_sep>)?\s*((?:<arg_key>.*)?)\Z", re.DOTALL)
_BETWEEN_TOKENS = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        # id, name and arguments between tokens of their own
        r"<\|tool_call:begin\|>(?P<id>.*?)<\|tool_call:name\|>(?P<name>.*?)<\|tool_call:args\|>(?P<arguments>.*?)"
        r"(?:<\|tool_call:end\|>|\Z)",
        # functions.name:0 is both id and name
        r"<\|tool_call_begin\|>\s*(?P<id>(?:functions\.)?(?P<name>[^<]*?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>"
        r"(?P<arguments>.*?)(?:<\|tool_call_end\|>|\Z)",
        # type and name, then JSON in a code block
        r"<｜tool▁call▁begin｜>\w*<｜tool▁sep｜>(?P<name>[^\n]*)\n```json\n(?P<arguments>.*?)\n```",
        r"<｜tool▁call▁begin｜>(?P<name>.*?)<｜tool▁sep｜>(?P<arguments>.*?)(?:<｜tool▁call▁end｜>|\Z)",
        rf"(?P<name>{_NAME})(?:\[CALL_ID\](?P<id>\w+))?\[ARGS\](?P<arguments>.*?)(?=\[TOOL_CALLS\]|\Z)",
    )
)
_BRACED = re.compile(rf"\s*call:({_NAME})(?=\{{)")
_TAGGED = re.compile(
    rf"""{re.escape(TAG)}<invoke name="({_NAME})">(.*?){re.escape(TAG)}</invoke>""",
    re.DOTALL,
)


def read_calls(text: str, types: Types | None = None, *, closed: bool = True) -> tuple[ToolCall, ...]:
    """The calls in a text that holds nothing else; none where it cannot be read as calls.

    Args:
        text: the text between the markers of calls.
        types: types of parameters, for notations that write strings and numbers alike.
        closed: whether an end marker came; else a name alone may be half a name, and is no call.
    """
    if TAG in text:
        return tuple(_tagged(text, types or {}))
    text = _CLOSE.sub(r"</\1>", _OPEN.sub(r"<\1>", _DECORATION.sub("", text))).strip()
    text = _FENCE.sub(r"\1", text)
    for notation in _NOTATIONS:
        if notation is _keys_and_values and not closed and "<arg_key>" not in text:
            continue
        calls = notation(text, types or {})
        if calls:
            return tuple(calls)
    return ()


def parameter_types(tools: Iterable[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Type of each parameter by function name, where the JSON schemas of tools state it."""
    types: dict[str, dict[str, Any]] = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping):
            types[str(function.get("name"))] = {
                name: kind_of(schema) for name, schema in properties.items() if isinstance(schema, Mapping)
            }
    return types


def new_call(name: str, arguments: Any, id: Any = None) -> ToolCall:
    """A call whose arguments are JSON text; its id is "" where the model wrote none."""
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(id=str(id) if isinstance(id, (str, int)) else "", name=name, arguments=arguments.strip() or "{}")


def call_id(key: str, index: int) -> str:
    """An id for a call to which the model gives none: nine letters and digits, which every family takes.

    Args:
        key: of the answer; the same one gives the same ids again, when an answer is read a second time.
        index: of the call in its answer.
    """
    digest = blake2b(f"{key} {index}".encode(), digest_size=9).digest()
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in digest)


# Notations ---------------------------------------------------------------------------------------------------------


def _json(text: str, types: Types) -> list[ToolCall]:
    """{"name": …, "arguments": …}, one or several of them, or a list of them."""
    decoder, calls, position = json.JSONDecoder(strict=False), [], 0
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return []
        for entry in value if isinstance(value, list) else [value]:
            call = _json_call(entry)
            if call is None:
                return []
            calls.append(call)
        while position < len(text) and text[position] in " \t\r\n,;":
            position += 1
    return calls


def _json_call(entry: Any) -> ToolCall | None:
    if not isinstance(entry, Mapping):
        return None
    inner = entry.get("function")
    if isinstance(inner, Mapping):
        entry = {**entry, **inner}
    name = next((entry[key] for key in ("name", "tool_name", "function") if isinstance(entry.get(key), str)), None)
    keys = ("arguments", "parameters", "args")
    if name is not None:
        arguments: Any = next((entry[key] for key in keys if entry.get(key) is not None), {})
        id = next((entry[key] for key in ("id", "tool_call_id", "call_id") if key in entry), None)
        return new_call(name, arguments, id)
    if len(entry) == 1:  # {name: arguments}
        ((name, arguments),) = entry.items()
        if isinstance(arguments, Mapping):
            return new_call(name, dict(arguments))
    return None


def _between_tokens(text: str, types: Types) -> list[ToolCall]:
    for pattern in _BETWEEN_TOKENS:
        calls = []
        for match in pattern.finditer(text):
            found = match.groupdict()
            if not found["name"].strip() or not found["arguments"].lstrip().startswith("{"):
                return []  # cut off before its name or its arguments
            calls.append(new_call(found["name"].strip(), found["arguments"], (found.get("id") or "").strip()))
        if calls:
            return calls
    return []


def _elements(text: str, types: Types) -> list[ToolCall]:
    """<function=name><parameter=key>value</parameter></function> and its relatives."""
    calls = []
    for match in _ELEMENT.finditer(text):
        name, body = match[2], match[3].strip()
        parameters = [(key, value, rest) for _, key, rest, value in _PARAMETER.findall(body)]
        if not parameters and body.startswith("{"):
            calls.append(new_call(name, body))
            continue
        parameters = parameters or [(key, value, "") for key, value in _CHILD.findall(body)]
        known = types.get(name, {})
        values: dict[str, Any] = {}
        for key, value, rest in parameters:
            values[key.strip()] = value_of(value, declared_type(rest) or known.get(key.strip()))
        calls.append(new_call(name, values))
    return calls


def _keys_and_values(text: str, types: Types) -> list[ToolCall]:
    """A name, then <arg_key>key</arg_key><arg_value>value</arg_value> for each argument."""
    calls = []
    for piece in re.split(r"</?tool_call>", text):
        if not piece.strip():
            continue
        match = _KEYED.match(piece)
        if match is None:
            return []
        known = types.get(match[1], {})
        arguments = {
            key.strip(): value_of(value, known.get(key.strip())) for key, value in _KEY_VALUE.findall(match[2])
        }
        calls.append(new_call(match[1], arguments))
    return calls


def _braced(text: str, types: Types) -> list[ToolCall]:
    """call:name{key:<|"|>value<|"|>,other:1}, one or several."""
    calls, at = [], 0
    while at < len(text):
        head = _BRACED.match(text, at)
        if head is None:
            return []
        try:
            arguments, at = read_braced(text, head.end())
        except (ValueError, RecursionError):
            return []
        calls.append(new_call(head[1], arguments))
    return calls


def _tagged(text: str, types: Types) -> list[ToolCall]:
    """<invoke name="..."> with an element for each parameter, all of them with a token of their own before them."""
    calls = []
    for name, body in _TAGGED.findall(text):
        schema = {"type": "object", "properties": types.get(name, {})}
        try:
            arguments = read_elements(body, schema)
        except (ValueError, RecursionError):
            return []
        calls.append(new_call(name, arguments if isinstance(arguments, dict) else {}))
    return calls


def _python(text: str, types: Types) -> list[ToolCall]:
    """[name(key="value"), other()]."""
    try:
        tree = _parsed(text.strip())
        nodes = tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]
        calls = []
        for node in nodes:
            if not isinstance(node, ast.Call) or node.args or not all(word.arg for word in node.keywords):
                return []
            values = {str(word.arg): _literal(word.value) for word in node.keywords}
            calls.append(new_call(ast.unparse(node.func), values))
        return calls
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []


def _parsed(text: str) -> ast.expr:
    """The expression that a text is; line breaks inside of quotes, which Python does not allow, are taken as such."""
    text = _UNKNOWN_ESCAPE.sub(r"\\\\", text)  # Python reads it so, with a warning
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        return ast.parse(text.replace("\n", "\\n"), mode="eval").body


_NOTATIONS: tuple[Callable[[str, Types], Sequence[ToolCall]], ...] = (
    _json,
    _between_tokens,
    _elements,
    _braced,
    _python,
    _keys_and_values,
)


def _literal(node: ast.expr) -> Any:
    """A Python literal in which JSON's words may appear too."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}.get(node.id, node.id)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_literal(key)): _literal(item) for key, item in zip(node.keys, node.values, strict=True) if key}
    value = ast.literal_eval(node)
    json.dumps(value)
    return value


def declared_type(attributes: str) -> str | None:
    """The type in an element's own attributes."""
    if found := re.search(r'\bstring="(true|false)"', attributes):
        return "string" if found[1] == "true" else "any"
    found = re.search(r'\btype="(\w+)"', attributes)
    return found[1] if found else None


def value_of(text: str, kind: Any) -> Any:
    """A value written out as text: a string where its type says so, else JSON where it can be read as such."""
    text = text.removeprefix("\n").removesuffix("\n")
    text = re.sub(r"^<!\[CDATA\[(.*)\]\]>$", r"\1", text, flags=re.DOTALL)
    if kind == "string" or (kind == NULLABLE and text.strip() != "null"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if text.lstrip().startswith(("{", "[")):  # written as Python writes it
        try:
            return _literal(_parsed(text.strip()))
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return text
    return {"True": True, "False": False, "None": None}.get(text.strip(), text)
