"""The wire protocol: every message survives its round trip, and nothing else is ever a message."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl import messages
from minisgl.messages import (
    MESSAGE_TYPES,
    PROTOCOL_VERSION,
    AbortNamed,
    AbortRequest,
    CacheFlushed,
    DeltaBatch,
    DetokenizeRequest,
    Dispatched,
    Drain,
    Failed,
    FinishReason,
    FlushCache,
    GenerateRequest,
    Health,
    Heartbeat,
    Hello,
    Logprobs,
    MalformedMessage,
    Message,
    Opening,
    Progress,
    Ready,
    RequestError,
    Shutdown,
    StreamOpen,
    TextAnswer,
    TokenBatch,
    TokenizedRequest,
    TokenizeRequest,
    WorkerDown,
    WorkerUp,
    decode,
    encode,
    http_worker_of,
    make_request_id,
)
from minisgl.sampling_params import Grammar, SamplingParams

PACKAGE = Path(messages.__file__).parent

int32 = st.integers(-(2**31), 2**31 - 1)
int64 = st.integers(-(2**63), 2**63 - 1)
text = st.text(max_size=20)
stamps = st.lists(int64, max_size=11)
floats = st.floats(allow_nan=False)
json_values = st.recursive(
    st.none() | st.booleans() | int64 | floats | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
json_objects = st.dictionaries(text, json_values, max_size=4)
finishes = st.sampled_from(FinishReason)
sampling = st.builds(
    SamplingParams,
    max_new_tokens=st.none() | int64,
    temperature=floats,
    top_k=int64,
    top_p=floats,
    min_p=floats,
    seed=st.none() | int64,
    min_new_tokens=int64,
    ignore_eos=st.booleans(),
    stop=st.lists(text, max_size=3).map(tuple),
    stop_token_ids=st.lists(int64, max_size=3).map(tuple),
    skip_special_tokens=st.booleans(),
    no_stop_trim=st.booleans(),
    frequency_penalty=floats,
    presence_penalty=floats,
    repetition_penalty=floats,
    logit_bias=st.lists(st.tuples(int64, floats), max_size=3).map(tuple),
    grammar=st.none() | st.builds(Grammar, text, text),
    logprobs=st.none() | int64,
    prompt_logprobs_from=st.none() | int64,
)
prompts = text | st.lists(int32, max_size=8) | st.lists(json_objects, min_size=1, max_size=3)
stream_opens = st.builds(
    StreamOpen, int64, int64, int64, st.lists(text, max_size=3), st.booleans(), st.booleans(), stamps, int64
)
float32 = st.floats(allow_nan=False, width=32)


@st.composite
def logprobs(draw: st.DrawFn, rows: int) -> Logprobs:
    count, top = draw(st.integers(0, 3)), draw(st.integers(0, 2))
    return Logprobs(
        draw(st.integers(0, rows - 1)),
        draw(st.booleans()),
        *(
            draw(st.lists(kind, min_size=size, max_size=size))
            for size in (count, count * top)
            for kind in (int32, float32)
        ),
        draw(st.just([]) | st.lists(st.binary(max_size=4), min_size=count * (top + 1), max_size=count * (top + 1))),
    )


@st.composite
def token_batches(draw: st.DrawFn) -> TokenBatch:
    rows = draw(st.lists(st.tuples(int64, int32, finishes), max_size=6))
    return TokenBatch(
        *draw(st.tuples(int64, int64, int64, int64, int64)),
        draw(st.lists(stream_opens, max_size=3)),
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
        draw(st.lists(logprobs(len(rows)), max_size=2)) if rows else [],
    )


@st.composite
def delta_batches(draw: st.DrawFn) -> DeltaBatch:
    rows = draw(st.lists(st.tuples(int64, text, st.lists(int32, max_size=3), finishes), max_size=6))
    named = st.integers(0, max(0, len(rows) - 1))
    most = 3 if rows else 0
    return DeltaBatch(
        [row[0] for row in rows],
        [row[1] for row in rows],
        [len(row[2]) for row in rows],
        [token for row in rows for token in row[2]],
        [row[3] for row in rows],
        draw(st.lists(st.builds(Opening, named, int64, int64, stamps), max_size=most)),
        draw(st.dictionaries(named, int64 | text, max_size=most)),
        draw(stamps),
        draw(st.lists(logprobs(len(rows)), max_size=2)) if rows else [],
    )


BY_TYPE: dict[type[Any], st.SearchStrategy[Any]] = {
    GenerateRequest: st.builds(GenerateRequest, int64, prompts, sampling, stamps, json_objects),
    AbortRequest: st.builds(AbortRequest, int64),
    TokenizedRequest: st.builds(TokenizedRequest, int64, st.lists(int32, max_size=8), sampling, stamps),
    TokenBatch: token_batches(),
    DeltaBatch: delta_batches(),
    RequestError: st.builds(RequestError, int64, int64, text, text),
    Dispatched: st.builds(Dispatched, int64, int64, st.lists(int64, max_size=5)),
    TokenizeRequest: st.builds(
        TokenizeRequest, int64, text | st.lists(json_objects, max_size=3), json_objects, st.booleans()
    ),
    DetokenizeRequest: st.builds(DetokenizeRequest, int64, st.lists(int32, max_size=8), st.booleans()),
    TextAnswer: st.builds(TextAnswer, int64, text, st.lists(int32, max_size=8)),
    FlushCache: st.builds(FlushCache, int64),
    CacheFlushed: st.builds(CacheFlushed, int64, int64, st.booleans()),
    AbortNamed: st.builds(AbortNamed, text),
    Hello: st.builds(Hello, text, int64, int64, text),
    Progress: st.builds(Progress, text, int64, text, int64, int64),
    Ready: st.builds(Ready, text, int64, json_objects),
    Heartbeat: st.builds(Heartbeat, text, int64, int64, int64, st.booleans(), json_objects),
    Failed: st.builds(Failed, text, int64, text, text),
    WorkerUp: st.builds(WorkerUp, text, int64, text),
    WorkerDown: st.builds(WorkerDown, text, int64, text),
    Health: st.builds(Health, st.lists(text, max_size=3), json_objects, int64),
    Drain: st.builds(Drain),
    Shutdown: st.builds(Shutdown),
}
any_message: st.SearchStrategy[Message] = st.one_of(list(BY_TYPE.values()))

# Anything that msgpack can say, well beyond what the protocol uses.
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=24)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**33), st.integers(0, 10**9 - 1)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | st.binary(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def decode_or_refuse(frame: bytes) -> None:
    """Any exception but MalformedMessage fails the test; what is accepted can be sent on, unchanged."""
    try:
        message = decode(frame)
    except MalformedMessage:
        return
    again = encode(message)
    assert encode(decode(again)) == again


# ---- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message_type", MESSAGE_TYPES.values(), ids=lambda cls: cls.__name__)
def test_round_trip(message_type: type[Message]) -> None:
    @settings(max_examples=60)
    @given(BY_TYPE[message_type])
    def check(message: Message) -> None:
        back = decode(encode(message))
        assert type(back) is message_type and back == message

    check()


@given(st.integers(0, 127), st.integers(0, 2**16 - 1), st.integers(0, 2**40 - 1))
def test_a_request_id_names_its_http_worker(http_worker: int, epoch: int, counter: int) -> None:
    rid = make_request_id(http_worker, epoch, counter)
    assert 0 <= rid < 2**63
    assert http_worker_of(rid) == (http_worker, epoch)
    assert rid & 0xFF_FFFF_FFFF == counter


# ---- what is not a message ------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(frame: bytes) -> None:
    decode_or_refuse(frame)


@settings(max_examples=300)
@given(any_message, st.data())
def test_frames_with_flipped_cut_or_added_bytes_are_refused_or_harmless(message: Message, data: st.DataObject) -> None:
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "add"])):
            case "flip":
                frame[at] ^= data.draw(st.integers(1, 255))
            case "cut" if len(frame) > 1:
                del frame[at:]
            case _:
                frame[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        if not frame:
            break
    decode_or_refuse(bytes(frame))


@settings(max_examples=400)
@given(any_message, st.data())
def test_fields_of_another_kind_are_refused_or_harmless(message: Message, data: st.DataObject) -> None:
    values = msgpack.unpackb(encode(message))
    values[data.draw(st.integers(0, len(values) - 1))] = data.draw(anything)
    decode_or_refuse(msgpack.packb(values))


@settings(max_examples=200)
@given(st.sampled_from(sorted(MESSAGE_TYPES)), st.lists(anything, max_size=13))
def test_the_right_type_with_any_fields_is_refused_or_harmless(type_id: int, fields: list[Any]) -> None:
    decode_or_refuse(msgpack.packb([type_id, PROTOCOL_VERSION, *fields]))


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        msgpack.packb({}),
        msgpack.packb([]),
        msgpack.packb([AbortRequest.TYPE]),
        msgpack.packb([AbortRequest.TYPE, PROTOCOL_VERSION]),
        msgpack.packb([AbortRequest.TYPE, PROTOCOL_VERSION, 1, 2]),
        msgpack.packb([AbortRequest.TYPE, PROTOCOL_VERSION + 1, 1]),
        msgpack.packb([AbortRequest.TYPE, PROTOCOL_VERSION, True]),
        msgpack.packb([AbortRequest.TYPE, PROTOCOL_VERSION, 2**63]),
        msgpack.packb([AbortRequest.TYPE, PROTOCOL_VERSION, "1"]),
        msgpack.packb([True, PROTOCOL_VERSION, 1]),
        msgpack.packb([99, PROTOCOL_VERSION, 1]),
        msgpack.packb([AbortRequest.TYPE, PROTOCOL_VERSION, msgpack.ExtType(5, b"x")]),
        msgpack.packb([Ready.TYPE, PROTOCOL_VERSION, "a", 1, {1: 2}]),
        encode(AbortRequest(1)) + b"\x00",
        encode(TokenBatch(0, 1, 1, 0, 0, [], [1], [2], [FinishReason.NONE]))[:-1] + b"\x09",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ],
)
def test_known_bad_frames(frame: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(frame)


def test_rows_must_agree() -> None:
    batch = DeltaBatch([1], ["a"], [1], [5], [FinishReason.NONE], [Opening(0, 1, 0, [])], {0: 5})
    assert decode(encode(batch)) == batch
    for change in (
        {"texts": []},
        {"token_counts": [2]},
        {"token_counts": [-1], "token_ids": []},
        {"openings": [Opening(1, 1, 0, [])]},
        {"matched": {-1: 5}},
        {"logprobs": [Logprobs(1, False, [5], [-0.5])]},
        {"logprobs": [Logprobs(0, False, [5], [])]},
        {"logprobs": [Logprobs(0, False, [5, 6], [-0.5, -0.25], [5, 6, 7], [0.0, 0.0, 0.0])]},
        {"logprobs": [Logprobs(0, False, [5], [-0.5], [], [], [b"a", b"b"])]},
    ):
        with pytest.raises(MalformedMessage):
            decode(encode(dataclasses.replace(batch, **change)))


# ---- the set is closed ----------------------------------------------------------------------------------------------


def test_the_type_table_is_closed() -> None:
    defined = {cls for cls in vars(messages).values() if dataclasses.is_dataclass(cls) and hasattr(cls, "TYPE")}
    assert set(MESSAGE_TYPES.values()) == defined == set(get_args(Message)) == set(BY_TYPE)
    assert all(type_id == cls.TYPE for type_id, cls in MESSAGE_TYPES.items())


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {"recv_pyobj", "send_pyobj", "recv_serialized", "send_serialized"}


def dangers(tree: ast.AST) -> list[str]:
    """The ways to run code out of data that a module contains."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found += [name.name for name in names if name.name.split(".")[0] in FORBIDDEN_MODULES]
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                found.append(module)
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                found.append(name)
            case ast.Attribute(attr=name) if name in FORBIDDEN_ATTRIBUTES:
                found.append(name)
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                found.append("torch.load")
            case ast.keyword(arg="trust_remote_code", value=ast.Constant(value=True)):
                found.append("trust_remote_code=True")
    return found


def test_the_scan_finds_what_it_looks_for() -> None:
    source = (
        "import pickle\nfrom dill import loads\neval('1')\nsock.recv_pyobj()\ntorch.load(f)\nf(trust_remote_code=True)"
    )
    assert len(dangers(ast.parse(source))) == 6
    assert not dangers(ast.parse("model.eval()\nre.compile('x')\njson.load(f)\nf(trust_remote_code=flag)"))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_in_the_package_runs_code_out_of_data(path: Path) -> None:
    assert not dangers(ast.parse(path.read_text(encoding="utf-8")))


LIGHT_MODULES = {
    "http": "minisgl.http.main",
    "tokenizer": "minisgl.tokenizer_proc.main",
    "detokenizer": "minisgl.detokenizer_proc.main",
    "launcher": "minisgl.serve",
    "worker": "minisgl.worker",
}


@pytest.mark.parametrize("module", LIGHT_MODULES.values(), ids=LIGHT_MODULES.keys())
def test_the_light_processes_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
