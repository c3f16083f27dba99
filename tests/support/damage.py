"""Random damage to files, for tests of what reads them."""

from hypothesis import strategies as st

PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"{",
    b"[" * 2000,
    b'"',
    b"-1",
    b"null",
    b"1e999",
    b"\x80",
    b"18446744073709551615",
    b"\n",
]


def edits(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with bytes replaced, inserted, removed or repeated, or cut off."""
    place = st.integers(0, len(content))

    def edited(steps: list[tuple[int, int, bytes]]) -> bytes:
        changed = content
        for start, length, piece in steps:
            changed = changed[:start] + piece + changed[start + length :]
        return changed

    piece = st.sampled_from(PIECES) | st.binary(max_size=8)
    edit = st.tuples(place, st.sampled_from([0, 1, 4, 8]), piece)
    cut = st.tuples(place, st.just(len(content)), st.just(b""))
    return st.lists(edit, min_size=1, max_size=4).map(edited) | cut.map(lambda step: edited([step]))


def json_edits(content: bytes) -> st.SearchStrategy[bytes]:
    """The content with numbers, texts and brackets exchanged, so that it often remains JSON."""
    places = [i for i, byte in enumerate(content) if chr(byte) in '0123456789"[]{}:,']
    values = [b"-1", b"0", b"99999999999999999999", b"null", b"[]", b"{}", b'""', b"true", b"1.5", b'"x"', b","]
    edit = st.tuples(st.sampled_from(places), st.integers(0, 3), st.sampled_from(values))

    def edited(steps: list[tuple[int, int, bytes]]) -> bytes:
        changed = content
        for start, length, value in steps:
            changed = changed[:start] + value + changed[start + length :]
        return changed

    return st.lists(edit, min_size=1, max_size=3).map(edited)
