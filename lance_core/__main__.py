"""`python -m lance_core`: see cli/main.py."""

import sys

if __name__ == "__main__":
    try:
        from .cli.main import main, stop_on_signals

        stop_on_signals()
        code = main()
    except KeyboardInterrupt:  # while modules were still being imported
        code = 130
    sys.exit(code)
else:
    from .cli.main import main
