"""Reads descriptions and captions: which words that the teacher knows about do they contain?

Whatever wrote them (the scene verbalizer, annotations, a captioning model), the same phrases count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
import re

from data_pipeline import commonsense


@dataclass(frozen=True)
class Clues:
  """What a description says of a region; "" and () where it is silent.

  noun: what it is. held: the thing in the hand. near: nouns it is next to, on, or with. side: left,
  right or middle of the picture.
  """

  noun: str = ""
  person: bool = False
  headwear: str = ""
  held: str = ""
  pose: str = ""
  near: tuple[str, ...] = ()
  side: str = ""


@dataclass(frozen=True)
class Setting:
  """What the captions say about the whole picture; "" when they do not."""

  place: str = ""
  weather: str = ""


def _any_of(phrases):
  """A pattern that finds whole phrases, the longest first, in the plural as well."""
  listed = "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))
  return re.compile(rf"\b({listed})(?:s|es)?\b")


_HEADWEAR = _any_of(commonsense.HEADWEAR)
_POSES = _any_of(commonsense.POSES)
_HELD = _any_of(set(commonsense.WHY) | set(commonsense.OBJECTS))
_NOUNS = _any_of(set(commonsense.OBJECTS) | commonsense.PERSON_WORDS)
_WEATHER = _any_of(commonsense.WEATHER_WORDS)
_PLACES = _any_of(commonsense.PLACE_WORDS)
_HOLDING = re.compile(r"\b(?:holding|carrying|holds|carries) (?:an?|the|his|her|their) (.*)")
_SIDE = re.compile(r"\b(left|right|middle)\b")
_NEXT_TO = re.compile(r"\b(?:next to|beside|with|on|riding) (.*)")


def _first(pattern, text):
  found = pattern.search(text)
  return found.group(1) if found else ""


def read_description(text: str) -> Clues:
  """The `Clues` in the description of one region, whoever wrote it."""
  text = text.lower()
  noun = _first(_NOUNS, text)
  person = noun in commonsense.PERSON_WORDS
  holding, beside = _HOLDING.search(text), _NEXT_TO.search(text)
  held = ""
  if holding:
    held = _first(_HELD, holding.group(1).split(",")[0])
  near = tuple(dict.fromkeys(_NOUNS.findall(beside.group(1)))) if beside else ()
  return Clues(
    noun=commonsense.PERSON if person else noun,
    person=person,
    headwear=_first(_HEADWEAR, text),
    held=held,
    pose=_first(_POSES, text),
    near=tuple(commonsense.PERSON if n in commonsense.PERSON_WORDS else n for n in near),
    side=_first(_SIDE, text),
  )


def read_captions(captions: Sequence[str]) -> Setting:
  """The `Setting` that the captions tell; the first word about place or weather counts."""
  text = " . ".join(captions).lower()
  return Setting(
    commonsense.PLACE_WORDS.get(_first(_PLACES, text), ""),
    commonsense.WEATHER_WORDS.get(_first(_WEATHER, text), ""),
  )
