"""The problem of a study as its store has it: where it was, what it was made from, its keywords.

Results are read without it, and so without any code of a user. It is loaded to run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from esljax._checks import refuse
from esljax.experiment import Keyword, OutsideConfig, Problem, Source, content_of


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """A problem that is known by its record alone."""

    name: str
    place: str
    """Where it was; "" for an object that was given from Python."""
    content: str
    """A digest of what it is made from."""
    keywords: Mapping[str, Keyword]

    @staticmethod
    def of(content: Mapping[str, Any], where: str) -> "Recorded":
        """The problem of the description of a study.

        **Raises:** `InputError` if that is no such description.
        """
        name, place, digest = (content["problem"].get(key) for key in ("name", "place", "content"))
        if not all(isinstance(text, str) for text in (name, place, digest)):
            raise refuse("problem", f"be described in {where}", f"is {content['problem']!r}")
        base, grid = content.get("base", {}), content.get("grid", {})
        known = OutsideConfig.__dataclass_fields__
        keywords = {
            name: Keyword(_annotation(value), tuple(value) if isinstance(value, list) else value)
            for name, value in base.items()
            if name not in known
        }
        varying = {name: values for name, values in grid.items() if isinstance(values, list)}
        for point in content.get("points", ()):
            varying |= {name: [value] for name, value in point.items()}
        for key, values in (varying | {k: [0] for k in grid.keys() - varying.keys()}).items():
            if key not in known and key not in keywords:
                keywords[key] = Keyword(_annotation(values[0]) | None, None)
        return Recorded(name, place, digest, keywords)

    def __str__(self) -> str:
        return self.name

    def check(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, which were checked before they were recorded."""
        return dict(settings)

    @property
    def problem(self) -> Callable[..., Problem]:
        """What makes the problem, from where it was.

        **Raises:** `InputError` if it is not there any more.
        """
        return self.loaded().problem

    def loaded(self) -> Source:
        """The source of the problem.

        **Raises:** `InputError` if it was an object, or cannot be loaded.
        """
        if not self.place:
            raise refuse(
                "problem",
                "be given again to run a study of an object",
                f"is {self.name}, which was given from Python",
            )
        return Source.of(self.place)


def recorded(source: Any) -> dict[str, str]:
    """The record of a problem."""
    content = source.content if isinstance(source, Recorded) else content_of(source)
    return {"name": str(source), "place": source.place, "content": content}


def _annotation(value: Any) -> Any:
    if isinstance(value, list):
        return tuple[type(value[0]) if value else str, ...]
    return type(value)
