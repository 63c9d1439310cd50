"""Which tokens are selected: the flags, as a `Selection` takes them."""

from typing import Any, Literal

Select = Literal["fraction", "mass"]


def selection_flags(args: Any) -> dict[str, Any]:
    """Arguments of a `Selection` from --select, --fraction, --mass, --first_token and the rest.

    `args` is a SePOConfig or what a command's parser made, with an attribute a flag.
    """
    rejected = args.rejected_fraction
    if args.rejected_select == "mass":
        rejected = "mass"
    elif args.rejected_select == "fraction" and rejected is None:
        rejected = args.fraction
    return {
        "fraction": "mass" if args.select == "mass" else args.fraction,
        "rejected_fraction": rejected,  # None: as the chosen response
        "mass": args.mass,
        "first_token": args.first_token,
    }


def uses_mass(args: Any) -> bool:
    """Whether a response's tokens are selected by the score that they hold."""
    return "mass" in (args.select, args.rejected_select)


def uses_fraction(args: Any) -> bool:
    """Whether --fraction decides how many tokens of a response are selected."""
    falls_back = args.rejected_select == "fraction" and args.rejected_fraction is None
    return args.select != "mass" or falls_back
