"""What infra/ leaves to the shell that deploys: `{{ $NAME }}`, filled in without losing what stands.

A variable that is empty or not set here says nothing: where the server has a value, it stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.runtime.contract import StageError

SECRETS = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")
"""Kept in blocks, which the server encrypts; job templates refer to them."""
_NEEDED = ("ARRIVAL_URI", "ARRIVAL_RECIPE")
_AT_FIRST = {"ENGINERY_STACK": "enginery", "SCHEDULED_RECIPE": "tiny"}
_NAMED = re.compile(r"\{\{ \$(\w+) \}\}")


@dataclass
class Shell:
    """The variables of the shell that deploys, and what was found out about them while declarations were filled.

    Attributes:
        given: name -> value.
        kept: names without a value here whose value on the server stays.
        missing: names without which nothing can be deployed, and which neither this shell nor the server has.
    """

    given: Mapping[str, str]
    kept: set[str] = field(default_factory=set)
    missing: set[str] = field(default_factory=set)

    def fill(self, declared: Any, stands: Any = None) -> Any:
        """A declaration with values for its names; where one is not set here, the text that stands in that place."""
        if isinstance(declared, Mapping):
            there = stands if isinstance(stands, Mapping) else {}
            return {key: self.fill(value, there.get(key)) for key, value in declared.items()}
        if isinstance(declared, list):
            same = isinstance(stands, list) and len(stands) == len(declared)
            return [self.fill(one, stands[place] if same else None) for place, one in enumerate(declared)]
        return self._text(declared, stands) if isinstance(declared, str) else declared

    def check(self) -> None:
        """Refuse before anything is changed.

        Raises:
            StageError: variables are missing; it names all of them.
        """
        if self.missing:
            raise StageError(
                "nothing was deployed: the Prefect server has no value for these variables, and neither has this shell",
                measured=", ".join(sorted(self.missing)),
                remedy="Set all of them and deploy again.",
            )

    def kept_line(self) -> list[str]:
        """One line on what stays because this shell does not say it; none where nothing does."""
        return [f"not set here, and kept as they stand: {', '.join(sorted(self.kept))}"] if self.kept else []

    def _text(self, declared: str, stands: Any) -> str:
        names = set(_NAMED.findall(declared))
        unset = {name for name in names if name not in SECRETS and not self.given.get(name)}
        filled = _NAMED.sub(lambda found: self._value(found[1]), declared)
        if not unset or filled == stands:
            return filled
        if isinstance(stands, str) and stands:
            self.kept |= unset
            return stands
        self.missing |= unset & set(_NEEDED)
        return filled

    def _value(self, name: str) -> str:
        if name in SECRETS:
            return f"{{{{ prefect.blocks.secret.{block_name(name)} }}}}"
        return self.given.get(name) or _AT_FIRST.get(name, "")


def block_name(variable: str) -> str:
    """The block that holds a secret."""
    return f"enginery-{variable.lower().replace('_', '-')}"


def names_in(declared: Any) -> set[str]:
    """Every name that a declaration leaves to the shell."""
    return set(_NAMED.findall(str(declared)))
