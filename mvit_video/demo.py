"""``python -m mvit_video.demo`` is the command ``mvit-demo``."""

from mvit_video.cli.main import demo as main

if __name__ == "__main__":
    main()
