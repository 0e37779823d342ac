"""`python -m trivium.cli`: the `trivium` command without an installed script."""

from trivium.cli.main import main

main()
