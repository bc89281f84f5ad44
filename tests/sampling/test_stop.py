"""Stop strings: never leaked, found across pieces, independent of where the pieces are cut."""

from hypothesis import example, given
from hypothesis import strategies as st

from engine.sampling.stop import StopStringMatcher


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The whole text at once: the first end position wins, then the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def feed(pieces: list[str], stops: list[str]) -> tuple[str, str | None, list[str]]:
    matcher = StopStringMatcher(stops)
    shown = [matcher.push(piece) for piece in pieces]
    return "".join(shown) + matcher.finish(), matcher.matched, shown


def test_across_pieces():
    matcher = StopStringMatcher(["</s>", "User:"])
    assert matcher.push("Hello <") == "Hello "
    assert matcher.push("b> U") == "<b> "
    assert matcher.push("ser") == ""
    assert not matcher.stopped
    assert matcher.push(": hi") == ""
    assert matcher.stopped
    assert matcher.matched == "User:"
    assert matcher.push("more") == ""
    assert matcher.finish() == ""


def test_held_text_comes_out_at_the_end():
    matcher = StopStringMatcher(["STOP"])
    assert matcher.push("we ST") == "we "
    assert matcher.finish() == "ST"
    assert matcher.finish() == ""


def test_no_stops_pass_through():
    assert feed(["a", "", "b"], []) == ("ab", None, ["a", "", "b"])


pieces = st.lists(st.text("ab\n", max_size=5), max_size=12)
stop_lists = st.lists(st.text("ab\n", min_size=1, max_size=6), max_size=4)


@given(pieces, stop_lists)
@example(["aa", "ab"], ["aab", "ab"])
@example(["ab", "ab", "abc"], ["ababc", "b\n"])
def test_equals_the_naive_model(pieces, stops):
    text, matched, shown = feed(pieces, stops)
    assert (text, matched) == naive("".join(pieces), stops)
    # What was shown at any time is a prefix of the final text: nothing had to be taken back.
    so_far = ""
    for piece in shown:
        so_far += piece
        assert text.startswith(so_far)


@given(pieces, stop_lists)
def test_nothing_is_held_without_need(pieces, stops):
    matcher = StopStringMatcher(stops)
    shown, fed = "", ""
    for piece in pieces:
        shown += matcher.push(piece)
        fed += piece
        if matcher.stopped:
            return
        held = fed[len(shown) :]
        assert fed == shown + held
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
