"""``python -m actzip.cli``."""

from actzip.cli import main

if __name__ == "__main__":
    main()
