"""What is found in a text that is not continued: a class, an entity, an answer, a choice.

It travels inside the registered model, as `engine` does.
"""

from __future__ import annotations

from dataclasses import dataclass

SEVERAL = "multi_label_classification"
"""`problem_type` of a classifier each of whose classes holds or not, whatever the others."""


@dataclass(frozen=True)
class Label:
    """A class and how likely it is; of a model with a single class, the number that it gives the text."""

    label: str
    score: float


@dataclass(frozen=True)
class Entity:
    """A part of a text, text[start:end], what it is and how likely."""

    label: str
    score: float
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Span:
    """An answer, context[start:end], and how likely it is; empty where there is none."""

    text: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class Choice:
    """A choice, its place among those of its question from 0 on, and how likely it is among these."""

    choice: int
    text: str
    score: float
