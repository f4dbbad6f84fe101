"""`lskd corpus …`: from pictures to a published dataset, one resumable stage after another."""
from pathlib import Path

from data_pipeline import stages
from lskd_jax.commands import folders
from lskd_jax.commands.arguments import add_verb, count, number, seed, share


def add_verbs(verbs) -> None:
  """Declares `corpus` and its verbs."""
  parser = verbs.add_parser("corpus", help="the stages that make a corpus", allow_abbrev=False,
                            description="The stages that make a corpus, in this order.")
  verbs = parser.add_subparsers(metavar="STAGE", required=True)
  images = "folder that the records' image paths are relative to (default: as noted by verbalize)"

  p = add_verb(verbs, "verbalize", verbalize, "describe pictures and their regions in words",
               "lskd corpus verbalize --source scenes --count 1000 --out runs/words")
  p.add_argument("--source", required=True, choices=("scenes", "coco"),
                 help="drawn scenes, or photographs with boxes in the COCO format")
  p.add_argument("--out", required=True, type=Path, metavar="DIR")
  p.add_argument("--split", default="train", help="split the records belong to (default: train)")
  group = p.add_argument_group("scenes")
  group.add_argument("--count", type=count, help="pictures to draw (default: 1000)")
  group.add_argument("--seed", type=seed, help="default: 0")
  group.add_argument("--error-rate", type=share,
                     help="share of attributes that are misread (default: 0.25)")
  group = p.add_argument_group("coco")
  group.add_argument("--annotations", type=Path, metavar="FILE", help="instances json")
  group.add_argument("--captions", type=Path, metavar="FILE", help="captions json, if there is one")
  group.add_argument("--images", type=Path, metavar="DIR", help="folder of the photographs")

  p = add_verb(verbs, "teach", teach, "write statements from the words",
               "lskd corpus teach --corpus runs/words --out runs/taught")
  _folders(p)
  p.add_argument("--per-image", type=count, default=8, help="statements, at most (default: 8)")
  p.add_argument("--seed", type=seed, default=0)

  p = add_verb(verbs, "judge", judge, "judge a share of the statements, or list them for a person",
               "lskd corpus judge --corpus runs/taught --sheet --out sheet.csv")
  p.add_argument("--corpus", required=True, type=Path, metavar="DIR")
  p.add_argument("--out", required=True, type=Path, metavar="FILE", help=".jsonl or, a sheet, .csv")
  p.add_argument("--sheet", action="store_true",
                 help="write statements for a person to judge, instead of judging scenes by their "
                      "graph")
  p.add_argument("--share", type=share, default=0.05, help="of all statements (default: 0.05)")
  p.add_argument("--wrong", type=share, default=0.05,
                 help="share of the verdicts turned around, as people err (default: 0.05)")
  p.add_argument("--seed", type=seed, default=0)

  p = add_verb(verbs, "score", score, "give every statement its P(accept) by a critic",
               "lskd corpus score --corpus runs/taught --model runs/student/model "
               "--judgements judged.jsonl --out runs/scored")
  _folders(p)
  p.add_argument("--images", type=Path, metavar="DIR", help=images)
  p.add_argument("--model", required=True, type=Path, metavar="DIR",
                 help="a critic; or a student, whose likelihoods become scores")
  p.add_argument("--judgements", type=Path, metavar="FILE",
                 help="what turns a student's likelihoods into probabilities")

  p = add_verb(verbs, "filter", filter_, "drop duplicates and choose the cut to read with",
               "lskd corpus filter --corpus runs/scored --judgements judged.jsonl "
               "--target-precision 0.9 --out runs/filtered")
  _folders(p)
  p.add_argument("--judgements", type=Path, metavar="FILE")
  cut = p.add_mutually_exclusive_group()
  cut.add_argument("--target-precision", type=share, metavar="P",
                   help="the lowest cut that reaches this precision (default: the best F1)")
  cut.add_argument("--min-score", type=number, metavar="X", help="this cut")

  p = add_verb(verbs, "build", build, "write the dataset, pictures included",
               "lskd corpus build --corpus runs/filtered --out runs/built")
  _folders(p)
  p.add_argument("--images", type=Path, metavar="DIR", help=images)
  p.add_argument("--name", default="default", help="of this variant of the dataset")
  p.add_argument("--overwrite", action="store_true", help="replace another dataset of that name")

  p = add_verb(verbs, "report", report, "write a page with numbers, plots and pictures",
               "lskd corpus report --corpus runs/filtered --out report.html")
  p.add_argument("--corpus", required=True, type=Path, metavar="DIR")
  p.add_argument("--out", required=True, type=Path, metavar="FILE.html")
  p.add_argument("--images", type=Path, metavar="DIR", help=images)

  p = add_verb(verbs, "publish", publish, "copy a built dataset, checked and with a dataset card",
               "lskd corpus publish --corpus runs/built --out /data/published "
               "--image-source 'COCO 2017' --image-licence 'CC BY 4.0'")
  _folders(p)
  p.add_argument("--image-source", default="", help="for the card: where the pictures come from")
  p.add_argument("--image-licence", default="", help="for the card")
  p.add_argument("--critic", default="", help="for the card: what scored the statements")
  p.add_argument("--threshold", type=number, help="for the card: the score to read with")
  p.add_argument("--notes", default="", help="for the card, in Markdown")
  p.add_argument("--overwrite", action="store_true", help="replace another dataset of that name")


def _folders(parser) -> None:
  parser.add_argument("--corpus", required=True, type=Path, metavar="DIR",
                      help="what the stage before wrote")
  parser.add_argument("--out", required=True, type=Path, metavar="DIR")


def verbalize(args) -> None:
  """Draws scenes, or reads photographs with boxes, and describes them."""
  from data_pipeline import corpus_stages
  scenes = {"count": 1000, "seed": 0, "error_rate": 0.25}
  for name in ("annotations", "captions", "images") if args.source == "scenes" else scenes:
    if getattr(args, name) is not None:
      args.parser.error(f"--{name.replace('_', '-')} is not for --source {args.source}")
  if args.source == "scenes":
    given = {name: getattr(args, name) for name in scenes if getattr(args, name) is not None}
    summary = corpus_stages.verbalize_scenes(args.out, **scenes | given, split=args.split)
    root = args.out / "images"
  else:
    for name in ("annotations", "images"):
      if getattr(args, name) is None:
        args.parser.error(f"--source coco needs --{name}")
    root = args.images
    summary = corpus_stages.verbalize_photographs(args.annotations, root, args.out, args.captions,
                                                  args.split)
  stages.open_shards(args.out)  # says so if there is nothing
  folders.note_images(args.out, root)
  folders.say_what_came(summary, args.out, f"lskd corpus teach --corpus {args.out} --out DIR")
  if summary.get("crowds"):
    print(f"  passed over: {summary['crowds']} boxes of crowds, which show no single thing")


def teach(args) -> None:
  """The template teacher."""
  from data_pipeline import corpus_stages
  summary = corpus_stages.teach_corpus(args.corpus, args.out, args.per_image, args.seed)
  folders.note_images(args.out, folders.image_root(args.corpus, needed=False))
  folders.say_what_came(summary, args.out, f"lskd corpus judge --corpus {args.out} --out FILE",
                        f"lskd corpus report --corpus {args.out} --out FILE.html")


def judge(args) -> None:
  """Judgements of scenes by their graph; for other pictures a sheet that a person fills in."""
  import numpy as np

  from data_pipeline import judge
  from data_pipeline.records import DataError
  if args.out.suffix == ".csv" and not args.sheet:
    raise DataError(f"--out {args.out}: judgements are written as .jsonl; .csv is for --sheet")
  records = list(stages.read_records(args.corpus))
  if not any(record.statements for record in records):
    raise DataError(f"{args.corpus}: has no statements; run `lskd corpus teach` first")
  with folders.new_file(args.out) as draft:
    if args.sheet:
      written = judge.write_sheet(records, args.share, draft, args.seed)
    else:
      if not all("scene" in record.extra for record in records):
        raise DataError(f"{args.corpus}: only drawn scenes can be judged without a person; add "
                        "--sheet to write a sheet that a person fills in")
      rng = np.random.default_rng(args.seed)
      found = judge.judge_from_scene(records, rng, args.share, args.wrong)
      judge.write_judgements(draft, found)
      written = len(found)
    if not written:
      raise DataError(f"--share {args.share}: that is none of the statements; raise it")
  if args.sheet:
    print(f"judge: {written} statements to judge in {args.out}\n"
          "  next: fill in `accept` with 1 or 0; the file then goes to --judgements")
  else:
    accepted = sum(judgement.accept for judgement in found)
    print(f"judge: {written} judgements in {args.out}, {accepted} accept\n"
          f"  next: lskd corpus score --corpus {args.corpus} --model DIR --judgements {args.out} "
          "--out DIR")


def score(args) -> None:
  """Scores by a critic, or by the critic of kind `evidence` on a student's likelihoods."""
  from lskd_jax import scoring
  root = folders.image_root(args.corpus, args.images)
  scored = scoring.score_stages(args.corpus, root, args.model, args.out, args.judgements)
  stages.open_shards(args.out)  # says so if there is nothing
  folders.note_images(args.out, root)
  folders.say_what_came(scored.summary, args.out, f"lskd corpus filter --corpus {args.out} "
                        f"--judgements {args.judgements or 'FILE'} --out DIR")
  print(f"  scores: {scored.worth}")


def filter_(args) -> None:
  """Drops duplicates. The cut is written beside them; what is below it stays, for another cut."""
  from data_pipeline import filter as filtering
  from lskd_jax.commands import cuts
  cut = cuts.choose(stages.read_records(args.corpus), args.judgements, args.target_precision,
                    args.min_score)
  summary = filtering.filter_corpus(args.corpus, args.out)
  folders.note_images(args.out, folders.image_root(args.corpus, needed=False))
  if cut is None:
    (args.out / folders.CUT).unlink(missing_ok=True)  # of an earlier call
  else:
    stages.write_json(args.out / folders.CUT, cut)
  folders.say_what_came(summary, args.out, f"lskd corpus build --corpus {args.out} --out DIR",
                        f"lskd corpus report --corpus {args.out} --out FILE.html")
  print("  " + cuts.in_words(cut))


def build(args) -> None:
  """The TFDS dataset."""
  from data_pipeline import lck
  from data_pipeline.manifest import read_manifest
  records, root = folders.Records(args.corpus), folders.image_root(args.corpus, args.images)
  folder = lck.build_lck(records, root, args.out, args.name, overwrite=args.overwrite)
  manifest = read_manifest(folder)
  splits = manifest["splits"].values()
  total = {kind: sum(split[kind] for split in splits) for kind in ("images", "statements")}
  print(f"build: {total['images']} images, {total['statements']} statements in {folder}\n"
        f"{folders.rejections(manifest['rejected'], folder / 'rejected.jsonl')}\n"
        f"  next: lskd train --config FILE --config.data.corpus={folder}{_reading(args.corpus)} "
        f"--workdir DIR\n        lskd corpus publish --corpus {folder} --out DIR")


def _reading(corpus: Path) -> str:
  """The option to train with the corpus's cut, if it has one."""
  import numpy as np
  cut = folders.cut_of(corpus)
  # A built corpus has its scores in float32: the number below, so that what is just at the cut stays.
  return "" if cut is None else f" --config.data.min_score={np.nextafter(np.float32(cut), np.float32(-1))}"


def report(args) -> None:
  """One HTML page."""
  from data_pipeline.images import read_image
  from data_pipeline.report import write_corpus_report
  records, root = folders.Records(args.corpus), folders.image_root(args.corpus, args.images)
  write_corpus_report(args.out, str(args.corpus), records,
                      lambda record: read_image(root / record.image),
                      cut=folders.cut_of(args.corpus), truth=truth_of(records))
  print(f"report: {args.out}; open it in a browser")


def truth_of(records) -> dict[str, bool] | None:
  """Which statements are true, where the pictures are drawn scenes and the teacher is ours."""
  from data_pipeline.judge import is_true
  from data_pipeline.sources.scenes import scene_from_dict
  known = {s.index: all(is_true(s, scene_from_dict(record.extra["scene"])))
           for record in records if "scene" in record.extra
           for s in record.statements if "facts" in s.provenance}
  return known or None


def publish(args) -> None:
  """A checked copy with a dataset card."""
  from data_pipeline.lck import publish_lck
  folder = publish_lck(folders.built_folder(args.corpus), args.out, args.image_source,
                       args.image_licence, args.critic, args.threshold, args.notes, args.overwrite)
  print(f"publish: {folder}; its card is {folder / 'README.md'}")
