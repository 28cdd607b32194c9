"""Damage to valid files: seeded changes of bytes, of JSON values and of the headers of safetensors files."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml
from safetensors.torch import load, save


DEPTH = 100_000
DIGITS = "9" * 5_000
# Texts that json.dumps does not write; they replace the marked strings in its result.
RAW = {
    "@deep-list@": "[" * DEPTH + "]" * DEPTH,
    "@deep-dict@": '{"a":' * DEPTH + "0" + "}" * DEPTH,
    "@digits@": DIGITS,
    "@many@": "[" + "0," * 20_000 + "0]",
    "@float@": "1e999",
}
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 0.5, -0.5, 1.5, float("nan"), float("inf"), 2**31, 2**63, 10**30, 10**400),
    *("", "x", "0.5", "x" * 2_000, "../../outside", "\u0000", "\ud800", "[x](http://x)", "true"),
    *([], {}, [[]], [None], ["x"], [0.5], [-1, 2], {"": None}, {"x": {"x": []}}, [["x", 1], ["x", 2]]),
    *RAW,
)


def to_text(value: Any) -> str:
    """JSON, with the texts of `RAW` in place of their marks."""
    text = json.dumps(value, indent=1)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def mutate_json(value: Any, chance: random.Random) -> str:
    """The text of a JSON value in which one or two values are replaced, removed, repeated or renamed."""
    root = [value]
    for _ in range(chance.choice((1, 1, 2))):
        container, key = chance.choice(list(places(root)))
        action = chance.random()
        if action < 0.6 or container is root:
            container[key] = copy.deepcopy(chance.choice(VALUES))
        elif action < 0.8:
            del container[key]
        elif isinstance(container, dict):
            container[chance.choice(("x", "", "@", f"{key} ", *container))] = container.pop(key)
        else:
            container.insert(0, copy.deepcopy(container[key]))
    text = to_text(root[0])
    return repeat_a_key(text, chance) if chance.random() < 0.1 else text


def repeat_a_key(text: str, chance: random.Random) -> str:
    lines = text.splitlines()
    line = chance.randrange(len(lines))
    return "\n".join([*lines[:line], lines[line], *lines[line:]])


def mutate_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes that are cut, changed, repeated or added."""
    position = chance.randrange(len(data))
    junk = chance.randbytes(chance.choice((1, 4, 100)))
    return chance.choice(
        (
            lambda: b"",
            lambda: data[:position],
            lambda: data[position:],
            lambda: data[:position] + junk + data[position:],
            lambda: data[:position] + junk + data[position + len(junk) :],
            lambda: data + junk,
            lambda: data[:position] + data[position : position + 50] * 3 + data[position + 50 :],
            lambda: bytes(chance.randrange(256) if chance.random() < 0.01 else byte for byte in data),
        )
    )()


def mutate_json_file(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.25:
        return mutate_bytes(data, chance)
    return mutate_json(json.loads(data), chance).encode("utf-8", errors="surrogatepass")


def mutate_recipe(data: bytes, chance: random.Random) -> bytes:
    """A recipe of YAML, given as JSON, which YAML includes; some have anchors."""
    text = mutate_json_file(data, chance)
    if chance.random() < 0.2:
        levels = chance.choice((2, 30))
        bomb = [f"a{level}: &a{level} [{f'*a{level - 1},' * 9 if level else '0'}]" for level in range(levels)]
        merged = [f"m{level}: &m{level} {{<<: [{f'*m{level - 1},' * 9}]}}" for level in range(1, levels)]
        lines = chance.choice((bomb, ["m0: &m0 {x: 0}", *merged], ["a: &a [*a]"], ["a: &a {b: *a}"], ["a: *b"]))
        text = "\n".join(lines).encode()
    return text


def mutate_readme(data: bytes, chance: random.Random) -> bytes:
    """A model card with damaged metadata or text."""
    _, header, text = data.decode().split("---\n", maxsplit=2)
    if chance.random() < 0.3:
        return mutate_bytes(data, chance)
    values = json.dumps(yaml.safe_load(header)).encode()
    return b"---\n" + mutate_recipe(values, chance) + b"\n---\n" + text.encode()


Seal = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def mutate_tensor_file(key: str | None = None, seal: Seal | None = None) -> Callable[[bytes, random.Random], bytes]:
    """Returns a mutation of a safetensors file: of its header, of its tensors, or of JSON values in its metadata.

    Args:
        key: of the JSON values in the metadata; None if there are none.
        seal: makes the changed JSON values look whole, as by a new checksum.
    """

    def mutate(data: bytes, chance: random.Random) -> bytes:
        action = chance.random()
        if action < 0.25:
            return mutate_bytes(data, chance)
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        if action < 0.5 or key is None:
            text = mutate_json(header, chance).encode("utf-8", errors="surrogatepass")
            length = chance.choice((len(text), len(text), len(text), 2**63, len(text) - 1))
            return struct.pack("<Q", length) + text + data[8 + size :]
        tensors, values = load(data), json.loads(header["__metadata__"][key])
        if action < 0.6 and tensors:
            name = chance.choice(sorted(tensors))
            tensors[name] = damage_tensor(tensors[name], chance)
        text = mutate_json(values, chance)
        if seal is not None and chance.random() < 0.8:
            try:
                values = json.loads(text)
                seal(tensors, values)
                text = json.dumps(values)
            except (ValueError, TypeError, AttributeError, RecursionError):
                pass  # nothing that could have a checksum
        return save(tensors, {"format": "pt", key: text.encode("utf-8", errors="replace").decode()})

    return mutate


def damage_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return chance.choice(
        (
            lambda: flat.clone(),
            lambda: flat[: len(flat) // 2].clone(),
            lambda: torch.zeros_like(tensor),
            lambda: torch.full_like(tensor, 77),
            lambda: tensor.to(torch.float64),
            lambda: torch.full(tensor.shape, float("nan")),
            lambda: tensor.new_zeros(0),
        )
    )()
