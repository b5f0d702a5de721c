"""`python -m bcmfnet`: the command line, also under launchers that start Python modules."""

from bcmfnet.cli import main

if __name__ == "__main__":
    main()
