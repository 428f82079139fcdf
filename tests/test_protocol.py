"""TensorFlow Serving's JSON, read and written. Expected texts: tensorflow/serving r2.11, RapidJSON 1.1.0."""

import json
import math
import struct
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import protocol, rapidjson
from serving.protocol import RequestError, Signature, Tensor, TensorInfo, VersionStatus

VECTOR = {"input_1": TensorInfo("serving_default_input_1:0", "DT_FLOAT", (-1,))}
SEARCH = {
    "queries": TensorInfo("q:0", "DT_FLOAT", (-1, 2)),
    "k": TensorInfo("k:0", "DT_INT32", ()),
}
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def read(body: bytes, inputs=VECTOR) -> dict[str, Tensor]:
    return protocol.read_inputs(protocol.read_json(body), inputs)


def refusal(body: bytes, inputs=VECTOR) -> str:
    with pytest.raises(RequestError) as caught:
        read(body, inputs)
    assert caught.value.code == "INVALID_ARGUMENT"
    return caught.value.message


def shapes_and_values(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: (tensor.shape, list(tensor.values)) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("method", "path", "wanted"),
    [
        ("GET", "/v1/models/index", ("status", "index", None, None)),
        ("GET", "/v1/models/index/versions/007", ("status", "index", 7, None)),
        ("GET", "/v1/models/index/labels/stable", ("status", "index", None, "stable")),
        ("GET", "/v1/models/index/metadata", ("metadata", "index", None, None)),
        ("GET", "/v1/models/index/versions/7/metadata", ("metadata", "index", 7, None)),
        # the pattern ignores case, the comparison after it does not
        ("GET", "/V1/Models/index/METADATA", ("status", "index", None, None)),
        ("GET", "/v1/models/%69ndex", ("status", "index", None, None)),
        # the query string is part of the matched path
        ("GET", "/v1/models/index?x=1", ("status", "index?x=1", None, None)),
        ("POST", "/v1/models/index:predict", ("predict", "index", None, None)),
        ("POST", "/v1/models/index/versions/7:classify", ("classify", "index", 7, None)),
    ],
)
def test_a_path_says_what_is_asked(method, path, wanted):
    route = protocol.route(method, path)
    assert (route.action, route.model_name, route.version, route.label) == wanted


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/"),
        ("GET", "/v1/models/index/"),
        ("GET", "/v1/models/index/metadata/"),
        ("GET", "/v1/models/index/versions/abc"),
        ("GET", "/v1/models/index:predict"),
        ("POST", "/v1/models/index"),
        ("POST", "/v1/models/index:predict/"),
        ("POST", "/v1/models/index:predict?x=1"),
        ("POST", "/v1/models/index%3Apredict"),
        ("POST", "/v1/models/index:PREDICT"),
        ("HEAD", "/v1/models/index"),
        ("PUT", "/v1/models/index:predict"),
        ("GET", "/v1/models/index\u0660/versions/\u0661"),  # digits, but not ASCII's
    ],
)
def test_any_other_path_is_a_malformed_request(method, path):
    with pytest.raises(RequestError) as caught:
        protocol.route(method, path)
    assert caught.value.message == f"Malformed request: {method} {path}"
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("target", "path"),
    [
        (b"/v1/models/index:predict", "/v1/models/index:predict"),
        (b"/v1/models/index?x=1#y", "/v1/models/index?x=1#y"),
        (b"http://a.example:80/v1/models/index", "/v1/models/index"),
        (b"//v1/models/index", "/models/index"),  # a host named v1
        (b"/v1/models/%69ndex", "/v1/models/%69ndex"),
        (b"/v1/models/in[dex", None),
        (b"/v1/models/%6", None),
        (b"/v1/models/a b", None),
        (b"/v1/models/\xc3\xa9", None),
    ],
)
def test_a_request_line_names_a_path_or_no_uri(target, path):
    # libevent 2.1.8, evhttp_uri_parse; evhttp_request.cc, decode
    assert protocol.path_of(target) == path


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/versions/1"])
def test_a_path_without_a_model_is_told_so(path):
    with pytest.raises(RequestError, match=r"^Missing model name in request\.$"):
        protocol.route("GET", path)


@pytest.mark.parametrize("version", [str(2**63), "9" * 5000])  # Python itself reads 4,300 digits at most
def test_a_version_beyond_64_bits_is_refused_with_an_empty_body(version):
    # http_rest_api_handler.cc returns before it writes the JSON
    with pytest.raises(RequestError) as caught:
        protocol.route("GET", f"/v1/models/index/versions/{version}")
    assert (caught.value.http_status, caught.value.body()) == (400, b"")
    assert protocol.route("GET", f"/v1/models/index/versions/{'0' * 5000}7").version == 7
    assert protocol.route("GET", f"/v1/models/index/versions/{2**63 - 1}").version == 2**63 - 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The document is empty"),
        (b" \n", "The document is empty. at offset: 2"),
        (b"{", "Missing a name for object member. at offset: 1"),
        (b"{'a': 1}", "Missing a name for object member. at offset: 1"),
        (b'{"a": 1,}', "Missing a name for object member. at offset: 8"),
        (b'{"a" 1}', "Missing a colon after a name of object member. at offset: 5"),
        (b'{"a": 1 "b": 2}', "Missing a comma or '}' after an object member. at offset: 8"),
        (b"[1, 2", "Missing a comma or ']' after an array element. at offset: 5"),
        (b"[1,]", "Invalid value. at offset: 3"),
        (b"[0.5, nan]", "Invalid value. at offset: 7"),
        (b"[infinity]", "Invalid value. at offset: 1"),
        (b"// x\n{}", "Invalid value. at offset: 0"),
        (b"[1.]", "Miss fraction part in number. at offset: 3"),
        (b"[1e]", "Miss exponent in number. at offset: 3"),
        (b"[0, 1e400]", "Number too big to be stored in double. at offset: 4"),
        (b"[" + b"9" * 250 + b"e99]", "Number too big to be stored in double. at offset: 1"),
        (b"[" + b"9" * 400 + b"]", "Number too big to be stored in double. at offset: 1"),
        (b'"abc', "Missing a closing quotation mark in string. at offset: 4"),
        (b'"\\x"', "Invalid escape character in string. at offset: 1"),
        (b'"a\nb"', "Invalid escape character in string. at offset: 2"),
        (b'"\\u12"', "Incorrect hex digit after \\u escape in string. at offset: 1"),
        (b'"\\ud800"', "The surrogate pair in string is invalid. at offset: 1"),
        (b"{} {}", "The document root must not be followed by other values. at offset: 3"),
        (b"[" * 100_000, "Nested too deeply."),  # ours: the real server's stack would overflow
    ],
)
def test_what_is_not_json_is_refused_in_rapidjsons_words(body, message):
    assert refusal(body) == f"JSON Parse error: {message}"


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": 1, "b": 2, "a": 3}', {"a": 1, "b": 2}),  # the first of equal keys
        (b'{"a": 1, "\\u0061": 3}', {"a": 1}),
        (b"[Infinity, -Infinity, Inf, -Inf]", [math.inf, -math.inf, math.inf, -math.inf]),
        (b"[1e-400, -0.0, 1e308]", [0.0, -0.0, 1e308]),
        (b'"\\ud83d\\ude00"', "😀"),
        (b'"\xff"', "\udcff"),  # bytes that are not UTF-8 are kept
        (b"[1]\0 anything", [1]),  # a zero ends the document
        (b'["\\u00e9", "\\\\ud800"]', ["é", "\\ud800"]),  # no surrogate: a letter, and a written backslash
    ],
)
def test_what_rapidjson_forgives_is_read(body, value):
    assert rapidjson.parse(body) == value


@given(JSON_VALUES)
def test_the_fast_reader_and_the_exact_one_agree(value):
    body = json.dumps(value).encode()
    assert repr(rapidjson.parse(body)) == repr(rapidjson._Reader(body).document())


SPACES = st.sampled_from(["", " ", "\n", "\r\t"])
KEYS = st.sampled_from(["a", "b", "a:b", "", "\\u0061"])
JSON_TEXTS = st.recursive(  # keys may come twice, and numbers in any spelling
    st.sampled_from(["null", "true", '"a:"', '"\\ud83d\\ude00"', "NaN", "-Infinity", "Inf", "-0", "1e400"])
    | st.from_regex(r"-?(0|[1-9][0-9]{0,25})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", fullmatch=True),
    lambda inner: (
        st.builds(
            lambda texts, space: f"[{f',{space}'.join(texts)}{space}]", st.lists(inner, max_size=4), SPACES
        )
        | st.builds(
            lambda members, space: (
                "{" + ",".join(f'{space}"{key}"{space}:{space}{text}' for key, text in members) + "}"
            ),
            st.lists(st.tuples(KEYS, inner), max_size=4),
            SPACES,
        )
    ),
    max_leaves=12,
)


def read_by(read, body: bytes) -> str:
    try:
        return repr(read(body))
    except rapidjson.JsonError as error:
        return str(error)


@given(JSON_TEXTS)
def test_the_readers_agree_on_equal_keys_and_every_spelling_of_a_number(text):
    body = text.encode()
    assert read_by(rapidjson.parse, body) == read_by(lambda b: rapidjson._Reader(b).document(), body)


@given(st.lists(st.floats() | st.floats(width=32) | st.integers(-(10**6), 10**6).map(float)), st.booleans())
def test_many_numbers_are_printed_as_each_alone(values, single):
    rounded = array("f", values).tolist() if single else values
    wanted = [rapidjson.number(value, single) for value in rounded]
    assert rapidjson.numbers(rounded, single) == wanted


@given(st.binary(min_size=4, max_size=400).map(lambda b: np.frombuffer(b[: len(b) // 4 * 4], np.float32)))
def test_any_float32_at_all_is_printed_so(values):
    wanted = [rapidjson.number(value, True) for value in values.tolist()]
    assert rapidjson.numbers(values.tolist(), True) == wanted


@given(
    st.binary(max_size=40) | st.text(alphabet='{}[]",:.+-eE0129NaInfity\\u \n', max_size=40).map(str.encode)
)
def test_any_bytes_are_read_or_refused_in_words(body):
    try:
        assert isinstance(protocol.read_json(body), dict)
    except RequestError as error:
        refused = error.message
    else:
        return
    assert refused.startswith(("JSON Parse error: ", "JSON Value: "))


def test_columnar_and_row_forms_make_the_same_vector():
    wanted = {"input_1": ((3,), [1.0, 2.5, -3.0])}
    assert shapes_and_values(read(b'{"inputs": [1, 2.5, -3]}')) == wanted
    assert shapes_and_values(read(b'{"inputs": {"input_1": [1, 2.5, -3], "extra": 1}}')) == wanted
    assert shapes_and_values(read(b'{"instances": [1, 2.5, -3]}')) == wanted
    rows = b'{"instances": [{"input_1": 1}, {"input_1": 2.5}, {"input_1": -3}]}'
    assert shapes_and_values(read(rows)) == wanted


def test_a_nested_list_becomes_a_matrix_that_the_op_can_refuse():
    assert shapes_and_values(read(b'{"instances": [[1, 2]]}')) == {"input_1": ((1, 2), [1.0, 2.0])}
    assert shapes_and_values(read(b'{"inputs": 5}')) == {"input_1": ((), [5.0])}
    assert shapes_and_values(read(b'{"inputs": []}')) == {"input_1": ((0,), [])}


def test_several_inputs_are_taken_by_name():
    body = b'{"inputs": {"k": 3, "queries": [[1, 2], [3, 4]]}}'
    wanted = {"k": ((), [3]), "queries": ((2, 2), [1.0, 2.0, 3.0, 4.0])}
    assert shapes_and_values(read(body, SEARCH)) == wanted


def test_numbers_past_float32_become_infinite():
    assert list(read(b'{"inputs": [1e39, -1e39, 1e-60]}')["input_1"].values) == [math.inf, -math.inf, 0.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[1]", "JSON Value: [\n    1\n] Is not object"),
        (b'{"x": 1}', "Missing 'inputs' or 'instances' key"),
        (
            b'{"instances": 1}',
            "JSON Value: {\n    \"instances\": 1\n} Expecting 'instances' to be an list/array",
        ),
        (b'{"instances": []}', "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array"),
        (b'{"inputs": {}}', "Missing named input: input_1 in 'inputs' object."),
        (b'{"inputs": ["a"]}', 'JSON Value: "a" Type: String is not of expected type: float'),
        (b'{"inputs": [true]}', "JSON Value: true Type: True is not of expected type: float"),
        (b'{"inputs": [null]}', "JSON Value: null Type: Null is not of expected type: float"),
        (b'{"inputs": [[1, 2], [3]]}', "Encountered list at unexpected size: 1 at level: 1 expected size: 2"),
        (b'{"inputs": [1, [2]]}', "Encountered list at unexpected level: 1 expected < 1"),
        (
            b'{"inputs": [[1], 2.5]}',
            "JSON Value: 2.5 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
        ),
        (
            b'{"instances": [1, [2]]}',
            "Failed to process element: 1 of 'instances' list. "
            "Error: INVALID_ARGUMENT: Expecting shape [] but got: [1]",
        ),
        (
            b'{"instances": [[1], [2, 3]]}',
            "Failed to process element: 1 of 'instances' list. "
            "Error: INVALID_ARGUMENT: Expecting tensor size: 1 but got: 2",
        ),
        (
            b'{"instances": [{"input_1": 1, "x": 2}]}',
            "Failed to process element: 0 key: x of 'instances' list. "
            "Error: INVALID_ARGUMENT: JSON object: does not have named input: x",
        ),
        (
            b'{"instances": [{}]}',
            "Failed to process element: 0 of 'instances' list. "
            "JSON object: {} keys must be equal to: input_1",
        ),
        (
            b'{"instances": [1, {"input_1": 2}]}',
            "Expecting value/list but got object at item 1 of input list",
        ),
        (b'{"instances": [{"input_1": 2}, 1]}', "Expecting object but got list at item 1 of input list"),
    ],
)
def test_a_value_that_does_not_fit_is_named(body, message):
    assert refusal(body) == message


def test_both_forms_at_once_are_refused():
    assert refusal(b'{"inputs": [1], "instances": [1]}').endswith(
        "} Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
    )


FILTERS = {
    "allowed": TensorInfo("allowed:0", "DT_STRING", (-1,)),
    "minimum_score": TensorInfo("minimum_score:0", "DT_FLOAT", ()),
}


def test_texts_and_a_score_are_read_beside_an_empty_list():
    body = '{"inputs": {"allowed": ["é", {"b64": "/w=="}], "minimum_score": 1}}'.encode()
    wanted = {"allowed": ((2,), ["é".encode(), b"\xff"]), "minimum_score": ((), [1.0])}
    assert shapes_and_values(read(body, FILTERS)) == wanted
    empty = read(b'{"inputs": {"allowed": [], "minimum_score": -0.5}}', FILTERS)
    assert shapes_and_values(empty) == {"allowed": ((0,), []), "minimum_score": ((), [-0.5])}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"[1]", "JSON Value: 1 Type: Number is not of expected type: string"),
        (b'[{"b64": "?"}]', "Unable to base64 decode"),
        (b'["a", ["b"]]', "Encountered list at unexpected level: 1 expected < 1"),
    ],
)
def test_what_is_no_text_is_refused_as_an_id(given, message):
    assert refusal(b'{"inputs": {"minimum_score": 1, "allowed": ' + given + b"}}", FILTERS) == message


@pytest.mark.parametrize("text", ["YQ", "YQ==", "YQ..", "YQ.=", " Y\\tQ\\n", "YQ= =", "YR"])
def test_base64_is_read_as_absl_reads_it(text):
    """Padded by either sign or not at all, with white space anywhere; bits beyond a byte do not count."""
    body = f'{{"inputs": {{"minimum_score": 1, "allowed": [{{"b64": "{text}"}}]}}}}'
    assert shapes_and_values(read(body.encode(), FILTERS))["allowed"] == ((1,), [b"a"])


@pytest.mark.parametrize(
    "text", ["Y", "YQ=", "YQ===", "Y=Q=", "YWJj=", "=", "YWJjZ", "YQ-_", "YQ\\u0000", "é"]
)
def test_what_absl_does_not_read_is_no_base64(text):
    body = f'{{"inputs": {{"minimum_score": 1, "allowed": [{{"b64": "{text}"}}]}}}}'
    assert refusal(body.encode(), FILTERS) == "Unable to base64 decode"


def test_a_version_beyond_64_bits_is_an_error_of_its_model():
    with pytest.raises(RequestError) as raised:
        protocol.route("GET", "/v1/models/a%20b/versions/9223372036854775808")
    assert raised.value.model_name == "a b"


def test_what_is_no_plain_json_is_read_a_bounded_number_of_steps(monkeypatch):
    monkeypatch.setattr(rapidjson, "MAX_STEPS", 4)
    with pytest.raises(rapidjson.JsonError, match=r"^JSON Parse error: Invalid value. at offset: 11$"):
        rapidjson.parse(b"[true,true,x]")  # the array and three values
    said = "JSON Parse error: Not plain JSON, and more than 4 values to look at one by one. at offset: "
    for body in (b"[true,true,true,x]", b'{"a":"\\n\\n",x', b'["", "", x]'):
        with pytest.raises(rapidjson.JsonError) as raised:
            rapidjson.parse(body)
        assert str(raised.value).startswith(said), body
    assert rapidjson.parse(b"[true,true,true,true]") == [True] * 4  # plain JSON has no bound
    assert rapidjson.parse(b"[1,2,3,4,5,6,7,8,NaN]")[:8] == list(range(1, 9))  # nor have numbers in a row


def test_a_large_value_is_not_printed_whole_in_an_error(monkeypatch):
    value = [1] * 1000
    assert rapidjson.text(value).count("1") == 1000
    monkeypatch.setattr(rapidjson, "MAX_STEPS", 30)
    assert 5 < rapidjson.text(value).count("1") < 30


def test_a_deeply_nested_value_is_not_printed_whole_with_all_its_indents():
    value = [1] * 20_000
    for _ in range(400):
        value = [value]
    printed = rapidjson.text(value)  # 20,000 lines of 1,604 spaces each would be 32 MB
    assert len(printed) == 2**20
    assert printed.startswith("[\n    [\n        [\n")


def test_a_scalar_input_takes_whole_numbers_only():
    body = b'{"inputs": {"queries": [[1, 2]], "k": 2.0}}'
    assert refusal(body, SEARCH) == "JSON Value: 2.0 Type: Number is not of expected type: int32"
    body = b'{"inputs": {"queries": [[1, 2]], "k": 2147483648}}'
    assert refusal(body, SEARCH).startswith("JSON Value: 2147483648 Type: Number")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"signature_name": "nope"}, 'Serving signature name: "nope" not found in signature def'),
        ({"signature_name": 1}, "'signature_name' key must be a string value."),
        ({"signature_name": "init"}, "Failed to get input map for signature: init"),
    ],
)
def test_a_signature_that_cannot_be_asked_is_refused(document, message):
    signatures = {"serving_default": Signature(VECTOR, {}, ""), "init": Signature({}, {}, "")}
    with pytest.raises(RequestError) as caught:
        protocol.find_signature(signatures, document)
    assert caught.value.message.endswith(message)
    assert protocol.find_signature(signatures, {}).inputs == VECTOR


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.2, "0.2"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (9_000_000.0, "9e+06"),  # "%g", as WriteDecimal's comment says
        (0.00003, "3e-05"),
        (16_777_216.0, "16777216.0"),  # 2^24: six digits do not read back
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (math.nan, "NaN"),
    ],
)
def test_a_float_is_printed_as_the_real_server_prints_it(value, text):
    assert rapidjson.number(value, single=True) == text


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_a_printed_float_reads_back_as_the_same_float32(value):
    text = rapidjson.number(value, single=True)
    assert struct.pack("f", float(text)) == struct.pack("f", value)
    assert "." in text or "e" in text
    assert json.loads(text) == float(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e21, "1e21"),
        (1e20, "100000000000000000000.0"),
        (1.5, "1.5"),
        (1e-6, "0.000001"),
        (1.25e-7, "1.25e-7"),
    ],
)
def test_a_number_in_an_error_is_laid_out_by_rapidjsons_prettify(value, text):
    assert rapidjson.text([value]) == f"[\n    {text}\n]"


FOUND = {
    "output_2": Tensor("DT_INT32", (2,), [4, 0]),
    "output_1": Tensor("DT_FLOAT", (2,), [0.5, 0.25]),
}


def test_the_columnar_answer_has_one_list_an_output():
    lines = [
        "{",
        '    "outputs": {', '        "output_1": [', "            0.5,", "            0.25", "        ],",
        '        "output_2": [', "            4,", "            0", "        ]", "    }", "}",
    ]  # fmt: skip
    assert protocol.predict_body(FOUND, {"inputs": []}).decode() == "\n".join(lines)


def test_the_row_answer_has_one_object_a_result():
    body = protocol.predict_body(FOUND, {"instances": []})
    assert json.loads(body) == {
        "predictions": [{"output_1": 0.5, "output_2": 4}, {"output_1": 0.25, "output_2": 0}]
    }
    assert b'\n        {\n            "output_1": 0.5,\n            "output_2": 4\n        },\n' in body


def test_a_single_output_has_no_name():
    # the layout in the documentation's half_plus_two example
    outputs = {"y": Tensor("DT_FLOAT", (3,), [2.5, 3.0, 4.5])}
    assert protocol.predict_body(outputs, {"instances": []}) == (
        b'{\n    "predictions": [2.5, 3.0, 4.5\n    ]\n}'
    )
    assert json.loads(protocol.predict_body(outputs, {})) == {"outputs": [2.5, 3.0, 4.5]}


def test_matrices_and_strings_are_nested_and_escaped():
    outputs = {
        "document_ids": Tensor("DT_STRING", (2, 1), [b'a"\n\x1f', "é".encode()]),
        "scores": Tensor("DT_FLOAT", (2, 1), [1.0, 2.0]),
        "raw_bytes": Tensor("DT_STRING", (2, 1), [b"\xff", b""]),
    }
    for key in ("outputs", "predictions"):
        body = protocol.predict_body(outputs, {"instances" if key == "predictions" else "inputs": []})
        assert b'"a\\"\\n\\u001F"' in body
        answer = json.loads(body)[key]
        first = answer[0] if key == "predictions" else {name: column[0] for name, column in answer.items()}
        assert first == {"document_ids": ['a"\n\x1f'], "scores": [1.0], "raw_bytes": [{"b64": "/w=="}]}


def test_an_answer_may_be_arrays():
    arrays = {
        "output_1": Tensor("DT_FLOAT", (2,), np.array([0.5, 0.25], np.float32)),
        "output_2": Tensor("DT_INT32", (2,), np.array([4, 0], np.int32)),
    }
    for form in ({"inputs": 1}, {"instances": 1}):
        assert protocol.predict_body(arrays, form) == protocol.predict_body(FOUND, form)
    texts = {"x": Tensor("DT_STRING", (1,), np.array([b"a"], object))}
    assert json.loads(protocol.predict_body(texts, {})) == {"outputs": ["a"]}


def test_no_output_is_no_answer():
    with pytest.raises(RequestError, match=r"^Cannot convert empty tensor map to JSON$"):
        protocol.predict_body({}, {})


def test_rows_without_a_common_first_dimension_are_refused():
    uneven = FOUND | {"output_2": Tensor("DT_INT32", (1,), [4])}
    with pytest.raises(RequestError, match="output_2 has inconsistent batch size: 1 expecting: 2"):
        protocol.predict_body(uneven, {"instances": []})
    with pytest.raises(RequestError, match=r"Tensor name: s has no shape information $"):
        protocol.predict_body({"s": Tensor("DT_FLOAT", (), [1.0])}, {"instances": []})


def test_the_status_lists_versions_as_strings():
    body = protocol.status_body([VersionStatus(8, "END", "NOT_FOUND", "gone"), VersionStatus(7, "AVAILABLE")])
    rows = json.loads(body)["model_version_status"]
    assert rows[0] == {
        "version": "8", "state": "END", "status": {"error_code": "NOT_FOUND", "error_message": "gone"}
    }  # fmt: skip
    assert (rows[1]["version"], rows[1]["status"]) == ("7", {"error_code": "OK", "error_message": ""})
    assert body.startswith(b'{\n "model_version_status": [\n  {\n   "version": "8",\n')


def test_a_status_escapes_what_protobuf_does():
    # protobuf's json_escaping.cc; ScaNN's ops have such names
    body = protocol.status_body([VersionStatus(8, "END", "NOT_FOUND", "Op type 'Scann>Search' \x7f é")])
    assert b"Op type 'Scann\\u003eSearch' \\u007f \xc3\xa9" in body
    row = json.loads(body)["model_version_status"][0]
    assert row["status"]["error_message"] == "Op type 'Scann>Search' \x7f é"


def test_the_metadata_show_sizes_as_strings_and_an_unknown_rank():
    outputs = {"output_1": TensorInfo("StatefulPartitionedCall:0", "DT_FLOAT", None)}
    signature = Signature(VECTOR, outputs, "tensorflow/serving/predict")
    body = protocol.metadata_body("index", 7, {"serving_default": signature})
    assert body.startswith(
        b'{\n"model_spec":{\n "name": "index",\n "signature_name": "",\n "version": "7"\n}\n,\n'
    )
    shown = json.loads(body)["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert shown == {
        "inputs": {
            "input_1": {
                "dtype": "DT_FLOAT",
                "tensor_shape": {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False},
                "name": "serving_default_input_1:0",
            }
        },
        "outputs": {
            "output_1": {
                "dtype": "DT_FLOAT",
                "tensor_shape": {"dim": [], "unknown_rank": True},
                "name": "StatefulPartitionedCall:0",
            }
        },
        "method_name": "tensorflow/serving/predict",
    }


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "JSON Value: {} When method is classify, key 'examples' is expected and was not found"),
        ({"context": 1}, "Example must be JSON object but got JSON Number"),
        ({"examples": [1]}, "Example must be JSON object but got JSON Number"),
        ({"examples": [{"a": None}]}, "Feature: a has element with unexpected JSON type: Null"),
        ({"examples": [{"a": [[1]]}]}, "Feature: a has element with unexpected JSON type: Array"),
        ({"examples": [{"a": {"x": 1}}]}, "Feature: a has element with unexpected JSON type: Object"),
        ({"examples": [{"a": [1, 2.5]}]}, "Unexpected element type in feature: a expecting type: int64"),
        ({"examples": [{"a": ["x", True]}]}, "Unexpected element type in feature: a expecting type: bytes"),
        ({"examples": [{"a": {"b64": "?"}}]}, "Unable to base64 decode"),
        (
            {"examples": [{"a": 2**63}]},
            "Feature: a has uint64_t element. Only int64_t is supported.",
        ),
    ],
)
def test_examples_that_are_none_are_named(document, message):
    # util/json_tensor.cc, FillClassifyRegressRequestFromJson
    with pytest.raises(RequestError) as caught:
        protocol.check_examples(document)
    assert caught.value.message == message


def test_examples_of_every_kind_are_taken():
    every = {"a": 1, "b": [0.5, 1.5], "c": ["x", {"b64": "/w=="}], "d": [True, 2], "e": []}
    protocol.check_examples({"context": every, "examples": [every, {}]})


def test_classify_and_regress_are_refused_as_there():
    outputs = {name: TensorInfo(name, "DT_FLOAT", None) for name in ("output_1", "output_2")}
    signatures = {"serving_default": Signature(VECTOR, outputs, "", debug="inputs {}")}
    with pytest.raises(RequestError, match="key 'examples' is expected and was not found"):
        protocol.refuse_examples("classify", {}, signatures)
    with pytest.raises(RequestError, match=r"^No classification inputs found in SignatureDef: inputs "):
        protocol.refuse_examples("classify", {"examples": [{}]}, signatures)
    with pytest.raises(RequestError, match=r"^Expected one output Tensor\.$"):
        protocol.refuse_examples("regress", {"examples": [{}]}, signatures)
