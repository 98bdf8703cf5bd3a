"""``python -m mvit_video.demo`` is the command ``mvit-demo``."""

from mvit_video.cli.demo import main

if __name__ == "__main__":
    main()
