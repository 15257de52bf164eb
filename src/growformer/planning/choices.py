"""What a request may choose beside sizes: recipes that are exact as well, and that no size asks for by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from growformer.errors import RequestError

TOKENS: Mapping[str, str] = {
    "open": "new tokens take part in the softmax: old logits are exact, and probabilities learn of the new tokens",
    "closed": "new tokens have probability zero, so that old probabilities are exact too",
}
"""What new tokens are to the softmax over the vocabulary."""

ROPES: Mapping[str, str] = {
    "theta": "pair i stays pair i, rope_theta becomes theta^(n'/n): any even size, served right everywhere",
    "strided": "pair i becomes pair m i, rope_theta stays: whole multiples m",
    "longrope": "pair i stays pair i, every frequency is written in a list: any even size",
    "proportional": "pair i stays pair i, new pairs do not turn: any even size",
}
"""Where the pairs of a rotary head go when it gets wider, and what config.json says of their frequencies."""

SAME: Mapping[str, str] = {
    "refused": "a request for the source's own sizes is a mistake",
    "planned": "it is a growth by nothing, a control",
}
"""What a request is that changes no size."""


@dataclass(frozen=True)
class Choices:
    """The recipes of one request.

    Attributes:
        rope: one of `ROPES`.
        new_tokens: one of `TOKENS`.
        same: one of `SAME`.

    Raises:
        RequestError: another word.
    """

    rope: str = field(default="theta", metadata={"words": ROPES})
    new_tokens: str = field(default="open", metadata={"words": TOKENS})
    same: str = field(default="refused", metadata={"words": SAME})

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            words, found = one.metadata["words"], getattr(self, one.name)
            if found not in words:
                said = "; ".join(f"{word}: {what}" for word, what in words.items())
                raise RequestError(f"{one.name}={found!r} is unknown; there are {', '.join(words)} ({said})")

    def to_json(self) -> dict[str, Any]:
        """Plain data; what stands at its default is left out."""
        return {
            one.name: found for one in dataclasses.fields(self) if (found := getattr(self, one.name)) != one.default
        }
