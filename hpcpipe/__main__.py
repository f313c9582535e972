"""The verbs, nothing else: what a person types becomes one call.

Everything heavy is imported by the verb that needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from hpcpipe.config import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status. A ``UserError`` becomes one sentence on stderr and status 2."""
    args = parser().parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"hpcpipe: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="hpcpipe", description="Trains language models through a pipeline of MPI ranks.")
    verbs = top.add_subparsers(metavar="VERB", required=True)

    prepare = verbs.add_parser("prepare", help="tokenizer and token files from text, JSONL or parquet")
    prepare.add_argument("text", nargs="+", help="files, folders, or python-stdlib for Python's own source files")
    prepare.add_argument("--out", required=True, metavar="DIR")
    prepare.add_argument("--vocab", type=int, default=8192, metavar="N", help="tokens of the byte-level BPE to train")
    prepare.add_argument("--tokenizer", metavar="JSON", help="use this tokenizer.json instead of training one")
    prepare.add_argument("--val", type=float, default=0.05, metavar="SHARE", help="share of documents held out")
    prepare.add_argument(
        "--errors", choices=("stop", "skip"), default="stop", help="what to do with text that is not UTF-8"
    )
    prepare.add_argument("--force", action="store_true", help="replace what is in DIR")
    prepare.set_defaults(run=_prepare)

    plan = verbs.add_parser("plan", help="cut, schedule, FLOPs and exact bytes per rank, predicted bubble")
    _config(plan)
    plan.add_argument("--ranks", type=int, default=0, metavar="N", help="ranks; 0 = pipeline.ranks x pipeline.replicas")
    _pictures(plan)
    plan.set_defaults(run=_plan)

    train = verbs.add_parser("train", help="train; under mpirun or srun, one rank per device")
    _config(train)
    _profile(train)
    train.set_defaults(run=_train)

    inspect = verbs.add_parser("inspect", help="a checkpoint, a run folder or a timeline.jsonl: what is in it")
    inspect.add_argument("path")
    inspect.add_argument("--json", action="store_true", help="for programs")
    inspect.add_argument("--stats", action="store_true", help="mean, rms, largest, spectral norm, NaN and Inf")
    inspect.add_argument("--diff", default="", metavar="OTHER", help="what has changed up to another checkpoint")
    inspect.add_argument("--merge", default="", metavar="FILE", help="write one HDF5 file without virtual datasets")
    inspect.add_argument("--history", action="store_true", help="a run folder: all checkpoints, how parameters moved")
    inspect.add_argument("--histogram", action="store_true", help="how the values of each tensor are distributed")
    inspect.add_argument("--only", default="", metavar="NAMES", help="tensors for these two, such as 'layer.*.norm1.*'")
    inspect.add_argument("--plot", default="", metavar="FILE", help="draw these two, as a .png or one .html page")
    _pictures(inspect)
    inspect.set_defaults(run=_inspect)

    report = verbs.add_parser("report", help="one HTML page about a run: loss, speed, bubble, timeline, memory")
    report.add_argument("run_dir", metavar="RUN_DIR")
    report.add_argument("--out", metavar="FILE", help="default: report.html in the run's folder")
    report.set_defaults(run=_report)

    _interchange(verbs)

    generate = verbs.add_parser("generate", help="text from a checkpoint")
    generate.add_argument("path", help="a checkpoint or a run folder")
    generate.add_argument("--prompt", default="def ", help="the text to continue")
    generate.add_argument("--tokens", type=int, default=200, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.8)
    generate.add_argument("--top-k", type=int, default=40, metavar="K", help="0 = all")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--tokenizer", metavar="JSON", help="default: the one in the run's folder")
    generate.set_defaults(run=_generate)
    return top


def _interchange(verbs: Any) -> None:
    out = verbs.add_parser("export", help="a checkpoint as a Hugging Face folder")
    out.add_argument("path", help="a checkpoint or a run folder")
    out.add_argument("--out", required=True, metavar="DIR")
    kinds = ("float32", "bfloat16", "float16")
    out.add_argument("--dtype", choices=kinds, default="", help="default: float32, or what an imported model came in")
    out.set_defaults(run=_export)

    back = verbs.add_parser("import", help="a Hugging Face folder (GPT-2, Llama, Mistral) as a checkpoint")
    back.add_argument("path", metavar="FOLDER")
    back.add_argument("--out", required=True, metavar="RUN_DIR")
    back.set_defaults(run=_import)


def _config(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("config", metavar="RUN.toml")
    verb.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="overrides")


def _profile(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--profile", nargs="?", const="", metavar="FILE",
        help="write the last step as trace events, for ui.perfetto.dev; default: trace.json in the run's folder",
    )  # fmt: skip


def _pictures(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--svg", default="", metavar="FILE", help="write the timeline as a picture")
    verb.add_argument("--trace", default="", metavar="FILE", help="write it as trace events, for ui.perfetto.dev")


def _prepare(args: argparse.Namespace) -> None:
    from hpcpipe.prepare import prepare

    prepare(
        args.text, args.out, vocab_size=args.vocab, val_fraction=args.val, tokenizer=args.tokenizer, errors=args.errors,
        force=args.force,
    )  # fmt: skip


def _plan(args: argparse.Namespace) -> None:
    from hpcpipe.config import load
    from hpcpipe.planner import describe

    config = load(args.config, args.overrides)
    print(describe.describe(config, args.ranks, svg=args.svg, trace=args.trace))


def _train(args: argparse.Namespace) -> int:
    from hpcpipe.comm import mpi

    link = mpi.connect()
    try:
        _run(args, link)
    except UserError as error:
        if getattr(error, "everywhere", False):  # every rank knows: one of them tells
            if link.rank == 0:
                print(f"hpcpipe: {error}", file=sys.stderr, flush=True)
            link.close()
            return 2
        link.abort(str(error))
    except BaseException:
        link.abort(traceback.format_exc())
    link.close()
    return 0


def _run(args: argparse.Namespace, link: Any) -> None:
    from hpcpipe.config import load

    config, error = None, None
    try:
        config = load(args.config, args.overrides)
    except UserError as problem:
        error = str(problem)
    link.agree(error)
    from hpcpipe.train import train

    assert config is not None
    train(config, link, args.profile)


def _inspect(args: argparse.Namespace) -> None:
    if args.path.endswith(".jsonl"):
        from hpcpipe.planner.describe import timeline

        print(timeline(args.path, svg=args.svg, trace=args.trace))
        return
    if args.svg or args.trace:
        raise UserError(f"inspect: --svg and --trace draw a timeline, {args.path} is none; give a run's timeline.jsonl")
    look = [name for name in ("history", "histogram", "only", "plot") if getattr(args, name)]
    if look and (args.diff or args.merge or args.stats):
        raise UserError(f"inspect: --{look[0]} does not go with --diff, --merge or --stats; ask one after the other")
    if look:
        from hpcpipe import plot

        print(plot.look(args.path, args.history, args.histogram, args.only, args.json, args.plot))
        return
    if args.diff:
        from hpcpipe.checkpoint.compare import compare

        print(compare(args.path, args.diff, json=args.json))
        return
    if args.merge:
        from hpcpipe.checkpoint.merge import merge

        print(f"merged {merge(args.path, args.merge)} into {args.merge}")
        return
    from hpcpipe.checkpoint.inspect import describe

    print(describe(args.path, json=args.json, stats=args.stats))


def _report(args: argparse.Namespace) -> None:
    from hpcpipe.report import report

    report(args.run_dir, args.out)


def _export(args: argparse.Namespace) -> None:
    from hpcpipe.hugging_face import export

    export(args.path, args.out, args.dtype)
    print(f"exported to {args.out}")


def _import(args: argparse.Namespace) -> None:
    from hpcpipe import hugging_face

    found = hugging_face.import_(args.path, args.out)
    print(f'imported to {args.out}; a run goes on from it with out = "{args.out}" and\n\n{hugging_face.toml(found)}')


def _generate(args: argparse.Namespace) -> None:
    from hpcpipe.generate import generate
    from hpcpipe.predict import open_predictor

    try:
        size = len(args.prompt.encode())
    except UnicodeEncodeError:
        raise UserError("generate: the prompt is not UTF-8; type it in a UTF-8 terminal") from None
    predictor, tokenizer = open_predictor(args.path, size + args.tokens)
    generate(
        predictor, args.tokenizer or tokenizer, args.prompt, tokens=args.tokens, temperature=args.temperature,
        top_k=args.top_k, seed=args.seed,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
