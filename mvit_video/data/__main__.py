"""``python -m mvit_video.data`` is the command ``mvit-data``."""

from mvit_video.cli.data import main

if __name__ == "__main__":
    main()
