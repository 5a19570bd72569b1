"""`python -m layerstream` is the `layerstream` command."""

from layerstream.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
