"""`exact-megatron census`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from ..config import ExactConfig
from ..utils.files import STDOUT, not_empty, write_text, writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", nargs="+", help="common prefix of a .bin/.idx pair; several are counted together")
    parser.add_argument("--seq-length", type=int, required=True, help="window in tokens")
    defaults = ExactConfig()
    parser.add_argument("--alpha", type=float, help=f"default: {defaults.alpha}")
    parser.add_argument(
        "--tail-share", type=float, help="share of the loss weight that the tail gets, in place of --alpha"
    )
    parser.add_argument("--gamma", type=float, help=f"default: {defaults.gamma}")
    parser.add_argument("--tau", type=int, help="lower edge of the tail; default: a quarter of the window")
    parser.add_argument("--eps", type=float, help=f"default: {defaults.eps}")
    parser.add_argument("--normalization", choices=("corpus", "none"), help=f"default: {defaults.normalization}")
    parser.add_argument("--max-weight", type=float, help="default: none")
    parser.add_argument(
        "--eod-mask-loss", action="store_true", help="targets after a document's EOD are not supervised"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=not_empty,
        help="write the table as JSON; - is standard output, without the table",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=not_empty,
        help="draw where supervision goes, before and after (PNG, SVG or PDF)",
    )


def run(args: argparse.Namespace) -> int:
    """Print, write and draw the census; where no target lies in the tail, unweighted, and then say so.

    Returns:
        0; 2 without a tail if a setting of the weights was given, which then have none to be computed from.
    """
    from ..allocation import NoTail, WeightTable
    from ..exposure import ExposureCensus
    from ..packing import read_index
    from ..reporting.census import census_json, plot_census, print_census
    from ..reporting.style import picture_name

    if args.plot:
        picture_name(args.plot)  # before the count, which may be long
    names = [field.name for field in dataclasses.fields(ExactConfig)]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    config = ExactConfig(**given).validated(args.seq_length)
    parts = [
        ExposureCensus.from_document_lengths(
            read_index(prefix).lengths, args.seq_length, eod_mask_loss=args.eod_mask_loss
        )
        for prefix in args.prefix
    ]
    census = sum(parts[1:], parts[0])
    warning = None
    try:
        table = WeightTable.from_census(census, config)
    except NoTail as error:
        table = WeightTable.unweighted(census, config)
        warning = error
    facts = json.dumps(census_json(census, table), indent=1)
    if args.json == "-":
        with writing(STDOUT):
            print(facts)
    else:
        with writing(STDOUT):
            print_census(census, table)
        if args.json:
            write_text(args.json, facts + "\n")
    if args.plot:
        plot_census(census, table, args.plot)
        print(f"picture: {args.plot}", file=sys.stderr if args.json == "-" else sys.stdout)
    if warning is not None:
        sys.stdout.flush()
        print(f"exact-megatron census: warning: no weights: {warning}", file=sys.stderr)
    return 2 if warning is not None and given else 0
