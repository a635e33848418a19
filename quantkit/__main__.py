"""`python -m quantkit`: the same command line as the `quantkit` script."""

from quantkit.cli import main

main()
