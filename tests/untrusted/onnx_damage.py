"""Random changes to an ONNX model, field by field: what bytes flipped at random rarely reach, since protobuf refuses them."""

from __future__ import annotations

import random

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from onnx import ModelProto

INTEGERS = [-1, 0, 1, 2, 3, 7, 16, 17, 2**31 - 1, 2**31, 2**40, 2**62, -(2**31), -(2**62)]
TEXTS = [
    "", "x", "..", "../secret", "/etc/passwd", "moee.data", "dense.data", "link", "a\\b", "moee", "ai.onnx", "com.example",
    "MoeeFfn", "Loop", "If", "Add", "offset", "length", "location", "16", "-16", "1_6", " 16", "*/_ORT_MEM_ADDR_/*", "y" * 3000,
]  # fmt: skip


def parts(message: Message) -> list[Message]:
    """A message and all that it holds."""
    found = [message]
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                found += parts(inner)
    return found


def change(model: ModelProto, seed: int, changes: int) -> ModelProto:
    """A copy with `changes` fields set, removed, doubled or moved."""
    source = random.Random(seed)
    result = ModelProto()
    result.CopyFrom(model)
    for _ in range(changes):
        message = source.choice(parts(result))
        fields = [field for field, _ in message.ListFields()] if source.random() < 0.8 else list(message.DESCRIPTOR.fields)
        if fields:
            _change(message, source.choice(fields), source)
    return result


def _change(message: Message, field: FieldDescriptor, source: random.Random) -> None:
    value = getattr(message, field.name)
    if field.is_repeated:
        place, what = source.randrange(len(value)) if len(value) else 0, source.randrange(4)
        if what == 0 and len(value):
            del value[place]
        elif field.message_type is not None:
            new = value.add()
            if len(value) > 1 and what == 1:
                new.CopyFrom(value[place])
        elif what == 1 and len(value):
            value.append(value[place])
        else:
            value.append(_scalar(field, source))
    elif field.message_type is not None:
        message.ClearField(field.name) if source.random() < 0.5 else value.SetInParent()
    elif source.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, source))


def _scalar(field: FieldDescriptor, source: random.Random):
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        text = source.choice(TEXTS)
        return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    if field.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return source.choice([0.0, -1.0, float("nan"), float("inf"), 1e38])
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return source.choice(field.enum_type.values).number
    bits = 31 if field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 63
    value = source.choice([i for i in INTEGERS if -(2**bits) <= i < 2**bits])
    unsigned = field.cpp_type in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64)
    return abs(value) if unsigned else value
