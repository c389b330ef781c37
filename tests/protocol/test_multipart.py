"""Forms, parsed piece by piece: only the offsets of fields are found."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import ApiError
from gateway.protocol.multipart import FormReader, boundary_of


def form(parts: list[tuple[str, bytes]], boundary: bytes = b"xyz") -> bytes:
    made = [
        b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (boundary, name.encode(), value)
        for name, value in parts
    ]
    return b"".join(made) + b"--%b--\r\n" % boundary


def read(body: bytes, pieces: list[int]) -> FormReader:
    reader = FormReader(b"xyz", {"model": True, "file": False})
    place = 0
    for end in [*sorted(pieces), len(body)]:
        reader.feed(body[place:end])
        place = end
    reader.end()
    return reader


VALUES = st.binary(max_size=60) | st.sampled_from(
    [b"", b"\r\n", b"--xyz", b"\r\n--xy", b"\r\n--", b"--xyz--", b"a\r\n"]
)


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "prompt"]), VALUES), max_size=3),
    VALUES,
    VALUES,
    st.lists(st.integers(0, 400), max_size=8),
    st.booleans(),
)
def test_offsets_are_exact_at_every_split(
    others: list[tuple[str, bytes]], model: bytes, file: bytes, pieces: list[int], first: bool
) -> None:
    """Wherever the body is cut, a field's value is `body[start:end]` and its part `body[part_start:part_end]`."""
    fields = [("model", model), ("file", file)] if first else [("file", file), ("model", model)]
    body = form([*others, *fields])
    if any(b"\n--xyz" in b"\n" + value for _, value in [*others, *fields]):
        return  # no such form can be: the boundary is chosen so that it does not occur
    reader = read(body, [min(piece, len(body)) for piece in pieces])
    assert reader.done
    found = reader.fields["model"]
    assert body[found.start : found.end] == model == bytes(found.value)
    found = reader.fields["file"]
    assert body[found.start : found.end] == file
    assert found.value == b""
    for name, value in fields:
        part = reader.fields[name]
        rest = body[: part.part_start] + body[part.part_end :]
        assert rest == form([*others, *[pair for pair in fields if pair != (name, value)]])
    assert reader.first == 0


def test_a_field_is_there_before_the_form_ends() -> None:
    """As soon as the line after its value has begun; a form that ends there is malformed."""
    reader = FormReader(b"xyz", {"model": True})
    reader.feed(b'--xyz\r\ncontent-disposition: form-data; name="model"\r\n\r\nm-1')
    assert reader.fields["model"].end == -1
    reader.feed(b"\r\n--xyz")
    found = reader.fields["model"]
    assert (found.whole, found.text, reader.done) == (True, "m-1", False)
    with pytest.raises(ApiError, match="ends before its last boundary"):
        reader.end()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ('Content-Disposition: form-data; name="model"', "model"),
        ("content-disposition:form-data;name=model", "model"),
        ('Content-Disposition: form-data; name="Model"', "model"),
        ('Content-Type: text/plain\r\nContent-Disposition: form-data; filename="x"; name="model"', "model"),
        ("Content-Disposition: form-data; name=\"file\"; filename*=UTF-8''a%20b", "file"),
        ('Content-Disposition: form-data; filename="; name=model"; name="file"', "file"),
        ('Content-Disposition: form-data; name="file"; filename="C:\\a b.txt"', "file"),
        ('Content-Disposition: form-data; name="other"', None),
        (r'Content-Disposition: form-data; name="file"; filename="q\"uote.mp3"', "file"),
        (r'Content-Disposition: form-data; name="file"; filename="end\"', "file"),
        ('Content-Disposition: form-data; name="file"; filename="a"b.mp3"', "file"),
        ("Content-Disposition: form-data; name=file; filename=a@b (1).mp3", "file"),
        ("Content-Disposition: form-data; name=file; filename=a.mp3; filename*=UTF-8''a(1).mp3", "file"),
        ('Content-Disposition: form-data; name="file"; filename="\u00e9 x.wav"', "file"),
        (
            'Content-Disposition: form-data; name="model"\r\nContent-Type: a/b; charset=UTF-8\r\nContent-Length: 1',
            "model",
        ),
    ],
)
def test_how_a_part_is_named(head: str, name: str | None) -> None:
    """Quoted or not, in any order and case, and never by text that only looks like a name."""
    body = f"--xyz\r\n{head}\r\n\r\nv\r\n--xyz--".encode()
    assert list(read(body, []).fields) == ([name] if name else [])


HIDDEN = 'Content-Disposition: form-data; name="model"'


@pytest.mark.parametrize(
    "head",
    [
        'Content-Disposition: form-data; name = "model"',
        "Content-Disposition: form-data; name*=UTF-8''model",
        "Content-Disposition: form-data; name=\"x\"; name*=UTF-8''model",
        'Content-Disposition: form-data;\r\n name="model"',
        'Content-Disposition: attachment; name="model"',
        f'Content-Disposition: form-data; name="x"\r\n{HIDDEN}',
        'Content-Disposition : form-data; name="model"',
        'Content-Disposition: form-data; filename="a\\"; name="model"',
        'Content-Disposition: form-data; name="x"; name="model"',
        f"X: y\n{HIDDEN}\r\nContent-Disposition: form-data; name=x",
        'Content-Disposition: form-data; name="=?utf-8?B?bW9kZWw=?="',
        r'Content-Disposition: form-data; name="mo\del"',
        'Content-Disposition: form-data; name="model\0"',
        'Content-Disposition: form-data; name="model "x"',
        'Content-Disposition: form-data; name="m\u00f6del"',
        "Content-Disposition: form-data; name=session[model]",
        r'Content-Disposition: form-data; filename="a\"; name="model"; x="',
        'Content-Disposition: form-data; name="model"\r\nContent-Transfer-Encoding: base64',
        'Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; charset=utf-16',
        "Content-Disposition: form-data",
        "X: y",
        "",
    ],
)
def test_an_ambiguous_name_is_refused(head: str) -> None:
    """Azure might read a `model` there that the gateway has not checked."""
    with pytest.raises(ApiError) as caught:
        read(f"--xyz\r\n{head}\r\n\r\nv\r\n--xyz--".encode(), [])
    assert (caught.value.status, caught.value.code) == (400, "malformed_form")


@pytest.mark.parametrize(
    "value",
    [
        b"\n--xyz\r\n" + HIDDEN.encode() + b"\r\n\r\nm",
        b"\r--xyz--",
        b"\r\n--xyz--X",
        b"\r\n--xyzX",
        b"\r\n--xyz--\r\nX",
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_delimiter_that_only_some_readers_recognize_is_refused(value: bytes, size: int) -> None:
    """One after half a line break, or with more bytes after it; at any cut."""
    body = form([("prompt", b"a" + value)])
    with pytest.raises(ApiError, match="malformed"):
        read(body, list(range(size, len(body), size)))


def test_single_line_feeds_are_refused() -> None:
    """They cannot hide a form from readers that accept them."""
    with pytest.raises(ApiError, match="malformed"):
        read(form([("model", b"m")]).replace(b"\r\n", b"\n"), [])


@pytest.mark.parametrize("name", ["model", "MODEL", "Model"])
def test_a_repeated_field_is_refused(name: str) -> None:
    """Azure might use the other one: the model that is checked must be the model that is used."""
    with pytest.raises(ApiError, match="two fields 'model'"):
        read(form([("model", b"a"), ("x", b""), (name, b"b")]), [])


def test_alike_fields_count_as_one() -> None:
    """Two names for the same thing are a repeated field, too."""
    reader = FormReader(b"xyz", {"a": True, "b": True}, alike=frozenset({"a", "b"}))
    with pytest.raises(ApiError, match="two fields 'b'"):
        reader.feed(form([("a", b""), ("b", b"")]))


@pytest.mark.parametrize(
    "body",
    [b"--xyz\r\n" + b"a" * 20_000, form([("model", b"m" * 70_000)]), form([("x", b"")] * 10_001)],
    ids=["endless head", "endless model", "too many parts"],
)
def test_a_malformed_form_is_refused(body: bytes) -> None:
    """With a 400, before it uses memory."""
    with pytest.raises(ApiError) as caught:
        read(body, [])
    assert caught.value.status == 400


def test_boundaries() -> None:
    """From the Content-Type, quoted or not; another type has none."""
    assert boundary_of(["multipart/form-data; boundary=abc"]) == b"abc"
    assert boundary_of(['Multipart/Form-Data; charset=utf-8; Boundary="a b,c"']) == b"a b,c"
    assert boundary_of(["multipart/form-data; boundary=----=_Part_1_2.3; charset=utf-8"]) == b"----=_Part_1_2.3"
    assert boundary_of(["multipart/form-data; boundary=a/b"]) == b"a/b"
    assert boundary_of(["application/json"]) is None
    assert boundary_of([]) is None


@pytest.mark.parametrize(
    "given",
    [
        ["multipart/form-data"],
        ["multipart/form-data; boundary="],
        [f"multipart/form-data; boundary={'x' * 71}"],
        ["multipart/form-data; boundary=a; boundary=b"],
        ["multipart/form-data; boundary =a; boundary=b"],
        ["multipart/form-data; boundary*=a; boundary=b"],
        ['multipart/form-data; x="; boundary=a ; boundary=b'],
        ['multipart/form-data; boundary="a;"'],
        ["text/plain", "multipart/form-data; boundary=a"],
    ],
)
def test_an_ambiguous_boundary_is_refused(given: list[str]) -> None:
    """A reader with another boundary reads another form."""
    with pytest.raises(ApiError, match="malformed"):
        boundary_of(given)


def steps_of(call: Callable[[], object]) -> int:
    """Return the number of function calls within a call, including C functions."""
    steps = 0

    def count(_frame: object, event: str, _of: object) -> None:
        nonlocal steps
        steps += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return steps


@pytest.mark.parametrize(
    ("boundary", "value"),
    [(b"-", b"-" * 65536), (b"a", b"--a" * 20_000), (b"-" * 70, b"-" * 65536)],
    ids=["dashes", "boundaries", "long"],
)
def test_a_value_full_of_boundaries_costs_no_more_steps_than_another(boundary: bytes, value: bytes) -> None:
    """A boundary that is not on its own line is not a delimiter, and costs no step: clients choose both."""
    head = b'--%b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' % boundary

    def steps(value: bytes) -> int:
        reader = FormReader(boundary, {"file": False})
        reader.feed(head)
        return steps_of(lambda: reader.feed(value))

    assert steps(value) == steps(b"x" * len(value))
