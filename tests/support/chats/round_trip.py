"""An assistant's message rendered by a chat template, read as if the model had written it, and rendered again."""

import json
import re
from dataclasses import dataclass, replace

from engine.errors import InvalidRequestError
from engine.text import ChatTemplate
from engine.text.answers.call_forms import sample_of
from engine.text.answers.call_stream import Sections
from engine.text.answers.formats import Kind, Marks
from engine.text.answers.parser import AnswerParser
from engine.text.answers.tool_calls import parameter_types

RESULT = "Qzresult"
LAST = "qzlast"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What."},
                    "number": {"type": "integer", "description": "How many."},
                    "more": {
                        "type": "object",
                        "description": "More.",
                        "additionalProperties": False,
                        "properties": {"tags": {"type": "array", "items": {"type": "string"}}},
                    },
                },
                "required": ["query"],
            },
        },
    }
]
USER = {"role": "user", "content": "Hello"}
THINKING = {"enable_thinking": True, "thinking": True, "thinking_mode": "thinking", "preserve_thinking": True}
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>",
    "<|return|>", "<|call|>", "<|calls|>", "</s>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|eot|>", "<end_of_sentence>", "<|END_OF_TURN_TOKEN|>", "<|role_end|>", "</assistant>", "<|end_of_msg|>",
    "<｜hy_eos:opensource｜>", "<|assistant_end|>", "<seed:eos>", "<|message_sep|>\n\nfunction result", "<sep>",
    "<|observation|>", "<|eod_id|>", "<|user|>", "<|tools_suffix|>", "<SPECIAL_12>",
    "<｜tool▁outputs▁begin｜>", "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><results>",
)  # fmt: skip


def call(which, **arguments):
    """A call with an id of nine characters, as some templates want it."""
    return {
        "id": f"abcdefgh{which}",
        "type": "function",
        "function": {"name": "look_up", "arguments": arguments},
    }


def message(*calls, reasoning="", content=""):
    """A message of the assistant."""
    made = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return {**made, "reasoning_content": reasoning} if reasoning else made


NASTY = 'a "b" <c> {d} ü, 2\n[e] \\ ' + LAST
MESSAGES = {
    "one call": message(call(1, query=LAST)),
    "text before": message(call(1, query=LAST, number=2, more={"tags": ["é", "b c"]}), content="I look."),
    "reasoning": message(call(1, query=NASTY), reasoning="Hm.\nSo."),
    "two calls": message(call(1, query="x", number=-1), call(2, query=NASTY, more={"tags": []}), reasoning="Hm."),
    "no arguments": message(call(1)),
}


@dataclass
class Trip:
    """What came of one message: the text of the model, what was read, and both renderings up to the end token."""

    raw: str
    first: str
    second: str
    calls: list

    @property
    def equal(self):
        return self.first == self.second


def conversation(answer):
    """A question, an answer with calls, and their results."""
    results = [
        {"role": "tool", "name": "look_up", "tool_call_id": one["id"], "content": RESULT}
        for one in answer["tool_calls"]
    ]
    return [USER, answer, *results]


def text_trip(template, form, answer) -> Trip:
    """The same where a template reads no calls: they go back as text."""
    calls = "\n".join(
        sample_of(form, "look_up", json.dumps(one["function"]["arguments"], ensure_ascii=False))
        for one in answer["tool_calls"][:1]
    )
    raw = "\n".join(filter(None, (answer["content"], calls)))
    parser = AnswerParser(knowing(template, form), "", parameter_types(TOOLS))
    pieces = [parser.push(raw), parser.finish()]
    talks = [[USER, {"role": "assistant", "content": text}, USER] for text in (raw, parser.text_with_calls)]
    first, second = (template.render(talk) for talk in talks)
    return Trip(raw, first, second, [one for piece in pieces for one in piece.tool_calls])


def knowing(template, form):
    """The markers of a template, with those of a form that it does not show."""
    markers = template.answer_format(tools=TOOLS)
    known = any(marks.begin == form.begin for marks in markers.marks)
    more = () if known else (Marks(Kind.CALLS, form.begin, (form.end,) if form.end else ()),)
    return replace(markers, marks=(*markers.marks, *more))


def round_trip(template: ChatTemplate, answer, size=3, **names) -> Trip:
    """Renders, reads in pieces of a size, and renders what was read."""
    thinks = "reasoning_content" in answer
    names = {**({name: value and thinks for name, value in THINKING.items()}), **names}
    first = template.render(conversation(answer), tools=TOOLS, **names)
    prompt = template.render([USER], tools=TOOLS, **names)
    begin = next((at for at, pair in enumerate(zip(prompt, first, strict=False)) if pair[0] != pair[1]), len(prompt))
    if begin < len(prompt):  # the prompt has opened what this answer does not have: back to a whole marker
        begin = first.rindex("<", 0, begin + 1) if re.search(r"[<\[][\w|/]*\Z", first[:begin]) else begin
    stop = first.find(RESULT, begin)
    last = max(first.rfind(LAST, begin, stop), first.find("look_up", begin, stop), begin)
    ends = [first.find(end, last, stop) for end in ENDS]
    end = min((at for at in ends if at >= 0), default=None)
    if end is None:
        raise InvalidRequestError("no end token between the calls and their results")
    raw = first[begin:end]
    form = template.call_form(tools=TOOLS)
    types = parameter_types(TOOLS)
    parser = AnswerParser(
        template.answer_format(tools=TOOLS), first[:begin], types, sections=Sections(form, ["look_up"], types)
    )
    pieces = [parser.push(raw[at : at + size]) for at in range(0, len(raw), size)] + [parser.finish()]
    calls = [one for piece in pieces for one in piece.tool_calls]
    parts = [one for piece in pieces for one in piece.call_parts]
    joined = ["".join(part.arguments for part in parts if part.index == number) for number in range(len(calls))]
    assert joined == [one.arguments for one in calls], "streamed and whole arguments differ"
    read = {
        "role": "assistant",
        "content": "".join(piece.content for piece in pieces),
        "reasoning_content": "".join(piece.reasoning for piece in pieces),
        "tool_calls": [one.as_dict() for one in calls],
    }
    if not calls:
        return Trip(raw, first[:end], "", calls)
    second = template.render(conversation(read), tools=TOOLS, **names)
    return Trip(raw, first[:end], second[:end], calls)
