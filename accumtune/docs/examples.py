"""For mkdocstrings: the `Example:` of a docstring, written as in Keras, becomes a block of code."""

import re
from typing import Any

import griffe

# A heading, an empty line, and what stands below it up to the next empty line.
_EXAMPLE = re.compile(r"^Example:\n\n(?P<code>>>> .+?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


class KerasExamples(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = obj.docstring.value.replace("  # doctest: +SKIP", "")
            obj.docstring.value = _EXAMPLE.sub(r"Example:\n\n```pycon\n\g<code>\n```", text)
