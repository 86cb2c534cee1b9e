"""lowprec-scaling: from a folder of runs to a decision with error bars.

    lowprec-scaling ingest --runs runs/ wandb://me/ladder old.csv --out runs.csv     # one table; says what it left out
    lowprec-scaling fit --runs runs.csv --law efficiency --out fits/efficiency       # parameters, intervals, a verdict
    lowprec-scaling compare --runs runs.csv --laws efficiency,delta --holdout N D    # which law predicts, and where
    lowprec-scaling advise --runs runs.csv --law efficiency --budget 1e22 --speedup nvfp4=1.4
    lowprec-scaling design --runs runs.csv --law efficiency --budget 1e20            # which runs to train next
    lowprec-scaling report --runs runs.csv --laws efficiency,delta --out report      # all of it as one page

Runs are run folders of lowprec or folders of them, CSV, TSV, JSON, JSONL and Parquet tables, offline `.wandb` files,
and W&B projects; several are joined. A law is a name from `recipes/law/` or the path of a YAML file. The laws, how
they are fitted and what a verdict means: `docs/scaling-laws.md`. Examples: `lowprec-scaling COMMAND --help`.

Exit codes: 0 done · 1 compare: in some direction no law could be scored · 2 the command, a file or a table is wrong,
and one sentence says how · 3 refused: advice from a fit that is not to be trusted, or `fit --strict`.
"""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder that holds the package takes the place of tools/
    sys.path[0] = str(next(p for p in Path(__file__).resolve().parents if (p / "lowprec" / "__init__.py").exists()))

from lowprec.tools import scaling_advise, scaling_commands, scaling_report
from lowprec.tools.scaling_runs import add_choice, add_source, many

Parser = argparse.ArgumentParser
Group = argparse._ArgumentGroup
USAGE = {
    "ingest": "--runs SRC ... --out CSV",
    "fit": "--runs SRC ... --law LAW [--out DIR]",
    "compare": "--runs SRC ... --laws LAW,LAW --holdout DIRECTION ... [--out DIR]",
    "advise": "--runs SRC ... --law LAW --budget FLOP ... [--speedup PRECISION=S ...]",
    "design": "[--runs SRC ... --law LAW] --budget FLOP [--out CSV]",
    "report": "--runs SRC ... --laws LAW,LAW --out DIR",
}
EXAMPLES = {
    "ingest": """examples:
  lowprec-scaling ingest --runs runs/ --out runs.csv
  lowprec-scaling ingest --runs old.csv --columns N=params D=toks loss=final_val --n-kind total --out runs.csv
  lowprec-scaling ingest --runs 'wandb://me/ladder?state=finished' --out runs.csv""",
    "fit": """examples:
  lowprec-scaling fit --runs runs.csv --law chinchilla --precision bf16 --out fits/bf16
  lowprec-scaling fit --runs runs.csv --law efficiency --holdout N D --out fits/efficiency
  lowprec-scaling fit --runs runs.csv --law quartet --option eff_D=null --fix gamma=1 E=1.69 --bootstrap 0
  lowprec-scaling fit --runs runs.csv --law my_law.yaml --where 'D/N>=20' --drop-highest 5 --strict""",
    "compare": """examples:
  lowprec-scaling compare --runs runs.csv --laws chinchilla,efficiency,delta --holdout N D
  lowprec-scaling compare --runs runs.csv --laws capacity,kumar --holdout precision
  lowprec-scaling compare --runs runs.csv --laws efficiency,delta --holdout D --above 100 --coverage 200""",
    "advise": """examples:
  lowprec-scaling advise --runs runs.csv --law efficiency --budget 1e22 --speedup nvfp4=1.4 mxfp4=1.5
  lowprec-scaling advise --runs runs.csv --law efficiency --budget 1e22 --max-params bf16=7e9 nvfp4=1.2e10
  lowprec-scaling advise --runs runs.csv --law delta --budget 1e21 1e22 --speedup nvfp4=1.4 --late-switch nvfp4
  lowprec-scaling advise --runs runs.csv --law capacity --budget 1e22 --speedup mxfp6=1.2 \\
      --format mxfp6 gmse_w=4e-4 gmse_a=4e-4                            # a format that nobody has trained""",
    "design": """examples:
  lowprec-scaling design --budget 1e20 --precision bf16 nvfp4 --out ladder.csv           # nothing trained yet
  lowprec-scaling design --runs runs.csv --law efficiency --budget 1e20 --target N=7e9,D=1.4e11
  lowprec-scaling design --runs runs.csv --law efficiency --budget 1e20 --for break-even \\
      --target precision=nvfp4,C=1e22""",
    "report": """examples:
  lowprec-scaling report --runs runs.csv --laws chinchilla,efficiency --holdout N D --out report
  lowprec-scaling report --runs runs/ --laws efficiency --budget 1e22 --speedup nvfp4=1.4 --next 1e20 --out report""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: see the module."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(argv)
    options.command = shlex.join(["lowprec-scaling", *argv])
    try:
        return int(options.run(options))
    except BrokenPipeError:  # `lowprec-scaling ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        print(f"lowprec-scaling: {error}", file=sys.stderr)
        return 2


def parser() -> Parser:
    """The command line."""
    p = Parser(
        "lowprec-scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Parser:
        q = commands.add_parser(
            name, usage=f"lowprec-scaling {name} {USAGE[name]} [...]", help=text, epilog=EXAMPLES[name],
            description=f"{text[0].upper()}{text[1:]}.", formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )  # fmt: skip
        q.set_defaults(run=run, law=None, option=[], fix=[], delta=None, seed=0, bootstrap=0)
        q.add_argument("--progress", action="store_true", help="progress on stderr, also if that is no terminal")
        add_source(q, required=name != "design")
        if name != "ingest":
            add_choice(q)
        return q

    _ingest(command("ingest", scaling_commands.ingest, "read runs into one table, and say what was left out and why"))
    _fit(command("fit", scaling_commands.fit_one, "fit a law: parameters, intervals, a verdict"))
    _compare(command("compare", scaling_commands.compare_laws, "which law predicts runs that it has not seen"))
    _advise(command("advise", scaling_advise.command, "which precision, size and tokens to spend a budget on"))
    _design(command("design", scaling_commands.design_runs, "which runs to train, first or next"))
    _report(command("report", scaling_report.command, "one HTML page, its figures, and fit.json of every law"))
    return p


def _ingest(p: Parser) -> None:
    p.add_argument("--out", type=Path, required=True, metavar="CSV", help="the table to write")


def _fit(p: Parser) -> None:
    _law(p)
    _fitting(p, 1000)
    _heldout(p)
    p.add_argument("--out", type=Path, metavar="DIR", help="fit.json and runs.csv go there")
    p.add_argument("--strict", action="store_true", help="exit with 3 if the verdict is REFUSE")


def _compare(p: Parser) -> None:
    p.add_argument("--laws", nargs="+", required=True, metavar="LAW,...", help="names or paths, by commas or spaces")
    p.add_argument("--seed", type=int, default=0, help="of restarts and bootstrap (default: %(default)s)")
    _heldout(p, required=True)
    p.add_argument("--out", type=Path, metavar="DIR", help="compare.json, held-out predictions and runs.csv go there")


def _advise(p: Parser) -> None:
    _law(p)
    _fitting(p, 500)
    _question(p, required=True)
    p.add_argument("--max-params", nargs="+", default=[], metavar="N", help="that fit in memory: N, or PRECISION=N ...")
    p.add_argument(
        "--inference-tokens", type=_count, default=0.0, metavar="T", help="to be served, from the same budget"
    )
    many(p, "--serve-speedup", "PRECISION=S", "of serving, over the reference, as measured")
    p.add_argument(
        "--format", nargs="+", action="append", default=[], metavar=("LABEL", "COLUMN=VALUE"),
        help="a precision that was not trained, for laws that predict it from its columns",
    )  # fmt: skip
    many(p, "--given", "COLUMN=VALUE", "of the runs to be: unique_tokens=1e10")
    p.add_argument("--late-switch", metavar="LABEL", help="also: this one, ending in the reference precision")
    p.add_argument("--iso-flop", action="store_true", help="also: loss along each budget")
    many(p, "--iso-loss", "LOSS", "also: the smallest budget that reaches it", type=_positive)
    p.add_argument("--force", action="store_true", help="answer although the verdict is REFUSE")
    p.add_argument("--out", type=Path, metavar="DIR", help="advice.json goes there")


def _design(p: Parser) -> None:
    _law(p, required=False)
    p.add_argument("--budget", type=_positive, required=True, metavar="FLOP", help="of the runs to be trained")
    p.add_argument(
        "--for", dest="purpose", choices=("loss", "gap", "break-even"), default="loss",
        help="the number to know better (default: %(default)s)",
    )  # fmt: skip
    many(p, "--target", "NAME=VALUE", "where: N, D, precision; for break-even: precision and C (FLOP)")
    p.add_argument(
        "--sizes", nargs="+", type=_positive, metavar="N", help="to choose from (default: 8 around those trained)"
    )
    p.add_argument("--ratios", nargs="+", type=_positive, metavar="D/N", help="to choose from (default: from 10 on)")
    p.add_argument("--most", type=_whole, default=40, metavar="COUNT", help="runs at most (default: %(default)s)")
    _device(p)
    p.add_argument("--out", type=Path, metavar="CSV", help="the list of runs to write")


def _report(p: Parser) -> None:
    p.add_argument("--laws", nargs="+", required=True, metavar="LAW,...", help="names or paths, by commas or spaces")
    _fitting(p, 500)
    _heldout(p)
    _question(p)
    p.add_argument("--next", type=_positive, metavar="FLOP", help="also: which runs to add for so many FLOP")
    p.add_argument("--title", default="Scaling laws", metavar="TEXT", help="of the page (default: %(default)s)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="index.html, figures, fit.json of every law")
    p.set_defaults(purpose="loss", target=[])


# ---- groups that several commands share


def _law(p: Parser, required: bool = True) -> None:
    g = p.add_argument_group("the law")
    g.add_argument("--law", required=required, metavar="LAW", help="a name from recipes/law, or a YAML file")
    many(g, "--option", "NAME=VALUE", "of the law, instead of its file's: gamma=free")
    many(g, "--fix", "NAME=VALUE", "parameters that are held at a value, natural units")


def _fitting(p: Parser, bootstraps: int) -> None:
    g = p.add_argument_group("how it is fitted")
    g.add_argument(
        "--delta", type=_positive, metavar="D", help="Huber threshold (default: the law's; inf: least squares)"
    )
    g.add_argument("--seed", type=int, default=0, help="of restarts and bootstrap (default: %(default)s)")
    g.add_argument(
        "--bootstrap", type=_whole, default=bootstraps, metavar="COUNT",
        help="refits of resampled runs, for intervals (default: %(default)s; 0: none)",
    )  # fmt: skip
    g.add_argument(
        "--cluster", choices=("cell", "run"), default="cell",
        help="what is resampled: all runs of one N and D together, or single ones (default: %(default)s)",
    )  # fmt: skip
    g.add_argument("--workers", type=_whole, default=1, metavar="COUNT", help="processes (default: %(default)s)")


def _heldout(p: Parser, required: bool = False) -> None:
    g = p.add_argument_group("held-out tests")
    many(
        g,
        "--holdout",
        "DIRECTION",
        "N (the largest sizes), D (the longest runs), rollout, precision",
        required=required,
    )
    g.add_argument("--above", type=_positive, metavar="X", help="hold out what lies above X in N, or in --axis for D")
    g.add_argument("--axis", choices=("D/N", "D"), default="D/N", help="what direction D means (default: %(default)s)")
    g.add_argument(
        "--coverage", type=_whole, default=0, metavar="COUNT",
        help="refits for the share of held-out runs inside their intervals (default: none)",
    )  # fmt: skip


def _question(p: Parser, required: bool = False) -> None:
    g = p.add_argument_group("the question")
    g.add_argument(
        "--budget",
        nargs="+",
        type=_positive,
        required=required,
        metavar="FLOP",
        help="at the speed of the reference precision",
    )
    many(g, "--speedup", "PRECISION=S", "of training, end to end, over the reference, as measured")
    _device(g)


def _device(g: Parser | Group) -> None:
    g.add_argument(
        "--reference", default="bf16", metavar="LABEL", help="precision to compare with (default: %(default)s)"
    )
    g.add_argument("--kappa", type=_positive, default=6.0, help="FLOP a parameter and token (default: %(default)g)")


def _positive(text: str) -> float:
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _count(text: str) -> float:
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def _whole(text: str) -> int:
    value = _count(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number")
    return int(value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


if __name__ == "__main__":
    sys.exit(main())
