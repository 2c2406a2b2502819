"""The JSON body of a request to predict as arrays: rows of `instances`, columns of `inputs`.

See https://www.tensorflow.org/tfx/serving/api_rest. What is long is read in a process of its own,
see `json_workers`; so this module imports neither TensorFlow nor gRPC.

Long arrays of numbers, which are most of a long body, never become Python objects: the body is
searched for them once, simdjson turns them into arrays piece by piece, and Python's own parser gets
a body in which `NaN` stands in their places.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import simdjson

DEFAULT_SIGNATURE = "serving_default"
BASE64 = "b64"

_SHOWN = 80  # Characters of a wrong value in a message
_BLOCK_BYTES = 1000  # Shorter arrays are left to Python's parser
_PIECE_BYTES = 1 << 18  # What simdjson is given at a time: it takes 12 times as much memory
_MAX_TOKENS = 1_000_000  # In a body of more, there is little that is long
_MAX_RANK = 32  # NumPy's limit
_NUMBER = b"0123456789.eE+- \n\r\t"
_BLANK = bytes.maketrans(b"[]", b"  ")
# Strings are matched to be passed over, the last group because such a body is left as it is.
_TOKENS = re.compile(
    rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]0-9 \n\r\t.,eE+-]+|(NaN|Infinity)', re.DOTALL
)

_EXCERPT = reprlib.Repr()
_EXCERPT.maxstring = _EXCERPT.maxlong = _EXCERPT.maxother = _SHOWN
_EXCERPT.maxlist = _EXCERPT.maxdict = 8


class JsonError(ValueError):
    """A body that cannot be predicted from.

    Attributes:
      code: Name of a canonical status code.
    """

    def __init__(self, message: str, code: str = "INVALID_ARGUMENT"):
        super().__init__(message)
        self.code = code


class Kind(NamedTuple):
    """The type of an input.

    Attributes:
      dtype: NumPy's name, `object` for strings; empty: it cannot be sent.
      name: TensorFlow's name.
    """

    dtype: str
    name: str


Signatures = Mapping[str, Mapping[str, Kind]]


class Inputs(NamedTuple):
    """What a body asks for.

    Attributes:
      signature: Name of one of the signatures.
      by_row: Whether it had `instances`.
      arrays: For each input of the signature, of its type; shapes are as sent.
    """

    signature: str
    by_row: bool
    arrays: dict[str, np.ndarray]


class _Block:
    """A regular array of numbers in the body, not read yet."""

    def __init__(self, body: bytes, begin: int, end: int, shape: tuple[int, ...]):
        self._body, self._begin, self._end = body, begin, end
        self.shape = shape

    def __repr__(self) -> str:
        return self._body[self._begin : min(self._end, self._begin + _SHOWN + 1)].decode()

    def to_lists(self) -> Any:
        """As Python's parser has it; for what simdjson refuses, and for its words."""
        return _load(self._body[self._begin : self._end])

    def fill(self, array: np.ndarray) -> bool:
        """Reads the numbers into an array of this shape; False: simdjson cannot.

        Raises:
          TypeError: They are not of the array's type.
        """
        flat = array.reshape(-1)
        if not flat.size:
            return True
        integers = array.dtype.kind in "iu"
        kind = ("u" if array.dtype == np.uint64 else "i") if integers else "d"
        wide = {"u": np.uint64, "i": np.int64, "d": np.float64}[kind]
        parser, at = simdjson.Parser(), 0
        for piece in self._pieces():
            try:
                values = np.frombuffer(_numbers(parser, piece, kind), wide)
            except (ValueError, TypeError, RuntimeError):
                if integers and _are_numbers(parser, piece):
                    raise TypeError from None
                return False
            if integers and values.size:
                bounds = np.iinfo(array.dtype)
                if values.min() < bounds.min or values.max() > bounds.max:
                    raise TypeError
            if at + values.size > flat.size:
                return False
            with np.errstate(over="ignore"):
                flat[at : at + values.size] = values
            at += values.size
        return at == flat.size

    def _pieces(self) -> Iterator[bytes]:
        """JSON arrays of numbers without further brackets."""
        begin = self._begin
        while begin < self._end:
            end = self._body.find(b",", begin + _PIECE_BYTES, self._end)
            end = self._end if end < 0 else end
            yield b"[%b]" % self._body[begin:end].translate(_BLANK)
            begin = end + 1


def _numbers(parser: Any, piece: bytes, kind: str) -> bytes:
    """The numbers in a JSON array as 64 bits each: signed, unsigned or floating."""
    return parser.parse(piece).as_buffer(of_type=kind)


def _are_numbers(parser: simdjson.Parser, piece: bytes) -> bool:
    try:
        _numbers(parser, piece, "d")
    except (ValueError, TypeError, RuntimeError):
        return False
    return True


def parse(body: bytes, signatures: Signatures, max_bytes: int) -> Inputs:
    """Parses the body of a request to predict.

    Args:
      body: Of the request.
      signatures: Of the model, with types of their inputs.
      max_bytes: What an input may take once it is unpacked.

    Raises:
      JsonError: It is not such a request, or does not fit the signature.
    """
    rest, blocks = _cut(body)
    document = _load(rest, blocks)
    if not isinstance(document, dict):
        raise JsonError(f"JSON Value: {_show(document)} Is not object")
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise JsonError(
            f"JSON Value: {_show(document)} not formatted correctly. "
            "'signature_name' key must be a string value."
        )
    name = name or DEFAULT_SIGNATURE
    if name not in signatures:
        raise JsonError(f'Serving signature key "{name}" not found.', "FAILED_PRECONDITION")
    has_booleans = b"true" in rest or b"false" in rest
    reader = _Reader(signatures, name, max_bytes, bool(blocks), has_booleans)
    return Inputs(name, "instances" in document, reader.read(document))


def _load(text: bytes, blocks: Sequence[_Block] = ()) -> Any:
    """Parses JSON in which NaN stands for blocks, if there are any."""
    if not text:
        raise JsonError("JSON Parse error: The document is empty")
    following = iter(blocks)
    hooks: dict[str, Any] = {"parse_constant": lambda _: next(following)} if blocks else {}
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        raise JsonError("JSON Parse error: nested too deeply") from None
    except ValueError as error:  # Also text that is not UTF-8, and numbers of thousands of digits
        raise JsonError(f"JSON Parse error: {error}") from None


def _cut(body: bytes) -> tuple[bytes, list[_Block]]:
    """Takes long arrays out of a body: what is left, with NaN for each of them."""
    kept, blocks, done = [], [], 0
    if len(body) < _BLOCK_BYTES:
        return body, []
    for count, match in enumerate(_TOKENS.finditer(body)):
        begin, end = match.span()
        if match[1] or count == _MAX_TOKENS:
            return body, []
        if end - begin < _BLOCK_BYTES or body[begin] == ord('"'):
            continue
        begin, end = body.find(b"[", begin, end), body.rfind(b"]", begin, end) + 1
        shape = _find_shape(body, begin, end) if 0 <= begin < end else None
        if shape is not None:
            kept += [body[done:begin], b"NaN"]
            blocks.append(_Block(body, begin, end, shape))
            done = end
    return (b"".join([*kept, body[done:]]) if blocks else body), blocks


def _find_shape(body: bytes, begin: int, end: int) -> tuple[int, ...] | None:
    """The shape of a nested list of numbers; None if it is none, or rows differ."""
    nesting = b"".join(
        body[at : min(at + _PIECE_BYTES, end)].translate(None, _NUMBER)
        for at in range(begin, end, _PIECE_BYTES)
    )
    rank = len(nesting) - len(nesting.lstrip(b"["))
    if rank > _MAX_RANK:
        return None
    shape: list[int] = []
    expected, size = b"", 0
    for depth in range(1, rank + 1):
        # The first list of this depth ends at as many brackets.
        length = nesting.find(b"]" * depth) + depth - (rank - depth)
        count, excess = divmod(length - 1, size + 1)
        if excess or count < 1 or length > len(nesting):
            return None
        expected = b"[%b%b]" % ((expected + b",") * (count - 1), expected)
        size = length
        shape.insert(0, count)
    if expected != nesting:
        return None
    first = body[body.find(b"[", begin) : body.find(b"]", begin)].strip(b"[ \n\r\t")
    if not first:  # Brackets alone: nothing in the innermost lists, if nothing is in any
        if shape[-1] > 1 or body[begin:end].translate(None, b"[], \n\r\t"):
            return None
        shape[-1] = 0
    return tuple(shape)


class _Reader:
    """Makes arrays of a document's values."""

    def __init__(
        self,
        signatures: Signatures,
        name: str,
        max_bytes: int,
        has_blocks: bool,
        has_booleans: bool,
    ):
        self._signatures = signatures
        self._kinds = signatures[name]
        self._max_bytes = max_bytes
        self._has_blocks = has_blocks
        self._has_booleans = has_booleans

    def read(self, document: Mapping[str, Any]) -> dict[str, np.ndarray]:
        if ("instances" in document) == ("inputs" in document):
            raise JsonError(
                "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to "
                "exist"
                if "inputs" in document
                else "Missing 'inputs' or 'instances' key"
            )
        if "inputs" in document:
            columns = self._columns(document["inputs"])
        else:
            columns = self._rows(document["instances"])
        for name in self._kinds:
            if name not in columns:
                raise JsonError(
                    f"Missing named input: {name} in 'inputs' object.{self._other(columns)}"
                )
        for name in columns:
            if name not in self._kinds:
                raise JsonError(f"JSON object: does not have named input: {name}")
        return {name: self._array(name, columns[name]) for name in self._kinds}

    def _columns(self, columns: Any) -> Mapping[str, Any]:
        single = len(self._kinds) == 1
        if isinstance(columns, dict) and not (single and _is_base64(columns)):
            return columns
        if not single:
            raise JsonError(
                "inputs is a plain value/list, but expecting an object as multiple input tensors "
                "required as per tensorinfo_map"
            )
        return dict.fromkeys(self._kinds, columns)

    def _rows(self, instances: Any) -> Mapping[str, Any]:
        if not isinstance(instances, (list, _Block)):
            raise JsonError("Expecting 'instances' to be an list/array")
        if not (instances.shape[0] if isinstance(instances, _Block) else instances):
            raise JsonError("No values in 'instances' array")
        named = isinstance(instances, list) and _is_named(instances[0])
        if not named and len(self._kinds) != 1:
            raise JsonError(
                "instances is a plain list, but expecting list of objects as multiple input "
                "tensors required as per tensorinfo_map"
            )
        if not named:
            return dict.fromkeys(self._kinds, instances)
        assert isinstance(instances, list)
        for index, item in enumerate(instances):
            if not isinstance(item, dict):
                raise JsonError(f"Expecting object but got list at item {index} of input list")
            if item.keys() != self._kinds.keys():
                raise JsonError(
                    f"Failed to process element: {index} of 'instances' list. JSON object: "
                    f"{_show(item)} keys must be equal to: {','.join(self._kinds)}"
                    f"{self._other(item)}"
                )
        return {name: [item[name] for item in instances] for name in self._kinds}

    def _other(self, names: Mapping[str, Any]) -> str:
        """Which signature takes such inputs, for a message."""
        for name, kinds in self._signatures.items():
            if kinds.keys() == names.keys():
                return f' (those of the signature {name}: give "signature_name": "{name}")'
        return ""

    def _array(self, name: str, value: Any) -> np.ndarray:
        kind = self._kinds[name]
        if not kind.dtype:
            raise JsonError(f"input {name!r}: tensors of {kind.name} cannot be read")
        try:
            if kind.dtype == "object":
                array = self._strings(value)
            else:
                array = self._numbers(name, value, kind)
        except (RecursionError, OverflowError):
            array = None
        if array is None:
            raise JsonError(f"input {name!r}: Encountered list at unexpected size: rows differ")
        self._check_size(name, array.shape, array.dtype.itemsize)
        return array

    def _check_size(self, name: str, shape: Sequence[int], itemsize: int) -> None:
        size = math.prod(shape) * itemsize
        if size > self._max_bytes:
            raise JsonError(
                f"input {name!r}: the shape {list(shape)} takes {size} bytes, more than the "
                f"{self._max_bytes} that are allowed"
            )

    def _numbers(self, name: str, value: Any, kind: Kind) -> np.ndarray | None:
        dtype = np.dtype(kind.dtype)
        if self._has_blocks and dtype.kind in "iuf":
            blocks = value if isinstance(value, list) else [value]
            if blocks and all(isinstance(block, _Block) for block in blocks):
                shape = blocks[0].shape
                if any(block.shape != shape for block in blocks):
                    return None
                self._check_size(name, (len(blocks), *shape), dtype.itemsize)
                array = np.empty((len(blocks), *shape), dtype)
                try:
                    if all(block.fill(row) for block, row in zip(blocks, array)):
                        return array if isinstance(value, list) else array[0]
                except TypeError:
                    raise self._wrong_type(value, kind) from None
        if self._has_blocks:
            value = _expand(value)
        try:
            array = np.array(value)
        except ValueError:
            return None
        kinds = {"b": "b", "f": "iuf"}.get(dtype.kind, "iu")
        if array.size and array.dtype.kind not in kinds:
            raise self._wrong_type(value, kind)
        if self._has_booleans and dtype.kind != "b" and _has_boolean(value):
            raise self._wrong_type(value, kind)
        if array.size and dtype.kind in "iu":
            bounds = np.iinfo(dtype)
            if not bounds.min <= int(array.min()) <= int(array.max()) <= bounds.max:
                raise self._wrong_type(value, kind)
        with np.errstate(over="ignore"):
            return array.astype(dtype)

    def _strings(self, value: Any) -> np.ndarray | None:
        try:
            array = np.array(self._decode(value), np.object_)
        except ValueError as error:
            if isinstance(error, JsonError):
                raise
            return None
        return array if all(isinstance(item, bytes) for item in array.ravel()) else None

    def _decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decode(item) for item in value]
        if isinstance(value, str):
            return value.encode("utf-8", "surrogatepass")
        if not _is_base64(value):
            raise self._wrong_type(value, Kind("object", "string"))
        try:
            return base64.b64decode(value[BASE64], validate=True)
        except (binascii.Error, ValueError):
            raise JsonError("Unable to base64 decode") from None

    def _wrong_type(self, value: Any, kind: Kind) -> JsonError:
        message = f"JSON Value: {_show(value)} is not of expected type: {kind.name}"
        item = value
        while isinstance(item, list) and item:
            item = item[0]
        if kind.dtype != "object" and _is_base64(item):
            # The most common mistake of all: encoded images for the signature that takes pixels.
            for name, kinds in self._signatures.items():
                if [each.dtype for each in kinds.values()] == ["object"]:
                    message += f'; encoded bytes go with "signature_name": "{name}"'
                    break
        return JsonError(message)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get(BASE64), str)


def _is_named(item: Any) -> bool:
    return isinstance(item, dict) and not _is_base64(item)


def _has_boolean(value: Any) -> bool:
    if isinstance(value, list):
        return any(_has_boolean(item) for item in value)
    return isinstance(value, bool)


def _expand(value: Any) -> Any:
    """Puts lists in the places of blocks."""
    if isinstance(value, list):
        return [_expand(item) for item in value]
    return value.to_lists() if isinstance(value, _Block) else value


def _show(value: Any) -> str:
    text = _EXCERPT.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
