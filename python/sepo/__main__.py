"""Run `python -m sepo COMMAND`."""

from sepo.commands.main import main

main()
