"""``python -m mvit_video.eval`` is the command ``mvit-eval``."""

from mvit_video.cli.eval import main

if __name__ == "__main__":
    main()
