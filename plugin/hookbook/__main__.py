"""`python -m hookbook` is the `hookbook` command."""

from hookbook.cli import main

if __name__ == "__main__":
    main()
