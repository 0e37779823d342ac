"""`python -m trivium.cli`: the command where no script is installed."""

from trivium.cli.main import main

main()
