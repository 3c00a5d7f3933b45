"""tools/html_to_text.py: prose stays, everything else goes."""

from html_to_text import prose

SENTENCE = "This is a sentence of ordinary English prose that goes on for long enough to be taken by the program."


def test_keeps_paragraphs_and_their_inline_elements() -> None:
    assert prose(f"<p>{SENTENCE[:10]}<b>{SENTENCE[10:20]}</b>\n{SENTENCE[20:]}</p>") == [
        SENTENCE[:20] + " " + SENTENCE[20:]
    ]


def test_paragraphs_without_end_tags() -> None:
    assert prose(f"<ul><li><p>{SENTENCE}<p>{SENTENCE}</li></ul>") == [SENTENCE, SENTENCE]


def test_leaves_out_what_is_no_prose() -> None:
    for element in ("pre", "table", "nav", "script", "footer"):
        assert prose(f"<{element}><p>{SENTENCE}</p></{element}>") == []
    assert prose(f"<div>{SENTENCE}</div><p>Too short.</p><p>{'x=1; ' * 30}</p>") == []
