"""What an answer may have before its text, from the markers of a model and the end of its prompt."""

from engine.errors import ConstraintError
from engine.sampling.opening import Opening, Thought
from engine.text.answers.formats import AnswerFormat, Kind

_MESSAGES = "<|channel|>"
_ANALYSIS = "<|channel|>analysis<|message|>"
_FINALS = ("<|channel|>final<|message|>", "<|channel|>final <|constrain|>json<|message|>")
_NEXT = "<|end|><|start|>assistant"


def opening_of(markers: AnswerFormat, prompt: str, *, begins_thoughts: bool) -> Opening | None:
    """The opening of an answer whose text is constrained; None where the text comes first.

    Args:
        markers: how the model marks structure.
        prompt: the end of the prompt.
        begins_thoughts: whether the model itself may begin a thought behind this prompt.

    Raises:
        ConstraintError: answers have a structure that a constraint cannot go with.
    """
    tail = prompt.rstrip()
    if markers.channels is not None:
        return _of_messages(markers, tail)
    marks = [one for one in markers.marks if one.kind is Kind.REASONING and one.ends]
    heads = tuple(head for head in markers.frames[::2] if not tail.endswith(head))
    for one in marks:
        if tail.endswith(one.begin):
            return Opening(opened=one.ends, heads=heads)
    ended = any(tail.endswith(end) for one in marks for end in one.ends)
    thoughts = tuple(Thought(one.begin, one.ends) for one in marks) if begins_thoughts and not ended else ()
    return Opening(thoughts=thoughts, heads=heads) if thoughts or heads else None


def _of_messages(markers: AnswerFormat, tail: str) -> Opening | None:
    """The opening of an answer in messages: thoughts in the channel "analysis", then the head of the final message."""
    assert markers.channels is not None, "checked before"
    if _MESSAGES in markers.channels.opens:
        thoughts = (Thought(_ANALYSIS, (_NEXT,)),)
        _, start, rest = tail.rpartition("<|start|>assistant")
        if start and not rest:
            return Opening(thoughts=thoughts, heads=_FINALS, in_messages=True)
        if start and rest == _ANALYSIS:
            return Opening(opened=(_NEXT,), thoughts=thoughts, heads=_FINALS, in_messages=True)
        if start and rest.startswith(_FINALS):
            return None
    raise ConstraintError(
        "a constraint cannot go with the answers of this chat template, which are messages with headers of their own "
        "kind; leave the constraint out, or continue a prompt that was rendered already (generate, /v1/completions)"
    )
