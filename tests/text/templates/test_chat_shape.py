"""Messages in the shape that a template takes: no content, parts, roles, arguments, lists that a template changes."""

import logging

import pytest

from engine.errors import InvalidRequestError, TokenizerError
from engine.text import ChatTemplate

USER = {"role": "user", "content": "Q"}
NEXT = {"role": "user", "content": "And?"}


def call(arguments):
    return {"id": "abcdefgh1", "type": "function", "function": {"name": "look", "arguments": arguments}}


def calling(arguments='{"x": 1}', **values):
    return {"role": "assistant", "content": None, "tool_calls": [call(arguments)]} | values


RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "R"}
CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"


def over(body, **options):
    """A template that does this with every message m."""
    return ChatTemplate("{% for m in messages %}" + body + "{% endfor %}", **options)


def render(template, messages, **options):
    return template.render(messages, add_generation_prompt=False, **options)


# ----------------------------------------------------------------------------------------- missing or null content


@pytest.mark.parametrize(
    "body",
    [
        "<{{ m.role }}>{{ m.content }}" + CALLS,
        "{{ '<' + m.role + '>' + m.content }}" + CALLS,
        "<{{ m.role }}>{{ m.content | trim }}" + CALLS,
        "<{{ m.role }}>{% if '</think>' in m.content %}-{% endif %}{{ m.content.split('x')[-1] }}" + CALLS,
        "<{{ m.role }}>{% if m.content is none %}{% else %}{{ m.content }}{% endif %}" + CALLS,
        "<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}" + CALLS,
        "<{{ m.role }}>{{ '%s' % m.content }}" + CALLS,
        # calls only where there is no content: None, as the template asks for it
        "<{{ m.role }}>{% if m.content is none %}" + CALLS + "{% else %}{{ m.content }}{% endif %}",
        "<{{ m.role }}>{% if 'content' in m %}{{ m.content }}{% else %}" + CALLS + "{% endif %}",
        "<{{ m.role }}>{% if m.content == none %}" + CALLS + "{% else %}{{ m.content + '' }}{% endif %}",
    ],
)
def test_no_content_beside_calls(body):
    without = calling()
    del without["content"]
    template = over(body)
    empty_parts = [calling(content=parts) for parts in ([], [{"type": "text", "text": None}], [""])]
    for message in (calling(), without, calling(content=""), *empty_parts):
        assert render(template, [USER, message, RESULT]) == '<user>Q<assistant>[look {"x": 1}]<tool>R'


def test_an_empty_turn_of_the_assistant_is_left_out_where_the_template_tells_none_from_empty():
    body = CALLS + "{% if m.content is not none %}<{{ m.role }}>{{ m.content }}{% endif %}"
    assert render(over(body), [USER, calling(), RESULT]) == '<user>Q[look {"x": 1}]<tool>R'


@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system"])
def test_null_content_is_empty(role):
    messages = [USER, calling(), {"role": role, "content": None, "tool_call_id": "abcdefgh1"}]
    assert render(over("<{{ m.role }}>{{ m.content }}"), messages).endswith(f"<{role}>")


@pytest.mark.parametrize("content", [None, "", [], [{"type": "text", "text": ""}], [{"text": None}]])
def test_nothing_said_has_the_form_that_the_template_takes(content):
    template = over("<{{ m.role }}>{{ m.content[0].text.strip() }}")
    assert render(template, [USER, {"role": "assistant", "content": content}, NEXT]) == "<user>Q<assistant><user>And?"


def test_no_tools_are_none_or_absent_as_the_template_takes_them():
    for body, expected in (
        ("{% for t in tools %}!{% endfor %}<{{ m.role }}>{{ m.content }}", "<user>Q"),
        ("{{ documents | length }}{% if tools is not none %}!{% endif %}", "0!"),
        ("{% if tools is not none %}!{% endif %}{{ m.content }}", "Q"),
    ):
        assert render(over(body), [USER]) == expected


def test_keys_without_a_value_are_left_out():
    """As other programs write messages: every key there is, most of them null."""
    empty = dict.fromkeys(("tool_calls", "reasoning_content", "name", "refusal", "audio", "function_call"))
    template = over("<{% for k in m %}{{ k }} {% endfor %}{{ m.content }}{% if 'tool_calls' in m %}!{% endif %}>")
    assert (
        render(template, [USER, {"role": "assistant", "content": "A", **empty}]) == "<role content Q><role content A>"
    )
    assert "!" not in render(template, [USER, {"role": "assistant", "content": "A", "tool_calls": []}])


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_whatever_it_is_called(given, read):
    template = over("<{{ m.role }}>{% if m." + read + " %}({{ m." + read + " }}){% endif %}{{ m.content }}")
    for content in ({"content": None}, {"content": "A"}, {}):
        text = render(template, [USER, {"role": "assistant", given: "hm", **content}, NEXT])
        assert text == f"<user>Q<assistant>(hm){content.get('content') or ''}<user>And?"


def test_reasoning_as_a_part():
    body = (
        "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'thinking' %}[THINK]{{ p.thinking }}[/THINK]{% else %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endif %}"
    )
    plain = over("<{{ m.role }}>{{ m.reasoning_content }}|{{ m.content }}")
    thinking = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}]
    for message in ({"content": "A", "reasoning_content": "hm"}, {"content": thinking}):
        assert render(over(body), [USER, {"role": "assistant", **message}]).endswith("<assistant>[THINK]hm[/THINK]A")
        assert render(plain, [USER, {"role": "assistant", **message}]).endswith("<assistant>hm|A")


def test_text_beside_reasoning_and_calls_is_not_lost_where_the_template_refuses_it():
    template = over(
        "{% if m.tool_calls and m.content and m.thinking %}{{ raise_exception('not both') }}{% endif %}"
        "<{{ m.role }}>{{ m.thinking or m.content }}" + CALLS
    )
    text = render(template, [USER, calling(content="I look.", reasoning_content="hm"), RESULT])
    assert text == '<user>Q<assistant>hm\n\nI look.[look {"x": 1}]<tool>R'


def test_a_message_of_nothing_is_refused():
    with pytest.raises(InvalidRequestError, match=r"messages\[1\] has no 'content'"):
        render(over("{{ m.content }}"), [USER, {"role": "assistant"}])


# ------------------------------------------------------------------------------------------------ strings and parts

PARTS = {"role": "user", "content": [{"type": "text", "text": "Q1 "}, {"type": "text", "text": "Q2"}]}
WALK = "{% for p in m.content %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{{ m.content }}", "Q|Q1 \nQ2"),
        (WALK, "Q|Q1 Q2"),
        ("{% if m.content is string %}{{ m.content }}{% else %}" + WALK + "{% endif %}", "Q|Q1 Q2"),
        ("{% for p in m.content %}{{ p.text }}{% if not loop.last %}+{% endif %}{% endfor %}", "Q|Q1 +Q2"),
        ("{{ m.content | map(attribute='text') | join('+') }}", "Q|Q1 +Q2"),
        ("{{ m.content[0].text }}", "Q|Q1 \nQ2"),
        ("{{ m.content[0]['text'] if m.content is not string else m.content }}", "Q|Q1 \nQ2"),
        ("{{ (m.content | selectattr('type', 'equalto', 'text') | first).text }}", "Q|Q1 \nQ2"),
    ],
)
def test_a_text_in_the_form_that_the_template_takes(body, expected):
    assert render(over(body + "|"), [USER, PARTS]) == expected + "|"
    same = {"role": "user", "content": ["Q1 ", {"type": "input_text", "text": "Q2"}]}
    assert render(over(body + "|"), [USER, same]) == expected + "|"


def test_each_role_has_a_form_of_its_own():
    body = "<{{ m.role }}>{% if m.role == 'user' %}" + WALK + "{% else %}{{ m.content }}{% endif %}"
    parts = {"role": "system", "content": PARTS["content"]}
    assert render(over(body), [parts, PARTS]) == "<system>Q1 \nQ2<user>Q1 Q2"


@pytest.mark.parametrize(
    "body",
    [
        "<{{ m.role }}>{% for p in m.content %}{% if p.type == 'image' %}<image>{% endif %}{% endfor %}",
        "<{{ m.role }}>{% for p in m.content %}{% if p.type == 'words' %}{{ p.words }}{% endif %}{% endfor %}",
        "<{{ m.role }}>{% if m.content is mapping %}{{ m.content.text }}{% endif %}",
        "{% if m.role == 'assistant' %}{{ m.content }}{% endif %}",
    ],
)
def test_a_template_that_loses_the_text_is_an_error(body):
    with pytest.raises(InvalidRequestError, match="loses the text of messages of the role 'user'"):
        render(over(body), [USER])


def test_results_that_a_template_has_no_place_for_are_an_error():
    template = over("{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}{% endif %}")
    assert render(template, [USER, {"role": "assistant", "content": "A"}]) == "<user>Q<assistant>A"
    for role in ("tool", "critic"):
        with pytest.raises(InvalidRequestError, match=f"loses the text of messages of the role '{role}'"):
            render(template, [USER, {"role": role, "content": "nine o'clock"}])


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("given", ["", "  ", None, "{}", {}, "null", "missing"])
def test_no_arguments_are_an_empty_mapping(given):
    body = (
        "<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
        "{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}"
        "{{ c.function.arguments | tojson }}{{ '' + c.function.arguments }}]{% endfor %}"
    )
    message = calling(given)
    if given == "missing":
        del message["tool_calls"][0]["function"]["arguments"]
    assert render(over(body), [USER, message, RESULT]) == "<user>Q<assistant>[look{}{}]<tool>R"


# ---------------------------------------------------------------------------------------------------------- roles

DEVELOPER = {"role": "developer", "content": "D"}
SYSTEM = {"role": "system", "content": "S"}
SAY = "<{{ m.role }}>{{ m.content }}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (SAY, "<system>D<user>Q"),
        ("{% if m.role not in ['system', 'user'] %}{{ raise_exception('no') }}{% endif %}" + SAY, "<system>D<user>Q"),
        ("{% if m.role in ['system', 'user'] %}" + SAY + "{% endif %}", "<system>D<user>Q"),
        ("{% if m.role == 'developer' %}<dev>{% else %}<{{ m.role }}>{% endif %}{{ m.content }}", "<dev>D<user>Q"),
        ("{# developer #}" + SAY, "<system>D<user>Q"),
        ("{% if m.role == 'developer' %}{{ raise_exception('no') }}{% endif %}" + SAY, "<system>D<user>Q"),
    ],
)
def test_the_role_developer(body, expected):
    assert render(over(body), [DEVELOPER, USER]) == expected


NO_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
FIRST_ALONE = "{% if m.role != 'system' or loop.first %}"  # what later ones say is left out without an error
ONE_FIRST = "{% if m.role == 'system' and not loop.first %}{{ raise_exception('not at the beginning') }}{% endif %}"


@pytest.mark.parametrize(
    ("body", "messages", "expected"),
    [
        (NO_SYSTEM, [SYSTEM, USER], "<user>S\nQ"),
        (NO_SYSTEM, [DEVELOPER, USER], "<user>D\nQ"),
        (NO_SYSTEM, [SYSTEM, DEVELOPER, USER, NEXT], "<user>S\n\nD\nQ<user>And?"),
        (NO_SYSTEM, [SYSTEM, PARTS], "<user>S\nQ1 \nQ2"),
        (NO_SYSTEM, [{"role": "assistant", "content": "A"}, SYSTEM, USER], "<assistant>A<user>S\nQ"),
        (NO_SYSTEM, [SYSTEM], "<user>S"),
        ("{% if m.role != 'system' %}", [SYSTEM, USER], "<user>S\nQ"),
        (ONE_FIRST, [USER, SYSTEM, NEXT], "<user>Q<user>S\nAnd?"),
        (NO_SYSTEM, [SYSTEM, USER, DEVELOPER, NEXT], "<user>S\nQ<user>D\nAnd?"),
        (ONE_FIRST, [SYSTEM, DEVELOPER, USER], "<system>S\n\nD<user>Q"),
        (ONE_FIRST, [SYSTEM, USER, {**SYSTEM, "content": "T"}, NEXT], "<system>S<user>Q<user>T\nAnd?"),
        (FIRST_ALONE, [SYSTEM, USER, {**SYSTEM, "content": "T"}, NEXT], "<system>S<user>Q<user>T\nAnd?"),
        (FIRST_ALONE, [SYSTEM, {**SYSTEM, "content": "T"}, USER], "<system>S\n\nT<user>Q"),
        (FIRST_ALONE, [USER, DEVELOPER], "<user>Q<user>D"),
    ],
)
def test_a_system_message_that_the_template_refuses(body, messages, expected, caplog):
    end = "{% endif %}" if body.startswith("{% if m.role !=") else ""
    template = over(body + "<{{ m.role }}>{{ m.content }}" + end)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert render(template, messages) == expected
    assert len(caplog.records) == 1
    assert "system message" in caplog.text


def test_what_is_refused_for_another_reason_is_told_in_the_template_s_words():
    template = over("{% if m.content == 'And?' %}{{ raise_exception('too many') }}{% endif %}{{ m.content }}")
    with pytest.raises(InvalidRequestError, match="too many"):
        render(template, [SYSTEM, USER, NEXT])


# --------------------------------------------------------------------------- lists that a template makes and changes


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% set a = [] %}{% for m in messages %}{% set _ = a.append(m.role) %}{% endfor %}{{ a | join }}", "user"),
        ("{% set a = [3, 1] %}{{ a.append(2) }}{{ a.sort() }}{{ a }}", "NoneNone[1, 2, 3]"),
        ("{% set a = [1] %}{% do a.append(2) %}{{ a }}", None),
        ("{% set n = namespace(q=[1]) %}{% set _ = n.q.extend([2, 3]) %}{{ n.q.pop(0) }}{{ n.q }}", "1[2, 3]"),
        ("{% set a = [1, 2, 3] %}{{ a.insert(0, 'x') or a.remove(2) or a.reverse() or a }}", "[3, 1, 'x']"),
        ("{% set a = [1, 2, 1] %}{{ a.count(1) }}{{ a.index(2) }}{{ a.copy() }}{{ a.clear() or a }}", "21[1, 2, 1][]"),
        ("{% set d = {'a': 1} %}{{ d.update({'b': 2}) or d.pop('a') }}{{ d }}{{ d.setdefault('c', 3) }}", "1{'b': 2}3"),
        ("{% set rest = messages[:] %}{{ rest.pop(0).role }}{{ rest | length }}{{ messages | length }}", "user01"),
    ],
)  # fmt: skip
def test_lists_of_the_template_s_own(source, expected):
    template = ChatTemplate(source)
    if expected is None:
        with pytest.raises(TokenizerError, match="does not parse"):
            template.render([USER])
    else:
        assert template.render([USER]) == expected


@pytest.mark.parametrize(
    "change",
    [
        "messages.append(1)", "messages.pop()", "messages[0].update({'a': 1})", "messages[0].pop('role')",
        "tools.clear()", "tools[0].function.parameters.required.append('x')", "things.a.append(2)",
    ],
)  # fmt: skip
def test_what_a_template_was_given_it_cannot_change(change):
    tools = [{"function": {"name": "f", "parameters": {"required": ["a"]}}}]
    things, message = {"a": [1]}, dict(USER)
    template = ChatTemplate("{{ (" + change + ") ~ 'changed' }}")
    with pytest.raises((TokenizerError, InvalidRequestError), match="unsafe"):
        template.render([message], tools=tools, things=things)
    assert (things, message, tools[0]["function"]["parameters"]) == ({"a": [1]}, USER, {"required": ["a"]})


GROW = "{% for i in range(99999) %}{% for j in range(99999) %}"
END = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% set a = [1] %}" + GROW + "{% set _ = a.extend(a) %}" + END,
        "{% set a = [] %}" + GROW + "{% set _ = a.append('x' * 10000) %}" + END,
        "{% set a = [] %}" + GROW + "{% set _ = a.insert(0, 1) %}" + END,
        "{% set a = {} %}" + GROW + "{% set _ = a.update({i * 100000 + j: 'x' * 10000}) %}" + END,
        "{% set a = {} %}" + GROW + "{% set _ = a.setdefault(i * 100000 + j, 'x' * 10000) %}" + END,
        "{% set a = [] %}{% set b = [a] * 100000 %}{% set _ = a.extend('x' * 100000) %}{{ b }}",
        "{% set a = [] %}{% set b = [a] * 100000 %}{% set _ = a.extend('x' * 100000) %}{{ b ~ '' }}",
        "{% set a = [] %}{% set b = [a] * 100000 %}{% set _ = a.extend('x' * 100000) %}{{ b | tojson }}",
        "{% set a = [] %}{% set b = [a] * 100000 %}{% set _ = a.extend('x' * 100000) %}{{ b | string | length }}",
        "{% set a = [] %}{% set b = [a] * 100000 %}{% set _ = a.extend('x' * 100000) %}{{ '%s' % b }}",
        "{% set a = [] %}{% set b = [a] * 100000 %}{% set _ = a.extend('x' * 100000) %}{{ '{}'.format(b) }}",
        "{% set a = [] %}{% set _ = a.append(a) %}{{ a == [a] }}{{ a | length }}",
        "{% set n = namespace(a=[[]], b=[[]]) %}{% set x, y = n.a, n.b %}"
        "{% for i in range(60) %}{% set p, q = [], [] %}"
        "{% set _ = n.a[0].append(p) or n.a[0].append(p) or n.b[0].append(q) or n.b[0].append(q) %}"
        "{% set n.a, n.b = [p], [q] %}{% endfor %}{{ x == y }}",
        "{% set a = ['b', 'a'] %}{{ a.sort(key=cycler) }}",
    ],
)
def test_lists_do_not_grow_without_end(source):
    with pytest.raises((TokenizerError, InvalidRequestError), match="the model's chat template"):
        ChatTemplate(source).render([USER])
