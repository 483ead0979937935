"""`python -m sparsify.cli`: the command line without its script."""

from sparsify.cli.commands import main

if __name__ == "__main__":
    main()
