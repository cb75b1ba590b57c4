"""What `nspo2 retain` is told: its options, and the points of rank and scale that they ask for."""

from __future__ import annotations

import argparse
import sys

from ..projections.retain.project import FORMS, Point
from ..rows import check, option, whole
from ..training.retain import check_point
from .checks import check_output_dir
from .words import refuse_unknown, spell_out

GIVEN = Point(0, 1.0)
RANKS = [0, 1, 4, 12, 32]
SCALES = [0.5, 0.75, 1.0, 1.2, 1.5]
LOSS_INCREASE = 0.02
RANGES = {
    "max_loss_increase": option(None, lambda v: v is None or v >= 0, "a number of at least 0", ""),
    "retain_samples": whole(2, "", least=2),
    "retain_max_length": whole(1, "", least=1),
    "max_length": whole(1, "", least=1),
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nspo2 retain",
        description="Project a LoRA adapter off the directions that its inputs have on texts the model should go on "
        "reading as before. With preference pairs a grid of ranks and scales is measured, and the point with the "
        "lowest KL is written whose held-out loss the options allow.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("adapter", help="Folder or hub id of a LoRA adapter.")
    add(
        "--retain_dataset",
        nargs="+",
        required=True,
        help="Texts to retain: hub ids, folders or files; `self`: the base model writes them.",
    )
    add("--retain_eval_dataset", nargs="*", default=[], help="Texts that are measured on alone.")
    add("--dataset_name", help="Preference pairs: hub id, folder or file; the split `test`, or else all rows.")
    add("--output_dir", required=True, help="Where the projected adapter goes.")
    add("--model_name_or_path", help="The base model, if not the one that the adapter names.")
    add("--ranks", type=int, nargs="+", help="Directions taken out of each input; 0 only scales.")
    add("--scales", type=float, nargs="+", help="Factors of what is left of the adapter.")
    add("--form", choices=FORMS, default="hard", help="How directions are taken out.")
    add("--point", nargs=2, metavar=("RANK", "SCALE"), help="Write this point instead of the one that is chosen.")
    add("--max_loss_increase", type=float, help="Share by which the held-out loss may rise; 0.02 if left out.")
    add("--beta", type=float, default=0.1, help="DPO's beta, for loss and margin.")
    add("--max_length", type=int, default=1024, help="Tokens of a pair.")
    add("--retain_samples", type=int, default=256, help="Texts of each retained dataset.")
    add("--retain_max_length", type=int, default=512, help="Tokens of each retained text.")
    add("--dtype", default=None, help="Of the base model; float32 on a CPU, else its own.")
    add("--load_in_4bit", action="store_true", help="The base model in 4 bits (QLoRA).")
    parser.error = lambda message: sys.exit(f"error: {message}")  # type: ignore[method-assign]
    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv:
        refuse_unknown(word, known)
    args = parser.parse_args(spell_out(argv, ["--ranks", "--scales", "--point"]))
    check_retain(args)
    if args.point:
        try:
            args.point = Point(int(args.point[0]), float(args.point[1]), args.form)
        except ValueError as error:
            raise ValueError(f"`--point` takes a rank and a scale, such as 12 1.2, got {args.point}.") from error
    grid = [
        Point(rank, scale, args.form)
        for rank in dict.fromkeys([0, *(args.ranks or RANKS)])
        for scale in args.scales or SCALES
    ]
    if not args.dataset_name:
        grid = [args.point or Point(form=args.form)]
    elif args.point:
        grid.append(args.point)
    for point in grid:
        check_point(point)
    args.grid = list(dict.fromkeys([GIVEN, *(Point(p.rank, p.scale, p.form if p.rank else "hard") for p in grid)]))
    if args.point and not args.point.rank:
        args.point = Point(0, args.point.scale)
    return args


def check_retain(args: argparse.Namespace) -> None:
    """Raises `ValueError` for the first option with a value that cannot work."""
    check_output_dir(args.output_dir)
    for name, row in RANGES.items():
        check(row, f"--{name}", getattr(args, name))
    given = [f"`--{name}`" for name in ("ranks", "scales", "max_loss_increase") if getattr(args, name) is not None]
    if given and not args.dataset_name:
        raise ValueError(
            f"{' and '.join(given)}: without pairs there is nothing to choose by. Add `--dataset_name PAIRS`, or say "
            "with `--point RANK SCALE` what to write."
        )
