"""The original release's jsonl objects, key by key, read and written losslessly.

A row becomes typed values plus `extra`, which keeps every unknown key by name. What the typed
values cannot say (key order, an odd token, a fifth number in a box) is kept under
extra["original_form"]; it is written back only while it still says what the typed value says.
Here a region is the plain tuple (id, box, label, extra); `records.py` makes the records.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
import json
from typing import NamedTuple

from data_pipeline.jsonl import DataError
from data_pipeline.mentions import join_tokens, split_tokens

FORM = "original_form"
REQUIRED = object()  # the "absent" of a key that must be there


class Key(NamedTuple):
  """One key of a foreign object: how its value is read and written, what its absence means."""

  read: Callable = lambda raw: "" if raw is None else str(raw)
  write: Callable = lambda value: value
  absent: object = ""
  optional: bool = False  # left out when it says no more than its absence


def take(row: dict, keys: dict[str, Key]) -> tuple[dict, dict]:
  """(typed value per known key, `extra`) of an original object."""
  if not isinstance(row, dict):
    raise DataError(f"expected an object, got {row!r:.60}")
  values = {}
  for name, key in keys.items():
    try:
      values[name] = key.read(row[name]) if name in row else key.absent
    except DataError as error:
      raise DataError(f"{name}: {error}") from None
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
      raise DataError(f"cannot read {name!r}: {row[name]!r:.80}") from None
    if values[name] is REQUIRED:
      raise DataError(f"key {name!r} is missing")
  extra = {name: value for name, value in row.items() if name not in keys and name != FORM}
  plain = give(keys, values, extra)
  if _same(row, plain):
    return values, extra
  form = {"keys": list(row)} if list(row) != list(plain) else {}
  odd = {name: row[name] for name in row if name not in plain or not _same(row[name], plain[name])}
  form |= {"values": odd} if odd else {}
  return values, {**extra, FORM: form} if form else extra


def give(keys: dict[str, Key], values: dict, extra: dict) -> dict:
  """The original object that `take` turned into `values` and `extra`."""
  form = extra.get(FORM, {})
  odd, order = form.get("values", {}), form.get("keys")
  row = {}
  for name, key in keys.items():
    if name in odd and key.read(odd[name]) == values[name]:
      row[name] = odd[name]
    elif values[name] != key.absent or not (key.optional or (order and name not in order)):
      row[name] = key.write(values[name])
  row |= {name: value for name, value in extra.items() if name not in row and name != FORM}
  row |= {FORM: odd[FORM]} if FORM in odd else {}
  return {name: row[name] for name in [*(order or ()), *row] if name in row}


def _same(a, b) -> bool:
  """Equal as JSON text: unlike ==, tells 1 from 1.0 and true, and one key order from another."""
  return json.dumps(a) == json.dumps(b)


# ---- single values ----


def _path(raw) -> str:
  if not isinstance(raw, str) or not raw:
    raise ValueError
  return raw


def _ids(raw) -> tuple[int, ...]:
  """Region ids from [4], "4" or 4."""
  return tuple(int(i) for i in (raw if isinstance(raw, list) else [raw]) if i not in (None, ""))


def _box(raw) -> tuple[float, float, float, float]:
  """The first box of [[x1, y1, x2, y2, maybe a score]]."""
  x1, y1, x2, y2 = (float(edge) for edge in raw[0][:4])
  return x1, y1, x2, y2


_REFERENCE = {
  "name": Key(int, str, REQUIRED),
  "boxes": Key(_box, lambda box: [[float(edge) for edge in box]], REQUIRED),
  "segms": Key(lambda raw: raw, absent=None),
  "obj_guess": Key(),
  "tag": Key(absent="region"),
}
_CHOICE_REFERENCE = {key: _REFERENCE[key] for key in ("boxes", "obj_guess")}


def _read_reference(raw: dict) -> tuple:
  values, extra = take(raw, _REFERENCE)
  known = {key: values[key] for key in ("segms", "tag") if values[key] != _REFERENCE[key].absent}
  return values["name"], values["boxes"], values["obj_guess"], known | extra


def _write_reference(region: tuple) -> dict:
  region_id, box, label, extra = region
  values = {"name": region_id, "boxes": box, "obj_guess": label}
  values |= {key: extra.get(key, _REFERENCE[key].absent) for key in ("segms", "tag")}
  return give(_REFERENCE, values, extra)


def _read_references(raw: list | None) -> tuple:
  regions = tuple(_read_reference(reference) for reference in raw or ())
  for first in {region[0]: region for region in reversed(regions)}.values():
    if any(region[0] == first[0] and region != first for region in regions):
      raise DataError(f"region {first[0]} is listed twice, differently; keep one")
  return regions


def _write_references(regions: tuple) -> list:
  return [_write_reference(region) for region in regions]


def _read_choice_references(raw: dict | None) -> tuple:
  regions = []
  for name, reference in (raw or {}).items():
    values, extra = take(reference, _CHOICE_REFERENCE)
    regions.append((int(name), values["boxes"], values["obj_guess"], extra))
  return tuple(regions)


def _write_choice_references(regions: tuple) -> dict:
  return {
    str(region_id): give(_CHOICE_REFERENCE, {"boxes": box, "obj_guess": label}, extra)
    for region_id, box, label, extra in regions
  }


def _read_choices(raw: list) -> tuple:
  """((text, score or None) per choice)."""
  texts = [choice["text_output"] if "text_output" in choice else choice["text"] for choice in raw]
  scores = [choice.get("score") for choice in raw]
  return tuple(
    (join_tokens(text), None if score is None else float(score))
    for text, score in zip(texts, scores, strict=True)
  )


def _write_choices(choices: tuple) -> list:
  return [
    {"text_output": split_tokens(text)} | ({} if score is None else {"score": score})
    for text, score in choices
  ]


# ---- whole rows ----

TEXTS = ("question", "answer", "rationale")


def _provenance(raw) -> dict:
  return raw if isinstance(raw, dict) else {"value": raw}


def _read_qar(raw: dict) -> tuple[str, ...]:
  return tuple(join_tokens(raw.get(name)) for name in TEXTS)


def _write_qar(texts: tuple[str, ...]) -> dict:
  return dict(zip(TEXTS, texts, strict=True))


def text_keys(keys: Collection[str]) -> tuple[str, str, str]:
  """The keys that hold question, answer and rationale among the keys of a row."""
  if "question" not in keys and "text_input" in keys:
    return "text_input", "text_output", "rationale"
  if "question" not in keys and "full_text_input" in keys:
    return "full_text_input", "answer", "rationale"
  return TEXTS


def row_keys(keys: Collection[str]) -> dict[str, Key]:
  """How the known keys of a corpus row are read and written, in the order of the release."""
  if "qar" in keys:
    texts = {"qar": Key(_read_qar, _write_qar, ("", "", ""))}
  else:
    texts = {name: Key(join_tokens, split_tokens) for name in text_keys(keys)}
  ids = Key(_ids, list, ())
  return {
    "image": Key(_path, absent=REQUIRED),
    "source": Key(),
    "split": Key(absent="train"),
    "index": Key(),
    "region": ids,
    "region_all": ids,
    "references": Key(_read_references, _write_references, ()),
    **texts,
    "prediction": Key(lambda raw: None if raw is None else float(raw), absent=None, optional=True),
    "teacher": Key(optional=True),
    "provenance": Key(_provenance, absent={}, optional=True),
    "width": Key(int, absent=0, optional=True),
    "height": Key(int, absent=0, optional=True),
  }


def choice_keys(keys: Collection[str]) -> dict[str, Key]:
  """How the known keys of a choice row are read and written."""
  return {
    "image": Key(_path, absent=REQUIRED),
    text_keys(keys or ("text_input",))[0]: Key(join_tokens, split_tokens),
    "references": Key(_read_choice_references, _write_choice_references, ()),
    "choices": Key(_read_choices, _write_choices, REQUIRED),
    "label": Key(lambda raw: None if raw is None else int(raw), absent=None, optional=True),
    "answer_prefix": Key(absent="Answer:"),
    "instance_id": Key(),
    "context": Key(optional=True),
  }
