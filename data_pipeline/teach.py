"""The template teacher: writes statements from a verbalization, as a language model would.

It reads descriptions and captions (never the picture, never a scene graph), looks up what they
suggest in `commonsense`, and puts the conclusion into one of a few phrasings. If the words are
wrong, so are its statements. Every statement carries in `provenance` what it rests on:

    {"type": "role", "facts": [["role", 2, "chef"]], "rationale_facts": [["role", 2, "chef"]]}

A fact is [kind, region id, or None for the whole picture, value, or a list of values that will do].
"""

import dataclasses
from dataclasses import dataclass
import hashlib
import json

import numpy as np

from data_pipeline import commonsense
from data_pipeline.clues import Clues, Setting, read_captions, read_description
from data_pipeline.records import ImageRecord, Statement, Verbalization

TYPES = ("role", "why", "next", "feel", "relation")

# style -> (questions, answers, rationales); {0} and {1} are mentions, {a} the answer, {short} and
# {long} two ways to put the reason. All forms of a style carry the same key words.
FORMS = {
  "role": (
    ("what is the job of {0}?", "what does {0} work as?", "who is {0}?"),
    ("{a}", "{0} is {a}"),
    ("{short}", "{0} wears {long}"),
  ),
  "who": (
    ("who might {0} be?", "what is the role of {0}?", "who is {0}?"),
    ("{a}", "{0} is {a}"),
    ("{short} nearby", "{0} is next to {long}"),
  ),
  "why": (
    (
      "why does {0} hold that?",
      "what does {0} carry that for?",
      "what is {0} going to use that for?",
    ),
    ("{a}", "{0} wants {a}"),
    ("{short}", "{0} holds {long}"),
  ),
  "why there": (
    ("why is {0} there?", "what does {0} want there?", "what brings {0} there?"),
    ("{a}", "{0} wants {a}"),
    ("{short} nearby", "{0} is next to {long}"),
  ),
  "use": (
    ("what is {0} for?", "why would someone want {0}?", "what can {0} be used for?"),
    ("{a}", "it serves {a}"),
    ("it is {long}", "{0} is {long}"),
  ),
  "next": (
    ("what will {0} do next?", "what is {0} about to do?", "what does {0} do now?"),
    ("{a}", "{0} will {a}"),
    ("{short}", "{0} holds {long}"),
  ),
  "next there": (
    ("what will {0} do next?", "what is {0} about to do?", "what does {0} do now?"),
    ("{a}", "{0} will {a}"),
    ("{short} nearby", "{0} is next to {long}"),
  ),
  "next thing": (
    (
      "what will happen to {0} next?",
      "what comes next for {0}?",
      "what is about to happen to {0}?",
    ),
    ("{a}", "soon {a}"),
    ("it is {long}", "{0} is {long}"),
  ),
  "feel": (
    ("how does {0} feel?", "what is the mood of {0}?", "what does {0} feel like?"),
    ("{a}", "{0} feels {a}"),
    ("{short}", "{0} is {long}"),
  ),
  "feel there": (
    ("how does {0} feel?", "what is the mood of {0}?", "what does {0} feel like?"),
    ("{a}", "{0} feels {a}"),
    ("{short} nearby", "{0} is next to {long}"),
  ),
  "relation": (
    (
      "what does {0} do to {1}?",
      "how does {0} act towards {1}?",
      "what happens between {0} and {1}?",
    ),
    ("{a}", "{0} {a}"),
    ("{short}", "{0} is {long}"),
  ),
  "relation thing": (
    (
      "what does {0} do with {1}?",
      "what is {0} doing with {1}?",
      "what happens between {0} and {1}?",
    ),
    ("{a}", "{0} {a}"),
    ("{short}", "{0} is {long}"),
  ),
}


@dataclass(frozen=True)
class Draft:
  """A conclusion before it is phrased.

  style: its row in `FORMS`. short, long: two ways to put the reason. facts: what the answer rests
  on; rationale_facts: what the reason claims.
  """

  type: str
  style: str
  regions: tuple[int, ...]
  answer: str
  short: str
  long: str
  facts: tuple[list, ...]
  rationale_facts: tuple[list, ...]


def _settle(entry, setting, settings):
  """(text, the settings it holds in or None for all) of a WHY or NEXT entry in a known setting."""
  if isinstance(entry, str):
    return entry, None
  if not setting:
    return entry.get("", ""), None
  text = entry.get(setting, entry.get("", ""))
  return text, [s for s in settings if entry.get(s, entry.get("", "")) == text]


def _article(noun):
  return ("an " if noun[:1] in "aeiou" else "a ") + noun


def _where(kind, value, phrases):
  """(words, facts) that name the place or the weather, empty when it is not known."""
  return (f" {phrases[value]}", ([kind, None, value],)) if value else ("", ())


def _beside(clues):
  """The first neighbour of a person that suggests something, with what it suggests."""
  for noun in clues.near if clues.person else ():
    if noun in commonsense.BESIDE:
      return noun, commonsense.BESIDE[noun]
  return "", None


def _draft(type, style, regions, answer, short, long, facts, rationale_facts=None):
  return Draft(
    type, style, regions, answer, short, long, tuple(facts), tuple(rationale_facts or facts)
  )


def _role(i: int, clues: Clues, setting: Setting) -> Draft | None:
  if clues.headwear:
    role = commonsense.HEADWEAR[clues.headwear]
    facts = [["role", i, role]]
    return _draft(
      "role", "role", (i,), _article(role), f"the {clues.headwear}", _article(clues.headwear), facts
    )
  noun, rule = _beside(clues)
  if rule and rule[0]:
    return _draft("role", "who", (i,), rule[0], f"the {noun}", _article(noun), [["near", i, noun]])
  return None


def _why(i: int, clues: Clues, setting: Setting) -> Draft | None:
  if clues.held:
    text, weathers = _settle(
      commonsense.WHY.get(clues.held, ""), setting.weather, commonsense.WEATHER
    )
    text = text or commonsense.OBJECTS.get(clues.held, ("",))[0]
    if not text:
      return None
    facts, rationale_facts, words = [["thing", i, clues.held]], [["thing", i, clues.held]], ""
    if weathers:
      words, told = _where("weather", setting.weather, commonsense.WEATHER)
      facts.append(["weather", None, weathers])
      rationale_facts += told
    return _draft(
      "why",
      "why",
      (i,),
      text,
      f"the {clues.held}{words}",
      _article(clues.held) + words,
      facts,
      rationale_facts,
    )
  noun, rule = _beside(clues)
  if rule:
    return _draft(
      "why", "why there", (i,), rule[1], f"the {noun}", _article(noun), [["near", i, noun]]
    )
  if clues.noun in commonsense.OBJECTS and clues.noun not in commonsense.ANIMAL_FEELINGS:
    use = commonsense.OBJECTS[clues.noun][0]
    return _draft("why", "use", (i,), use, "", _article(clues.noun), [["noun", i, clues.noun]])
  return None


def _next(i: int, clues: Clues, setting: Setting) -> Draft | None:
  if clues.held in commonsense.NEXT:
    text, places = _settle(commonsense.NEXT[clues.held], setting.place, commonsense.PLACES)
    if not text:
      return None
    words, told = _where("place", setting.place, commonsense.PLACES)
    thing = ["thing", i, clues.held]
    facts = [thing] + ([["place", None, places]] if places else [])
    return _draft(
      "next",
      "next",
      (i,),
      text,
      f"the {clues.held}{words}",
      _article(clues.held) + words,
      facts,
      [thing, *told],
    )
  noun, rule = _beside(clues)
  if rule:
    return _draft(
      "next", "next there", (i,), rule[2], f"the {noun}", _article(noun), [["near", i, noun]]
    )
  if clues.noun in commonsense.OBJECTS:
    after = commonsense.OBJECTS[clues.noun][1]
    return _draft(
      "next", "next thing", (i,), after, "", _article(clues.noun), [["noun", i, clues.noun]]
    )
  return None


def _feel(i: int, clues: Clues, setting: Setting) -> Draft | None:
  words, told = _where("weather", setting.weather, commonsense.WEATHER)
  if clues.pose:
    pose = ["pose", i, clues.pose]
    text = clues.pose + words
    return _draft(
      "feel", "feel", (i,), commonsense.POSES[clues.pose][0], text, text, [pose], [pose, *told]
    )
  noun, rule = _beside(clues)
  if rule:
    return _draft(
      "feel", "feel there", (i,), rule[3], f"the {noun}", _article(noun), [["near", i, noun]]
    )
  if clues.noun in commonsense.ANIMAL_FEELINGS:
    text = _article(clues.noun)
    return _draft(
      "feel",
      "feel",
      (i,),
      commonsense.ANIMAL_FEELINGS[clues.noun],
      text,
      text,
      [["noun", i, clues.noun]],
    )
  return None


def _relation(i: int, j: int, clues: Clues, other: Clues) -> Draft | None:
  if clues.pose and other.headwear:
    role = commonsense.HEADWEAR[other.headwear]
    text = f"{clues.pose} near the {other.headwear}"
    answer = f"{commonsense.POSES[clues.pose][1]} the {role}"
    return _draft(
      "relation",
      "relation",
      (i, j),
      answer,
      text,
      text,
      [["pose", i, clues.pose], ["role", j, role]],
    )
  apart = {clues.side, other.side} == {"left", "right"}  # then it is another one of its kind
  if clues.person and other.noun in clues.near and other.noun in commonsense.BESIDE and not apart:
    text = f"next to the {other.noun}"
    answer = f"{commonsense.BESIDE[other.noun][4]} the {other.noun}"
    facts = [["near", i, other.noun], ["noun", j, other.noun]]
    return _draft("relation", "relation thing", (i, j), answer, text, text, facts)
  return None


_ABOUT_ONE = {"role": _role, "why": _why, "next": _next, "feel": _feel}


class Reader:
  """Reads a verbalization once and drafts conclusions on demand."""

  def __init__(self, verbalization: Verbalization):
    self.setting = read_captions(verbalization.captions)
    self.clues = {i: read_description(text) for i, text in verbalization.local.items()}

  def draft(self, type: str, regions: tuple[int, ...]) -> Draft | None:
    """The conclusion of one type about one region id (two for "relation"), or None."""
    if type == "relation":
      i, j = regions
      return _relation(i, j, self.clues[i], self.clues[j])
    return _ABOUT_ONE[type](regions[0], self.clues[regions[0]], self.setting)

  def targets(self, type: str) -> list[tuple[int, ...]]:
    """The region ids, or pairs of them, a question of this type can be about."""
    ids = sorted(self.clues)
    if type == "relation":
      return [(i, j) for i in ids for j in ids if i != j]
    return [(i,) for i in ids]


def phrase(draft: Draft, question: int, answer: int, rationale: int) -> tuple[str, str, str]:
  """(question, answer, rationale) of a draft; the numbers pick forms, modulo how many there are."""
  mentions = [f"[{i}]" for i in draft.regions]
  words = {"a": draft.answer, "short": draft.short, "long": draft.long}
  forms = zip(FORMS[draft.style], (question, answer, rationale))
  return tuple(choices[k % len(choices)].format(*mentions, **words) for choices, k in forms)


def teach(
  record: ImageRecord, rng: np.random.Generator, per_image: int = 8
) -> tuple[Statement, ...]:
  """Writes up to `per_image` statements about a verbalized record, the types taking turns.

  No two statements of an image ask the same about the same regions. A record without a
  verbalization, or one whose words suggest nothing, gets none.
  """
  reader = Reader(record.verbalization)
  region_all = tuple(region.id for region in record.regions)
  turns = []
  for k in rng.permutation(len(TYPES)).tolist():
    targets = reader.targets(TYPES[k])
    turns.append((TYPES[k], [targets[t] for t in rng.permutation(len(targets)).tolist()]))
  statements = []
  while len(statements) < per_image and any(left for _, left in turns):
    for type, left in turns:
      draft = None
      while draft is None and left:
        draft = reader.draft(type, left.pop())
      if draft is None or len(statements) == per_image:
        continue
      texts = phrase(draft, *rng.integers(0, 1 << 16, 3).tolist())
      statements.append(
        Statement(
          _index(record, texts),
          *texts,
          source=f"template_v1_{type}",
          teacher="template",
          region=draft.regions,
          region_all=region_all,
          provenance={
            "type": type,
            "facts": [*draft.facts],
            "rationale_facts": [*draft.rationale_facts],
          },
        )
      )
  return tuple(statements)


def _index(record: ImageRecord, texts: tuple[str, str, str]) -> str:
  """Names a statement by what it says of which image: a judgement is found by its index, and must not
  meet another statement after teaching with another seed, or in another corpus. Unique in an image,
  where no two statements ask the same."""
  digest = hashlib.sha256(json.dumps([record.image, *texts]).encode()).hexdigest()
  return f"{record.image_id}-{digest[:12]}"


def teach_record(record: ImageRecord, seed: int = 0, per_image: int = 8) -> ImageRecord:
  """The record with the template teacher's statements, the same for the same (seed, image id)."""
  rng = np.random.default_rng([seed, record.image_id, 2])
  return dataclasses.replace(record, statements=teach(record, rng, per_image))
