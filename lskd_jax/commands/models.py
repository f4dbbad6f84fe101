"""`lskd demo`, `eval`, `score`, `ask`, `import` and `export`."""
import json
from pathlib import Path

from lskd_jax.commands.arguments import add_verb, box, count, image_size, number, seed


def add_demo(verbs) -> None:
  """Declares `demo`."""
  p = add_verb(verbs, "demo", demo, "run everything on drawn scenes, up to a table and a report",
               "lskd demo --quick")
  p.add_argument("--workdir", type=Path, default=Path("demo"), metavar="DIR",
                 help="everything is written here (default: demo)")
  p.add_argument("--quick", action="store_true", help="a small run of everything, in minutes")
  p.add_argument("--full", action="store_true", help="more arms to compare")
  p.add_argument("--seed", type=seed, default=0)
  p.add_argument("--seeds", type=count, default=1, help="runs with as many seeds (default: 1)")


def add_verbs(verbs) -> None:
  """Declares the others."""
  p = add_verb(verbs, "eval", evaluate, "score a benchmark",
               "lskd eval --model runs/student/model --benchmark scenes --data test.jsonl "
               "--images runs/test/images --out runs/test/results")
  p.add_argument("--model", required=True, type=Path, metavar="DIR")
  p.add_argument("--benchmark", required=True, choices=("scenes",))
  p.add_argument("--data", required=True, type=Path, metavar="FILE", help="the items, jsonl")
  p.add_argument("--images", required=True, type=Path, metavar="DIR")
  p.add_argument("--out", required=True, type=Path, metavar="DIR",
                 help="gets metrics.json and predictions.jsonl")

  p = add_verb(verbs, "score", score, "score texts about regions of a picture",
               "lskd score --model runs/student/model --image beach.jpg --region 40,10,90,120 "
               "--text 'question: what is [0] doing? answer: surfing'")
  _add_picture(p)
  p.add_argument("--text", required=True, nargs="+", action="extend", metavar="TEXT",
                 help="one line of JSON for each: itm, itc and lm; a generative student has lm only")

  p = add_verb(verbs, "ask", ask, "ask about regions of a picture, or have it described",
               "lskd ask --model runs/student/model --image beach.jpg --region 40,10,90,120 "
               "--question 'what is [0] doing?'")
  _add_picture(p)
  group = p.add_mutually_exclusive_group(required=True)
  group.add_argument("--question", nargs="+", action="extend", metavar="TEXT",
                     help="one line of JSON for each: question and answer")
  group.add_argument("--caption", nargs="?", const="", metavar="PROMPT",
                     help="describe the picture instead; PROMPT: what the caption follows, such as "
                     "'a photo of' or '[0]'")
  p.add_argument("--prompt", metavar="TEXT", help="how a question is asked, with {question} for it "
                 "(default: the model's, 'question: {question} answer:')")
  p.add_argument("--stop", nargs="+", action="extend", default=[], metavar="TEXT",
                 help="the answer ends before the first of these, such as 'rationale:'")
  group = p.add_argument_group("decoding")
  group.add_argument("--beams", type=count, metavar="N", help="default: 5; 1 is greedy")
  group.add_argument("--max-tokens", type=count, metavar="N", help="default: 30")
  group.add_argument("--min-tokens", type=seed, metavar="N", help="default: 1")
  group.add_argument("--length-penalty", type=number, metavar="X",
                     help="below 0 for short texts, above for long ones (default: -1, of captions 1)")
  group.add_argument("--repetition-penalty", type=number, metavar="X", help="default: 1, none")
  group.add_argument("--sample", action="store_true", default=None, help="draw the words; no beams")
  group.add_argument("--temperature", type=number, metavar="X", help="of the draws (default: 1)")
  group.add_argument("--top-k", type=seed, metavar="N", help="draw from the N likeliest words")
  group.add_argument("--top-p", type=number, metavar="X",
                     help="draw from the fewest words that have this probability together")
  group.add_argument("--seed", type=seed, default=0, help="of the draws (default: 0)")

  p = add_verb(verbs, "import", import_weights, "make a model directory from PyTorch's weights",
               "lskd import --from hf blip2-itm-vit-g --image-size 364 --out models/blip2")
  p.add_argument("--from", dest="format", required=True, choices=("hf", "lavis"),
                 help="hf: a folder of transformers' BLIP-2 with its tokenizer: Blip2ForImageTextRetrieval, "
                 "or Blip2ForConditionalGeneration with OPT or T5; lavis: a .pth file of LAVIS's stage 1, "
                 "such as blip2_pretrained.pth, of its stage 2, or of LSKD's critic")
  p.add_argument("source", type=Path, metavar="SRC")
  p.add_argument("--out", required=True, type=Path, metavar="DIR", help="the model directory")
  p.add_argument("--image-size", type=image_size, metavar="PX",
                 help="of the student's pictures: 364, or 224x448 for HEIGHTxWIDTH; position embeddings "
                 "are stretched to it (default: as the source)")
  p.add_argument("--max-regions", type=count, default=8, metavar="N",
                 help="slots that texts can mention (default: 8; what `lskd export` wrote keeps its own)")
  group = p.add_argument_group("lavis, whose files hold weights only")
  group.add_argument("--tokenizer", type=Path, metavar="DIR",
                     help="a folder with the vocab.txt or tokenizer.json of bert-base-uncased")
  group.add_argument("--vit", type=Path, metavar="FILE",
                     help="the frozen ViT where SRC has none: eva_vit_g.pth or clip_vit_L.pth")
  group.add_argument("--decoder", type=Path, metavar="DIR",
                     help="of a stage-2 model: the folder of its language model, such as opt-2.7b or "
                     "flan-t5-xl, with its tokenizer")
  group.add_argument("--config", type=Path, metavar="FILE",
                     help="a config file with the sizes and data.region_mode (default: BLIP-2 with ViT-g/14, "
                     "tokens); configs/blip2_vit_l.py for blip2_pretrained_vitL.pth; what `lskd export` "
                     "wrote has its own in a side file")

  p = add_verb(verbs, "export", export_weights, "hand a model to PyTorch users",
               "lskd export --to hf --model runs/student/model --out export")
  p.add_argument("--to", dest="format", required=True, choices=("hf", "lavis"),
                 help="hf: a student as a folder for transformers' from_pretrained; lavis: a student or "
                 "critic as a .pth file for LAVIS")
  p.add_argument("--model", required=True, type=Path, metavar="DIR")
  p.add_argument("--out", required=True, type=Path, metavar="PATH",
                 help="hf: a new or empty folder; lavis: a new file")
  p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                 help="hf: of the tensors; the Q-Former stays float32 (default: float32)")
  p.add_argument("--without-vit", action="store_true",
                 help="lavis: leave out the ViT, as LAVIS does where it is frozen")


def _add_picture(p) -> None:
  """The arguments of what is said about a picture."""
  p.add_argument("--model", required=True, type=Path, metavar="DIR")
  p.add_argument("--image", required=True, type=Path, metavar="FILE")
  p.add_argument("--region", type=box, nargs="+", action="extend", default=[],
                 metavar="x1,y1,x2,y2", help="in pixels of the picture; the k-th is [k], from 0")


def demo(args) -> None:
  """Everything on drawn scenes."""
  from lskd_jax import demo as whole
  whole.run(workdir=args.workdir, quick=args.quick, full=args.full, seed=args.seed,
            seeds=args.seeds)


def evaluate(args) -> None:
  """Scores a benchmark."""
  from lskd_jax.commands import benchmarks
  metrics = benchmarks.run_scenes(args.model, args.data, args.images, args.out)
  for column, heads in metrics["columns"].items():
    print(f"{column:8s} " + "  ".join(f"{head} {100 * value:5.1f} %"
                                      for head, value in heads.items()))
  print(f"eval: {metrics['items']} items; {args.out / 'metrics.json'}, "
        f"{args.out / 'predictions.jsonl'}")


def score(args) -> None:
  """One JSON line per text."""
  from lskd_jax import predictor
  found = predictor.load(args.model).score(args.image, args.region, args.text)
  for row in found:
    print(json.dumps(row, ensure_ascii=False))


def ask(args) -> None:
  """One JSON line per question."""
  from lskd_jax import predictor
  if args.caption is not None and args.prompt:
    args.parser.error("--prompt is for --question; give --caption its own prompt")
  names = ("beams", "max_tokens", "min_tokens", "length_penalty", "repetition_penalty", "sample",
           "temperature", "top_k", "top_p")
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  for name in ("temperature", "top_k", "top_p"):
    if name in given and not args.sample:
      args.parser.error(f"--{name.replace('_', '-')} is for --sample")
  options = {"stop": args.stop, "seed": args.seed, **given}
  model = predictor.load(args.model)
  if args.question:
    answers = model.ask(args.image, args.region, args.question, prompt=args.prompt, **options)
    found = [{"question": question, "answer": answer}
             for question, answer in zip(args.question, answers, strict=True)]
  else:
    found = [{"caption": model.caption(args.image, args.region, args.caption, **options)}]
  for row in found:
    print(json.dumps(row, ensure_ascii=False))


def import_weights(args) -> None:
  """PyTorch's weights to a model directory."""
  if args.format == "hf":
    for name in ("tokenizer", "vit", "config", "decoder"):
      if getattr(args, name):
        args.parser.error(f"--{name} is for --from lavis; a transformers folder has its own")
    from lskd_jax.convert import hf
    found = hf.import_hf(args.source, args.out, image_size=args.image_size,
                         max_regions=args.max_regions)
  else:
    if not args.tokenizer and not args.decoder:
      args.parser.error("--from lavis needs --tokenizer DIR, or for stage 2 --decoder DIR, since SRC holds "
                        "weights only")
    if args.tokenizer and args.decoder:
      args.parser.error("--tokenizer is for stage 1; the folder of --decoder has its own")
    from lskd_jax.config_files import load_config
    from lskd_jax.convert import lavis, lavis_decoder
    from lskd_jax.models.build import run_config
    config = load_config(args.config or "configs/common.py")
    sizes = {**config.model.to_dict(), "max_regions": args.max_regions,
             "region_mode": config.data.region_mode}
    options = dict(config=run_config("student", sizes), vit=args.vit, image_size=args.image_size)
    if args.decoder:
      found = lavis_decoder.import_stage2(args.source, args.out, decoder_dir=args.decoder, **options)
    else:
      found = lavis.import_lavis(args.source, args.out, tokenizer_dir=args.tokenizer, **options)
  print(f"import: a {found.kind} in {found.model}")
  if found.fresh:
    parts = dict.fromkeys("cross-attention gates" if name.endswith("cross/gate") else
                          name.removeprefix("student/").split("/")[0] for name in found.fresh)
    print(f"not in {args.source}, so at their initial values: {', '.join(parts)}")


def export_weights(args) -> None:
  """A model directory to PyTorch's weights."""
  if args.format == "hf":
    if args.without_vit:
      args.parser.error("--without-vit is for --to lavis; transformers reads whole models")
    from lskd_jax.convert import hf
    print(f"export: {hf.export_hf(args.model, args.out, dtype=args.dtype or 'float32')}")
  else:
    if args.dtype:
      args.parser.error("--dtype is for --to hf; a .pth file is written in float32")
    from lskd_jax.convert import lavis_export
    found = lavis_export.export_lavis(args.model, args.out, vit=not args.without_vit)
    print("\n".join([f"export: {found.file}", *(f"note: {note}" for note in found.notes)]))
