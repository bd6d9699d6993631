"""YAML as people write settings: the values that JSON has, bounded in size, depth and what aliases stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from loda.reading.plain import DEPTH, DOCUMENT_BYTES, ReadingError, read_bytes

NODES = 100_000  # values in a document, what an alias stands for counted at each of its uses
_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))
_MERGE = "tag:yaml.org,2002:merge"
_LARGEST = 2**128


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain values only, with bounds and without dates and binaries.

    Few lines of aliases can stand for billions of values ("billion laughs"): a node's weight is that of all it stands
    for, and is bounded before any value is built.
    """

    # A date in a setting is a text: nothing here has dates, and 2026-02-30 would be no YAML.
    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own form
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, content: bytes | str) -> None:
        super().__init__(content)
        self._depth = 0
        self._weights: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth > DEPTH:
            raise ReadingError(f"nested deeper than {DEPTH} levels")
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        try:
            node: Any = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        if id(node) not in self._weights:
            if alias:  # its node is still open
                raise ReadingError(f"line {node.start_mark.line + 1}: an alias stands for what it is a part of")
            self._weigh(node)
            if len(self._weights) > NODES:
                raise ReadingError(f"more than {NODES:,} values")
        return node

    def _weigh(self, node: yaml.Node) -> None:
        if node.tag not in _TAGS and node.tag != _MERGE:
            tag = node.tag.removeprefix("tag:yaml.org,2002:")
            raise ReadingError(
                f"line {node.start_mark.line + 1}: the tag {tag[:80]!r} is not taken; expected plain values "
                "(texts, numbers, true, false, null, lists, mappings)"
            )
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        weight = 1 + sum(self._weights[id(child)] for child in children)
        if weight > NODES:
            raise ReadingError(f"line {node.start_mark.line + 1}: stands for more than {NODES:,} values, with aliases")
        self._weights[id(node)] = weight

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = str(self.construct_scalar(node))
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ReadingError(f"line {node.start_mark.line + 1}: a text with half a character (\\ud800)") from None
        return text

    def construct_number(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > 130:  # base 2, with its sign and 0b
            raise ReadingError(f"line {node.start_mark.line + 1}: a whole number of {len(node.value)} digits")
        value = int(self.construct_yaml_int(node))
        if abs(value) >= _LARGEST:
            raise ReadingError(f"line {node.start_mark.line + 1}: a whole number of more than 128 bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)


def parse_yaml(content: bytes | str) -> Any:
    """The value of a YAML document; None for an empty one. JSON is YAML, too.

    Dates stay texts. Aliases and ``<<`` are taken as long as all that they stand for is at most 100,000 values.

    Raises:
        ReadingError: not YAML or not UTF-8, a tag that asks for an object, more than 1 MiB, nested deeper than 64
            levels, too many values, or a whole number of more than 128 bits.
    """
    if len(content) > DOCUMENT_BYTES:
        raise ReadingError(f"{len(content):,} bytes, expected at most {DOCUMENT_BYTES:,}")
    try:
        loader = _Loader(content)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except ReadingError:
        raise
    except (yaml.YAMLError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
        # PyYAML's own errors, and what its constructors raise on "!!bool maybe", 0x and the like
        raise ReadingError(f"not valid YAML: {error}") from error


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file; raises as :func:`loda.reading.read_bytes` and :func:`parse_yaml`."""
    return parse_yaml(read_bytes(path, DOCUMENT_BYTES))
