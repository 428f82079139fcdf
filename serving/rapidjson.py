"""JSON as TensorFlow Serving 2.11 reads and prints it: RapidJSON 1.1.0 with NaN and Infinity allowed.

`orjson` reads what is JSON to the letter, as nearly every request is: a vector of 384 numbers in 17 us;
`json` took 308. It reads NaN, Infinity and equal keys, still in C. Whatever it refuses or could read
otherwise goes through `_Reader`, which follows RapidJSON's reader.h step by step so that the message and the
offset are the real ones. That and the text of an error are Python's work and take a thousand times longer, so
both end at `MAX_STEPS`: a request costs a second at most there, where it could cost minutes.
"""

import json
import math
import re
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import orjson

MAX_STEPS = 100_000  # values, names and escapes: nine microseconds each
MAX_TEXT = 1 << 20  # characters of a printed value: indents make much of a little that is deeply nested

JsonValue = Any  # None, bool, int, float, str, list, dict

_LARGE_EXPONENT = re.compile(rb"[eE]\+?\d{3}")
_LONG_NUMBER = re.compile(rb"\d{200}")  # a double ends at 1.8e308, an exponent of two digits adds 99
_SURROGATE = re.compile(rb"\\u[dD][89A-Fa-f]")
# What `_Reader` need not take byte by byte: numbers that surely are finite, and the plain part of a string.
_NUMBERS = re.compile(
    rb"(?:[ \n\r\t]*-?(?:0|[1-9][0-9]{0,199})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?[ \n\r\t]*,)+"
)
_PLAIN = re.compile(rb"[^\x00-\x1f\"\\]+")
_WHITESPACE = b" \n\r\t"
_SPACES, _DIGITS = re.compile(rb"[ \n\r\t]*"), re.compile(rb"[0-9]*")
_ESCAPES = {0x22: '"', 0x2F: "/", 0x5C: "\\", 0x62: "\b", 0x66: "\f", 0x6E: "\n", 0x72: "\r", 0x74: "\t"}
_BOM = b"\xef\xbb\xbf"
_HALF_ULP = 2.0**-24  # of a float32, relative to it, at most; below _LEAST_NORMAL it is more
_LEAST_NORMAL = 2.0**-126
_PRINTED = {code: f"\\u{code:04X}" for code in range(0x20)} | {
    0x22: '\\"', 0x5C: "\\\\", 0x08: "\\b", 0x0C: "\\f", 0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"
}  # fmt: skip


class JsonError(ValueError):
    """A body that RapidJSON refuses; the text is TensorFlow Serving's."""

    def __init__(self, message: str, offset: int | None = None) -> None:
        where = "" if offset is None else f" at offset: {offset}"
        super().__init__(f"JSON Parse error: {message}{where}")


def parse(body: bytes) -> JsonValue:
    """Read one JSON document; the first of equal keys wins, a byte order mark is skipped.

    Bytes that are not UTF-8 are kept as lone surrogates, as RapidJSON keeps them unchecked.

    Raises:
        JsonError: with RapidJSON's words and offset, or after `MAX_STEPS` with words of its own.
    """
    if not body:
        raise JsonError("The document is empty")  # the one message without an offset
    try:
        document = orjson.loads(body)
        if _n_keys(document) == body.count(b":"):  # else a key may be there twice
            return document
    except ValueError:
        pass
    try:
        if not _is_doubtful(body):
            decoded = body.decode("utf-8", "surrogateescape")
            return json.loads(decoded, object_pairs_hook=_first_wins, parse_int=_integer)
    except (RecursionError, ValueError):
        pass  # `_Reader` says what is wrong, in the real words
    try:
        return _Reader(body).document()
    except RecursionError:
        # The real server reads by recursion too, and would end by a stack overflow.
        raise JsonError("Nested too deeply.") from None


def text(value: JsonValue) -> str:
    """A value as error messages show it: RapidJSON's PrettyWriter, four spaces, one element a line.

    It breaks off where `MAX_STEPS` pieces or `MAX_TEXT` characters are printed.
    """
    if isinstance(value, float):
        return number(value, single=abs(value) <= 3.4028234e38)
    printed = _Printed()
    _write(value, 0, printed)  # stops where the real writer stops: at the first NaN inside
    return "".join(printed.parts)[:MAX_TEXT]


def number(value: float, single: bool) -> str:
    """A float as TensorFlow Serving prints it: six digits if they read back the same, else all of them.

    Args:
        value: for `single`, is rounded to float32 first.
        single: float32 (up to nine digits), else float64 (up to seventeen).

    Source: tensorflow/serving util/json_tensor.cc, `WriteDecimal`.
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("-Infinity" if value < 0 else "Infinity")
    if single:
        value = _float32(value)
    short = f"{value:g}"
    back = float(short)
    if (_float32(back) if single else back) != value:
        short = f"{value:.9g}" if single else f"{value:.17g}"
    return short if "." in short or "e" in short else short + ".0"


def numbers(values: Sequence[float], single: bool) -> list[str]:
    """What `number` prints of each value, faster: most float32 need nine digits, and one look tells."""
    if not single:
        return [number(value, False) for value in values]
    singles = array("f", values)
    six = ("%g " * len(singles) % tuple(singles)).split()
    nine = ("%.9g " * len(singles) % tuple(singles)).split()
    spelled = []
    for value, short, long in zip(singles, six, nine, strict=True):
        size = abs(value)
        if abs(float(short) - value) > size * _HALF_ULP and size > _LEAST_NORMAL:
            spelled.append(long if "." in long or "e" in long else long + ".0")
        else:  # it may read back the same, or is no finite number
            spelled.append(number(value, True))
    return spelled


def string(value: str) -> str:
    """A JSON string; only what JSON forbids is escaped, with RapidJSON's upper-case digits."""
    return f'"{value.translate(_PRINTED)}"'


def kind(value: JsonValue) -> str:
    """RapidJSON's name of a value's type."""
    if value is None or isinstance(value, bool):
        return {None: "Null", True: "True", False: "False"}[value]
    names: dict[type, str] = {dict: "Object", list: "Array", str: "String"}
    return names.get(type(value), "Number")


def _end(pattern: re.Pattern[bytes], body: bytes, start: int) -> int:
    """Where what a pattern takes, perhaps nothing, ends."""
    match = pattern.match(body, start)
    return match.end() if match else start


def _is_doubtful(body: bytes) -> bool:
    """Whether `json` might accept what RapidJSON refuses: lone surrogates, numbers past a double's range."""
    return any(pattern.search(body) for pattern in (_SURROGATE, _LARGE_EXPONENT, _LONG_NUMBER))


def _n_keys(document: JsonValue) -> int:
    """Keys of an object and of the objects right in it; with no other colon in the text there are no more."""
    if type(document) is not dict:
        return -1
    return len(document) + sum(len(value) for value in document.values() if type(value) is dict)


def _integer(digits: str | bytes) -> int | float:
    """Whole numbers beyond 64 bits become doubles, as RapidJSON's do."""
    value = int(digits)
    return value if -(2**63) <= value < 2**64 else float(digits)


def _float32(value: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _first_wins(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    members = dict(pairs)
    if len(members) < len(pairs):
        members = {}
        for key, value in pairs:
            members.setdefault(key, value)
    return members


class _Printed:
    """A text in the making."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.size = 0

    def add(self, part: str) -> None:
        self.parts.append(part)
        self.size += len(part)

    def is_full(self) -> bool:
        return len(self.parts) > MAX_STEPS or self.size > MAX_TEXT


def _write(value: JsonValue, level: int, printed: _Printed) -> bool:
    """Append the printed value; False where the real writer, or this one, leaves the rest out."""
    if printed.is_full():
        return False
    indent = "\n" + "    " * (level + 1)
    if isinstance(value, dict):
        printed.add("{")
        for i, (key, item) in enumerate(value.items()):
            printed.add(f"{',' if i else ''}{indent}{string(key)}: ")
            if not _write(item, level + 1, printed):
                return False
        printed.add(indent[:-4] + "}" if value else "}")
    elif isinstance(value, list):
        printed.add("[")
        for i, item in enumerate(value):
            printed.add(f",{indent}" if i else indent)
            if not _write(item, level + 1, printed):
                return False
        printed.add(indent[:-4] + "]" if value else "]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            return False  # Writer::WriteDouble refuses them without kWriteNanAndInfFlag
        printed.add(_shortest(value))
    else:
        printed.add(string(value) if isinstance(value, str) else json.dumps(value))
    return True


def _shortest(value: float) -> str:
    """A double in the fewest digits, laid out as RapidJSON's dtoa.h, `Prettify`, does."""
    sign = "-" if math.copysign(1, value) < 0 else ""
    if value == 0:
        return sign + "0.0"
    digits, point = _digits_and_point(abs(value))
    if point - len(digits) >= 0 and point <= 21:
        return f"{sign}{digits.ljust(point, '0')}.0"
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    rest = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{rest}e{point - 1}"


def _digits_and_point(value: float) -> tuple[str, int]:
    """Shortest digits without zeros at the ends, and where the point stands: 0.0012 is ("12", -2)."""
    mantissa, _, exponent = repr(value).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = whole + fraction
    point = len(whole) + int(exponent or 0)
    stripped = digits.lstrip("0")
    return stripped.rstrip("0"), point - (len(digits) - len(stripped))


class _Reader:
    """RapidJSON's recursive reader (reader.h, version 1.1.0), for the few bodies `json` cannot judge."""

    def __init__(self, body: bytes) -> None:
        self.body = body + b"\0"  # RapidJSON's streams end in a zero, and a zero ends a document
        self.at = len(_BOM) if body.startswith(_BOM) else 0
        self._n_steps = 0

    def document(self) -> JsonValue:
        self._skip_whitespace()
        if self._peek() == 0:
            raise self._error("The document is empty.")
        value = self._value()
        self._skip_whitespace()
        if self._peek() != 0:
            raise self._error("The document root must not be followed by other values.")
        return value

    def _peek(self) -> int:
        return self.body[self.at]

    def _error(self, message: str, offset: int | None = None) -> JsonError:
        return JsonError(message, self.at if offset is None else offset)

    def _step(self) -> None:
        self._n_steps += 1
        if self._n_steps > MAX_STEPS:
            raise self._error(f"Not plain JSON, and more than {MAX_STEPS} values to look at one by one.")

    def _skip_whitespace(self) -> None:
        if self.body[self.at] in _WHITESPACE:
            self.at = _end(_SPACES, self.body, self.at)

    def _consume(self, expected: bytes) -> bool:
        """Take as many of the bytes as match; whether all of them did."""
        for byte in expected:
            if self.body[self.at] != byte:
                return False
            self.at += 1
        return True

    def _value(self) -> JsonValue:
        self._step()
        start = self._peek()
        for word, value in ((b"null", None), (b"true", True), (b"false", False)):
            if start == word[0]:
                if not self._consume(word):
                    raise self._error("Invalid value.")
                return value
        if start == ord('"'):
            return self._string()
        if start == ord("{"):
            return self._object()
        return self._array() if start == ord("[") else self._number()

    def _object(self) -> dict[str, JsonValue]:
        self.at += 1
        members: dict[str, JsonValue] = {}
        self._skip_whitespace()
        if self._consume(b"}"):
            return members
        while True:
            if self._peek() != ord('"'):
                raise self._error("Missing a name for object member.")
            name = self._string()
            self._skip_whitespace()
            if not self._consume(b":"):
                raise self._error("Missing a colon after a name of object member.")
            self._skip_whitespace()
            members.setdefault(name, self._value())
            self._skip_whitespace()
            if self._consume(b"}"):
                return members
            if not self._consume(b","):
                raise self._error("Missing a comma or '}' after an object member.")
            self._skip_whitespace()

    def _array(self) -> list[JsonValue]:
        self.at += 1
        items: list[JsonValue] = []
        self._skip_whitespace()
        if self._consume(b"]"):
            return items
        while True:
            items += self._numbers()
            items.append(self._value())
            self._skip_whitespace()
            if self._consume(b"]"):
                return items
            if not self._consume(b","):
                raise self._error("Missing a comma or ']' after an array element.")
            self._skip_whitespace()

    def _numbers(self) -> list[int | float]:
        """As many numbers as follow, each with its comma, read at once."""
        run = _NUMBERS.match(self.body, self.at)
        if run is None:
            return []
        self.at = run.end()
        self._skip_whitespace()
        return json.loads(b"[%s]" % run[0][:-1], parse_int=_integer)

    def _string(self) -> str:
        self._step()
        self.at += 1
        parts = bytearray()
        while True:
            plain = _PLAIN.match(self.body, self.at)
            if plain:
                parts += plain[0]
                self.at = plain.end()
            byte = self._peek()
            if byte == ord("\\"):
                parts += self._escape().encode("utf-8", "surrogatepass")
            elif byte == ord('"'):
                self.at += 1
                return parts.decode("utf-8", "surrogateescape")
            elif byte == 0:
                raise self._error("Missing a closing quotation mark in string.")
            else:
                raise self._error("Invalid escape character in string.")

    def _escape(self) -> str:
        self._step()
        start = self.at
        letter = self.body[start + 1]
        self.at += 2
        if letter in _ESCAPES:
            return _ESCAPES[letter]
        if letter != ord("u"):
            raise self._error("Invalid escape character in string.", start)
        high = self._hex4(start)
        if not 0xD800 <= high <= 0xDBFF:
            return chr(high)
        low = self._hex4(start) if self._consume(b"\\u") else 0
        if not 0xDC00 <= low <= 0xDFFF:
            raise self._error("The surrogate pair in string is invalid.", start)
        return chr(((high - 0xD800) << 10 | (low - 0xDC00)) + 0x10000)

    def _hex4(self, start: int) -> int:
        digits = self.body[self.at : self.at + 4]
        if not re.fullmatch(rb"[0-9A-Fa-f]{4}", digits):
            raise self._error("Incorrect hex digit after \\u escape in string.", start)
        self.at += 4
        return int(digits, 16)

    def _digits(self) -> bytes:
        start = self.at
        self.at = _end(_DIGITS, self.body, start)
        return self.body[start : self.at]

    def _number(self) -> int | float:
        start = self.at
        minus = self._consume(b"-")
        if self._peek() in b"NI":
            value = self._nan_or_infinity()
            return -value if minus else value
        if not self._consume(b"0") and not self._digits():
            raise self._error("Invalid value.")
        is_float = self._fraction() | self._exponent()
        spelled = self.body[start : self.at]
        number = float(spelled)
        if math.isinf(number):
            raise self._error("Number too big to be stored in double.", start)
        return number if is_float else _integer(spelled)

    def _fraction(self) -> bool:
        if not self._consume(b"."):
            return False
        if not self._digits():
            raise self._error("Miss fraction part in number.")
        return True

    def _exponent(self) -> bool:
        if self._peek() not in b"eE":
            return False
        self.at += 1
        if self._peek() in b"+-":
            self.at += 1
        if not self._digits():
            raise self._error("Miss exponent in number.")
        return True

    def _nan_or_infinity(self) -> float:
        is_nan = self._peek() == ord("N")
        complete = self._consume(b"NaN" if is_nan else b"Inf")
        if complete and not is_nan and self._peek() == ord("i"):
            complete = self._consume(b"inity")
        if not complete:
            raise self._error("Invalid value.")
        return math.nan if is_nan else math.inf
