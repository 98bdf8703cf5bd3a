"""``python -m mvit_video.eval`` is the command ``mvit-eval``."""

from mvit_video.cli.main import evaluate as main

if __name__ == "__main__":
    main()
