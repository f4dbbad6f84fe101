"""The report: one page that can be opened anywhere, about whatever there is to show."""

import base64
import dataclasses
import io
import re

from PIL import Image
import pytest

from data_pipeline.records import DataError, ImageRecord, Region, Statement
from data_pipeline.report import (
  Bars,
  CriticCurve,
  Curve,
  GalleryGroup,
  GalleryItem,
  PrecisionRecall,
  ResultsTable,
  ShownStatement,
  corpus_figures,
  gallery_groups,
  write_corpus_report,
  write_report,
)

TABLE = ResultsTable(
  columns=("Q→A", "swap"),
  rows=(("unfiltered", ((77.8, "±1.6"), 74.4)), ("lskd", ((83.3, "±1.5"), 79.6)),
        ("overlay", (25.2, None)), ("ceiling", (88.4, 87.9))),
  chance=(25.0, 25.0), highlight="lskd", reference=("ceiling",), caption="Accuracy in percent.")
CURVES = [Curve("lskd", (0, 450, 900), (25, 40, 83), "Q→A", baseline=25),
          Curve("none", (0, 900), (25, 26), "Q→A"),
          Curve("lskd", tuple(range(100)), tuple(range(100)), "loss")]
CRITICS = PrecisionRecall(
  (CriticCurve("evidence", (0.1, 0.5, 1), (1, 0.9, 0.6), 0.87),
   CriticCurve("heads", (0.1, 0.5, 1), (0.9, 0.7, 0.6), 0.7)),
  cut=0.55, recall=0.5, before=0.6, after=0.9)


def record(number, *scores):
  """A picture of two regions, with one statement per score."""
  statements = tuple(
    Statement(f"{number}-{k}", "what is [0] doing?", "[0] waves at [1]", "[1] looks back", score=s)
    for k, s in enumerate(scores))
  return ImageRecord(f"{number}.png", number, 96, 96, (
    Region(0, (4, 30, 40, 90), "chef"), Region(1, (50, 30, 90, 90), "king")), statements)


def load(record):
  return Image.new("RGB", (record.width, record.height), (record.image_id, 90, 160))


RECORDS = [record(0, 0.9, 0.1), record(1, 0.5), record(2, 0.99, 0.42), record(3, 0.02),
           record(4, 0.7)]


def full_page(path):
  truth = {"0-0": True, "0-1": False}
  return write_report(
    path, "Demo", table=TABLE, curves=CURVES, precision_recall=CRITICS,
    funnel=[("pictures", 100), ("statements", 600), ("kept", 300)],
    figures=corpus_figures(RECORDS, 0.5, truth), gallery=gallery_groups(RECORDS, load, 0.5, truth),
    notes=["one seed only"], facts={"wall time": "8 min"}, paper_table=TABLE).read_text("utf-8")


# --- the page ---

def test_the_page_needs_nothing_but_itself(tmp_path):
  page = full_page(tmp_path / "report.html")
  links = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
  assert links and all(link.startswith(("#", "data:")) for link in links)
  assert "http:" not in page and "https:" not in page and "@import" not in page
  assert "<script" not in page and "default-src 'none'" in page    # the browser enforces it as well
  ids = set(re.findall(r'id="([^"]*)"', page))
  assert all(link[1:] in ids for link in links if link.startswith("#"))


def test_the_same_input_gives_the_same_bytes(tmp_path):
  assert full_page(tmp_path / "a.html") == full_page(tmp_path / "b.html")


def test_every_text_is_escaped(tmp_path):
  evil = '<script>alert("$x_1$")</script>'
  statement = Statement("s", f"who is [0] {evil}", evil, evil, score=0.5, source=evil)
  bad = dataclasses.replace(record(0), image=evil, statements=(statement,),
                            regions=(Region(0, (1, 1, 50, 50), evil),))
  page = write_report(
    tmp_path / "report.html", evil, facts={evil: evil}, notes=[evil], funnel=[(evil, 1)],
    table=ResultsTable((evil,), ((evil, ((1.0, evil),)),), caption=evil),
    curves=[Curve(evil, (0, 1), (0, 1), evil)],
    precision_recall=PrecisionRecall((CriticCurve(evil, (0.5, 1), (1, 0.5), 0.7),)),
    figures=corpus_figures([bad]),
    gallery=[GalleryGroup(evil, evil, g.items) for g in gallery_groups([bad], load)],
  ).read_text("utf-8")
  assert "<script" not in page and "&lt;script&gt;" in page
  assert re.search(r"<text[^>]*>[^<]*\$x_1\$", page)    # nor do plots take dollars for formulas


@pytest.mark.parametrize("given, heading", [
  ({"table": TABLE}, "results"), ({"paper_table": TABLE}, "paper"), ({"curves": CURVES}, "curves"),
  ({"precision_recall": CRITICS}, "critic"), ({"funnel": [("a", 1)]}, "funnel"),
  ({"figures": [Bars("b", "", (("x", 1),))]}, "corpus"), ({"notes": ["n"]}, "notes"), ({}, None)])
def test_sections_without_data_are_left_out(tmp_path, given, heading):
  page = write_report(tmp_path / "report.html", "Part", **given).read_text("utf-8")
  assert re.findall(r'<h2 id="(\w+)"', page) == ([heading] if heading else [])
  assert page.count('href="#') >= bool(heading)    # and the contents list has just that one


def test_the_best_value_is_bold_but_the_ceiling_does_not_compete(tmp_path):
  page = write_report(tmp_path / "report.html", "Table", table=TABLE).read_text("utf-8")
  assert re.findall(r"<b>([\d.]+)</b>", page) == ["83.3", "79.6"]
  rows = re.findall(r'<tr(?: class="(\w+)")?><th scope="row">(\w+)', page)
  assert rows == [("chance", "chance"), ("", "unfiltered"), ("ours", "lskd"), ("", "overlay"),
                  ("reference", "ceiling")]
  assert "<small>±1.5</small>" in page and "<td>–</td>" in page


def test_the_funnel_says_what_each_step_keeps(tmp_path):
  page = write_report(tmp_path / "report.html", "Funnel", funnel=[
    ("pictures", 100), ("statements", 600), ("kept", 300), ("nothing", 0)]).read_text("utf-8")
  assert re.findall(r'class="note">([^<]*)', page) == [
    "", "6.0 for each", "50.0% of the step before", "0.0% of the step before"]
  assert re.findall(r'class="bar" style="width:([\d.]+)%', page) == [
    "16.67", "100.00", "50.00", "0.00"]


def test_a_failed_write_leaves_no_half_page_and_says_what_to_mend(tmp_path):
  (tmp_path / "file").write_text("not a folder")
  with pytest.raises(DataError, match="cannot write the report"):
    write_report(tmp_path / "file" / "report.html", "No")
  write_report(tmp_path / "new" / "report.html", "Yes")
  assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.html"]


# --- the gallery ---

def names(group):
  return [item.caption for item in group.items]


def test_best_worst_and_borderline_are_what_they_say():
  best, worst, borderline, by_lot = gallery_groups(RECORDS, load, cut=0.45, per_group=2)
  assert [g.title for g in (best, worst, borderline, by_lot)] == [
    "Best", "Worst", "Borderline", "Random"]
  # One statement per picture, the top one first.
  assert names(best) == ["2.png", "0.png"]
  assert [item.statements[0].score for item in best.items] == [0.99, 0.9]
  assert [item.statements[0].score for item in worst.items] == [0.02, 0.1]
  assert [item.statements[0].score for item in borderline.items] == [0.42, 0.5]
  assert [item.statements[0].kept for item in borderline.items] == [False, True]


def test_random_pictures_depend_on_the_seed_alone():
  def lot(seed):
    return names(gallery_groups(RECORDS, load, per_group=2, seed=seed)[-1])
  assert lot(1) == lot(1)
  assert len({tuple(lot(seed)) for seed in range(9)}) > 1


def test_only_chosen_pictures_are_loaded():
  loaded = []
  gallery_groups((record(i, 0.5) for i in range(200)), lambda r: loaded.append(r) or load(r),
                 per_group=3)
  assert len(loaded) <= 9    # three groups of three: there is no cut, so no borderline


def test_without_scores_there_are_only_random_pictures():
  bare = [dataclasses.replace(r, statements=()) for r in RECORDS]
  group, = gallery_groups(bare, load)
  assert group.title == "Random" and len(group.items) == 5
  assert set(group.items[0].boxes) == {0, 1}    # no statement points anywhere: all are shown


def test_a_mention_has_the_colour_of_its_box_and_truth_is_said_in_words(tmp_path):
  item = GalleryItem(Image.new("RGB", (96, 96)), {7: (0, 20, 40, 90), 3: (50, 20, 90, 90)}, (
    ShownStatement("what does [3] want?", "[3,7] want the ball", "", 0.91, kept=True, truth=False),
    ShownStatement("who is [9]?", "nobody", "", truth=True)))
  page = write_report(tmp_path / "report.html", "Gallery",
                      gallery=[GalleryGroup("Some", "", (item,))]).read_text("utf-8")
  tags = dict(re.findall(r'class="tag"[^>]*fill="(#\w+)"/><text[^>]*>(\d+)<', page))
  chips = {(c, n) for c, n in re.findall(r'style="background:(#\w+)[^>]*>\[(\d+)\]', page)}
  assert len(tags) == 2 and chips == set(tags.items())
  assert '<span class="chip">[9]</span>' in page    # no such box: a grey chip, not an error
  assert "✗ false" in page and "✓ true" in page and "kept" in page and "critic 0.91" in page


def test_boxes_follow_a_picture_that_is_loaded_at_another_size():
  big = dataclasses.replace(record(0, 0.5), width=192, height=192)
  item = gallery_groups([big], lambda r: Image.new("RGB", (96, 96)))[0].items[0]
  assert item.boxes[0] == (2, 15, 20, 45)


def embedded(page):
  return [Image.open(io.BytesIO(base64.b64decode(data)))
          for data in re.findall(r'<image href="data:image/\w+;base64,([^"]*)', page)]


def test_small_pictures_are_stored_as_they_are_and_photographs_reduced(tmp_path):
  photo = Image.effect_noise((1200, 900), 40)
  items = (GalleryItem(Image.new("RGB", (96, 96), (1, 2, 3)), {}), GalleryItem(photo, {}))
  page = write_report(tmp_path / "report.html", "Gallery",
                      gallery=[GalleryGroup("Both", "", items)]).read_text("utf-8")
  drawn, reduced = embedded(page)
  assert drawn.size == (96, 96) and drawn.convert("RGB").getpixel((5, 5)) == (1, 2, 3)
  assert reduced.size == (480, 360) and reduced.format == "JPEG"


# --- a corpus alone ---

def test_figures_count_what_the_corpus_holds():
  truth = {"0-0": True, "0-1": False}
  figures = {f.title: f for f in corpus_figures(RECORDS, cut=0.5, truth=truth)}
  assert sum(figures["Statements per picture"].series[0][1]) == 5
  assert "Mean 1.4, largest 2" in figures["Statements per picture"].caption
  assert dict(figures["Scores"].series)["true"][22] == 1    # 0.9 is in the bar from 0.88 to 0.92
  assert [name for name, _ in figures["Scores"].series] == ["true", "false", "scored"]
  assert figures["Questions"].counts == (("what", 7),)


def test_a_corpus_without_scores_or_statements_still_has_a_page(tmp_path):
  bare = [dataclasses.replace(r, statements=()) for r in RECORDS]
  page = write_corpus_report(tmp_path / "report.html", "Photographs", bare, load).read_text("utf-8")
  assert re.findall(r'<h2 id="(\w+)"', page) == ["corpus", "gallery"]
  assert "chef" in page    # the boxes' labels take the statements' place


def test_a_scored_corpus_shows_what_the_cut_keeps(tmp_path):
  page = write_corpus_report(
    tmp_path / "report.html", "Corpus", RECORDS, load, cut=0.5).read_text("utf-8")
  labels = re.findall(r'class="label">([^<]*)</span>.*?class="count">([\d,]+)', page)
  assert labels[:4] == [("pictures", "5"), ("statements", "7"), ("with a score", "7"),
                        ("score of 0.50 or more", "4")]


def test_an_empty_corpus_is_an_error_that_says_so(tmp_path):
  with pytest.raises(DataError, match="no pictures"):
    write_corpus_report(tmp_path / "report.html", "Empty", [], load)
