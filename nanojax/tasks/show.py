"""Prints prepared conversations token by token, the supervised ones in colour: `python -m nanojax.tasks show`."""

import sys

import numpy as np
from rich.console import Console
from rich.text import Text

from nanojax import cli
from nanojax.cli import UserError
from nanojax.tasks import packing, prepared, stream
from nanojax.tokenizer import Tokenizer

SUPERVISED, OTHER, NUMBER = "bold green", "red", "bright_black"


def shown(tokenizer: Tokenizer, ids: np.ndarray, mask: np.ndarray, numbers: bool = False) -> Text:
    """The tokens' text, supervised ones in SUPERVISED, the rest in OTHER; `numbers`: each with its id behind it.

    Without numbers, neighbours of one colour are decoded together, so that a character of several tokens is whole.
    """
    out = Text()
    borders = range(len(ids)) if numbers else [0, *(np.flatnonzero(np.diff(mask.astype(int))) + 1).tolist()]
    for begin, end in zip(borders, [*borders[1:], len(ids)]):
        out.append(tokenizer.decode(ids[begin:end].tolist()), SUPERVISED if mask[begin] else OTHER)
        if numbers:
            out.append(f"[{ids[begin]}]", NUMBER)
    return out


def marked(text: Text) -> str:
    """The text where there are no colours: supervised spans in 「 and 」."""
    out, at = "", 0
    for span in text.spans:
        if span.style == SUPERVISED:
            out += f"{text.plain[at : span.start]}「{text.plain[span.start : span.end]}」"
            at = span.end
    return out + text.plain[at:]


def main(arguments: list[str]) -> None:
    """`python -m nanojax.tasks show`."""
    parser = cli.Parser(
        "python -m nanojax.tasks show",
        "Prints prepared conversations as the model sees them: supervised tokens green, others red. Where there are\n"
        "no colours (a file, a pipe), supervised tokens stand in 「 and 」.",
        "  python -m nanojax.tasks show data/chat\n"
        "  python -m nanojax.tasks show data/chat --conversation=1000 --count=3 --ids\n"
        "  python -m nanojax.tasks show data/chat --row=0 --seq=2048        one packed row of the first pass",
    )
    parser.add_argument("folder", type=cli.path, help="folder that python -m nanojax.tasks prepare wrote")
    parser.add_argument("--conversation", type=int, default=0, metavar="N", help="the first one to print (0)")
    parser.add_argument("--count", type=cli.count, default=1, metavar="N", help="how many (1)")
    parser.add_argument("--row", type=int, metavar="N", help="print a packed row instead")
    parser.add_argument("--seq", type=cli.count, default=2048, metavar="T", help="tokens per row (2048)")
    parser.add_argument("--seed", type=int, default=0, help="of the packed rows' order (0)")
    parser.add_argument("--split", choices=["train", "valid"], default="train", help="valid: what is held out")
    parser.add_argument("--ids", action="store_true", help="each token with its id")
    args = parser.parse_args(arguments)
    tokenizer, of = prepared.load(args.folder, args.split, verify=False)
    console = Console(highlight=False, soft_wrap=True)
    for title, (ids, mask) in _chosen(args, tokenizer, of):
        text = shown(tokenizer, ids, mask, args.ids)
        console.print(Text(f"--- {title}: {len(ids)} tokens, {int(mask.sum())} supervised", "bold"))
        if console.is_terminal and not console.no_color:
            console.print(text)
        else:
            sys.stdout.write(marked(text) + "\n")


def _chosen(args, tokenizer: Tokenizer, of: prepared.Conversations):
    """(title, (ids, mask)) of what the command line asks for."""
    if args.row is None:
        last = args.conversation + args.count
        if not 0 <= args.conversation < last <= len(of):
            raise UserError(f"--conversation={args.conversation} --count={args.count}: there are 0 to {len(of) - 1}")
        for number in range(args.conversation, last):
            yield f"conversation {number}", of[number]
        return
    plan = packing.plan_pass(of, args.seq + 1, stream.pass_seed(args.seed, 0))
    if not 0 <= args.row < plan.rows:
        raise UserError(f"--row={args.row}: there are 0 to {plan.rows - 1}")
    members = plan.numbers[plan.first[args.row] : plan.first[args.row + 1]].tolist()
    title = f"row {args.row} of {plan.rows}, conversations {', '.join(map(str, members))}"
    yield title, tuple(stream.read_row(of, plan, args.row, tokenizer.bos, args.seq + 1))
