"""``python -m actzip``: the command line."""

from actzip.cli import main

if __name__ == "__main__":
    main()
