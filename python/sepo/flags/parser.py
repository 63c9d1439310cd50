"""The parser of every command: errors that a user can mend, old names, help that is short."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from sepo.errors import InputError
from sepo.flags.renamed import say_renamed, today_on_the_command_line


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names each flag once, and its default where that says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action)
        short = [name for name in action.option_strings if not name.startswith("--")]
        long = [name for name in action.option_strings if name.startswith("--")]
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join([*short, *long[:1]]) + " " + value

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        """Show what a value is, not the flag's name once more."""
        if action.const is True:
            return "true|false"
        names: dict[object, str] = {int: "N", float: "X"}
        return getattr(action.type, "metavar", names.get(action.type, "TEXT"))

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is False or action.default in (None, "", [])  # 0 does
        return action.help if says_nothing else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Raises InputError for what it can't parse."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": Help, **options})

    # argparse's is overloaded by the type of the namespace, of which there is one here
    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        argv = sys.argv[1:] if args is None else list(args)
        known = {name for action in self._actions for name in action.option_strings}
        argv, lines = today_on_the_command_line(argv, known)
        say_renamed(lines)
        return super().parse_known_args(argv, namespace)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)
