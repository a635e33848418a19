"""`python -m quantkit`: the same command line as the `quantkit` script."""

from quantkit.cli.main import main

main()
