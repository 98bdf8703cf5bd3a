"""``python -m mvit_video.data`` is the command ``mvit-data``."""

from mvit_video.cli.main import data as main

if __name__ == "__main__":
    main()
