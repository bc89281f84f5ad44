"""Chat templates of our own, one for each form of calls: made of its record, in jinja2."""

import json

from engine.text.answers.call_form import PLACES

_HINTS = {
    "harmony": "<|channel|>analysis<|message|>",
    "muse": "<|start|>assistant to=self<|message|>",
    "solar": "<|begin|>assistant<|think|>",
    "functionary-v3.2": ">>>all\n",
}
_ANSWERS = {"harmony": "<|channel|>final<|message|>", "muse": "<|message|>", "solar": "<|content|>"}
_NUMBER = "{{ loop.index0 }}"
_TREE = """{%- macro tree(v) -%}
{%- if v is string -%}STRING{%- elif v is mapping -%}OBJECT{%- elif v is iterable -%}ARRAY{%- else -%}
{{- v | tojson -}}{%- endif -%}
{%- endmacro -%}"""


def template_of(form):
    """A template whose calls are written in a form."""
    if form.opens == ">>>":
        begin, over, said = "<turn>assistant\n>>>", "<|eot_id|>", "all\n{{ m.content }}"
    elif form.opens:
        begin, over = f"{form.opens}assistant", "<|im_end|>"
        said = _ANSWERS[form.name] + "{{ m.content }}"
    else:
        begin, over, said = "<turn>assistant\n", "<|im_end|>", "{{ m.content or '' }}"
    before, behind = form.thought if form.opens else ("<think>\n", "\n</think>\n\n")
    thought = f"{{% if m.reasoning_content %}}{_text(before)}{{{{ m.reasoning_content }}}}{_text(behind)}{{% endif %}}"
    if not before:
        thought = ""
    calls = f"{{% if m.tool_calls %}}{_calls(form)}{{% endif %}}"
    if form.opens:
        said = f"{{% if not m.tool_calls %}}{said}{{% endif %}}"
    hint = f"{{# {_HINTS[form.name]} #}}" if form.opens else ""
    return (
        f"{_tree(form)}{hint}"
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
        f"{_text(begin)}{thought}{said}{calls}{over}"
        "{%- else -%}<turn>{{ m.role }}\n{{ m.content }}<|im_end|>{%- endif -%}{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{_text(begin)}{{%- endif -%}}"
    )


def _text(text):
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _filled(pattern, **places):
    parts = PLACES.split(pattern)
    return "".join(places[part] if number % 2 else _text(part) for number, part in enumerate(parts))


def _calls(form):
    arguments = "{{ c.function.arguments | tojson }}"
    if form.parameter:
        value = "{{ v | tojson }}" if form.quoted else "{{ v if v is string else v | tojson }}"
        if form.tree is not None:
            value = "{{ tree(v) }}"
        kinds = "{{ 'string' if v is string else 'number' if v is number else 'object' }}"
        one = _filled(form.parameter, key="{{ k }}", value=value, type=kinds)
        if form.other_parameter:
            other = _filled(form.other_parameter, key="{{ k }}", value=value)
            one = f"{{% if v is string %}}{one}{{% else %}}{other}{{% endif %}}"
        separator = f"{{% if not loop.last %}}{_text(form.separator)}{{% endif %}}" if form.separator else ""
        arguments = f"{{% for k, v in c.function.arguments | items %}}{one}{separator}{{% endfor %}}"
    call = _filled(form.call, name="{{ c.function.name }}", arguments=arguments, id="{{ c.id }}", index=_NUMBER)
    if form.between is None:
        call = _text(form.begin + form.around[0]) + call + _text(form.around[1] + form.end)
        return f"{{% for c in m.tool_calls %}}{call}{{% endfor %}}"
    between = f"{{% if not loop.last %}}{_text(form.between)}{{% endif %}}" if form.between else ""
    return (
        f"{_text(form.begin + form.around[0])}{{% for c in m.tool_calls %}}{call}{between}{{% endfor %}}"
        f"{_text(form.around[1] + form.end)}"
    )


def _tree(form):
    if form.tree is None:
        return ""
    tree = form.tree
    separator = f"{{% if not loop.last %}}{_text(tree.separator)}{{% endif %}}" if tree.separator else ""
    member = _filled(tree.member, key="{{ k }}", value="{{ tree(w) }}")
    item = _filled(tree.item, value="{{ tree(w) }}")
    texts = {
        "STRING": _text(tree.string[0]) + "{{ v }}" + _text(tree.string[1]),
        "OBJECT": f"{_text(tree.braces[0])}{{% for k, w in v | items %}}{member}{separator}{{% endfor %}}"
        f"{_text(tree.braces[1])}",
        "ARRAY": f"{_text(tree.brackets[0])}{{% for w in v %}}{item}{separator}{{% endfor %}}{_text(tree.brackets[1])}",
    }
    made = _TREE
    for name, text in texts.items():
        made = made.replace(name, text)
    return made
